"""`hypercorn` over hybrid connections, whose event loop never waits for a KMS::

    with asyncio.Runner(loop_factory=qkd_tls.aio.EventLoop) as runner:
        runner.run(hypercorn.asyncio.serve(app, QKDConfig(context)))

hypercorn tells its application nothing about the connection of a request, so no `QKDInfo` either. Under
policy `require` every connection is hybrid.
"""

from __future__ import annotations

from hypercorn import Config

from qkd_tls.context import QKDContext

__all__ = ["QKDConfig"]


class QKDConfig(Config):
    """A configuration whose `bind` addresses are served with a `QKDContext`.

    All TLS settings are the context's, except for `alpn_protocols`, which are set on it. `hypercorn`'s own
    command starts its loop itself: call `hypercorn.asyncio.serve`. Its HTTP/3 does not use the `QKDContext`.

    Args:
        context: a server's context.
    """

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
        return self._context
