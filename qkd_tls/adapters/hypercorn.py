"""`hypercorn` over hybrid connections, whose event loop never waits for a KMS::

    with asyncio.Runner(loop_factory=qkd_tls.aio.EventLoop) as runner:
        runner.run(hypercorn.asyncio.serve(app, QKDConfig(context)))

hypercorn tells its application nothing about the connection of a request, so no `QKDInfo` either. Under
policy `require` every connection is hybrid.
"""

from __future__ import annotations

import socket
from importlib.metadata import version
from typing import Any

from hypercorn import Config

from qkd_tls.context import QKDContext

__all__ = ["QKDConfig"]


class QKDConfig(Config):
    """A configuration whose `bind` addresses are served with a `QKDContext`.

    All TLS settings are the context's, except for `alpn_protocols`, which are set on it. `hypercorn`'s own
    command starts its loop itself: call `hypercorn.asyncio.serve`. Its HTTP/3 does not use the `QKDContext`.

    The addresses of `insecure_bind` are served without TLS, as with hypercorn.

    Args:
        context: a server's context.

    `hypercorn.asyncio.serve` raises RuntimeError, and serves nothing, if this version of hypercorn would serve the
    addresses of `bind` without the context.
    """

    _context_taken = False

    def __init__(self, context: QKDContext) -> None:
        super().__init__()
        self._context = context

    @property
    def ssl_enabled(self) -> bool:
        """Always True."""
        return True

    def create_ssl_context(self) -> QKDContext:
        """Return the context with this configuration's ALPN protocols; called by hypercorn."""
        self._context.set_alpn_protocols(self.alpn_protocols)
        self._context_taken = True
        return self._context

    def create_sockets(self) -> Any:
        """Return the sockets to serve; those with TLS do not listen without the context. Called by hypercorn."""
        sockets = super().create_sockets()
        if len(sockets.insecure_sockets) != len(self.insecure_bind):
            for sock in (*sockets.secure_sockets, *sockets.insecure_sockets, *sockets.quic_sockets):
                sock.close()
            raise _not_hybrid()
        sockets.secure_sockets[:] = [_SecureSocket(self, sock) for sock in sockets.secure_sockets]
        return sockets


class _SecureSocket(socket.socket):
    """A socket that does not listen until its configuration's context was taken."""

    def __init__(self, config: QKDConfig, sock: socket.socket) -> None:
        timeout = sock.gettimeout()
        super().__init__(fileno=sock.detach())
        self.settimeout(timeout)
        self._config = config

    def listen(self, *args: Any) -> None:
        if not self._config._context_taken:
            self.close()
            raise _not_hybrid()
        super().listen(*args)


def _not_hybrid() -> RuntimeError:
    return RuntimeError(
        f"hypercorn {version('hypercorn')} does not take the QKDContext of this configuration: nothing is served."
        " Use a version of hypercorn that docs/dropin.md names: those were tried"
    )
