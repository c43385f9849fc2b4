"""Transports and protocols of asyncio over hybrid connections."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

from qkd_tls.aio.handshakes import driving
from qkd_tls.aio.turns import Turns
from qkd_tls.context import QKDContext
from qkd_tls.errors import QKDError

__all__ = ["Gate", "Incoming", "create_connection", "create_server", "over_tls", "start_tls"]

_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)

_log: Final = logging.getLogger("qkd_tls")


class Gate(asyncio.Protocol):
    """A stand-in for the application's protocol until TLS is established; it keeps early data and events."""

    def __init__(self) -> None:
        self._early = bytearray()
        self._ended = False
        self._lost: tuple[Exception | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Leave the peer's first bytes to TLS."""
        transport.pause_reading()  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Keep the data."""
        self._early += data

    def eof_received(self) -> None:
        """Remember the end of the stream."""
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Remember the loss of the connection."""
        self._lost = (exc,)

    def open(self, transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
        """Let the application's protocol take over."""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._early:
            _give(protocol, bytes(self._early))
        if self._ended:
            protocol.eof_received()  # type: ignore[attr-defined]
        if self._lost is not None:
            protocol.connection_lost(*self._lost)


def _give(protocol: Any, data: bytes) -> None:
    if not isinstance(protocol, asyncio.BufferedProtocol):
        protocol.data_received(data)
        return
    while data:
        buffer = memoryview(protocol.get_buffer(len(data)))
        if not buffer:
            raise RuntimeError("get_buffer() returned an empty buffer")
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]


class Incoming(Gate):
    """A server's side of one connection, from its first byte on."""

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], context: QKDContext, **timeouts: Any
    ) -> None:
        super().__init__()
        self._factory, self._context, self._timeouts = factory, context, timeouts
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        super().connection_made(transport)
        self._task = asyncio.get_running_loop().create_task(self._upgrade(transport))

    async def _upgrade(self, transport: Any) -> None:
        try:
            await Turns.of(asyncio.get_running_loop()).wait()
            tls = await start_tls(transport, self, self._context, server_side=True, **self._timeouts)
        except BaseException as error:
            # asyncio leaves it open where it fails at once.
            transport.close()
            if not isinstance(error, OSError):
                raise
            # There is nobody to raise it to. asyncio says no more than this in debug mode.
            _log.log(
                logging.WARNING if isinstance(error, QKDError) else logging.DEBUG,
                "the handshake with %s failed: %s",
                transport.get_extra_info("peername"),
                error,
            )
            return
        try:
            self.open(tls, self._factory())
        except BaseException:
            tls.abort()
            raise


async def start_tls(
    transport: asyncio.WriteTransport,
    protocol: asyncio.BaseProtocol,
    sslcontext: QKDContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> asyncio.Transport:
    """Start TLS like `loop.start_tls`; raise the same errors as `QKDContext.wrap_socket`."""
    loop = asyncio.get_running_loop()
    with driving(loop, transport):
        upgraded = await loop.start_tls(
            transport,
            protocol,
            sslcontext,
            server_side=server_side,
            server_hostname=server_hostname,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        )
    if upgraded is None:
        # asyncio says nothing of a transport that was aborted meanwhile.
        raise ConnectionAbortedError("the transport was closed during the handshake")
    return upgraded


async def create_connection(
    protocol_factory: Callable[[], _Protocol],
    host: Any = None,
    port: Any = None,
    *,
    ssl: QKDContext,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    **tcp: Any,
) -> tuple[asyncio.Transport, _Protocol]:
    """Connect like `loop.create_connection`; `tcp` are its other arguments (`sock`, `family`, ...).

    `transport.get_extra_info("ssl_object").qkd` says what protects the connection.
    """
    if server_hostname is None:
        if not host:
            raise ValueError("You must set server_hostname when using ssl without a host")
        server_hostname = host
    loop = asyncio.get_running_loop()
    await Turns.of(loop).wait()
    raw, gate = await loop.create_connection(Gate, host, port, **tcp)
    return await over_tls(
        raw,
        gate,
        protocol_factory,
        ssl,
        server_hostname=server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
    )


async def over_tls(
    raw: asyncio.Transport,
    gate: Gate,
    protocol_factory: Callable[[], _Protocol],
    context: QKDContext,
    **options: Any,
) -> tuple[asyncio.Transport, _Protocol]:
    """Shake hands on a connected transport, then let the application's protocol take over from the gate."""
    try:
        await Turns.of(asyncio.get_running_loop()).wait()
        tls = await start_tls(raw, gate, context, **options)
    except BaseException:
        # asyncio leaves it open where it fails at once.
        raw.close()
        raise
    try:
        protocol = protocol_factory()
        gate.open(tls, protocol)
    except BaseException:
        tls.abort()
        raise
    return tls, protocol


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: Any = None,
    port: Any = None,
    *,
    ssl: QKDContext,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    **tcp: Any,
) -> asyncio.Server:
    """Listen like `loop.create_server`; `tcp` are its other keyword arguments.

    A handshake that fails for want of a QKD key is logged as a warning to the logger "qkd_tls", other
    failures as debug.
    """
    return await asyncio.get_running_loop().create_server(
        lambda: Incoming(
            protocol_factory,
            ssl,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        ),
        host,
        port,
        **tcp,
    )
