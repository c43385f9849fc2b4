"""Draw the engine's two state machines and write its tables, from the table of transitions itself.

Usage, from the root of the repository, with the package installed::

    python docs/engine_diagram.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

from qkd_tls.engine import TRANSITIONS, Event, State

DOCS: Final = Path(__file__).resolve().parent

ASKS_KMS: Final = {
    State.CLIENT_KEY,
    State.CLIENT_OFFER_KEYS,
    State.SERVER_KEY,
    State.SERVER_OFFER_KEYS,
}
"""States in which an engine waits for its KMS."""
ASKS_PROGRAM: Final = {State.SERVER_NAME}
"""States in which it waits for the program; in all others but the last it waits for the peer's bytes."""


@dataclass(frozen=True)
class Layout:
    """A column of states from top to bottom, and one state to the left, between two of them."""

    role: str
    column: tuple[State, ...]
    aside: State

    @property
    def states(self) -> frozenset[State]:
        """All states of this role."""
        return frozenset((*self.column, self.aside))


LAYOUTS: Final = (
    Layout(
        "client",
        (
            State.CLIENT_START,
            State.CLIENT_HELLO,
            State.CLIENT_DISCOVER,
            State.CLIENT_OFFER_KEYS,
            State.CLIENT_OFFER,
            State.CLIENT_HYBRID,
        ),
        State.CLIENT_KEY,
    ),
    Layout(
        "server",
        (
            State.SERVER_NAME,
            State.SERVER_HELLO,
            State.SERVER_HANDSHAKE,
            State.SERVER_CONTROL,
            State.SERVER_OFFER_KEYS,
            State.SERVER_SKIP,
        ),
        State.SERVER_KEY,
    ),
)


def arrows(layout: Layout) -> dict[tuple[State, State], list[Event]]:
    """Return the events by the states that they lead from and to."""
    found: dict[tuple[State, State], list[Event]] = {}
    for (state, event), after in TRANSITIONS.items():
        if state in layout.states:
            found.setdefault((state, after), []).append(event)
    return found


def told(name: str) -> str:
    """Return a name from the code as words."""
    return name.lower().replace("_", " ").replace("psk", "PSK")


# --- the picture

_WIDTH: Final = 900
_ROW: Final = 112
_BOX: Final = (210, 52)
_COLUMN_X: Final = 340
_ASIDE_X: Final = 60
_END_X: Final = 740
_END_WIDTH: Final = 130
_TOP: Final = 70

_STYLE: Final = """\
<style>
text { font-family: sans-serif; font-size: 14px; fill: #0f172a; }
.name { font-family: monospace; font-weight: bold; text-anchor: middle; }
.event { fill: #334155; }
.state { fill: #ffffff; stroke: #2563eb; stroke-width: 1.5; }
.kms { fill: #fef3c7; stroke: #b45309; stroke-width: 1.5; }
.program { fill: #ede9fe; stroke: #6d28d9; stroke-width: 1.5; }
.end { fill: #dcfce7; stroke: #15803d; stroke-width: 1.5; }
.arrow { fill: none; stroke: #334155; stroke-width: 1.5; marker-end: url(#head); }
</style>"""


