"""The messages of a block, and the ways in which a block ends.

A block, with Alice (the transmitter) and Bob (the receiver). Each arrow is a message on the classical
channel; a message in several parts has one tag, which comes with the last part:

1. Bob -> Alice, in parts: for each frame the detections, then the questions of Cascade, at last DONE.
   Alice -> Bob, in parts: for each frame the bits that count, then the answers of Cascade, at last FINAL: the
   challenge of verification, the seed of the Toeplitz matrix, and the share of keys for each purpose.
2. Bob -> Alice: CONFIRM. Bob's corrected block is verified, he holds the keys for Alice's masters.
3. Alice -> Bob: COMMITTED. Alice has stored all keys; now Bob stores those for his own masters.

So a key is offered to masters at one side only when the other side holds it. Either side can end a block in
step 1 with ABORT as its last part; the other then does the same, unless it has sent its last part, and the
block gives no key. Keys of a block for which the last message is lost are in doubt: in the next session Bob
names the block that he waits for, and Alice tells him if she has stored it.

Nothing that arrives is used for good before the tag over it was checked.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

__all__ = [
    "LAST_PARTS",
    "NO_DOUBT",
    "SHARE_BYTES",
    "Aborted",
    "Conversation",
    "Doubt",
    "Kind",
    "LinkError",
    "Part",
    "Ready",
    "Reason",
    "Share",
]

_SHARE: Final = struct.Struct(">IHHHII")
_READY: Final = struct.Struct(">16s16s32sI16sI")


class LinkError(Exception):
    """The peer does not follow the protocol, or its settings differ: the session ends."""


class Reason(IntEnum):
    """The reason why a block gives no key; the second byte of ABORT."""

    QBER = 1
    RECONCILIATION = 2
    NOTHING_SECRET = 3
    RESIDUAL_ERRORS = 4

    @property
    def text(self) -> str:
        """The reason in words."""
        return _REASONS[self]


_REASONS: Final = {
    Reason.QBER: "QBER above the threshold",
    Reason.RECONCILIATION: "reconciliation failed",
    Reason.NOTHING_SECRET: "too few secret bits",
    Reason.RESIDUAL_ERRORS: "errors were left after reconciliation",
}


class Aborted(Exception):
    """A block that gives no key.

    Attributes:
        reason: the reason.
        heard: True if the other side has reported it, which ends its message.
    """

    def __init__(self, reason: Reason, *, heard: bool = False) -> None:
        """Keep both arguments."""
        super().__init__(reason.text)
        self.reason = reason
        self.heard = heard


class Kind(IntEnum):
    """The first byte of each part."""

    READY = 1
    SIFT = 2
    SIFTED = 3
    QUESTION = 4
    ANSWER = 5
    DONE = 6
    ABORT = 7
    FINAL = 8
    CONFIRM = 9
    COMMITTED = 10


class Part(NamedTuple):
    """A part of a message."""

    data: bytes
    last: bool  # its tag, over all parts of the message, has come and was right


class Conversation(Protocol):
    """The authenticated classical channel of one session, as a party sees it."""

    async def send(self, data: bytes, *, last: bool) -> None:
        """Send a part of a message, or all of it."""
        ...

    async def receive(self) -> Part:
        """Return the next part. Raises an exception of its own if the channel fails."""
        ...


class Doubt(NamedTuple):
    """A block of which this side does not know if the other has stored it."""

    session: bytes
    number: int


class Ready(NamedTuple):
    """The first message of each side in a session."""

    instance: bytes  # 16 bytes, new in each process
    nonce: bytes  # 16 bytes, new in each session
    settings: bytes  # digest
    capacity: int  # keys of each direction
    doubt: Doubt  # Bob: waits for word on this block. Alice: has stored it. Zeros: none

    def to_bytes(self) -> bytes:
        """Return the part."""
        return bytes([Kind.READY]) + _READY.pack(
            self.instance, self.nonce, self.settings, self.capacity, *self.doubt
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Ready:
        """Parse a part. Raises LinkError for anything else."""
        if len(data) != _READY.size:
            raise LinkError(f"the first message has {_READY.size} bytes, not {len(data)}")
        instance, nonce, settings, capacity, session, number = _READY.unpack(data)
        return cls(instance, nonce, settings, capacity, Doubt(session, number))


NO_DOUBT: Final = Doubt(bytes(16), 0)


class Share(NamedTuple):
    """The division of a block's secret bits: first to the reserve, then to keys."""

    length: int  # secret bits
    material: int  # bytes for the reserve
    one_time_a_to_b: int  # one-time keys that these make, and for which direction
    one_time_b_to_a: int
    for_a: int  # keys
    for_b: int

    @property
    def one_time(self) -> tuple[int, int]:
        """One-time keys by direction."""
        return self.one_time_a_to_b, self.one_time_b_to_a

    def bits(self, key_size: int) -> int:
        """Return the number of secret bits that the share takes."""
        return 8 * self.material + key_size * (self.for_a + self.for_b)

    def to_bytes(self) -> bytes:
        """Return bytes of a fixed size."""
        return _SHARE.pack(*self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Share:
        """Parse a share. Raises `struct.error` for another length."""
        return cls(*_SHARE.unpack(data))


LAST_PARTS: Final = frozenset({Kind.READY, Kind.DONE, Kind.FINAL, Kind.CONFIRM, Kind.COMMITTED})
SHARE_BYTES: Final = _SHARE.size
