"""Hybrid connections for anyio, under asyncio and trio: a KMS is asked in a worker thread."""

from __future__ import annotations

from typing import Any, NoReturn

import anyio.to_thread
from anyio import aclose_forcefully
from anyio.abc import AnyByteStream, ByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

from kms_client import KeyManager
from qkd_tls.adapters.refusal import checked
from qkd_tls.context import QKDContext
from qkd_tls.endpoint import HoldingDriver, KeyRequest, KeysWanted, driver_in_charge, fetch_keys

__all__ = ["wrap_stream"]


class _StreamDriver(HoldingDriver):
    """A driver that keeps the engine's request for the stream to answer."""

    def __init__(self) -> None:
        self._asked: tuple[KeyRequest, KeyManager] | None = None

    def fetch(self, request: KeyRequest, manager: KeyManager) -> NoReturn:
        self._asked = request, manager
        raise KeysWanted(request)

    async def answer(self) -> bool:
        """Ask the key manager if the handshake waits for it; return whether it did."""
        if self._asked is None:
            return False
        (request, manager), self._asked = self._asked, None
        # Not abandoned on cancellation: the keys have to be wiped.
        return self.deliver(await anyio.to_thread.run_sync(fetch_keys, request, manager))


class _Stream(ByteStream):
    """The transport of one connection. If the handshake waits for keys, receiving waits for them."""

    def __init__(self, stream: Any, driver: _StreamDriver) -> None:
        self._stream = stream
        self._driver = driver

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if await self._driver.answer():
            # No new bytes: the handshake goes on.
            return b""
        data: bytes = await self._stream.receive(max_bytes)
        return data

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        self._driver.give_up()
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
    """Wrap a stream as `TLSStream.wrap` does; `extra(TLSAttribute.ssl_object).qkd` says what protects it.

    Raises the same errors as `TLSStream.wrap` and `QKDContext.wrap_socket`. A cancellation waits for the
    answer of a KMS that has been asked.
    """
    driver = _StreamDriver()
    token = driver_in_charge.set(driver)
    try:
        tls = await TLSStream.wrap(
            _Stream(stream, driver),
            server_side=server_side,
            hostname=hostname,
            ssl_context=context,
            standard_compatible=standard_compatible,
        )
    finally:
        driver_in_charge.reset(token)
    connection: Any = tls.extra(TLSAttribute.ssl_object)  # noqa: S610 - not Django's
    try:
        # The server may have chosen another context, by the name that the client asks for.
        checked(connection, getattr(connection, "context", context) if server_side else context, "anyio")
    except BaseException:
        await aclose_forcefully(tls)
        raise
    return tls
