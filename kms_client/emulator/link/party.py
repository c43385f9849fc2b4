"""The common part of both sides of a link: a session, and the way from a block's secret bits to keys."""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Final, NamedTuple, Protocol, TypeVar, TypeVarTuple

import numpy as np

from kms_client.emulator.link.arrays import Bits
from kms_client.emulator.link.authentication.reserve import KeyReserve
from kms_client.emulator.link.figures import Block, Figures
from kms_client.emulator.link.messages import (
    LAST_PARTS,
    NO_DOUBT,
    Aborted,
    Conversation,
    Kind,
    LinkError,
    Ready,
    Reason,
    Share,
)
from kms_client.emulator.link.photonics.parameters import CHECK_BASIS, DEFAULT, KEY_BASIS, Source
from kms_client.emulator.link.postprocessing.finite_key import BlockCounts, Security, secret_length
from kms_client.emulator.link.postprocessing.verification import LEAKED_BITS
from kms_client.emulator.link.sifting import Tally

__all__ = [
    "BlockKeys",
    "Offload",
    "Party",
    "SecretKey",
    "Settings",
    "Sink",
    "inline",
    "key_id",
]

_SECURITY: Final = Security()
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class SecretKey(NamedTuple):
    """A key with its ID."""

    key_id: str
    secret: bytearray

    def __repr__(self) -> str:
        return f"<SecretKey {self.key_id}>"


class BlockKeys(NamedTuple):
    """The keys of a block."""

    for_a: list[SecretKey]  # for masters at Alice's side
    for_b: list[SecretKey]


class Sink(Protocol):
    """A store for keys: that of a KME."""

    def room(self) -> tuple[int, int]:
        """Return the numbers of keys that there is room for: for masters at A, for masters at B."""
        ...

    async def wait_for_room(self) -> None:
        """Return when there is room for enough keys to be worth making."""
        ...

    def hold(self, keys: list[SecretKey]) -> None:
        """Store keys for masters at the other side; until `settle` they may be missing there."""
        ...

    def offer(self, keys: list[SecretKey]) -> None:
        """Store keys for masters at this side; until `settle` the other side may lack them."""
        ...

    def settle(self) -> None:
        """Settle the keys in doubt: they are on both sides."""
        ...

    def drop(self) -> None:
        """Forget the keys in doubt that are still stored: they are not on both sides."""
        ...


