"""Agreement of two KMEs on the keys that both hold and the SAEs they are for: JSON lines over mutual TLS.

Side A has the key source and listens, side B connects and connects again. Whenever they are joined, each
reports its unassigned keys and drops those that the other lacks. From then on messages arrive in order, so
that a key is always known at the other end before an assignment names it.

With a key source, this channel carries keys under ordinary TLS: it stands in for the quantum link, without
its protection. If the keys come from an emulated QKD link (`qkd_side`), there is no source, and no key goes
over it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
from pathlib import Path
from typing import Any

from kms_client.emulator.kme_sync import PeerKMEDown, feed, new_keys
from kms_client.emulator.source import KeySource
from kms_client.emulator.store import Assignment, KeyStore, NotFound

__all__ = ["ConnectingSync", "ListeningSync", "client_context"]

_log = logging.getLogger("kms_client.emulator")

_ACK_TIMEOUT = 3.0  # seconds
_RETRY = 0.25  # seconds between attempts to connect
_MAX_LINE = 1 << 25  # bytes: the IDs of some 700,000 keys


class _Sync:
    """The part that both sides share once they are connected."""

    def __init__(self, store: KeyStore, peer_kme_id: str) -> None:
        self._store = store
        self._peer_kme_id = peer_kme_id
        self._writer: asyncio.StreamWriter | None = None
        self._acks: dict[int, asyncio.Future[bool]] = {}
        self._count = 0

    @property
    def up(self) -> bool:
        """True if both ends have agreed on their keys and the connection stands."""
        return self._writer is not None

    async def assign(self, assignments: list[Assignment]) -> None:
        """Tell the other KME and wait for its confirmation; see `PeerKME`."""
        writer = self._writer
        if writer is None:
            raise PeerKMEDown
        self._count += 1
        number = self._count
        ack = self._acks[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(writer, {"type": "assign", "number": number, "assignments": assignments})
            done = await asyncio.wait_for(ack, _ACK_TIMEOUT)
        except TimeoutError:
            # Whether the other end has done it is unknown: start afresh.
            writer.transport.abort()
            raise PeerKMEDown from None
        finally:
            del self._acks[number]
        if not done:
            raise PeerKMEDown

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Agree on the keys and handle messages until the connection ends."""
        try:
            if _common_name(writer) != self._peer_kme_id:
                _log.warning("refused a link: the certificate is not that of %s", self._peer_kme_id)
                return
            told = self._store.unassigned_ids()
            self._send(writer, {"type": "sync", "key_ids": told})
            message = await self._receive(reader)
            dropped = self._store.keep_only(message["key_ids"], told)
            _log.info("link to %s up, %d keys dropped", self._peer_kme_id, dropped)
            self._writer = writer
            await self._joined(writer)
            while True:
                self._handle(await self._receive(reader), writer)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            # No text of the error: it might quote a message that holds a key.
            _log.info("link to %s ended: %s", self._peer_kme_id, type(error).__name__)
        finally:
            if self._writer is writer:
                self._writer = None
                for ack in self._acks.values():
                    if not ack.done():
                        ack.set_result(False)
            writer.transport.abort()

    async def _joined(self, writer: asyncio.StreamWriter) -> None:
        """React once both ends have agreed."""

    def _handle(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        kind = message["type"]
        if kind == "key":
            secret = bytearray(base64.b64decode(message["secret"]))
            self._store.put(message["key_id"], secret, available=message["available"])
        elif kind == "assign":
            try:
                for key_id, parts, size, master, slaves in message["assignments"]:
                    self._store.assign(Assignment(key_id, tuple(parts), size, master, tuple(slaves)))
                done = True
            except NotFound:
                done = False
            self._send(writer, {"type": "ack", "number": message["number"], "done": done})
        elif (ack := self._acks.get(message["number"])) is not None and not ack.done():
            ack.set_result(message["done"])

    @staticmethod
    def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    @staticmethod
    async def _receive(reader: asyncio.StreamReader) -> dict[str, Any]:
        line = await reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        return message


class ListeningSync(_Sync):
    """Side A of a link: holds the source and listens for side B.

    Args:
        store: side A's end.
        source: of the keys; None if they come from elsewhere.
        initial: keys of each direction to start with, put in when side B first connects.
        peer_kme_id: common name that side B's certificate must have.
        context: TLS with the KME's certificate, requiring the peer's.
    """

    def __init__(
        self,
        store: KeyStore,
        source: KeySource | None,
        initial: int,
        peer_kme_id: str,
        context: ssl.SSLContext,
    ) -> None:
        """Listen with `start`."""
        super().__init__(store, peer_kme_id)
        self._source = source
        self._initial = initial
        self._context = context
        self._talks: set[asyncio.Task[None]] = set()
        self._feeding: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which is a free one for 0."""
        self._server = await asyncio.start_server(
            self._accept, host, port, ssl=self._context, limit=_MAX_LINE
        )
        if self._source is not None:
            self._feeding = asyncio.create_task(feed(self._source, self._put))
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and end the connection."""
        self._server.close()
        for task in (self._feeding, *self._talks):
            if task is not None:
                await _cancel(task)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        try:
            if self._writer is not None:
                # Side B came back before the loss of its last connection was noticed here.
                self._writer.transport.abort()
                self._writer = None
            await self._talk(reader, writer)
        except asyncio.CancelledError:
            pass  # stop(); asyncio would log it as an error
        finally:
            self._talks.discard(task)

    async def _joined(self, writer: asyncio.StreamWriter) -> None:
        number, self._initial = 2 * self._initial, 0
        await self._put(number)

    async def _put(self, number: int) -> None:
        if self._writer is None or self._source is None:
            return
        writer = self._writer
        for key in new_keys(self._source, number, self._store):
            self._store.put(key.key_id, key.secret, available=key.for_a)
            secret = base64.b64encode(key.secret).decode()
            self._send(
                writer,
                {"type": "key", "key_id": key.key_id, "available": not key.for_a, "secret": secret},
            )


class ConnectingSync(_Sync):
    """Side B of a link: connects to side A, again and again.

    Args:
        store: side B's end.
        peer_kme_id: common name that side A's certificate must have.
        context: TLS with the KME's certificate, verifying the peer's; not its host name, because the KME's ID
            is checked instead.
    """

    def __init__(self, store: KeyStore, peer_kme_id: str, context: ssl.SSLContext) -> None:
        """Connect with `start`."""
        super().__init__(store, peer_kme_id)
        self._context = context

    def start(self, host: str, port: int) -> None:
        """Connect now and after every loss."""
        self._connecting = asyncio.create_task(self._connect(host, port))

    async def stop(self) -> None:
        """End the connection."""
        await _cancel(self._connecting)

    async def _connect(self, host: str, port: int) -> None:
        while True:
            try:
                streams = await asyncio.open_connection(host, port, ssl=self._context, limit=_MAX_LINE)
            except OSError as error:
                _log.debug("no link to %s yet: %s", self._peer_kme_id, type(error).__name__)
            else:
                await self._talk(*streams)
            await asyncio.sleep(_RETRY)


def client_context(cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """Return TLS settings for side B of a link: its KME's certificate, and verification of the other's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    context.check_hostname = False  # the link checks the KME's ID instead
    context.load_cert_chain(cert, key)
    return context


def _common_name(writer: asyncio.StreamWriter) -> str | None:
    certificate = writer.get_extra_info("peercert") or {}
    names = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    return names[0] if len(names) == 1 else None


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
