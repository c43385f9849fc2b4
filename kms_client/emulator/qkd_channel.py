"""The authenticated classical channel of a side: its sessions over connections, its reserve, its figures."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from kms_client.emulator.link.authentication.authenticators import Authenticator, Certificates
from kms_client.emulator.link.authentication.channel import ClassicalChannel
from kms_client.emulator.link.authentication.interceptor import Interceptor
from kms_client.emulator.link.authentication.reserve import Direction, KeyReserve
from kms_client.emulator.link.authentication.session import Rebootstrap, Session
from kms_client.emulator.link.messages import Part
from kms_client.emulator.qkd_wire import Streams

__all__ = ["AnchorFile", "Authentication", "WireConversation", "certificates"]

_SILENCE: Final = 10.0  # seconds in which the other side must say what it has to say
_CHUNK: Final = 1 << 18


class _Wire:
    """The connection, and the man in the middle of it if there is one."""

    def __init__(self, streams: Streams, middle: Callable[[], str] | None) -> None:
        self._reader, self._writer = streams
        self._middle = middle
        self._out, self._in = Interceptor(), Interceptor()

    async def write(self, data: bytes) -> None:
        self._writer.write(self._through(self._out, data))
        await self._writer.drain()

    async def read(self) -> bytes:
        data = await self._reader.read(_CHUNK)
        if not data:
            raise EOFError
        return self._through(self._in, data)

    def _through(self, interceptor: Interceptor, data: bytes) -> bytes:
        if self._middle is None:
            return data
        interceptor.attack = self._middle()
        return interceptor.feed(data)


class WireConversation:
    """One session on the classical channel."""

    def __init__(self, wire: _Wire, channel: ClassicalChannel) -> None:
        """Continue after the start of the session."""
        self._wire = wire
        self._channel = channel
        self._parts: deque[Part] = deque()
        self._take(b"")

    async def send(self, data: bytes, *, last: bool) -> None:
        """Send a part of a message. Raises OSError, or ChannelError if no key is left for it."""
        await self._wire.write(self._channel.seal(data) if last else self._channel.seal_part(data))

    async def receive(self) -> Part:
        """Return the next part.

        Raises:
            ChannelError: the part is not authentic.
            OSError: the connection has ended (EOFError, too), or nothing came for too long (TimeoutError).
        """
        async with asyncio.timeout(_SILENCE):
            while not self._parts:
                self._take(await self._wire.read())
        return self._parts.popleft()

    def _take(self, data: bytes) -> None:
        self._parts.extend(Part(*received) for received in self._channel.receive_data(data))


class Authentication:
    """The requirements of a side to start sessions, and its state that outlasts one session.

    Args:
        sends: the direction in which this side sends.
        link: names the link, equal on both sides.
        bootstrap: authenticates the channel before there are one-time keys.
        reserve: of one-time keys.
        target: one-time keys of each direction in a full reserve.
        rebootstrap: the reaction to a peer that has lost its keys.
        on_event: called with a sentence for the operator.
    """

    def __init__(
        self,
        sends: Direction,
        link: str,
        bootstrap: Authenticator,
        reserve: KeyReserve,
        *,
        target: int,
        rebootstrap: Rebootstrap,
        on_event: Callable[[str], None],
    ) -> None:
        """Start sessions with `begin`."""
        self.reserve = reserve
        self.failures = 0
        self._sends = sends
        self._link = link
        self._bootstrap = bootstrap
        self._target = target
        self._rebootstrap = rebootstrap
        self._on_event = on_event
        self._bootstraps = 0
        self._channel: ClassicalChannel | None = None

    async def begin(self, streams: Streams, middle: Callable[[], str] | None = None) -> WireConversation:
        """Start a session.

        Args:
            streams: the connection.
            middle: returns the action of a man in the middle, one of
                `kms_client.emulator.link.controls.MIDDLE`; None if there is none.

        Raises:
            ChannelError: the peer cannot prove itself, or has lost its keys and is not allowed to bootstrap
                again.
            OSError: the connection has ended (EOFError, too), or nothing came for too long (TimeoutError).
        """
        wire = _Wire(streams, middle)
        origin = self.reserve.origin
        session = Session(
            self._sends,
            self._link,
            self.reserve,
            self._bootstrap,
            rebootstrap=self._rebootstrap,
            minimum_keys=max(2, self._target // 8),
            on_event=self._on_event,
        )
        await wire.write(session.start())
        async with asyncio.timeout(_SILENCE):
            while session.channel is None:
                await wire.write(session.receive_data(await wire.read()))
        if self.reserve.origin != origin:
            self._bootstraps += 1
        self._channel = session.channel
        return WireConversation(wire, session.channel)

    def figures(self) -> dict[str, Any]:
        """Return figures for operators; see `kms_client.emulator.link.figures.Figures.authentication`."""
        if self._channel is None:
            mode = "nothing yet"
        else:
            mode = "one-time keys" if self._channel.one_time else self._bootstrap.name
        return {
            "mode": mode,
            "reserve_keys": self.reserve.level,
            "reserve_target": self._target,
            "made_bits": self.reserve.made_bits,
            "spent_bits": self.reserve.spent_bits,
            "bootstraps": self._bootstraps,
            "failures": self.failures,
        }


class AnchorFile:
    """A file of mode 0600 that keeps the anchor of a reserve over restarts; it is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        """Remember the path; nothing is read yet."""
        self._path = path

    def reserve(self) -> KeyReserve:
        """Return a reserve with the anchor of the file, if there is one.

        Raises:
            ValueError: the file is not an anchor file.
        """
        try:
            found = json.loads(self._path.read_text("utf-8"))
            return KeyReserve(bytes.fromhex(found["anchor"]), proven=found["proven"], keep=self.keep)
        except FileNotFoundError:
            return KeyReserve(keep=self.keep)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._path} is no anchor of a link: remove it on both sides") from None

    def keep(self, anchor: bytes | None, proven: bool) -> None:
        """Write the anchor, or remove the file if it is None."""
        if anchor is None:
            self._path.unlink(missing_ok=True)
            return
        new = self._path.with_suffix(".new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump({"anchor": anchor.hex(), "proven": proven}, file)
        new.replace(self._path)


def certificates(cert: Path, key: Path, ca: Path, peer_id: str) -> Certificates:
    """Return authentication by the certificate of this side's KME, and that of its peer.

    Raises:
        OSError: a file cannot be read.
        ValueError: the key is neither P-256, P-384 nor ML-DSA, or does not match the certificate.
    """
    private = load_pem_private_key(key.read_bytes(), None)
    chain = x509.load_pem_x509_certificates(cert.read_bytes())
    authorities = x509.load_pem_x509_certificates(ca.read_bytes())
    return Certificates(private, chain, authorities, peer_id)  # type: ignore[arg-type]  # it checks the kind
