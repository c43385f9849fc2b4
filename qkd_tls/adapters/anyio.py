"""anyio over hybrid connections, under asyncio and trio: a KMS is asked in a worker thread."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from anyio.abc import AnyByteStream, ByteStream
from anyio.streams.tls import TLSStream

from qkd_tls.context import QKDContext
from qkd_tls.endpoint import KeyRequest, KeysWanted
from qkd_tls.engine import Engine
from qkd_tls.fetch import fetch_keys
from qkd_tls.sslobject import QKDObject, adopter

__all__ = ["wrap_stream"]


class _Keeper(ByteStream):
    """The transport of one connection. Where the handshake waits for keys, receiving waits for them."""

    server_port: int | None = None

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._connection: QKDObject | None = None
        self._engine: Engine | None = None
        self._request: KeyRequest | None = None

    def adopt(self, connection: QKDObject, engine: Engine) -> None:
        """Called by the connection that is being made."""
        self._connection, self._engine = connection, engine
        connection._ask = self._ask

    def _ask(self, request: KeyRequest) -> Any:
        self._request = request
        raise KeysWanted(request)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self._request is None:
            data: bytes = await self._stream.receive(max_bytes)
            return data
        assert self._engine is not None and self._connection is not None
        manager = self._connection.context.key_manager
        assert manager is not None
        request, self._request = self._request, None
        # Not abandoned on cancellation: the keys have to be wiped.
        self._engine.keys(await anyio.to_thread.run_sync(fetch_keys, request, manager))
        # No new bytes: the handshake goes on.
        return b""

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        if self._engine is not None:
            # Nothing where the handshake is complete.
            self._engine.abort()
        await self._stream.aclose()

    @property
    def extra_attributes(self) -> Any:
        return self._stream.extra_attributes


async def wrap_stream(
    stream: AnyByteStream,
    context: QKDContext,
    *,
    server_side: bool = False,
    hostname: str | None = None,
    standard_compatible: bool = True,
) -> TLSStream:
    """As `TLSStream.wrap`; `extra(TLSAttribute.ssl_object).qkd` says what protects the stream.

    Raises what `TLSStream.wrap` raises, and the errors of `QKDContext.wrap_socket`. A cancellation waits for the answer
    of a KMS that has been asked.
    """
    keeper = _Keeper(stream)
    token = adopter.set(keeper)
    try:
        return await TLSStream.wrap(
            keeper,
            server_side=server_side,
            hostname=hostname,
            ssl_context=context,
            standard_compatible=standard_compatible,
        )
    finally:
        adopter.reset(token)
