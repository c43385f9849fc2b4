"""Fixtures for the attacks: certificates, a pair of KMEs, the two sites of a link, and the attacker's own CA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))

from attack_support import Site
from socket_support import Authority, Lab

from kms_client.emulator import RunningPair, run_pair


@pytest.fixture(scope="session")
def running_kmes() -> Iterator[RunningPair]:
    with run_pair(rate=2000.0, buffer=2000) as pair:
        yield pair


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, running_kmes: RunningPair) -> Iterator[Lab]:
    ca = Authority(tmp_path_factory.mktemp("pki"))
    managers = {"client": running_kmes.client("a"), "server": running_kmes.client("b")}
    lab = Lab(ca, ca.issue("server"), ca.issue("client", ["client.example"]), running_kmes, managers)
    yield lab
    lab.close()
    for manager in managers.values():
        manager.close()


@pytest.fixture(scope="session")
def mallorys_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody but the attacker trusts."""
    return Authority(tmp_path_factory.mktemp("mallory"), "Mallory's CA")


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    """Client and server with their KMEs, and how often each KME was asked."""
    with Site(lab) as site:
        yield site
