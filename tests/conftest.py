"""The fixtures that several folders use: certificates, a pair of KMEs, and what stands at both ends of a link."""

from __future__ import annotations

import gc
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from kms_client import Etsi014Client
from kms_client.emulator import Faults, RunningPair, run_pair
from tests.support import attacks, commands, tunnels
from tests.support.sizes import sized
from tests.support.slow_kms import SlowManager
from tests.support.sockets import Authority, Identity, Lab, local_lab

# The same examples each time, and as long as they take.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=sized(100, 50),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

# --- the marker `pure`


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a pure test that uses a socket, starts a program or sleeps. Its fixtures may: others share them."""
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("pure") is not None:
            for owner, name in (
                (socket.socket, "bind"),
                (socket.socket, "connect"),
                (subprocess.Popen, "__init__"),
                (time, "sleep"),
            ):
                patch.setattr(owner, name, _refusing(f"{owner.__name__}.{name}", getattr(owner, name)))
        return (yield)


def _refusing(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        # Servers of other tests may still run in other threads. The first test that asks for KEMs has liboqs looked
        # for, which starts ldconfig.
        if threading.current_thread() is threading.main_thread() and not any(
            frame.f_globals.get("__name__") == "ctypes.util" for frame, _ in traceback.walk_stack(None)
        ):
            pytest.fail(f"this test is marked as pure, but led to {what}")
        return original(*arguments, **options)

    return refuse


# --- what a test leaves behind


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left_behind() -> Iterator[None]:
    """Have what a module's tests forgot to close told of there, and not when a collector comes by later."""
    yield
    gc.collect()


# --- certificates


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
def mallorys_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody but the attacker trusts."""
    return Authority(tmp_path_factory.mktemp("mallory"), "Mallory's CA")


# --- KMEs


@pytest.fixture(scope="session")
def running_kmes() -> Iterator[RunningPair]:
    with run_pair(rate=2000.0, buffer=4000) as pair:
        yield pair


@pytest.fixture
def kmes(running_kmes: RunningPair) -> Iterator[RunningPair]:
    """Two KMEs over mutual TLS. Whatever a test makes of them is put right again."""
    yield running_kmes
    for side in ("a", "b"):
        faults = running_kmes.faults(side)
        for name, value in vars(Faults()).items():
            setattr(faults, name, value)


@pytest.fixture(scope="session")
def key_managers(running_kmes: RunningPair) -> Iterator[dict[str, Etsi014Client]]:
    managers = {"client": running_kmes.client("a"), "server": running_kmes.client("b")}
    yield managers
    for manager in managers.values():
        manager.close()


# --- both ends of a link, in this process


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


@pytest.fixture
def local(ca: Authority, server_identity: Identity, client_identity: Identity) -> Lab:
    """The two sites with a KMS in the process."""
    return local_lab(ca, server_identity, client_identity)


@pytest.fixture(params=["client", "server"])
def slow(local: Lab, request: pytest.FixtureRequest) -> Lab:
    """The same, and the KMS of one side takes its time."""
    return _slowed(local, request.param)


@pytest.fixture
def slow_client(local: Lab) -> Lab:
    return _slowed(local, "client")


@pytest.fixture
def slow_server(local: Lab) -> Lab:
    return _slowed(local, "server")


def _slowed(lab: Lab, side: str) -> Lab:
    lab.managers = {**lab.managers, side: SlowManager(lab.managers[side])}
    return lab


@pytest.fixture
def site(lab: Lab) -> Iterator[attacks.Site]:
    """Client and server with their KMEs, and how often each KME was asked."""
    with attacks.Site(lab) as site:
        yield site


# --- the command


@pytest.fixture(scope="session")
def client_site(running_kmes: RunningPair) -> commands.Site:
    """The options of `qkd-tls` at the client's site."""
    return commands.Site.of(running_kmes, "a")


@pytest.fixture(scope="session")
def server_site(running_kmes: RunningPair) -> commands.Site:
    """The options of `qkd-tls` at the server's site."""
    return commands.Site.of(running_kmes, "b")


@pytest.fixture(scope="session")
def echo(server_site: commands.Site) -> Iterator[str]:
    """Address of `qkd-tls serve`, which echoes."""
    with commands.running_server(server_site) as running:
        yield running.address


@pytest.fixture(scope="session")
def www(server_site: commands.Site) -> Iterator[str]:
    """Address of `qkd-tls serve --www`."""
    with commands.running_server(server_site, "--www", "--alpn", "http/1.1") as running:
        yield running.address


# --- tunnels


@pytest.fixture(scope="session")
def all_sites(tmp_path_factory: pytest.TempPathFactory, running_kmes: RunningPair) -> tunnels.Sites:
    return tunnels.Sites.make(tmp_path_factory.mktemp("tunnels"), running_kmes)


@pytest.fixture
def sites(all_sites: tunnels.Sites, kmes: RunningPair) -> tunnels.Sites:
    """Both sites. Whatever a test makes of the KMEs is put right again."""
    return all_sites
