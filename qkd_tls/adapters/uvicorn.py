"""`uvicorn` over hybrid connections, whose event loop never waits for a KMS::

    uvicorn.run(
        app,
        ssl_context_factory=lambda config, default: context,
        loop="qkd_tls.aio:EventLoop",
        http="qkd_tls.adapters.uvicorn:QKDProtocol",
    )

Without `http` everything works without this module. The protocol here tells the application what protects a
request: `scope["state"]["qkd"]`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["QKDProtocol"]


class QKDProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """The HTTP protocol of uvicorn, also for the WebSockets that begin with it.

    The state of each request has the `QKDInfo` of its connection under "qkd"; None without a `QKDContext`.
    """

    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Put the connection's `QKDInfo` into the state; called by asyncio."""
        info = getattr(transport.get_extra_info("ssl_object"), "qkd", None)
        self.app_state = {**self.app_state, "qkd": info}
        super().connection_made(transport)
