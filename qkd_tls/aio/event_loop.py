"""asyncio over hybrid connections: asyncio's own functions by another name, and the loop never waits for a KMS.

asyncio's own TLS transport runs the connection, over a `QKDObject`. What is added: while that shakes hands, the key
manager is called in another thread, and the transport is woken up with the answer. Handshakes that come together take
turns: the loop sees to everything else between them. A program that calls asyncio's
functions itself, or a library does, gets the same by running in an `EventLoop`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import ssl as stdlib_ssl
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from socket import socket as Socket
from typing import Any, Final, NoReturn, TypeVar

from kms_client import KeyManager, KMSError, KMSUnavailable, QKDKey, wipe_keys
from qkd_tls.context import QKDContext
from qkd_tls.endpoint import KeyRequest, KeysWanted
from qkd_tls.engine import Engine
from qkd_tls.errors import QKDError, ssl_error
from qkd_tls.fetch import fetch_keys
from qkd_tls.socket import QKDSocket
from qkd_tls.sslobject import QKDObject, adopter

__all__ = [
    "MAX_KMS_REQUESTS",
    "EventLoop",
    "create_connection",
    "create_server",
    "open_connection",
    "start_server",
    "start_tls",
    "upgrade_streams",
    "wrap_socket",
]

_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)

MAX_KMS_REQUESTS: Final = 64
"""Requests to key managers under way at once in this process, each in a thread of its own; further ones wait."""

_LIMIT: Final = 1 << 16
_SLICE: Final = 0.005
"""Seconds of handshakes at a time; one step that has begun, of some milliseconds, is finished."""
_log: Final = logging.getLogger("qkd_tls")


# --- many handshakes at once


class _Turns:
    """The handshakes of one loop take turns. asyncio does everything that is ready before it looks at anything else."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object] | asyncio.Future[None]] = deque()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Turns:
        return _turns.setdefault(loop, cls())

    def queue(self, work: Callable[[], object] | asyncio.Future[None]) -> None:
        """Do this when its turn comes; it must not raise."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._take)
        self._waiting.append(work)

    async def wait(self) -> None:
        """For a turn, which lasts until the caller next waits for something."""
        turn = asyncio.get_running_loop().create_future()
        self.queue(turn)
        await turn

    def _take(self) -> None:
        end = time.monotonic() + _SLICE
        while self._waiting and time.monotonic() < end:
            work = self._waiting.popleft()
            if not isinstance(work, asyncio.Future):
                work()
            elif not work.done():
                work.set_result(None)
                # Its time cannot be measured here.
                break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._take)


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = weakref.WeakKeyDictionary()


# --- asking the key manager in another thread

_threads: concurrent.futures.ThreadPoolExecutor | None = None


def _after_fork_in_child() -> None:
    # Threads do not survive a fork.
    global _threads
    _threads = None


os.register_at_fork(after_in_child=_after_fork_in_child)


def _ask_in_thread(
    loop: asyncio.AbstractEventLoop,
    manager: KeyManager | None,
    request: KeyRequest,
    deliver: Callable[[list[QKDKey] | KMSError], None],
) -> None:
    """Call the key manager; `deliver` is called in the loop. Where the loop is closed by then, the keys are wiped."""
    assert manager is not None

    def hand_over(done: concurrent.futures.Future[list[QKDKey] | KMSError]) -> None:
        result = done.result()
        try:
            loop.call_soon_threadsafe(deliver, result)
        except RuntimeError:
            wipe_keys([] if isinstance(result, KMSError) else result)

    def submit(_: object) -> None:
        global _threads
        if _threads is None:
            _threads = concurrent.futures.ThreadPoolExecutor(
                MAX_KMS_REQUESTS, thread_name_prefix="qkd-tls-kms"
            )
        _threads.submit(_fetch, request, manager).add_done_callback(hand_over)

    # One at a time: many threads that begin together take the interpreter from the loop.
    turn = loop.create_future()
    turn.add_done_callback(submit)
    _Turns.of(loop).queue(turn)


def _fetch(request: KeyRequest, manager: KeyManager) -> list[QKDKey] | KMSError:
    try:
        return fetch_keys(request, manager)
    except BaseException as error:  # noqa: BLE001
        # A fault of the key manager's must not leave the connection hanging; the traceback is for who maintains it.
        _log.exception("the key manager %s failed", manager.name)
        return KMSUnavailable(
            f"the key manager failed with {type(error).__name__}",
            kms=manager.name,
            peer=request.peer_sae_id,
            hint="see the traceback in the log of this program",
        )


class _Handshake:
    """What is added to the handshake on one of asyncio's transports."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.BaseTransport) -> None:
        self._loop, self._transport = loop, transport
        self._asked: KeyRequest | None = None
        self._connection: QKDObject | None = None
        self._adopted = False
        self._queued = self._on = False
        peer = transport.get_extra_info("peername")
        self.server_port: int | None = peer[1] if isinstance(peer, tuple) else None

    def adopt(self, connection: QKDObject, engine: Engine) -> None:
        """Look after this connection. Only the first: asyncio's callbacks go on in this context for ever."""
        if self._adopted:
            return
        self._adopted, self.server_port = True, None
        self._connection = connection

        def ask(request: KeyRequest) -> NoReturn:
            if request is not self._asked:
                self._asked = request
                _ask_in_thread(self._loop, connection.context.key_manager, request, self._deliver)
            raise KeysWanted(request)

        connection._ask = ask
        connection._turn = self._wait_for_turn
        # asyncio drops what a failed handshake still has to say.
        connection._farewell = self._transport.write  # type: ignore[attr-defined]

    def give_up(self) -> None:
        """The handshake will not go on: wipe what was to be used, and keys that are still to come."""
        if self._connection is not None and self._connection._engine is not None:
            self._connection._engine.abort()

    def _wait_for_turn(self) -> None:
        if self._on:
            return
        # The end of the stream must not overtake what came before it.
        self._transport.pause_reading()  # type: ignore[attr-defined]
        if not self._queued:
            self._queued = True
            _Turns.of(self._loop).queue(self._take_turn)
        raise ssl_error(stdlib_ssl.SSLWantReadError, "The operation did not complete (waiting for its turn)")

    def _take_turn(self) -> None:
        self._queued, self._on = False, True
        try:
            if not self._transport.is_closing():
                self._transport.resume_reading()  # type: ignore[attr-defined]
            self._go_on()
        finally:
            self._on = False

    def _deliver(self, result: list[QKDKey] | KMSError) -> None:
        self._asked = None
        assert self._connection is not None and self._connection._engine is not None
        if self._transport.is_closing():
            self.give_up()
        try:
            self._connection._engine.keys(result)
        except Exception as error:  # noqa: BLE001
            self._fail(error)
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._transport.is_closing():
            return
        try:
            # No new bytes: asyncio's TLS goes on with the handshake.
            self._transport.get_protocol().buffer_updated(0)  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # A warning made an error, an observer that fails: asyncio catches TLS errors only here, and would wait on.
        self.give_up()
        self._transport._fatal_error(error, "the handshake failed")  # type: ignore[attr-defined]


