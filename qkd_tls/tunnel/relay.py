"""The relay: moves bytes between two connected sockets, in both directions, until both have ended.

Each direction is a `_Pump`. It reads into a buffer that all connections of the process share, and writes the
bytes at once. Bytes that the other side does not take are kept, and no more are read until they have gone:
that is the back-pressure, and the reason why an idle connection needs no buffer. The sockets must be
non-blocking, as a `QKDSocket` is.

The end of a stream is passed on as an end only if it is one. Everything else (a reset, TLS that ends without
close_notify, a time limit) becomes a reset at the other side, so that no reader takes a cut for the end of
the data.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["BUFFER_SIZE", "End", "Relay", "reset"]

_log: Final = logging.getLogger("qkd_tls.tunnel")

BUFFER_SIZE: Final = 1 << 18
"""Bytes read at a time, and the most that a direction keeps while the other side does not take them."""
_PASSES: Final = 8
"""Buffers that a direction moves before other connections have their turn."""
_LINGER_RESETS: Final = struct.pack("ii", 1, 0)
# One for the process: everything runs in one thread, and nothing stays in it.
_buffer: Final = memoryview(bytearray(BUFFER_SIZE))
_NOTHING: Final = memoryview(b"")


def reset(sock: socket.socket) -> None:
    """Close without notice: TCP sends RST, and TLS no close_notify.

    Unix sockets have no reset: their peer sees an end, or an error if bytes of its own were unread.
    """
    if sock.fileno() < 0:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESETS)
    # `QKDSocket.close` would say goodbye first.
    os.close(sock.detach())


@dataclass(frozen=True)
class End:
    """The end of a connection. `clean`: every byte of both directions was passed on, and both ends."""

    reason: str
    clean: bool = False
    error: str | None = None


class _Pump:
    """One direction. It waits for at most one thing: `waiting`, a socket and True for writing."""

    __slots__ = (
        "_count",
        "_ended",
        "_flushed",
        "_relay",
        "_rest",
        "_scheduled",
        "done",
        "sink",
        "source",
        "total",
        "waiting",
    )

    def __init__(
        self,
        relay: Relay,
        source: socket.socket,
        sink: socket.socket,
        count: Callable[[int], object],
        first: bytes,
    ) -> None:
        self._relay, self.source, self.sink = relay, source, sink
        self._count = count
        self._rest = memoryview(first)
        self._scheduled = False
        self._ended = False
        self._flushed = False
        self.waiting: tuple[socket.socket, bool] | None = None
        self.done = False
        self.total = 0
        """Bytes read."""

    @property
    def busy(self) -> bool:
        """True if there are bytes that the other side has not taken."""
        return bool(self._rest)

    def end(self) -> None:
        """Read no more; pass on the bytes read so far, and then an end."""
        self._ended = True
        if not self.done and not self._rest and not self._scheduled:
            self._flush()

    def event(self) -> None:
        """Go on: the awaited event has happened."""
        if not self._scheduled:
            self._run()

    def _later(self) -> None:
        self._scheduled = False
        if not self._relay.ended.done() and not self.done:
            self._run()

    def _run(self) -> None:
        try:
            self._move()
        except Exception as error:  # noqa: BLE001
            # A fault of this program's ends this connection, in the same way as any other cut.
            _log.exception("a connection failed")
            self._relay.abort("internal error", type(error).__name__)

    def _move(self) -> None:
        moved = 0
        reading = False
        try:
            for _ in range(_PASSES):
                reading = False
                if self._rest:
                    self._write(self._rest)
                if self._flushed:
                    self._finish()
                    return
                if self._ended:
                    self._flush()
                    return
                reading = True
                size = self.source.recv_into(_buffer)
                if not size:
                    self._ended = True
                    continue
                moved += size
                reading = False
                self._write(_buffer[:size])
            # Decrypted bytes may wait in memory, where no event tells of them.
            self._scheduled = True
            self._relay.loop.call_soon(self._later)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
            # TLS may have to read before it can write, and the other way round.
            write = isinstance(want, ssl.SSLWantWriteError) or (
                isinstance(want, BlockingIOError) and not reading
            )
            self._relay.wait(self, self.source if reading else self.sink, write=write)
        except OSError as error:
            self._relay.fail(self.source if reading else self.sink, error)
        finally:
            if moved:
                self.total += moved
                self._count(moved)

    def _write(self, data: memoryview) -> None:
        """Write all of it; if that is impossible, keep the rest and raise the want."""
        size = len(data)
        try:
            while data:
                data = data[self.sink.send(data) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            # TLS wants the same bytes again, though not from the same place.
            self._rest = memoryview(bytes(data)) if data.obj is _buffer.obj else data
            raise
        finally:
            if len(data) < size:
                self._relay.last_byte = self._relay.loop.time()
        self._rest = _NOTHING

    def _flush(self) -> None:
        """Wait for room once more after the last byte: a close_notify that did not fit would be lost."""
        self._flushed = True
        self._relay.wait(self, self.sink, write=True)

    def _finish(self) -> None:
        self.done = True
        self._relay.forget(self)
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._relay.fail(self.sink, error)
        else:
            self._relay.finished()


class Relay:
    """A relay of bytes between the plain and the hybrid side of one connection.

    Args:
        plain: non-blocking socket of the plain side.
        hybrid: established, non-blocking `QKDSocket`. A TLS end without close_notify must raise an error:
            `suppress_ragged_eofs` off.
        to_hybrid: called with each number of bytes read at the plain side.
        to_plain: called with each number of bytes read at the hybrid side.
        preface: bytes that the plain side gets first.

    `ended` gets the result; both sockets are closed then.
    """

    def __init__(
        self,
        plain: socket.socket,
        hybrid: socket.socket,
        *,
        to_hybrid: Callable[[int], object],
        to_plain: Callable[[int], object],
        preface: bytes = b"",
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[End] = self.loop.create_future()
        self.last_byte = self.loop.time()
        """The time at which the last byte was passed on, on the loop's clock."""
        self._plain, self._hybrid = plain, hybrid
        self._retired: str | None = None
        self._up = _Pump(self, plain, hybrid, to_hybrid, b"")
        self._down = _Pump(self, hybrid, plain, to_plain, preface)

    def start(self) -> None:
        """Begin. TLS may hold bytes already, so that the first reads wait for no event."""
        for pump in (self._up, self._down):
            if not self.ended.done():
                pump.event()

    @property
    def to_hybrid(self) -> int:
        """Bytes read at the plain side so far."""
        return self._up.total

    @property
    def to_plain(self) -> int:
        """Bytes read at the hybrid side so far."""
        return self._down.total

    @property
    def busy(self) -> bool:
        """True if there are bytes on their way that a socket has not taken."""
        return self._up.busy or self._down.busy

    def retire(self, reason: str) -> None:
        """End gently: read no more at the plain side and tell the hybrid side so; the other direction goes on.

        Later data of the plain side is not read, and answered with a reset when the connection closes.
        """
        if not self.ended.done() and self._retired is None:
            self._retired = reason
            self._up.end()

    def abort(self, reason: str, error: str | None = None) -> None:
        """Reset both sides."""
        self._end(End(reason, error=error))

    # --- for the pumps

    def wait(self, pump: _Pump, sock: socket.socket, *, write: bool) -> None:
        """Call the pump when the socket can be read or written."""
        if pump.waiting == (sock, write):
            return
        self.forget(pump)
        pump.waiting = (sock, write)
        add = self.loop.add_writer if write else self.loop.add_reader
        add(sock.fileno(), self._happened, sock, write)

    def forget(self, pump: _Pump) -> None:
        """Stop waiting, unless the other direction waits for the same."""
        waiting, pump.waiting = pump.waiting, None
        if waiting is not None and waiting not in (self._up.waiting, self._down.waiting):
            sock, write = waiting
            (self.loop.remove_writer if write else self.loop.remove_reader)(sock.fileno())

    def _happened(self, sock: socket.socket, write: bool) -> None:
        for pump in (self._up, self._down):
            if pump.waiting == (sock, write) and not self.ended.done():
                pump.event()

    def finished(self) -> None:
        """Note that one direction has passed on its end."""
        if self._up.done and self._down.done:
            unread = self._retired is not None and _has_bytes(self._plain)
            self._end(
                End(self._retired, error="the plain side went on sending")
                if self._retired is not None and unread
                else End(self._retired or "eof", clean=True)
            )

    def fail(self, sock: socket.socket, error: OSError) -> None:
        """Handle a socket's failure: end the connection."""
        side = "plain" if sock is self._plain else "hybrid"
        if isinstance(error, ssl.SSLEOFError):
            self._end(End("truncated", error=f"{side} side: TLS ended without close_notify"))
        elif isinstance(error, ssl.SSLError):
            self._end(End("tls", error=f"{side} side: {error.args[-1]}"))
        else:
            self._end(End(f"reset by {side} side", error=f"{side} side: {error.strerror or error}"))

    def _end(self, end: End) -> None:
        if self.ended.done():
            return
        for pump in (self._up, self._down):
            self.forget(pump)
        if end.clean:
            self._plain.close()
            self._hybrid.close()
        else:
            reset(self._hybrid)
            reset(self._plain)
        self.ended.set_result(end)


def _has_bytes(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
