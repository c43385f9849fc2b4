"""Fixtures for the tests with other implementations: those of `two_sites`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))

from two_sites import (
    all_lab,
    ca,
    client_identity,
    key_managers,
    kmes,
    lab,
    running_kmes,
    server_identity,
)

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