class _Picture:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows = {state: row for row, state in enumerate(layout.column)}
        self._height = _TOP + _ROW * len(layout.column) + 10
        into_aside = [before for before, after in arrows(layout) if after is layout.aside]
        self._aside_row = self._rows[into_aside[0]] + 0.5
        self._first_to_end = min(
            self._rows[before] for before, after in arrows(layout) if after is State.ESTABLISHED
        )

    def svg(self) -> str:
        role = self._layout.role
        title = f"States of the {role}'s handshake"
        about = "; ".join(
            f"{told(before.name)} to {told(after.name)}: {', '.join(told(event.name) for event in events)}"
            for (before, after), events in arrows(self._layout).items()
        )
        size = f"{_WIDTH} {self._height}"
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{_WIDTH}" '
            f'height="{self._height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{title}</title>',
            f'<desc id="desc">{escape(about)}.</desc>',
            _STYLE,
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="#334155"/></marker></defs>',
            # Its own ground, so that it can be read on dark pages too.
            f'<rect x="1" y="1" width="{_WIDTH - 2}" height="{self._height - 2}" rx="12" fill="#f8fafc" '
            'stroke="#94a3b8" stroke-width="2"/>',
            *self._arrows(),
            *self._boxes(),
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _y(self, state: State) -> float:
        """Return the middle of a state's box."""
        return _TOP + _ROW * (self._aside_row if state is self._layout.aside else self._rows[state])

    def _left(self, state: State) -> float:
        return _ASIDE_X if state is self._layout.aside else _COLUMN_X

    def _boxes(self) -> Iterator[str]:
        width, height = _BOX
        for state in (*self._layout.column, self._layout.aside):
            kind = "kms" if state in ASKS_KMS else "program" if state in ASKS_PROGRAM else "state"
            x, y = self._left(state), self._y(state)
            yield _rect(kind, x, y - height / 2, width, height)
            yield f'<text class="name" x="{x + width / 2:g}" y="{y + 5:g}">{state.name}</text>'
        top = self._y(self._layout.column[self._first_to_end]) - height / 2
        bottom = self._y(self._layout.column[-1]) + height / 2
        yield _rect("end", _END_X, top, _END_WIDTH, bottom - top)
        middle = (top + bottom) / 2 + 5
        yield f'<text class="name" x="{_END_X + _END_WIDTH / 2:g}" y="{middle:g}">{State.ESTABLISHED.name}</text>'

    def _arrows(self) -> Iterator[str]:
        width, height = _BOX
        column = self._layout.column
        for (before, after), events in arrows(self._layout).items():
            y, x = self._y(before), self._left(before)
            labels = [told(event.name) for event in events]
            if after is State.ESTABLISHED:
                yield _path(f"M{x + width} {y:g} H{_END_X}")
                yield from _labels(x + width + 12, y - 8, labels, upwards=True)
            elif after is before:
                yield _path(f"M{x:g} {y - 18:g} H{x - 36:g} V{y:g} H{x:g}")
                yield from _labels(x - 44, y - 5, labels, anchor="end")
            elif after is self._layout.aside:
                aside = _ASIDE_X + width / 2
                yield _path(f"M{x:g} {y:g} H{aside:g} V{self._y(after) - height / 2:g}")
                yield from _labels(aside + 12, y + 18, labels)
            elif before is self._layout.aside:
                aside = _ASIDE_X + width / 2
                yield _path(f"M{aside:g} {y + height / 2:g} V{self._y(after):g} H{_COLUMN_X}")
                yield from _labels(aside + 12, self._y(after) + 18, labels)
            elif self._rows[after] == self._rows[before] + 1:
                middle = x + width / 2
                yield _path(f"M{middle:g} {y + height / 2:g} V{self._y(after) - height / 2:g}")
                yield from _labels(middle + 10, (y + self._y(after)) / 2 + 5, labels, middle=True)
            elif self._rows[after] == self._rows[before] - 1:
                beside = x + width / 4
                yield _path(f"M{beside:g} {y - height / 2:g} V{self._y(after) + height / 2:g}")
                yield from _labels(
                    beside - 10, (y + self._y(after)) / 2 + 5, labels, anchor="end", middle=True
                )
            else:
                # Past other states: around them, on the left, each on its own way.
                up = column.index(after) < column.index(before)
                lane = 30 if up else _COLUMN_X - 60
                start = y + 14
                end = self._y(after) - 14
                yield _path(f"M{x:g} {start:g} H{lane:g} V{end:g} H{_COLUMN_X}")
                anchor, at = ("start", lane + 10) if up else ("end", lane - 8)
                yield from _labels(at, start - 8 if up else (start + end) / 2, labels, anchor=anchor)

    def _legend(self) -> Iterator[str]:
        y = self._height - 42
        for x, kind, text in (
            (60, "state", "waits for the peer"),
            (230, "kms", "waits for its KMS"),
            (390, "program", "asks the program"),
            (550, "end", "done. From elsewhere, an error: FAILED"),
        ):
            yield _rect(kind, x, y, 22, 18, 4)
            yield f'<text x="{x + 30}" y="{y + 14}">{text}</text>'


def _rect(kind: str, x: float, y: float, width: float, height: float, radius: int = 8) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def _path(steps: str) -> str:
    return f'<path class="arrow" d="{steps}"/>'


def _labels(
    x: float,
    y: float,
    texts: list[str],
    *,
    anchor: str = "start",
    upwards: bool = False,
    middle: bool = False,
) -> Iterator[str]:
    first = y - 18 * (len(texts) - 1) * (1 if upwards else 0.5 if middle else 0)
    for number, text in enumerate(texts):
        yield (
            f'<text class="event" x="{x:g}" y="{first + 18 * number:g}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )


# --- the tables


def state_table() -> str:
    """Return every state with its meaning."""
    lines = ["| state | meaning |", "| --- | --- |"]
    lines += [f"| `{state.name}` | {state.value} |" for state in State]
    return "\n".join(lines)


def transition_table() -> str:
    """Return every transition."""
    lines = ["| state | event | meaning of the event | next state |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{state.name}` | `{event.name}` | {event.value} | `{after.name}` |"
        for (state, event), after in TRANSITIONS.items()
    ]
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """Return the page with its generated parts made anew."""
    for name, text in (("states", state_table()), ("transitions", transition_table())):
        page, count = re.subn(
            rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)",
            lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for the table of {name}")
    return page


def files() -> dict[Path, str]:
    """Return the correct text of every file that is made from the table of transitions."""
    made = {DOCS / "_static" / f"engine-{layout.role}.svg": _Picture(layout).svg() for layout in LAYOUTS}
    page = DOCS / "engine.md"
    return {**made, page: with_tables(page.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
