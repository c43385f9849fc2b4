"""Measures all programs and writes the table in docs/dropin.md. Needs them all: `.ci/run` names the Debian packages."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kms_client.emulator import run_pair
from tests.support.dropin.harness import Sites
from tests.support.dropin.measure import Measurements
from tests.support.dropin.programs import PROGRAMS
from tests.support.dropin.table import table, write
from tests.support.requirements import Missing

__all__: list[str] = []


def main() -> None:
    results = []
    with (
        run_pair(rate=2000.0, buffer=4000) as kmes,
        tempfile.TemporaryDirectory(prefix="qkd-tls-dropin-") as folder,
    ):
        sites = Sites.make(Path(folder), kmes)
        measurements = Measurements(sites)
        for program in PROGRAMS:
            print(program.name, flush=True)
            result = measurements.of(program)
            if isinstance(result, Missing):
                raise SystemExit(f"{program.name}: {result}")
            results.append(result)
        sites.close()
    write(table(results))


if __name__ == "__main__":
    main()
