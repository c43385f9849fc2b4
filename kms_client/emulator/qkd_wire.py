"""The two channels of a link between its sides, as TCP connections: the fibre and the classical channel.

Side A listens, side B connects twice for each session. Each connection begins with `_MAGIC`, one byte for its
kind, and the session's 16 random bytes, which join them. After that the fibre carries frames of photons from
A to B: number (4 bytes) and length (4), big-endian, and the photons. The content of the classical channel is
defined in `kms_client.emulator.link.authentication`.

The connection that stands in for the fibre is not protected: an eavesdropper on it sees the photons that
pass, which is impossible on a real fibre. So it belongs on loopback, or on a private network.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from kms_client.emulator.link.photonics.line import Photons

__all__ = ["Channels", "FibreConnection", "FibreListener", "Streams", "connect"]

_MAGIC: Final = b"qkd-link/1 "
_FIBRE, _CLASSICAL = b"f", b"c"
_JOIN_BYTES: Final = 16
_JOIN_TIMEOUT: Final = 5.0  # seconds from the first connection of a session to the second
_MAX_WAITING: Final = 8  # connections that wait for their second
_HEAD: Final = struct.Struct(">II")
_MAX_FRAME: Final = 1 << 28  # bytes
_DEAD_AFTER: Final = 10  # seconds without any answer from the other host

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class FibreConnection:
    """One end of the connection that stands in for the fibre."""

    def __init__(self, streams: Streams) -> None:
        """Take over the connection."""
        self._reader, self._writer = streams

    async def send(self, number: int, photons: Photons) -> None:
        """Send a frame. Raises OSError if the connection has ended."""
        data = photons.to_bytes()
        self._writer.write(_HEAD.pack(number, len(data)))
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self) -> tuple[int, Photons]:
        """Return the next frame. Raises OSError or EOFError if the link ended, ValueError for garbage."""
        number, length = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        if length > _MAX_FRAME:
            raise ValueError(f"a frame of photons has {length} bytes")
        return number, Photons.from_bytes(await self._reader.readexactly(length))


class Channels(NamedTuple):
    """Both channels of a session."""

    fibre: Streams
    classical: Streams

    def abort(self) -> None:
        """End both at once."""
        for _, writer in self:
            writer.transport.abort()


class FibreListener:
    """Side A's end: listens, and joins the connections of a session.

    Args:
        on_session: called with the channels of each new session; they are ended when it returns.
    """

    def __init__(self, on_session: Callable[[Channels], Awaitable[None]]) -> None:
        """Listen with `start`."""
        self._on_session = on_session
        self._waiting: dict[bytes, tuple[bytes, Streams, asyncio.Event]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which is a free one for 0."""
        self._server = await asyncio.start_server(self._accept, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and end all connections."""
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
            await asyncio.wait([task])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._join((reader, writer))
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            pass  # no second connection, or stop()
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _join(self, streams: Streams) -> None:
        reader, writer = streams
        _watch(writer)
        async with asyncio.timeout(_JOIN_TIMEOUT):
            head = await reader.readexactly(len(_MAGIC) + 1 + _JOIN_BYTES)
        kind, join = head[len(_MAGIC) : -_JOIN_BYTES], head[-_JOIN_BYTES:]
        if not head.startswith(_MAGIC) or kind not in (_FIBRE, _CLASSICAL):
            return
        if join in self._waiting:
            other_kind, other, ended = self._waiting.pop(join)
            try:
                if other_kind != kind:
                    both = (streams, other) if kind == _FIBRE else (other, streams)
                    await self._on_session(Channels(*both))
            finally:
                ended.set()
        elif len(self._waiting) < _MAX_WAITING:
            ended = asyncio.Event()
            self._waiting[join] = kind, streams, ended
            try:
                async with asyncio.timeout(_JOIN_TIMEOUT):
                    await ended.wait()
            except TimeoutError:
                if self._waiting.pop(join, None) is None:
                    await ended.wait()  # the second connection has come in time
            finally:
                self._waiting.pop(join, None)


async def connect(host: str, port: int) -> Channels:
    """Open side B's end of a new session. Raises OSError if side A does not listen."""
    join = os.urandom(_JOIN_BYTES)
    opened: list[Streams] = []
    try:
        for kind in (_FIBRE, _CLASSICAL):
            opened.append(await asyncio.open_connection(host, port))
            _, writer = opened[-1]
            _watch(writer)
            writer.write(_MAGIC + kind + join)
    except BaseException:
        for _, writer in opened:
            writer.transport.abort()
        raise
    fibre, classical = opened
    return Channels(fibre, classical)


def _watch(writer: asyncio.StreamWriter) -> None:
    """Notice within seconds when the other host is gone, though an idle link sends nothing."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Not every system has all of them.
    for name, value in (
        ("TCP_KEEPIDLE", _DEAD_AFTER // 2),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", _DEAD_AFTER // 2),
        ("TCP_USER_TIMEOUT", 1000 * _DEAD_AFTER),
        ("TCP_NODELAY", 1),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