@contextlib.contextmanager
def _adopting(loop: asyncio.AbstractEventLoop, transport: asyncio.BaseTransport) -> Iterator[None]:
    keeper = _Handshake(loop, transport)
    token = adopter.set(keeper)
    try:
        yield
    except BaseException:
        keeper.give_up()
        raise
    finally:
        adopter.reset(token)


# --- transports and protocols


class _Gate(asyncio.Protocol):
    """Stands in for the application's protocol until TLS is there, and keeps what comes before it is connected."""

    def __init__(self) -> None:
        self._early = bytearray()
        self._ended = False
        self._lost: tuple[Exception | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The peer's first bytes are for TLS.
        transport.pause_reading()  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._early += data

    def eof_received(self) -> None:
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
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


class _Incoming(_Gate):
    """A server's side of one connection, from its first byte on."""

    def __init__(
        self, factory: Callable[[], asyncio.BaseProtocol], context: QKDContext, **timeouts: Any
    ) -> None:
        super().__init__()
        self._factory, self._context, self._timeouts = factory, context, timeouts
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._task = asyncio.get_running_loop().create_task(self._upgrade(transport))

    async def _upgrade(self, transport: Any) -> None:
        try:
            await _Turns.of(asyncio.get_running_loop()).wait()
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
    """As `loop.start_tls`; raises what `QKDContext.wrap_socket` raises."""
    loop = asyncio.get_running_loop()
    with _adopting(loop, transport):
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
    """As `loop.create_connection`; `tcp` are its other keyword arguments (`sock`, `family`, `local_addr`...).

    `transport.get_extra_info("ssl_object").qkd` says what protects the connection.
    """
    if server_hostname is None:
        if not host:
            raise ValueError("You must set server_hostname when using ssl without a host")
        server_hostname = host
    loop = asyncio.get_running_loop()
    await _Turns.of(loop).wait()
    raw, gate = await loop.create_connection(_Gate, host, port, **tcp)
    return await _over_tls(
        raw,
        gate,
        protocol_factory,
        ssl,
        server_hostname=server_hostname,
        ssl_handshake_timeout=ssl_handshake_timeout,
        ssl_shutdown_timeout=ssl_shutdown_timeout,
    )


async def _over_tls(
    raw: asyncio.Transport,
    gate: _Gate,
    protocol_factory: Callable[[], _Protocol],
    context: QKDContext,
    **options: Any,
) -> tuple[asyncio.Transport, _Protocol]:
    try:
        await _Turns.of(asyncio.get_running_loop()).wait()
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
    """As `loop.create_server`; `tcp` are its other keyword arguments.

    A handshake that fails for want of a QKD key is logged as a warning to the logger "qkd_tls", others as debug.
    """
    return await asyncio.get_running_loop().create_server(
        lambda: _Incoming(
            protocol_factory,
            ssl,
            ssl_handshake_timeout=ssl_handshake_timeout,
            ssl_shutdown_timeout=ssl_shutdown_timeout,
        ),
        host,
        port,
        **tcp,
    )


# --- streams


async def open_connection(
    host: str | None = None,
    port: int | None = None,
    *,
    ssl: QKDContext,
    limit: int = _LIMIT,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As `asyncio.open_connection`; `limit` in bytes, `options` are those of `create_connection`."""
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
    """As `asyncio.start_server`; `limit` in bytes, `options` are those of `create_server`."""
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
    """As `StreamWriter.start_tls`: the streams of a plain connection go on over TLS (STARTTLS)."""
    with _adopting(asyncio.get_running_loop(), writer.transport):
        await writer.start_tls(sslcontext, server_hostname=server_hostname, **timeouts)


# --- sockets


async def wrap_socket(
    sock: Socket,
    context: QKDContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    handshake_timeout: float = 60.0,
) -> QKDSocket:
    """Take over a connected TCP socket and shake hands; for programs that move the data themselves.

    Args:
        handshake_timeout: seconds for the whole handshake, the KMS included.

    Returns:
        A non-blocking socket, for `loop.add_reader` and `loop.add_writer`. Mind its `pending()`.

    Raises what `QKDContext.wrap_socket` raises; the socket is closed then.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    tls = context.wrap_socket(
        sock, server_side=server_side, server_hostname=server_hostname, do_handshake_on_connect=False
    )
    tls._ask = _keys_wanted
    try:
        async with asyncio.timeout(handshake_timeout):
            await _shake_hands(loop, tls)
    except TimeoutError:
        tls.close()
        raise TimeoutError(f"The handshake operation timed out after {handshake_timeout:g} seconds") from None
    except BaseException:
        tls.close()
        raise
    return tls


def _keys_wanted(request: KeyRequest) -> NoReturn:
    raise KeysWanted(request)


async def _shake_hands(loop: asyncio.AbstractEventLoop, tls: QKDSocket) -> None:
    while True:
        waiting = loop.create_future()
        await _Turns.of(loop).wait()
        try:
            tls.do_handshake()
            return
        except KeysWanted as wanted:
            engine = tls._engine
            assert engine is not None

            def deliver(
                result: list[QKDKey] | KMSError, engine: Engine = engine, waiting: Any = waiting
            ) -> None:
                try:
                    engine.keys(result)
                except Exception as error:  # noqa: BLE001 - an observer's, say
                    waiting.set_exception(error)
                _wake(waiting)

            _ask_in_thread(loop, tls.context.key_manager, wanted.request, deliver)
            await waiting
        except stdlib_ssl.SSLWantReadError:
            loop.add_reader(tls, _wake, waiting)
            try:
                await waiting
            finally:
                loop.remove_reader(tls)
        except stdlib_ssl.SSLWantWriteError:
            loop.add_writer(tls, _wake, waiting)
            try:
                await waiting
            finally:
                loop.remove_writer(tls)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


# --- the loop


class EventLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits for a KMS, whoever calls its functions with a `QKDContext`.

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
        raw, gate = await super().create_unix_connection(_Gate, path, sock=sock)
        return await _over_tls(raw, gate, protocol_factory, ssl, server_hostname=server_hostname, **options)

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
            lambda: _Incoming(protocol_factory, ssl, **timeouts), path, **options
        )

    async def connect_accepted_socket(
        self, protocol_factory: Any, sock: Any, *, ssl: Any = None, **options: Any
    ) -> Any:
        """See `asyncio.loop.connect_accepted_socket`."""
        if not isinstance(ssl, QKDContext):
            return await super().connect_accepted_socket(protocol_factory, sock, ssl=ssl, **options)
        raw, gate = await super().connect_accepted_socket(_Gate, sock)
        return await _over_tls(raw, gate, protocol_factory, ssl, server_side=True, **options)

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **options: Any) -> Any:
        """See `asyncio.loop.start_tls`."""
        if not isinstance(sslcontext, QKDContext):
            return await super().start_tls(transport, protocol, sslcontext, **options)
        with _adopting(self, transport):
            return await super().start_tls(transport, protocol, sslcontext, **options)
