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
import logging
from typing import Any, Final

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from qkd_tls.info import QKDInfo

__all__ = ["QKDProtocol"]

_log: Final = logging.getLogger("qkd_tls")


class QKDProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """The HTTP protocol of uvicorn, also for the WebSockets that begin with it.

    The state of each request has the `QKDInfo` of its connection under "qkd". A connection without one, because uvicorn
    was not given a `QKDContext` or has not used it, is closed at once, and an error is logged to the logger "qkd_tls".
    """

    app_state: dict[str, Any]

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Put the connection's `QKDInfo` into the state, or end it; called by asyncio."""
        info = getattr(transport.get_extra_info("ssl_object"), "qkd", None)
        if not isinstance(info, QKDInfo):
            _log.error(
                "a connection from %s was closed: uvicorn has not made it with a QKDContext",
                transport.get_extra_info("peername"),
            )
            transport.abort()
        self.app_state = {**self.app_state, "qkd": info}
        super().connection_made(transport)
