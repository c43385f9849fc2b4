"""Fixtures for the tests of the adapters: two sites with a KMS in the process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "qkd_tls"))

from adapter_support import SlowManager
from socket_support import Authority, Lab, local_lab


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def local(ca: Authority) -> Lab:
    return local_lab(ca, ca.issue("server"), ca.issue("client", ["client.example"]))


@pytest.fixture(params=["client", "server"])
def slow(local: Lab, request: pytest.FixtureRequest) -> Lab:
    """The same, and the KMS of one side takes its time."""
    local.managers = {**local.managers, request.param: SlowManager(local.managers[request.param])}
    return local


@pytest.fixture
def slow_client(local: Lab) -> Lab:
    local.managers = {**local.managers, "client": SlowManager(local.managers["client"])}
    return local


@pytest.fixture
def slow_server(local: Lab) -> Lab:
    local.managers = {**local.managers, "server": SlowManager(local.managers["server"])}
    return local
