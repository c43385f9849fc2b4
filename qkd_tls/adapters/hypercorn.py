"""`hypercorn` over hybrid connections, whose event loop never waits for a KMS::

    with asyncio.Runner(loop_factory=qkd_tls.aio.EventLoop) as runner:
        runner.run(hypercorn.asyncio.serve(app, QKDConfig(context)))

hypercorn tells its application nothing of the connection that a request came over: no `QKDInfo` either. Under policy
`require` every connection is hybrid.
"""

from __future__ import annotations

from hypercorn import Config

from qkd_tls.context import QKDContext

__all__ = ["QKDConfig"]


class QKDConfig(Config):
    """A configuration whose `bind` addresses are served with a `QKDContext`.

    All TLS settings are the context's, but for `alpn_protocols`, which are set on it. `hypercorn`'s own command starts
    its loop itself: call `hypercorn.asyncio.serve`. Its HTTP/3 is not for a `QKDContext`.

    Args:
        context: of a server.
    """

    def __init__(self, context: QKDContext) -> None:
        super().__init__()
        self._context = context

    @property
    def ssl_enabled(self) -> bool:
        """True."""
        return True

    def create_ssl_context(self) -> QKDContext:
        """Called by hypercorn."""
        self._context.set_alpn_protocols(self.alpn_protocols)
        return self._context
