"""The threat model lists no attack without a test, and there is no test of an attack that it does not list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.paths import DOCS, ROOT

TESTS = ROOT / "tests"
PAGE = (DOCS / "threat-model.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Attacks\n")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.splitlines()
    if line.startswith("| ") and not line.startswith(("| attack |", "| --- "))
]


def named_tests(row: list[str]) -> list[str]:
    return re.findall(r"`([^`]+)`", row[-1])


def names_in(file: Path) -> set[str]:
    """Its tests by name, with their classes."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name.startswith("test"):
                found.add(prefix + member.name)
    return found


def test_there_are_tables() -> None:
    assert len(ROWS) > 40
    assert {len(row) for row in ROWS} == {5}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_attack_has_tests_that_exist(row: list[str]) -> None:
    assert named_tests(row)
    for name in named_tests(row):
        path, _, test = name.partition("::")
        tests = names_in(TESTS / path)
        assert tests
        assert any(f"{found}::".startswith(f"{test}::" if test else "") for found in tests), name


def test_each_test_of_an_attack_is_listed() -> None:
    listed = {name for row in ROWS for name in named_tests(row)}
    here = {
        f"attacks/{file.name}::{test}"
        for file in Path(__file__).parent.glob("test_*.py")
        if file != Path(__file__)
        for test in names_in(file)
    }
    assert len(here) > 20
    assert here == {name for name in listed if name.startswith("attacks/")}
