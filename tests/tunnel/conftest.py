"""Fixtures for the tests of the tunnel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tunnel_support import Sites

from kms_client.emulator import Faults, RunningPair, run_pair


@pytest.fixture(scope="session")
def running_kmes() -> Iterator[RunningPair]:
    with run_pair(rate=2000.0, buffer=4000) as pair:
        yield pair


@pytest.fixture(scope="session")
def all_sites(tmp_path_factory: pytest.TempPathFactory, running_kmes: RunningPair) -> Sites:
    return Sites.make(tmp_path_factory.mktemp("pki"), running_kmes)


@pytest.fixture
def sites(all_sites: Sites) -> Iterator[Sites]:
    """Both sites. Whatever a test makes of the KMEs is put right again."""
    yield all_sites
    for side in ("a", "b"):
        for name, value in vars(Faults()).items():
            setattr(all_sites.kmes.faults(side), name, value)
