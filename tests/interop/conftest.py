"""Fixtures for the tests with other implementations: certificates, a pair of KMEs, and the two sites of a link."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))

from socket_support import Authority, Lab

from kms_client.emulator import Faults, RunningPair, run_pair


@pytest.fixture(scope="session")
def running_kmes() -> Iterator[RunningPair]:
    with run_pair(rate=2000.0, buffer=2000) as pair:
        yield pair


@pytest.fixture(scope="session")
def all_lab(tmp_path_factory: pytest.TempPathFactory, running_kmes: RunningPair) -> Iterator[Lab]:
    ca = Authority(tmp_path_factory.mktemp("pki"))
    managers = {"client": running_kmes.client("a"), "server": running_kmes.client("b")}
    yield Lab(ca, ca.issue("server"), ca.issue("client", ["client.example"]), running_kmes, managers)
    for manager in managers.values():
        manager.close()


@pytest.fixture
def lab(all_lab: Lab, running_kmes: RunningPair) -> Iterator[Lab]:
    """The client's and the server's site. Whatever a test makes of their KMEs is put right again."""
    yield all_lab
    all_lab.close()
    for side in ("a", "b"):
        for name, value in vars(Faults()).items():
            setattr(running_kmes.faults(side), name, value)
