"""Hooks of pytest: how many processes run tests, and what to install for those that were skipped for want of it."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from tests.support.requirements import Missing, advice

__all__: list[str] = []

_PROPERTY = "missing"


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    # Tests of servers and of time limits wait half of the time.
    return max(2, (os.cpu_count() or 1) * 3 // 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        requirement, present = mark.args
        if not present:
            raise requirement.missing()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # pytest replaces the exception by one of its own.
    missing = call.excinfo.value if call.excinfo is not None else None
    report = yield
    if isinstance(missing, Missing):
        # A part of the report that comes from the processes of a parallel run, too.
        report.user_properties.append(
            (_PROPERTY, f"{missing.requirement.how}\t{missing.requirement.package}")
        )
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    result = yield
    # None in the processes of a parallel run.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        found = [
            value
            for report in reporter.stats.get("skipped", [])
            for name, value in getattr(report, "user_properties", [])
            if name == _PROPERTY
        ]
        if found:
            reporter.write_line(advice([tuple(value.split("\t")) for value in found], len(found)))
    return result
