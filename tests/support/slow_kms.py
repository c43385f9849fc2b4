"""A KMS that takes its time, a loop's heartbeat, and small servers in threads."""

from __future__ import annotations

import contextlib
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

import anyio

from kms_client import KeyManager, KMSStatus, QKDKey
from qkd_tls import QKDContext

DELAY = 0.5
"""Seconds that a slow KMS takes."""


class SlowManager:
    """A key manager that answers after `DELAY`."""

    def __init__(self, inner: KeyManager) -> None:
        self._inner = inner
        self.protocol, self.name, self.sae_id = inner.protocol, inner.name, inner.sae_id
        self.given: list[QKDKey] = []

    def status(self, peer_sae_id: str) -> KMSStatus:
        return self._inner.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        time.sleep(DELAY)
        keys = self._inner.get_keys(peer_sae_id, number, size)
        self.given += keys
        return keys

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        time.sleep(DELAY)
        return self._inner.get_keys_by_id(peer_sae_id, key_ids)

    def close(self) -> None:
        self._inner.close()


@contextlib.asynccontextmanager
async def a_loop_that_turns() -> AsyncIterator[None]:
    """Fails where the event loop stood still for half of the time that a slow KMS takes."""
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        last = time.monotonic()
        while True:
            await anyio.sleep(0.01)
            longest = max(longest, time.monotonic() - last)
            last = time.monotonic()

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        yield
        group.cancel_scope.cancel()
    assert 0 < longest < DELAY / 2


class HTTPHandler(BaseHTTPRequestHandler):
    """Answers with the key ID of the connection."""

    protocol_version = "HTTP/1.1"
    timeout = 20

    def do_GET(self) -> None:
        body = self.connection.qkd.key_id.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class RedisHandler(socketserver.StreamRequestHandler):
    """What redis-py needs for PING; all else is an unknown command, as to old servers."""

    timeout = 20

    def handle(self) -> None:
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2])
            self.wfile.write(b"+PONG\r\n" if words[0].upper() == b"PING" else b"-ERR unknown command\r\n")


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of these tests."""


@contextlib.contextmanager
def serving(
    context: QKDContext, handler: type[socketserver.BaseRequestHandler] = HTTPHandler
) -> Iterator[int]:
    """The port of a hybrid server on loopback."""
    with _Server(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
