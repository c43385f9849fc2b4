"""Runs a program twice, with the standard library's TLS (or plain TCP) and with ours, and compares."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from tests.support.dropin.harness import COLUMNS, LIMIT, Ends, Outcome, Program, Sites, outcome
from tests.support.patience import PATIENCE
from tests.support.requirements import Missing

__all__ = ["Measurements", "Result"]

_MUST_WORK = ("connects", "up", "down")


@dataclass(frozen=True)
class Result:
    """What a program did in both runs, by column; and what protected the connections of ours."""

    program: type[Program]
    reference: dict[str, Outcome]
    ours: dict[str, Outcome]
    protections: frozenset[str]

    def cell(self, column: str) -> str:
        """As the table says it."""
        ours, reference = self.ours[column].text, self.reference[column].text
        if column in _MUST_WORK:
            return {"True": "yes", "none": "n/a"}.get(ours, f"no: `{ours}`")
        if ours == reference:
            return f"same: `{ours}`"
        return f"`{ours}`, not `{reference}`"

    def agrees(self, column: str) -> bool:
        """Whether our run went as the other one."""
        return self.ours[column].text == self.reference[column].text

    def in_time(self) -> bool:
        """Whether silence was given as long as the program was told, and ended by the program, not by the peer."""
        return 0.9 * LIMIT <= self.ours["timeout"].seconds < PATIENCE / 2

    @property
    def qkd(self) -> str:
        """What protected all connections."""
        return ", ".join(sorted(self.protections)) or "nothing seen"


class Measurements:
    """Results, measured when they are asked for, once."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites
        self._results: dict[type[Program], Result | Missing] = {}

    def of(self, program: type[Program]) -> Result | Missing:
        if program not in self._results:
            self._results[program] = self._measure(program)
            # What a program has left behind is told of here, and not in another test.
            gc.collect()
        return self._results[program]

    def _measure(self, program: type[Program]) -> Result | Missing:
        try:
            reference = self._run(program, self._sites.stock())
            ends = self._sites.hybrid()
            return Result(program, reference, self._run(program, ends), frozenset(ends.seen))
        except Missing as missing:
            return missing

    def _run(self, program: type[Program], ends: Ends) -> dict[str, Outcome]:
        with program(ends) as running:
            return {column: outcome(getattr(running, column)) for column in COLUMNS}
