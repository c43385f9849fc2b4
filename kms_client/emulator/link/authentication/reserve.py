"""The reserve of one-time keys: a small part of the link's own keys, kept for future messages.

Both sides hold the same reserve. Each direction has keys of its own, numbered from 0, so that both sides never take
the same key for different messages. Besides, there is the anchor: a secret from the first block after a bootstrap that
is never used up. It binds later bootstraps to this one: see `kms_client.emulator.link.authentication.session`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from kms_client.emulator.link.authentication.errors import ReserveEmpty

__all__ = ["ANCHOR_BYTES", "KEY_BYTES", "Direction", "KeyReserve"]

KEY_BYTES: Final = 32  # of a one-time key of Poly1305 (RFC 8439, section 2.5)
ANCHOR_BYTES: Final = 48


class Direction(IntEnum):
    """The direction of a message; what a side sends, the other side receives."""

    A_TO_B = 0
    B_TO_A = 1

    @property
    def opposite(self) -> Direction:
        """The other way."""
        return Direction(1 - self)


class _Lane:
    """The keys of one direction."""

    def __init__(self) -> None:
        self.keys: dict[int, bytearray] = {}
        self.next = 0  # the lowest number that may still be used
        self.end = 0  # one more than the highest number there has been

    def drop(self, numbers: range) -> int:
        """Wipe these keys; return how many there were."""
        dropped = 0
        for number in numbers:
            key = self.keys.pop(number, None)
            if key is not None:
                key[:] = bytes(KEY_BYTES)
                dropped += 1
        return dropped


class KeyReserve:
    """One-time keys of both directions and the anchor, in memory; wiped as they are used.

    Args:
        anchor: `ANCHOR_BYTES` that `keep` was once given, which a restarted process still knows.
        proven: the value that `keep` was given with it.
        keep: called with the anchor and True if it is proven, whenever one of them changes, and with None
            when it is forgotten. A program that stores them in a file of mode 0600 gets over its own restart
            without trusting the bootstrap's signatures again.

    Attributes:
        origin: 32 public bytes that name the session whose bootstrap started this reserve; empty before one.
        proven: True if the peer is known to hold the anchor, too.
        made_keys: one-time keys put in, ever.
        spent_keys: those used for a message.
        discarded_keys: those wiped unused: skipped, or not held by the peer.
        anchors: anchors made, ever.
    """

    def __init__(
        self,
        anchor: bytes | None = None,
        *,
        proven: bool = True,
        keep: Callable[[bytes | None, bool], None] = lambda anchor, proven: None,
    ) -> None:
        if anchor is not None and len(anchor) != ANCHOR_BYTES:
            raise ValueError(f"an anchor has {ANCHOR_BYTES} bytes, not {len(anchor)}")
        self._anchor = anchor
        self._keep = keep
        self._lanes = (_Lane(), _Lane())
        self.origin = b""
        self.proven = proven and anchor is not None
        self.made_keys = 0
        self.spent_keys = 0
        self.discarded_keys = 0
        self.anchors = 0

    def __repr__(self) -> str:
        levels = ", ".join(f"{self.available(direction)} keys {direction.name}" for direction in Direction)
        return f"<KeyReserve {levels}>"

    # --- what there is

    @property
    def anchor(self) -> bytes | None:
        """The anchor; secret."""
        return self._anchor

    @property
    def level(self) -> int:
        """Keys left in the direction that has fewer."""
        return min(self.available(direction) for direction in Direction)

    @property
    def made_bits(self) -> int:
        """Key bits that have gone into the reserve, anchors included."""
        return 8 * (KEY_BYTES * self.made_keys + ANCHOR_BYTES * self.anchors)

    @property
    def spent_bits(self) -> int:
        """Key bits that authentication has cost: used, discarded, and the anchors."""
        return 8 * (KEY_BYTES * (self.spent_keys + self.discarded_keys) + ANCHOR_BYTES * self.anchors)

    def available(self, direction: Direction) -> int:
        """Return the number of keys left in this direction."""
        return len(self._lanes[direction].keys)

    def next(self, direction: Direction) -> int:
        """Return the number of the first key that has not been used or skipped."""
        return self._lanes[direction].next

    def end(self, direction: Direction) -> int:
        """Return one more than the number of the last key that was put in."""
        return self._lanes[direction].end

    # --- replenishment

    def wanted(self, target: int) -> tuple[int, int]:
        """Return the number of keys to put in, for each direction, to have `target` there.

        Side A decides and tells side B: in the middle of a session the two may count differently.
        """
        a_to_b, b_to_a = (max(0, target - self.available(direction)) for direction in Direction)
        return a_to_b, b_to_a

    def material_size(self, counts: tuple[int, int]) -> int:
        """Return the number of bytes that `put` takes for so many keys of the two directions."""
        return KEY_BYTES * sum(counts) + (ANCHOR_BYTES if self._anchor is None else 0)

    def put(self, material: bytes, counts: tuple[int, int]) -> None:
        """Put in keys that both sides have just made: `material_size(counts)` bytes, equal on both sides.

        A side calls it after it has sealed its own last message about this block, and it has the other side's
        agreement by then: the next message that it sends uses the reserve. If it cannot know that the other
        side has done the same, it ends the session; the start of the next one makes the reserves equal.

        Raises:
            ValueError: not that many bytes.
        """
        if min(counts) < 0 or len(material) != self.material_size(counts):
            raise ValueError(
                f"{self.material_size(counts)} bytes of key are needed for {counts} keys, not {len(material)}"
            )
        if self._anchor is None:
            self._anchor, material = bytes(material[:ANCHOR_BYTES]), material[ANCHOR_BYTES:]
            self.anchors += 1
            self.proven = False
            self._keep(self._anchor, False)
        keys = (material[start : start + KEY_BYTES] for start in range(0, len(material), KEY_BYTES))
        for lane, count in zip(self._lanes, counts, strict=True):
            for _ in range(count):
                lane.keys[lane.end] = bytearray(next(keys))
                lane.end += 1
            self.made_keys += count

    # --- consumption

    def take(self, direction: Direction, number: int | None = None) -> bytes:
        """Return the key of this number, or the next one; those before it can never be used afterwards.

        Raises:
            ReserveEmpty: there is no such key (any more).
        """
        lane = self._lanes[direction]
        wanted = lane.next if number is None else number
        key = lane.keys.get(wanted)
        if key is None:
            raise ReserveEmpty(
                f"no one-time key {wanted} {direction.name}: the reserve has {lane.next} to {lane.end - 1}; "
                "start a new session, which makes a new reserve"
                if lane.keys
                else f"the reserve of one-time keys {direction.name} is empty: start a new session, which bootstraps"
            )
        del lane.keys[wanted]
        taken = bytes(key)
        key[:] = bytes(KEY_BYTES)
        self.spent_keys += 1
        self.discarded_keys += lane.drop(range(lane.next, wanted))
        lane.next = wanted + 1
        return taken

    def truncate(self, direction: Direction, end: int) -> None:
        """Wipe the keys from number `end` on: the peer does not have them."""
        lane = self._lanes[direction]
        self.discarded_keys += lane.drop(range(end, lane.end))
        lane.end = min(end, lane.end)

    # --- bootstrap

    def prove(self) -> None:
        """Note that the peer has shown that it has the keys that were put in."""
        if not self.proven:
            self.proven = True
            self._keep(self._anchor, True)

    def restart(self, origin: bytes, *, forget_anchor: bool) -> None:
        """Wipe all keys: a bootstrap has started a new reserve. The anchor goes if the peer does not have it."""
        for direction, lane in zip(Direction, self._lanes, strict=True):
            self.truncate(direction, 0)
            lane.next = 0
        self.origin = origin
        if forget_anchor and self._anchor is not None:
            self._anchor = None
            self.proven = False
            self._keep(None, False)