@dataclass(frozen=True)
class Settings:
    """The settings that both sides must have agreed on beforehand; sizes in bits."""

    source: Source = DEFAULT.source
    security: Security = _SECURITY
    block_bits: int = 1_000_000
    """Sifted bits of the key basis in a block, at least."""
    qber_threshold: float = 0.08
    """Error rate of the check basis above which a block is thrown away."""
    key_size: int = 256
    reserve: int = 64
    """One-time keys of each direction that the reserve is filled up to."""

    def __post_init__(self) -> None:
        if not 100 <= self.block_bits <= 1 << 24:
            raise ValueError(f"a block has 100 to {1 << 24} bits, not {self.block_bits}")
        if not 0 < self.qber_threshold < 0.5:
            raise ValueError(f"the QBER threshold is between 0 and 0.5, not {self.qber_threshold}")
        if self.key_size < 8 or self.key_size % 8:
            raise ValueError(f"key size must be a positive multiple of 8 bits, not {self.key_size}")
        if not 8 <= self.reserve <= 10_000:
            raise ValueError(f"the reserve has 8 to 10000 one-time keys, not {self.reserve}")

    def digest(self) -> bytes:
        """Return 32 bytes that are equal on both sides if the settings are."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).digest()


def key_id(session: bytes, block: int, position: int) -> str:
    """Return the ID of a key: public and the same on both sides, as a UUID of version 8 (RFC 9562)."""
    digest = hashlib.sha256(b"key of a QKD link" + session + struct.pack(">II", block, position)).digest()
    number = int.from_bytes(digest[:16], "big")
    number = number & ~(0xF << 76) | 8 << 76
    return str(uuid.UUID(int=number & ~(0x3 << 62) | 2 << 62))


async def inline(function: Callable[[*_Ts], _T], *arguments: *_Ts) -> _T:
    """Compute here and now; `asyncio.to_thread` leaves the event loop free."""
    return function(*arguments)


class Offload(Protocol):
    """The type of `inline`, or of a function that computes elsewhere."""

    def __call__(self, function: Callable[[*_Ts], _T], *arguments: *_Ts) -> Awaitable[_T]:
        """Compute `function(*arguments)`."""
        ...


class Party:
    """The common part of Alice and Bob.

    Args:
        settings: the same on both sides.
        sink: the destination of keys.
        reserve: of one-time keys.
        capacity: keys of each direction that the sink has room for.
        figures: for operators.
        offload: runs long computations, one call at a time.
        offload_optics: the same for the emulation of the optics, which runs at the same time.
    """

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        reserve: KeyReserve,
        capacity: int,
        figures: Figures,
        offload: Offload = inline,
        offload_optics: Offload = inline,
    ) -> None:
        """Start without doing anything."""
        self.settings = settings
        self.figures = figures
        self.instance = os.urandom(16)
        self.peer_instance: bytes | None = None
        self._sink = sink
        self._reserve = reserve
        self._capacity = capacity
        self._offload = offload
        self._offload_optics = offload_optics
        self._doubt = NO_DOUBT
        self._session = b""  # public, the same on both sides, never used before

    # --- a session

    async def _side_by_side(self, *work: Coroutine[Any, Any, None]) -> None:
        """Run all until the first ends or fails; then cancel the others, and raise the failure."""
        tasks = [asyncio.create_task(part) for part in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _blocks(
        self, conversation: Conversation, make: Callable[[int, Tally], Awaitable[None]]
    ) -> None:
        """Run one block after the other, each made by `make` from its number and an empty tally."""
        for number in count(1):
            tally = Tally()
            try:
                await make(number, tally)
            except Aborted as aborted:
                await self._end(conversation, aborted)
                self.figures.block(self._outcome(number, tally, reason=aborted.reason.text))

    # --- parts of messages

    async def _send(self, conversation: Conversation, kind: Kind, body: bytes = b"", *, last: bool) -> None:
        await conversation.send(bytes([kind]) + body, last=last)

    async def _receive(self, conversation: Conversation, *kinds: Kind) -> tuple[Kind, bytes]:
        """Return the kind and the body of the next part, which must be of one of these kinds.

        Raises:
            Aborted: the other side ends the block.
            LinkError: the part is of another kind.
        """
        data, last = await conversation.receive()
        kind = data[0] if data else 0
        if kind == Kind.ABORT and last and Kind.READY not in kinds:
            try:
                reason = Reason(data[1])
            except (IndexError, ValueError):
                raise LinkError("the other side ends a block without a reason") from None
            raise Aborted(reason, heard=True)
        if kind not in kinds or last != (kind in LAST_PARTS):
            expected = " or ".join(kind.name for kind in kinds)
            raise LinkError(f"the other side sends a message of kind {kind}, {expected} was expected")
        return Kind(kind), data[1:]

    async def _end(self, conversation: Conversation, aborted: Aborted) -> None:
        """End this side's message of a block that gives no key, and await the end of the other's."""
        await self._send(conversation, Kind.ABORT, bytes([aborted.reason]), last=True)
        while not aborted.heard:
            aborted.heard = (await conversation.receive()).last

    # --- what both sides compute

    def _open(self, first: Ready, second: Ready) -> None:
        """Start the session: both sides have reported that they are ready, Bob first."""
        both = first.to_bytes() + second.to_bytes()
        self._session = hashlib.sha256(b"session of a QKD link" + both).digest()[:16]

    def _check_ready(self, ready: Ready) -> None:
        if ready.settings != self.settings.digest():
            raise LinkError(
                "the other side has other settings: give both the same source, block size, QBER threshold, key size"
                " and security parameters"
            )
        self._peer_capacity = ready.capacity

    def _ready(self) -> Ready:
        return Ready(self.instance, os.urandom(16), self.settings.digest(), self._capacity, self._doubt)

    def _check_qber(self, tally: Tally) -> None:
        """Check the error rate. Raises Aborted above the threshold."""
        if tally.qber > self.settings.qber_threshold:
            raise Aborted(Reason.QBER)

    def _estimate(self, tally: Tally) -> float:
        """Return the error rate that Cascade is set up for: the same on both sides, never 0."""
        checked = int(tally.detections[CHECK_BASIS].sum())
        return min((int(tally.errors.sum()) + 1) / (checked + 2), 0.25)

    def _orders(self, number: int) -> bytes:
        """Return the seed of the orders of Cascade's passes."""
        return hashlib.sha256(b"orders" + self._session + struct.pack(">I", number)).digest()

    def _length(self, tally: Tally, leaked: int) -> int:
        """Return the number of secret bits after reconciliation told `leaked` of them."""
        key, check = (tuple(map(int, tally.detections[basis])) for basis in (KEY_BASIS, CHECK_BASIS))
        counts = BlockCounts(_three(key), _three(check), _three(tuple(map(int, tally.errors))))
        length = secret_length(
            counts, self.settings.source, leaked + LEAKED_BITS, self.settings.security
        ).bits
        return min(length, tally.sifted)

    def _cut(self, block: int, secret: Bits, share: Share) -> tuple[bytearray, BlockKeys]:
        """Return the refill of the reserve, and the keys."""
        refill_bits = 8 * share.material
        refill = bytearray(np.packbits(secret[:refill_bits]))
        size = self.settings.key_size
        keys = []
        for position in range(share.for_a + share.for_b):
            start = refill_bits + position * size
            keys.append(
                SecretKey(
                    key_id(self._session, block, position),
                    bytearray(np.packbits(secret[start : start + size])),
                )
            )
        secret[:] = 0
        return refill, BlockKeys(keys[: share.for_a], keys[share.for_a :])

    def _refill(self, material: bytearray, share: Share) -> None:
        """Put one-time keys into the reserve, if there are any."""
        if material:
            self._reserve.put(bytes(material), share.one_time)
            material[:] = bytes(len(material))

    def _outcome(
        self,
        number: int,
        tally: Tally,
        *,
        reason: str = "",
        errors: int = 0,
        leaked: int = 0,
        share: Share | None = None,
    ) -> Block:
        """Return the outcome of a block; `reason` if it gave no key."""
        size = self.settings.key_size
        keys = 0 if share is None else share.for_a + share.for_b
        refill = 0 if share is None else 8 * share.material
        length = 0 if share is None else share.length
        return Block(
            number=number,
            sifted=tally.sifted,
            qber=tally.qber,
            key_errors=errors,
            leaked=leaked,
            secret=length,
            keys=keys,
            discarded=max(0, (length - refill) // size - keys),
            authentication=refill,
            reason=reason,
        )


def _three(values: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third
