"""The table in docs/dropin.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from tests.support.dropin.harness import COLUMNS
from tests.support.dropin.measure import Result
from tests.support.paths import DOCS

__all__ = ["committed", "rows_of", "same", "table", "write"]

_PAGE: Final = DOCS / "dropin.md"

# What most readers look for comes first: the table is wider than a page.
_WORKS, *_DATA = COLUMNS
_TITLES: Final = (
    "program",
    COLUMNS[_WORKS],
    "`qkd`",
    "role",
    "how the context gets in",
    *(COLUMNS[column] for column in _DATA),
    "version",
)
_VERSION: Final = _TITLES.index("version")
_BETWEEN: Final = re.compile("(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)


def table(results: Iterable[Result]) -> str:
    """Markdown: a row a program, and the notes behind it."""
    notes: dict[str, int] = {}
    rows = [list(_TITLES), ["---"] * len(_TITLES)]
    for result in results:
        program = result.program
        how = f"`{program.how}`" if program.how else "not at all: it connects to the client tunnel"

        def cell(column: str, result: Result = result) -> str:
            text = result.cell(column)
            for note in (result.program.notes.get(column), result.program.deviations.get(column)):
                if note:
                    text += f" [{notes.setdefault(note, len(notes) + 1)}]"
            return text

        row = [program.name, cell(_WORKS), result.qkd, program.role, how]
        rows.append([*row, *map(cell, _DATA), program.version()])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"{number}. {note}" for note, number in notes.items())]
    return "\n".join(lines).rstrip("\n") + "\n"


def committed() -> str:
    """The table of the page."""
    match = _BETWEEN.search(_PAGE.read_text(encoding="utf-8"))
    assert match is not None
    return match.group()


def rows_of(text: str) -> dict[str, list[str]]:
    """A table's rows, by program."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows[2:]}


def same(committed: Sequence[str], measured: Sequence[str]) -> bool:
    """Whether two rows say the same; of other versions only the verdicts are compared, not the exceptions' names."""
    if committed[_VERSION] == measured[_VERSION]:
        return list(committed) == list(measured)
    return [_verdict(cell) for cell in _without_version(committed)] == [
        _verdict(cell) for cell in _without_version(measured)
    ]


def _without_version(row: Sequence[str]) -> list[str]:
    return [*row[:_VERSION], *row[_VERSION + 1 :]]


def _verdict(cell: str) -> str:
    return "same" if cell.startswith("same: ") else cell


def write(new: str) -> None:
    """Put another table into the page."""
    _PAGE.write_text(_BETWEEN.sub(lambda _: new, _PAGE.read_text(encoding="utf-8")), encoding="utf-8")
