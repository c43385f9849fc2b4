"""Fixtures for the attacks: those of `two_sites`, and the attacker's own CA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))

from attack_support import Site
from socket_support import Authority, Lab
from two_sites import ca, client_identity, key_managers, kmes, lab, running_kmes, server_identity

__all__ = [
    "ca",
    "client_identity",
    "key_managers",
    "kmes",
    "lab",
    "mallorys_ca",
    "running_kmes",
    "server_identity",
    "site",
]


@pytest.fixture(scope="session")
def mallorys_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody but the attacker trusts."""
    return Authority(tmp_path_factory.mktemp("mallory"), "Mallory's CA")


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    """Client and server with their KMEs, and how often each KME was asked."""
    with Site(lab) as site:
        yield site
