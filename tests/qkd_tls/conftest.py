"""Fixtures for the tests over real sockets: those of `two_sites`, and the two sites with a KMS in the process."""

from __future__ import annotations

import pytest
from socket_support import Authority, Identity, Lab, local_lab
from two_sites import ca, client_identity, key_managers, kmes, lab, running_kmes, server_identity

__all__ = ["ca", "client_identity", "key_managers", "kmes", "lab", "local", "running_kmes", "server_identity"]


@pytest.fixture
def local(ca: Authority, server_identity: Identity, client_identity: Identity) -> Lab:
    """The two sites with a KMS in the process."""
    return local_lab(ca, server_identity, client_identity)
