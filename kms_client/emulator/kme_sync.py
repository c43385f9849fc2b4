"""Agreement of two KMEs, within one process, on the keys that both hold and the SAEs they are for."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple, Protocol

from kms_client.emulator.source import KeySource
from kms_client.emulator.store import Assignment, KeyStore, NotFound

__all__ = ["DirectSync", "NewKey", "PeerKME", "PeerKMEDown", "feed", "new_keys"]

_TICK = 0.02  # seconds between looks at the source


class PeerKMEDown(Exception):
    """The other KME could not be told, or refused: the keys concerned must not be delivered."""


class PeerKME(Protocol):
    """The other KME, as one sees it."""

    @property
    def up(self) -> bool:
        """True if the other KME can be reached, as far as is known."""
        ...

    async def assign(self, assignments: list[Assignment]) -> None:
        """Tell the other KME the SAEs that keys go to; return once it has confirmed.

        Raises:
            PeerKMEDown: it has not confirmed, or that is unknown.
        """
        ...


class NewKey(NamedTuple):
    """A key as it leaves the source."""

    key_id: str
    secret: bytearray
    for_a: bool  # masters at side A may get it; else those at side B


def new_keys(source: KeySource, number: int, store_a: KeyStore) -> Iterator[NewKey]:
    """Yield up to `number` keys, each for the direction that has fewer; none beyond the buffers' size.

    The caller stores each key before asking for the next.
    """
    for _ in range(number):
        for_a = store_a.available_count <= store_a.held_count
        if min(store_a.available_count, store_a.held_count) >= store_a.max_key_count:
            return
        yield NewKey(str(uuid.uuid4()), source.make(), for_a)


async def feed(source: KeySource, put: Callable[[int], Awaitable[None]]) -> None:
    """Call `put` with the number of keys the source has made, again and again until cancelled."""
    last = time.monotonic()
    while True:
        await asyncio.sleep(_TICK)
        now = time.monotonic()
        await put(source.due(now - last))
        last = now


class DirectSync:
    """A link that joins two stores in one process.

    Args:
        source: of the keys.
        store_a: side A's end.
        store_b: side B's end.
    """

    def __init__(self, source: KeySource, store_a: KeyStore, store_b: KeyStore) -> None:
        """Start without keys, up at both ends."""
        self._source = source
        self._store_a = store_a
        self._store_b = store_b
        self.end_a = _DirectPeer(store_b)
        self.end_b = _DirectPeer(store_a)

    async def put(self, number: int) -> None:
        """Put up to `number` new keys into both stores."""
        if not (self.end_a.up and self.end_b.up):
            return
        for key in new_keys(self._source, number, self._store_a):
            self._store_a.put(key.key_id, key.secret, available=key.for_a)
            self._store_b.put(key.key_id, bytearray(key.secret), available=not key.for_a)

    async def run(self) -> None:
        """Put keys in as the source makes them, until cancelled."""
        await feed(self._source, self.put)


class _DirectPeer:
    def __init__(self, other: KeyStore) -> None:
        self.up = True  # set to False while the KME at the other end is stopped
        self._other = other

    async def assign(self, assignments: list[Assignment]) -> None:
        if not self.up:
            raise PeerKMEDown
        try:
            for assignment in assignments:
                self._other.assign(assignment)
        except NotFound:
            raise PeerKMEDown from None
