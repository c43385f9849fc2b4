"""The tables in docs/interop.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from tests.support.interop.matrix import COLUMNS
from tests.support.paths import DOCS

__all__ = ["WITHOUT_PSK", "committed", "page_with", "stacks_table", "together", "write"]

WITHOUT_PSK: Final = (
    ("curl", "it has no option for a PSK: through the [tunnel](howto-tunnel.md)"),
    ("Redis", "its TLS takes certificates only: through the [tunnel](howto-tunnel.md)"),
    ("PostgreSQL", "its TLS takes certificates only: through the [tunnel](howto-tunnel.md)"),
)
"""Programs that have TLS and no PSK, and what is left to them."""

_PAGE: Final = DOCS / "interop.md"
_TITLES: Final = ("stack", "version", "its role", *COLUMNS, "to know")
_PAIR_TITLES: Final = (
    "client - server", "bootstrap", "next connection", "bootstrap, explicit KEM", "next connection, explicit KEM"
)  # fmt: skip


def together(title: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [title, ["---"] * len(title), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def stacks_table(rows: Sequence[Sequence[str]]) -> str:
    """The stock stacks, and those that have no PSK."""
    reasons = [[name, "-", "both", *["no"] * len(COLUMNS), reason] for name, reason in WITHOUT_PSK]
    return together(_TITLES, [*rows, *reasons])


def committed(name: str) -> list[list[str]]:
    """The rows of one of the page's tables, "stacks" or "pairs"."""
    match = re.search(_between(name), _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    lines = [line for line in match.group().splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def page_with(stacks: Sequence[Sequence[str]], pairs: Sequence[Sequence[str]]) -> str:
    """The page with these rows."""
    page = _PAGE.read_text(encoding="utf-8")
    for name, table in (("stacks", stacks_table(stacks)), ("pairs", together(_PAIR_TITLES, pairs))):
        match = re.search(_between(name), page, re.DOTALL)
        assert match is not None
        page = page[: match.start()] + table + page[match.end() :]
    return page


def write(stacks: Sequence[Sequence[str]], pairs: Sequence[Sequence[str]]) -> None:
    """Put other rows into the page."""
    _PAGE.write_text(page_with(stacks, pairs), encoding="utf-8")


def _between(name: str) -> str:
    return f"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)"
