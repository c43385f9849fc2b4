"""CPython's own Lib/test/test_ssl.py on our classes, see run_test_ssl.py: each test comes out as outcomes.toml says."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cpython.outcomes import FILE, Table
from tests.support.cpython.page import PAGE, page
from tests.support.paths import ROOT
from tests.support.requirements import CPYTHON_TESTS, needs

TABLE = Table.load()
TIMEOUT = 600
"""Seconds for all tests together; half a minute is usual, most of it waiting."""


def cpython_file() -> Path | None:
    """test_ssl.py of this interpreter, where it has it."""
    try:
        spec = importlib.util.find_spec("test.test_ssl")
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def names_in(file: Path) -> list[str]:
    """What is read needs no import, which would warn of old modules."""
    return [
        f"{kind.name}.{method.name}"
        for kind in ast.parse(file.read_bytes()).body
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name.startswith("test")
    ]


CPYTHON_FILE = cpython_file()
NAMES = names_in(CPYTHON_FILE) if CPYTHON_FILE is not None else []

needs_the_file = needs(CPYTHON_TESTS, CPYTHON_FILE is not None)


@dataclass(frozen=True)
class Run:
    """All results by name, and how the program ended."""

    results: dict[str, dict[str, Any]]
    end: str

    def __getitem__(self, name: str) -> dict[str, Any]:
        assert name in self.results, f"there is no result, since the run has ended before: {self.end}"
        return self.results[name]

    def total(self, what: str) -> int:
        return sum(result[what] for result in self.results.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("cpython")
    # The tests leave files in the working directory.
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "cpython" / "run_test_ssl.py", folder / "results"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT,
        check=False,
    )
    lines = (folder / "results").read_text(encoding="utf-8").splitlines()
    results = {result["test"]: result for result in map(json.loads, lines)}
    return Run(results, f"exit code {process.returncode}\n{process.stdout[-5000:]}")


@needs_the_file
@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("name", NAMES)
def test_outcome(run: Run, name: str) -> None:
    result = run[name]
    outcome, reason = result["outcome"], result["reason"]
    exclusion = TABLE.exclusion(name, result["source"])
    if name in TABLE.module:
        assert outcome != "fail", reason
        assert result["ours"] == 0, f"it uses our classes: list it as passing in {FILE.name}"
    elif exclusion is not None:
        assert outcome != "pass", f"it passes, although it {exclusion.because}: take it out of {FILE.name}"
    elif outcome == "skip" and name in TABLE.skipped_by_some_builds:
        pytest.skip(f"CPython's own reason: {reason}")
    else:
        assert outcome == "pass", reason
        assert result["ours"] > 0, f"nothing of ours is in it: list it under module in {FILE.name}"


@needs_the_file
@pytest.mark.timeout(TIMEOUT)
def test_most_of_them_pass(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixty of a hundred that are about contexts, sockets and objects; counted from the results, not from the table."""
    counted = run.results.keys() - TABLE.module
    passed = [name for name in counted if run[name]["outcome"] == "pass"]
    with capsys.disabled():
        print(
            f"\nCPython's test_ssl.py: {len(passed)} of {len(counted)} tests of contexts, sockets and objects pass "
            f"({len(passed) / len(counted):.0%}), with {run.total('client')} hybrid connections"
        )
    assert len(passed) >= 0.6 * len(counted)


@needs_the_file
@pytest.mark.timeout(TIMEOUT)
def test_connections_were_hybrid(run: Run) -> None:
    """Both sides were ours, and none did without a QKD key."""
    assert run.total("client") > 50
    assert run.total("server") > 50
    assert run.total("other") == 0


@needs_the_file
@pytest.mark.timeout(TIMEOUT)
def test_all_of_the_file_was_run(run: Run) -> None:
    assert set(run.results) == set(NAMES), run.end


@pytest.mark.skipif(
    CPYTHON_FILE is None or sys.version_info[:2] != (3, 11),
    reason="the list is complete for Python 3.11; other versions may have tests of their own, which have to pass",
)
def test_every_test_is_listed() -> None:
    assert set(NAMES) <= TABLE.names


def test_no_test_is_listed_twice() -> None:
    always = [test for entry in TABLE.excluded if not entry.where for test in entry.tests]
    sometimes = {test for entry in TABLE.excluded if entry.where for test in entry.tests}
    assert len(always) == len(set(always))
    assert len(TABLE.passes) + len(TABLE.module) + len(always) == len(TABLE.names)
    assert sometimes <= TABLE.passes
    assert TABLE.skipped_by_some_builds <= TABLE.passes


def test_the_page_is_up_to_date() -> None:
    """If this fails: python -m tests.support.cpython.page."""
    assert PAGE.read_text(encoding="utf-8") == page(TABLE)
