"""An event loop in which asyncio's own functions take a `QKDContext`."""

from __future__ import annotations

import asyncio
from typing import Any

from qkd_tls.aio.handshakes import driving
from qkd_tls.aio.transports import Gate, Incoming, create_connection, create_server, over_tls
from qkd_tls.context import QKDContext

__all__ = ["EventLoop"]


class EventLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits for a KMS, whichever code calls its functions with a `QKDContext`.

    For programs and libraries that are given a context and call asyncio themselves (aiohttp, uvicorn, hypercorn)::

        with asyncio.Runner(loop_factory=qkd_tls.aio.EventLoop) as runner:
            runner.run(main())
    """

    async def create_connection(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *, ssl: Any = None, **options: Any
    ) -> Any:
        """See `asyncio.loop.create_connection`."""
        if isinstance(ssl, QKDContext):
            return await create_connection(protocol_factory, host, port, ssl=ssl, **options)
        return await super().create_connection(protocol_factory, host, port, ssl=ssl, **options)

    async def create_server(
        self, protocol_factory: Any, host: Any = None, port: Any = None, *, ssl: Any = None, **options: Any
    ) -> asyncio.Server:
        """See `asyncio.loop.create_server`."""
        if isinstance(ssl, QKDContext):
            return await create_server(protocol_factory, host, port, ssl=ssl, **options)
        return await super().create_server(protocol_factory, host, port, ssl=ssl, **options)

    async def create_unix_connection(
        self,
        protocol_factory: Any,
        path: Any = None,
        *,
        ssl: Any = None,
        sock: Any = None,
        server_hostname: str | None = None,
        **options: Any,
    ) -> Any:
        """See `asyncio.loop.create_unix_connection`."""
        if not isinstance(ssl, QKDContext):
            return await super().create_unix_connection(
                protocol_factory, path, ssl=ssl, sock=sock, server_hostname=server_hostname, **options
            )
        if server_hostname is None:
            raise ValueError("you have to pass server_hostname when using ssl")
        raw, gate = await super().create_unix_connection(Gate, path, sock=sock)
        return await over_tls(raw, gate, protocol_factory, ssl, server_hostname=server_hostname, **options)

    async def create_unix_server(
        self,
        protocol_factory: Any,
        path: Any = None,
        *,
        ssl: Any = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        **options: Any,
    ) -> asyncio.Server:
        """See `asyncio.loop.create_unix_server`."""
        timeouts: dict[str, Any] = {
            "ssl_handshake_timeout": ssl_handshake_timeout,
            "ssl_shutdown_timeout": ssl_shutdown_timeout,
        }
        if not isinstance(ssl, QKDContext):
            return await super().create_unix_server(protocol_factory, path, ssl=ssl, **timeouts, **options)
        return await super().create_unix_server(
            lambda: Incoming(protocol_factory, ssl, **timeouts), path, **options
        )

    async def connect_accepted_socket(
        self, protocol_factory: Any, sock: Any, *, ssl: Any = None, **options: Any
    ) -> Any:
        """See `asyncio.loop.connect_accepted_socket`."""
        if not isinstance(ssl, QKDContext):
            return await super().connect_accepted_socket(protocol_factory, sock, ssl=ssl, **options)
        raw, gate = await super().connect_accepted_socket(Gate, sock)
        return await over_tls(raw, gate, protocol_factory, ssl, server_side=True, **options)

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **options: Any) -> Any:
        """See `asyncio.loop.start_tls`."""
        if not isinstance(sslcontext, QKDContext):
            return await super().start_tls(transport, protocol, sslcontext, **options)
        with driving(self, transport):
            return await super().start_tls(transport, protocol, sslcontext, **options)
