"""Fixtures: certificates, a pair of KMEs, and the two sites of a link. A conftest.py names those its folder uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from socket_support import Authority, Identity, Lab

from kms_client import Etsi014Client
from kms_client.emulator import Faults, RunningPair, run_pair

__all__ = [
    "all_lab",
    "ca",
    "client_identity",
    "key_managers",
    "kmes",
    "lab",
    "running_kmes",
    "server_identity",
]


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def server_identity(ca: Authority) -> Identity:
    return ca.issue("server")


@pytest.fixture(scope="session")
def client_identity(ca: Authority) -> Identity:
    return ca.issue("client", ["client.example"])


@pytest.fixture(scope="session")
def running_kmes() -> Iterator[RunningPair]:
    with run_pair(rate=2000.0, buffer=2000) as pair:
        yield pair


@pytest.fixture(scope="session")
def key_managers(running_kmes: RunningPair) -> Iterator[dict[str, Etsi014Client]]:
    managers = {"client": running_kmes.client("a"), "server": running_kmes.client("b")}
    yield managers
    for manager in managers.values():
        manager.close()


@pytest.fixture
def kmes(running_kmes: RunningPair) -> Iterator[RunningPair]:
    """Two KMEs over mutual TLS. Whatever a test makes of them is put right again."""
    yield running_kmes
    for side in ("a", "b"):
        faults = running_kmes.faults(side)
        for name, value in vars(Faults()).items():
            setattr(faults, name, value)


@pytest.fixture
def lab(
    ca: Authority,
    server_identity: Identity,
    client_identity: Identity,
    kmes: RunningPair,
    key_managers: dict[str, Etsi014Client],
) -> Iterator[Lab]:
    """The client's and the server's site, with their KMEs."""
    lab = Lab(ca, server_identity, client_identity, kmes, key_managers)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def all_lab(
    ca: Authority,
    server_identity: Identity,
    client_identity: Identity,
    running_kmes: RunningPair,
    key_managers: dict[str, Etsi014Client],
) -> Lab:
    """The same, for what lasts longer than a test."""
    return Lab(ca, server_identity, client_identity, running_kmes, key_managers)
