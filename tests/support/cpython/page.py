"""Writes docs/cpython-test-ssl.md from outcomes.toml.

Usage, from the root of the repository::

    python -m tests.support.cpython.page
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.support.cpython.outcomes import Table
from tests.support.paths import DOCS

__all__ = ["PAGE", "page"]

PAGE: Final = DOCS / "cpython-test-ssl.md"

_INTRODUCTION: Final = """\
# CPython's own tests

CPython tests its module `ssl` with `Lib/test/test_ssl.py`. Here that file runs on `QKDContext`, `QKDSocket` and
`QKDObject`. It is not changed: within it, the names `ssl.SSLContext`, `ssl.SSLSocket`, `ssl.SSLObject` and
`ssl.create_default_context` mean ours. Each context has a KMS and the policy `require`: every connection is hybrid, and
both sides of it are ours.

The file differs from version to version; the names below are those of Python 3.11, 3.12 and 3.13.
`tests/support/cpython/outcomes.toml` says what is to come of each test, and this page is made of it. The test suite
runs all of them with the interpreter at hand. It fails where a test comes out otherwise, and so where an excluded one
passes.
"""

_DIFFERENCES: Final = """\
## What is different from the standard library

That is what the excluded tests show, and what a program may notice:
"""

_TESTS: Final = """\
## All tests

"Module" means that the test uses functions and constants of the module `ssl` only, and nothing of ours.
"""


def page(table: Table) -> str:
    """The text of the page."""
    return "\n".join(
        [
            _INTRODUCTION,
            *_totals(table),
            _DIFFERENCES,
            *(f"- {entry.users}" for entry in table.excluded if entry.users),
            "",
            _TESTS,
            *_outcomes(table),
            "",
        ]
    )


def _totals(table: Table) -> Iterator[str]:
    passed = len(table.passes)
    excluded = len(table.names - table.passes - table.module)
    yield (
        f"**{passed} of the {passed + excluded} tests of contexts, sockets and objects pass: "
        f"{passed / (passed + excluded):.0%}.** {len(table.module)} more are about the module alone.\n"
    )
    yield "| class | pass | excluded | module |"
    yield "| --- | --- | --- | --- |"
    for kind in _classes(table):
        names = {name for name in table.names if name.partition(".")[0] == kind}
        passes, module = len(names & table.passes), len(names & table.module)
        yield f"| `{kind}` | {passes} | {len(names) - passes - module} | {module} |"
    yield f"| all | {passed} | {excluded} | {len(table.module)} |\n"


def _outcomes(table: Table) -> Iterator[str]:
    yield "| class | test | outcome | because it |"
    yield "| --- | --- | --- | --- |"
    for name in sorted(table.names, key=lambda name: name.lower().split(".")):
        kind, _, test = name.partition(".")
        outcome = "module" if name in table.module else "passes" if name in table.passes else "excluded"
        exclusions = table.exclusions(name)
        if exclusions and name in table.passes:
            outcome = "passes; excluded in some versions"
        yield f"| `{kind}` | `{test}` | {outcome} | {'; '.join(entry.because for entry in exclusions)} |"


def _classes(table: Table) -> list[str]:
    return sorted({name.partition(".")[0] for name in table.names}, key=str.lower)


if __name__ == "__main__":
    PAGE.write_text(page(Table.load()), encoding="utf-8")
