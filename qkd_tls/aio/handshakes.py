"""The handshake on one of asyncio's transports: it takes turns with others, and never waits for a KMS."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from typing import NoReturn

from kms_client import KeyManager
from qkd_tls.aio.kms_threads import FetchResult, ask_in_thread
from qkd_tls.aio.turns import Turns
from qkd_tls.endpoint import HoldingDriver, KeyRequest, KeysWanted, driver_in_charge
from qkd_tls.errors import ssl_error

__all__ = ["LoopDriver", "TransportDriver", "driving"]


class LoopDriver(HoldingDriver, abc.ABC):
    """A driver that asks the key manager in another thread; the base of those for transports and sockets."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._claimed = False
        self._asked: KeyRequest | None = None

    def claim(self) -> bool:
        """Return True for the first connection only: asyncio's callbacks run in this context for ever."""
        first, self._claimed = not self._claimed, True
        return first

    def fetch(self, request: KeyRequest, manager: KeyManager) -> NoReturn:
        """Ask once, and have the answer delivered."""
        if request is not self._asked:
            self._asked = request
            ask_in_thread(self._loop, manager, request, self._deliver)
        raise KeysWanted(request)

    def _deliver(self, result: FetchResult) -> None:
        self._asked = None
        try:
            waiting = self.deliver(result)
        except Exception as error:  # noqa: BLE001 - an observer's, say
            self._fail(error)
        else:
            if waiting:
                self._go_on()

    @abc.abstractmethod
    def _go_on(self) -> None:
        """Go on with the handshake: the key manager has answered."""

    @abc.abstractmethod
    def _fail(self, error: Exception) -> None:
        """End the handshake with an error that is not one of TLS."""


class TransportDriver(LoopDriver):
    """The driver of a `QKDObject`'s handshake, which one of asyncio's transports runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.BaseTransport) -> None:
        super().__init__(loop)
        self._transport = transport
        self._queued = self._on = False
        peer = transport.get_extra_info("peername")
        self.server_port = peer[1] if isinstance(peer, tuple) else None

    def take_turn(self) -> None:
        """Wait for the handshake's turn, with the transport paused."""
        if self._on:
            return
        # The end of the stream must not overtake what came before it.
        self._transport.pause_reading()  # type: ignore[attr-defined]
        if not self._queued:
            self._queued = True
            Turns.of(self._loop).queue(self._take_turn)
        raise ssl_error(ssl.SSLWantReadError, "The operation did not complete (waiting for its turn)")

    def take_last_words(self, outgoing: ssl.MemoryBIO) -> None:
        """Send the last bytes of a failed handshake, which asyncio would drop."""
        self._transport.write(outgoing.read())  # type: ignore[attr-defined]

    def _take_turn(self) -> None:
        self._queued, self._on = False, True
        try:
            if not self._transport.is_closing():
                self._transport.resume_reading()  # type: ignore[attr-defined]
            self._go_on()
        finally:
            self._on = False

    def _deliver(self, result: FetchResult) -> None:
        if self._transport.is_closing():
            self.give_up()
        super()._deliver(result)

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
def driving(loop: asyncio.AbstractEventLoop, transport: asyncio.BaseTransport) -> Iterator[None]:
    """Give a driver of its own to the connection that is made in the block, on this transport."""
    driver = TransportDriver(loop, transport)
    token = driver_in_charge.set(driver)
    try:
        yield
    except BaseException:
        driver.give_up()
        raise
    finally:
        driver_in_charge.reset(token)
