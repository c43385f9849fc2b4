"""One context, many threads: no key is used twice, none is lost, nothing piles up."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from kms_client import Etsi014Client, QKDKey
from kms_client.emulator import DemoPKI
from qkd_tls import HandshakePath, Protection, QKDContext, QKDInfo, create_default_context
from qkd_tls.openssl import TLSConnection
from tests.support.sizes import sized
from tests.support.sockets import TIMEOUT, Authority, Identity

THREADS = 8
CONNECTIONS = sized(2000, 400)


@dataclass
class KMEProcess:
    """Both KMEs in a process of their own, so that their memory is not counted as ours."""

    process: subprocess.Popen[str]
    pki: DemoPKI
    urls: dict[str, str]
    record: Path

    def client(self, side: str) -> Etsi014Client:
        pki = self.pki
        files = (pki.sae_a_cert, pki.sae_a_key) if side == "a" else (pki.sae_b_cert, pki.sae_b_key)
        sae_id = "SAE-A" if side == "a" else "SAE-B"
        return Etsi014Client(self.urls[side], sae_id=sae_id, cert=files[0], key=files[1], ca=pki.kms_ca)

    def delivered(self, role: str) -> list[str]:
        """IDs of the keys that one side got, in order."""
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [line["key_id"] for line in lines if line["role"] == role]


@pytest.fixture
def kme_process(tmp_path: Path) -> Iterator[KMEProcess]:
    record = tmp_path / "deliveries"
    arguments = ["--dir", str(tmp_path / "kme"), "--json", "--record", str(record), "--buffer", "3000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kms_client", "pair", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        urls = {kme["side"]: kme["url"] for kme in ready["kmes"]}
        yield KMEProcess(process, DemoPKI(tmp_path / "kme", "SAE-A", "SAE-B"), urls, record)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT)


@dataclass
class Usage:
    """What this process holds at one moment."""

    resident: int
    """Bytes."""
    descriptors: int
    threads: int
    keys: int
    """QKDKey objects."""
    connections: int
    """TLS connections of OpenSSL."""

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        process = psutil.Process()
        objects = collections.Counter(type(one) for one in gc.get_objects())
        return cls(
            process.memory_info().rss,
            process.num_fds(),
            threading.active_count(),
            objects[QKDKey],
            objects[TLSConnection],
        )


@dataclass
class Traffic:
    """Client threads and server threads, which share one context each."""

    client: QKDContext
    server: QKDContext
    client_infos: queue.SimpleQueue[QKDInfo] = field(default_factory=queue.SimpleQueue)
    server_infos: queue.SimpleQueue[QKDInfo] = field(default_factory=queue.SimpleQueue)
    errors: queue.SimpleQueue[BaseException] = field(default_factory=queue.SimpleQueue)

    def run(self, connections: int) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
            todo: queue.SimpleQueue[int] = queue.SimpleQueue()
            for number in range(connections):
                todo.put(number)
            servers = [threading.Thread(target=self._serve, args=(listening,)) for _ in range(THREADS)]
            clients = [
                threading.Thread(target=self._request, args=(listening.getsockname(), todo))
                for _ in range(THREADS)
            ]
            for thread in (*servers, *clients):
                thread.start()
            for thread in clients:
                thread.join()
            # Wakes all that wait in accept().
            listening.shutdown(socket.SHUT_RDWR)
            for thread in servers:
                thread.join(TIMEOUT)
                assert not thread.is_alive()
        if not self.errors.empty():
            raise self.errors.get()

    def _serve(self, listening: socket.socket) -> None:
        while True:
            try:
                raw, _ = listening.accept()
            except OSError:
                return
            raw.settimeout(TIMEOUT)
            try:
                with self.server.wrap_socket(raw, server_side=True) as sock:
                    assert sock.qkd is not None
                    self.server_infos.put(sock.qkd)
                    sock.sendall(sock.recv(1 << 16))
            except BaseException as error:  # noqa: BLE001 - raised in run()
                self.errors.put(error)

    def _request(self, address: tuple[str, int], todo: queue.SimpleQueue[int]) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                number = todo.get_nowait()
                try:
                    raw = socket.create_connection(address, timeout=TIMEOUT)
                    with self.client.wrap_socket(raw, server_hostname="localhost") as sock:
                        assert sock.qkd is not None
                        self.client_infos.put(sock.qkd)
                        sock.sendall(b"request %d" % number)
                        assert sock.recv(1 << 16) == b"request %d" % number
                except BaseException as error:  # noqa: BLE001 - raised in run()
                    self.errors.put(error)

    @property
    def infos(self) -> tuple[list[QKDInfo], list[QKDInfo]]:
        """What clients and servers saw so far; each is given once."""
        return _drained(self.client_infos), _drained(self.server_infos)


def _drained(infos: queue.SimpleQueue[QKDInfo]) -> list[QKDInfo]:
    drained = []
    with contextlib.suppress(queue.Empty):
        while True:
            drained.append(infos.get_nowait())
    return drained


@pytest.fixture
def traffic(kme_process: KMEProcess, ca: Authority, server_identity: Identity) -> Iterator[Traffic]:
    managers = {side: kme_process.client(side) for side in ("a", "b")}
    client = create_default_context(cafile=str(ca.file), key_manager=managers["a"], peer_sae_id="SAE-B")
    server = QKDContext(ssl.PROTOCOL_TLS_SERVER, key_manager=managers["b"])
    server_identity.load_into(server)
    yield Traffic(client, server)
    for manager in managers.values():
        manager.close()


MEMORY_GROWTH = 6 << 20
"""Bytes that 1,800 more connections may add: fragmentation, and the key IDs that an association remembers."""


def test_two_thousand_connections(traffic: Traffic, kme_process: KMEProcess) -> None:
    """Two thousand at full size."""
    traffic.run(200)
    client_infos, server_infos = traffic.infos
    before = Usage.now()
    traffic.run(CONNECTIONS - 200)
    after = Usage.now()
    for infos, more in zip((client_infos, server_infos), traffic.infos, strict=True):
        infos += more

    assert len(client_infos) == len(server_infos) == CONNECTIONS
    assert {info.protection for info in client_infos} == {Protection.HYBRID}
    used = collections.Counter(info.key_id for info in client_infos)
    assert set(used.values()) == {1}, "a key was used twice"
    assert used == collections.Counter(info.key_id for info in server_infos)

    # The KMEs' own record: each key went out once to each side, and each that went out was used.
    for role in ("master", "slave"):
        assert collections.Counter(kme_process.delivered(role)) == used, f"delivered to the {role}"

    bootstraps = [info for info in client_infos if info.path is HandshakePath.BOOTSTRAP]
    # Threads that start together make an association each; one serves a thousand connections.
    assert 2 <= len(bootstraps) <= 6 * THREADS

    print(f"\nbefore {before}\nafter  {after}\nbootstraps {len(bootstraps)}")
    assert after.resident - before.resident < MEMORY_GROWTH
    # The clients of the KMEs keep a connection for each thread, if they come to need that many.
    assert after.descriptors <= before.descriptors + 2 * THREADS
    assert after.threads == before.threads
    # Other tests of this process may have left keys with a KMS of theirs.
    assert after.keys == before.keys
    assert after.connections <= before.connections


def test_threads_share_announced_keys(traffic: Traffic, kme_process: KMEProcess) -> None:
    """Each announced key serves one connection; none is fetched again while some are left."""
    traffic.client = create_default_context(
        cadata=ssl.DER_cert_to_PEM_cert(_only_ca(traffic.client)),
        key_manager=traffic.client.key_manager,
        peer_sae_id="SAE-B",
        announced_keys=31,
    )
    traffic.run(200)
    client_infos, server_infos = traffic.infos
    used = collections.Counter(info.key_id for info in client_infos)
    assert set(used.values()) == {1}, "a key was used twice"
    assert used == collections.Counter(info.key_id for info in server_infos)
    announced = {info.key_id for info in client_infos if info.announced}
    assert announced == {info.key_id for info in server_infos if info.announced}
    # Eight threads that start together may each fetch 32 keys, and leave 56 of all those unused.
    assert len(announced) >= 100
    for role in ("master", "slave"):
        delivered = collections.Counter(kme_process.delivered(role))
        assert set(delivered.values()) == {1}
        assert set(used) <= set(delivered)


def _only_ca(context: ssl.SSLContext) -> bytes:
    (der,) = context.get_ca_certs(binary_form=True)
    return der
