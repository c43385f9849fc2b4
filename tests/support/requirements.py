"""What some tests need beyond the dependency group `test`. They are skipped without it, and the last line of a run says
what to install.
"""

from __future__ import annotations

import sys
import unittest
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import pytest

__all__ = [
    "COMPILED",
    "CPYTHON_TESTS",
    "C_COMPILER",
    "LIBOQS",
    "NODE",
    "PYTHON313",
    "Missing",
    "Requirement",
    "advice",
    "debian",
    "needs",
]


@dataclass(frozen=True)
class Requirement:
    """Something that can be installed."""

    name: str
    how: str
    """A command without its last words, or as much of a sentence."""
    package: str
    """The last words."""

    def missing(self, why: str = "") -> Missing:
        """Return what to raise if it is not there; `why` is for what is there, but not good enough."""
        return Missing(self, why or f"no {self.name}")


class Missing(unittest.SkipTest):
    """Skip a test: raised by it, by a fixture, or by what they call."""

    def __init__(self, requirement: Requirement, why: str) -> None:
        self.requirement = requirement
        super().__init__(f"{why}: {requirement.how} {requirement.package}")


def debian(package: str, name: str = "") -> Requirement:
    """A program of a Debian package."""
    return Requirement(name or package, "apt install", package)


NODE: Final = Requirement("Node.js 26", "npm install", "node@26")
PYTHON313: Final = Requirement("Python 3.13", "set QKD_TLS_PYTHON313 to", "python3.13")
LIBOQS: Final = Requirement("usable liboqs", "build", "liboqs and set OQS_INSTALL_PATH")
COMPILED: Final = Requirement("skip-qkd", "pip install --group", "compiled")
C_COMPILER: Final = debian("gcc", "C compiler `cc`")
CPYTHON_TESTS: Final = debian(
    "libpython{}.{}-testsuite".format(*sys.version_info), "tests of CPython with this interpreter"
)


def needs(requirement: Requirement, present: bool) -> pytest.MarkDecorator:
    """Skip the test unless that is present."""
    return pytest.mark.needs(requirement, present)


def advice(missing: Iterable[tuple[str, str]], number: int) -> str:
    """One line for so many skipped tests: what to install, of pairs (how, package)."""
    packages: dict[str, set[str]] = {}
    for how, package in missing:
        packages.setdefault(how, set()).add(package)
    what = "; ".join(f"{how} {' '.join(sorted(names))}" for how, names in sorted(packages.items()))
    return f"To run {number} of the skipped tests, too: {what}"
