"""The emulated man in the middle of the classical channel: it has every byte, of both directions, in its hands.

It cuts the stream into frames as the peers do (the start of a session, then the channel's), and changes the
next one as it was told. It knows no keys. One with stolen signing keys is a `Session` of the attacker's own,
with the victim's `Certificates`: the tests have it.
"""

from __future__ import annotations

from typing import Final

from kms_client.emulator.link.authentication.channel import HEADER

__all__ = ["ATTACKS", "Interceptor"]

ATTACKS: Final = ("change", "drop", "replay", "reorder", "inject")
_START_FRAMES: Final = 2  # hello and proof


class Interceptor:
    """One direction of a connection; make a new one for each connection.

    Attributes:
        attack: one of `ATTACKS`, or "off"; it is done once to each frame from number `first` on.
        first: the first frame to touch, 0 is the hello, 1 the proof, then come the channel's.
        touched: frames that were changed.
    """

    def __init__(self, attack: str = "off", first: int = 0) -> None:
        self.attack = attack
        self.first = first
        self.touched = 0
        self._frames = 0
        self._buffer = bytearray()
        self._held: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that go on to the receiver for these bytes of the sender."""
        self._buffer += data
        out = b""
        while (size := self._frame_size()) is not None and len(self._buffer) >= size:
            frame = bytes(self._buffer[:size])
            del self._buffer[:size]
            out += self._touch(frame) if self._frames >= self.first else frame
            self._frames += 1
        return out

    def _frame_size(self) -> int | None:
        if self._frames < _START_FRAMES:
            return 4 + int.from_bytes(self._buffer[:4], "big") if len(self._buffer) >= 4 else None
        if len(self._buffer) < HEADER.size:
            return None
        _, _, _, size, proof_size = HEADER.unpack_from(self._buffer)
        return int(HEADER.size + size + proof_size)

    def _touch(self, frame: bytes) -> bytes:
        if self.attack == "off":
            held, self._held = self._held or b"", None
            return held + frame
        self.touched += 1
        if self.attack == "change":
            return frame[:-1] + bytes([frame[-1] ^ 1])
        if self.attack == "drop":
            return b""
        if self.attack == "replay":
            return frame + frame
        if self.attack == "inject":
            # Something of the right shape that nobody has sent.
            return frame[:-1] + bytes([frame[-1] ^ 0x80]) + frame
        if self._held is None:  # reorder
            self._held = frame
            return b""
        held, self._held = self._held, None
        return frame + held
