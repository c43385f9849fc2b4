"""A KMS that takes its time, a loop's heartbeat, and small servers in threads."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

import anyio

from kms_client import KeyManager, KMSStatus, QKDKey
from qkd_tls import QKDContext
from tests.support.patience import PATIENCE

_TURNS: Final = 5
"""Of the event loop, while the KMS is asked."""


class _Turns:
    """How often an event loop has turned."""

    def __init__(self) -> None:
        self.waits = self.waits_in_vain = 0
        self._number = 0
        self._changed = threading.Condition()

    def count(self) -> None:
        with self._changed:
            self._number += 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait for some more; in vain if the loop itself waits for the caller."""
        with self._changed:
            enough = self._number + _TURNS
            self.waits += 1
            self.waits_in_vain += not self._changed.wait_for(lambda: self._number >= enough, PATIENCE / 4)


_watched: list[_Turns] = []


class SlowManager:
    """A key manager that answers when it may, and only after the event loop that is watched has turned some times."""

    def __init__(self, inner: KeyManager) -> None:
        self._inner = inner
        self.protocol, self.name, self.sae_id = inner.protocol, inner.name, inner.sae_id
        self.given: list[QKDKey] = []
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()

    def status(self, peer_sae_id: str) -> KMSStatus:
        return self._inner.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        self._take_time()
        keys = self._inner.get_keys(peer_sae_id, number, size)
        self.given += keys
        return keys

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        self._take_time()
        return self._inner.get_keys_by_id(peer_sae_id, key_ids)

    def close(self) -> None:
        self._inner.close()

    def _take_time(self) -> None:
        self.asked.set()
        assert self.may_answer.wait(PATIENCE)
        for turns in _watched:
            turns.wait()


@contextlib.asynccontextmanager
async def a_loop_that_turns() -> AsyncIterator[None]:
    """Watch the running event loop. Fails unless a slow KMS is asked in the block, and the loop turns meanwhile."""
    turns = _Turns()

    async def beat() -> None:
        while True:
            await anyio.sleep(0.005)
            turns.count()

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        _watched.append(turns)
        try:
            yield
        finally:
            _watched.remove(turns)
        group.cancel_scope.cancel()
    assert turns.waits > 0
    assert turns.waits_in_vain == 0


class HTTPHandler(BaseHTTPRequestHandler):
    """Answers with the key ID of the connection."""

    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

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

    timeout = PATIENCE

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
