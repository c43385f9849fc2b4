"""What is to come of each of CPython's tests: outcomes.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

__all__ = ["FILE", "Exclusion", "Table"]

FILE: Final = Path(__file__).with_name("outcomes.toml")


@dataclass(frozen=True)
class Exclusion:
    """Tests that cannot pass, and why."""

    because: str
    """What the tests do; goes on from "it"."""
    users: str
    """What a program should know of it; empty where nothing."""
    tests: tuple[str, ...]
    where: str
    """Only versions of the tests with these words in them; empty for all."""


@dataclass(frozen=True)
class Table:
    """All tests by the names of class and method, with a dot in between."""

    passes: frozenset[str]
    module: frozenset[str]
    """With nothing of ours in them."""
    skipped_by_some_builds: frozenset[str]
    excluded: tuple[Exclusion, ...]

    @classmethod
    def load(cls) -> Self:
        data = tomllib.loads(FILE.read_text(encoding="utf-8"))
        return cls(
            **{name: _names(data[name]) for name in ("passes", "module", "skipped_by_some_builds")},
            excluded=tuple(
                Exclusion(
                    entry["because"],
                    entry.get("users", ""),
                    tuple(entry["tests"]),
                    entry.get("where_the_test_says", ""),
                )
                for entry in data["excluded"]
            ),
        )

    @property
    def names(self) -> frozenset[str]:
        """All tests."""
        return self.passes.union(self.module, *(entry.tests for entry in self.excluded))

    def exclusions(self, test: str) -> list[Exclusion]:
        """Why a test is excluded, or some versions of it."""
        return [entry for entry in self.excluded if test in entry.tests]

    def exclusion(self, test: str, source: str) -> Exclusion | None:
        """Why this version of a test, which `source` is the text of, is excluded."""
        return next((entry for entry in self.exclusions(test) if entry.where in source), None)


def _names(by_class: dict[str, list[str]]) -> frozenset[str]:
    return frozenset(f"{kind}.{name}" for kind, names in by_class.items() for name in names)
