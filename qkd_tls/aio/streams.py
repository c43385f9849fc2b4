"""Streams of asyncio over hybrid connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from qkd_tls.aio.handshakes import driving
from qkd_tls.aio.transports import create_connection, create_server
from qkd_tls.context import QKDContext

__all__ = ["open_connection", "start_server", "upgrade_streams"]

_LIMIT: Final = 1 << 16


async def open_connection(
    host: str | None = None,
    port: int | None = None,
    *,
    ssl: QKDContext,
    limit: int = _LIMIT,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect like `asyncio.open_connection`; `limit` in bytes, `options` as for `create_connection`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    transport, protocol = await create_connection(
        lambda: asyncio.StreamReaderProtocol(reader, loop=loop), host, port, ssl=ssl, **options
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
    host: Any = None,
    port: Any = None,
    *,
    ssl: QKDContext,
    limit: int = _LIMIT,
    **options: Any,
) -> asyncio.Server:
    """Listen like `asyncio.start_server`; `limit` in bytes, `options` are those of `create_server`."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(factory, host, port, ssl=ssl, **options)


async def upgrade_streams(
    writer: asyncio.StreamWriter,
    sslcontext: QKDContext,
    *,
    server_hostname: str | None = None,
    **timeouts: Any,
) -> None:
    """Put a plain connection's streams on TLS (STARTTLS), like `StreamWriter.start_tls`."""
    with driving(asyncio.get_running_loop(), writer.transport):
        await writer.start_tls(sslcontext, server_hostname=server_hostname, **timeouts)
