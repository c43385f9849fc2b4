"""The health endpoint: /healthz, /readyz and /metrics over HTTP/1.1, on loopback or a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any, Final

from qkd_tls.tunnel.metrics import Metrics

__all__ = ["Health"]

_TIMEOUT: Final = 10.0
_LARGEST: Final = 8192
"""The most bytes of a request's head."""
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


class Health:
    """An HTTP server that answers one request per connection.

    `state` returns whether the process takes connections, and its description.
    """

    def __init__(self, metrics: Metrics, state: Callable[[], tuple[bool, dict[str, Any]]]) -> None:
        self._metrics, self._state = metrics, state
        self._servers: list[asyncio.Server] = []

    async def serve(self, sockets: list[socket.socket]) -> None:
        """Answer on these sockets too."""
        for sock in sockets:
            self._servers.append(await asyncio.start_server(self._handle, sock=sock, limit=_LARGEST))

    def close(self) -> None:
        """Stop listening; close the sockets."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                async with asyncio.timeout(_TIMEOUT):
                    try:
                        head = await reader.readuntil(b"\r\n\r\n")
                    except asyncio.LimitOverrunError:
                        head = b""
                    writer.write(self._answer(head))
                    await writer.drain()
            except (TimeoutError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

    def _answer(self, head: bytes) -> bytes:
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(400, b"not HTTP/1\n")
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response(405, b"GET or HEAD only\n", more="Allow: GET, HEAD\r\n")
        status, content_type, body = self._page(target.partition(b"?")[0])
        return _response(status, body, content_type, with_body=method == b"GET")

    def _page(self, path: bytes) -> tuple[int, str, bytes]:
        match path:
            case b"/healthz":
                return 200, "text/plain", b"ok\n"
            case b"/readyz":
                ready, state = self._state()
                return 200 if ready else 503, "application/json", json.dumps(state).encode() + b"\n"
            case b"/metrics":
                return 200, self._metrics.content_type, self._metrics.text()
            case _:
                return 404, "text/plain", b"/healthz, /readyz or /metrics\n"


def _response(
    status: int, body: bytes, content_type: str = "text/plain", *, with_body: bool = True, more: str = ""
) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
