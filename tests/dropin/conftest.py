"""Fixtures: two KMEs and the certificates of both sites, and what each program did."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The certificates are those of the library's tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tunnel"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from dropin_support import Sites
from measure import Measurements

from kms_client.emulator import run_pair


@pytest.fixture(scope="session")
def measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measurements]:
    with run_pair(rate=2000.0, buffer=4000) as kmes:
        sites = Sites.make(tmp_path_factory.mktemp("dropin"), kmes)
        try:
            yield Measurements(sites)
        finally:
            sites.close()
