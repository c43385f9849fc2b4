"""Fixtures for the tests of the command: two KMEs, and servers that are `qkd-tls serve`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The certificates and the server in threads are those of the library's tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))

from cli_support import Site, running_server
from socket_support import Authority

from kms_client.emulator import Faults, RunningPair, run_pair


@pytest.fixture(scope="session")
def pair() -> Iterator[RunningPair]:
    with run_pair(rate=2000.0, buffer=2000) as pair:
        yield pair


@pytest.fixture
def kmes(pair: RunningPair) -> Iterator[RunningPair]:
    """The KMEs; their faults are put right again after the test."""
    yield pair
    for side in ("a", "b"):
        for name, value in vars(Faults()).items():
            setattr(pair.faults(side), name, value)


@pytest.fixture(scope="session")
def client(pair: RunningPair) -> Site:
    return Site.of(pair, "a")


@pytest.fixture(scope="session")
def server(pair: RunningPair) -> Site:
    return Site.of(pair, "b")


@pytest.fixture(scope="session")
def echo(server: Site) -> Iterator[str]:
    """Address of `qkd-tls serve`, which echoes."""
    with running_server(server) as running:
        yield running.address


@pytest.fixture(scope="session")
def www(server: Site) -> Iterator[str]:
    """Address of `qkd-tls serve --www`."""
    with running_server(server, "--www", "--alpn", "http/1.1") as running:
        yield running.address


@pytest.fixture(scope="session")
def foreign_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody here trusts."""
    return Authority(tmp_path_factory.mktemp("foreign"), "Foreign CA")
