"""Real programs, unmodified, with our context in place of the standard library's: they do the same."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from kms_client.emulator import run_pair
from tests.support.dropin.harness import COLUMNS, Program, Sites
from tests.support.dropin.measure import Measurements, Result
from tests.support.dropin.programs import PROGRAMS
from tests.support.dropin.table import committed, rows_of, same, table
from tests.support.requirements import Missing

MUST_WORK = ("connects", "up", "down")


@pytest.fixture(scope="session")
def measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measurements]:
    """What each program did, measured when it is first asked for."""
    with run_pair(rate=2000.0, buffer=4000) as kmes:
        sites = Sites.make(tmp_path_factory.mktemp("dropin"), kmes)
        try:
            yield Measurements(sites)
        finally:
            sites.close()


def measured(measurements: Measurements, program: type[Program]) -> Result:
    result = measurements.of(program)
    if isinstance(result, Missing):
        raise result.requirement.missing()
    return result


@pytest.fixture(params=PROGRAMS, ids=lambda program: program.name)
def result(request: pytest.FixtureRequest, measurements: Measurements) -> Result:
    return measured(measurements, request.param)


@pytest.mark.parametrize("column", MUST_WORK)
def test_works(result: Result, column: str) -> None:
    for run in (result.reference, result.ours):
        expected = "True" if column not in result.program.without else "none"
        assert run[column].text == expected, run[column].trace


@pytest.mark.parametrize("column", [column for column in COLUMNS if column not in MUST_WORK])
def test_as_with_the_standard_library(result: Result, column: str) -> None:
    if column in result.program.deviations:
        assert not result.agrees(column), "it is as with the standard library after all: say so"
    else:
        assert result.agrees(column), f"{result.cell(column)}\n{result.ours[column].trace}"


def test_times_out_in_time(result: Result) -> None:
    assert result.in_time(), result.ours["timeout"]


def test_every_connection_is_hybrid(result: Result) -> None:
    assert result.qkd == "hybrid"


def test_table(result: Result) -> None:
    """docs/dropin.md says what was measured: `python -m tests.support.dropin.write_table` writes it."""
    (measured_row,) = rows_of(table([result])).values()
    rows = [without_notes(row) for row in (rows_of(committed())[result.program.name], measured_row)]
    assert same(*rows), rows


def without_notes(row: list[str]) -> list[str]:
    """The numbers of notes are those of the whole table."""
    return [re.sub(r" \[\d+\]", "", cell) for cell in row]


def test_the_table_has_all_programs() -> None:
    assert list(rows_of(committed())) == [program.name for program in PROGRAMS]


def test_the_table_has_all_notes() -> None:
    notes = {note for program in PROGRAMS for note in (*program.notes.values(), *program.deviations.values())}
    assert set(re.findall(r"^\d+\. (.*)$", committed(), re.MULTILINE)) == notes
