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

_TITLES: Final = ("program", "version", "role", "how the context gets in", *COLUMNS.values(), "`qkd`")
_BETWEEN: Final = re.compile("(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)


def table(results: Iterable[Result]) -> str:
    """Markdown: a row a program, and the notes behind it."""
    notes: dict[str, int] = {}
    rows = [list(_TITLES), ["---"] * len(_TITLES)]
    for result in results:
        program = result.program
        how = f"`{program.how}`" if program.how else "not at all: it connects to the client tunnel"
        row = [program.name, program.version(), program.role, how]
        for column in COLUMNS:
            cell = result.cell(column)
            for note in (program.notes.get(column), program.deviations.get(column)):
                if note:
                    cell += f" [{notes.setdefault(note, len(notes) + 1)}]"
            row.append(cell)
        rows.append([*row, result.qkd])
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
    if committed[1] == measured[1]:
        return list(committed) == list(measured)
    return [_verdict(cell) for cell in _without_version(committed)] == [
        _verdict(cell) for cell in _without_version(measured)
    ]


def _without_version(row: Sequence[str]) -> list[str]:
    return [row[0], *row[2:]]


def _verdict(cell: str) -> str:
    return "same" if cell.startswith("same: ") else cell


def write(new: str) -> None:
    """Put another table into the page."""
    _PAGE.write_text(_BETWEEN.sub(lambda _: new, _PAGE.read_text(encoding="utf-8")), encoding="utf-8")
