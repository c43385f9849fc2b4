"""Sifting: the selection of the detections that count. The receiver announces them, the transmitter replies.

For each frame the receiver tells the pulses in which something was detected, their bases, and the bits of the
check basis. The transmitter tells the pulses of equal bases, and for those the intensities and its bits of
the check basis. Bits of the key basis are never told.

Both messages are of a fixed form, numbers big-endian, bits packed from the most significant one on and padded
with zeros. Announcement: the frame's number (4 bytes), the number of detections (4), the width of a distance
(1 byte: 1, 2 or 4), the distance of each detection from the one before (the first: from -1), the bases, the
bits of the check basis. Reply: the frame's number (4), the number of detections (4), one bit for each, set if
the bases are equal; then for those: the high and the low bits of the intensities' numbers, and the
transmitter's bits of the check basis.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.arrays import Bits
from kms_client.emulator.link.photonics.line import Sent
from kms_client.emulator.link.photonics.parameters import CHECK_BASIS, KEY_BASIS
from kms_client.emulator.link.photonics.receiver import Clicks

__all__ = ["Sifted", "Tally", "announcement", "reply", "take_reply"]


_HEAD = struct.Struct(">II")
_WIDTHS = (1, 2, 4)


@dataclass(frozen=True, eq=False)
class Sifted:
    """The data that both sides keep of a frame."""

    key_bits: Bits
    detections: NDArray[np.int64]
    """by basis and intensity"""
    errors: NDArray[np.int64]
    """of the check basis, by intensity"""


class Tally:
    """The frames of a block, added up."""

    def __init__(self) -> None:
        self.detections = np.zeros((2, 3), dtype=np.int64)
        self.errors = np.zeros(3, dtype=np.int64)
        self.sifted = 0  # bits of the key basis
        self._parts: list[Bits] = []

    def add(self, frame: Sifted) -> None:
        """Add a frame."""
        self.detections += frame.detections
        self.errors += frame.errors
        self.sifted += frame.key_bits.size
        self._parts.append(frame.key_bits)

    def key_bits(self) -> Bits:
        """Return the sifted block."""
        return np.concatenate(self._parts) if self._parts else np.empty(0, dtype=np.uint8)

    @property
    def qber(self) -> float:
        """The share of errors in the check basis; one half if nothing was detected in it."""
        checked = int(self.detections[CHECK_BASIS].sum())
        return int(self.errors.sum()) / checked if checked else 0.5


def announcement(frame: int, clicks: Clicks) -> bytes:
    """Return the receiver's message about a frame."""
    distances = np.diff(clicks.indices.astype(np.int64), prepend=-1)
    largest = int(distances.max()) if distances.size else 0
    width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
    return b"".join(
        (
            _HEAD.pack(frame, distances.size),
            bytes([width]),
            distances.astype(f">u{width}").tobytes(),
            _packed(clicks.bases),
            _packed(clicks.bits[clicks.bases == CHECK_BASIS]),
        )
    )


def reply(frame: int, sent: Sent, told: bytes) -> tuple[bytes, Sifted]:
    """Return the transmitter's answer to an announcement, and the data it keeps.

    Raises `ValueError` if the announcement makes no sense, or is about another frame.
    """
    number, reader = _open(frame, told)
    width = reader.take(1)[0]
    if width not in _WIDTHS:
        raise ValueError(f"distances have 1, 2 or 4 bytes, not {width}")
    distances = np.frombuffer(reader.take(width * number), dtype=f">u{width}").astype(np.int64)
    if number and distances.min() < 1:
        raise ValueError("detections are told in ascending order")
    indices = np.cumsum(distances) - 1
    if number and indices[-1] >= sent.pulses:
        raise ValueError(f"pulse {indices[-1]} is not in a frame of {sent.pulses} pulses")
    bases = reader.bits(number)
    check_bits = reader.bits(int(np.count_nonzero(bases == CHECK_BASIS)))
    reader.end()

    choices = sent.look_up(indices.astype(np.uint32))
    same = choices.bases == bases
    checked = (same & (bases == CHECK_BASIS))[bases == CHECK_BASIS]
    intensities = choices.intensities[same]
    kept_bases, kept_bits = bases[same], choices.bits[same]
    ours = kept_bits[kept_bases == CHECK_BASIS]
    answer = b"".join(
        (
            _HEAD.pack(frame, number),
            _packed(same.astype(np.uint8)),
            _packed(intensities >> 1),
            _packed(intensities & 1),
            _packed(ours),
        )
    )
    return answer, _sifted(kept_bases, intensities, kept_bits, ours != check_bits[checked])


def take_reply(frame: int, clicks: Clicks, told: bytes) -> Sifted:
    """Return the data that the receiver keeps, after the transmitter's answer.

    Raises `ValueError` if the answer makes no sense, or is about another frame.
    """
    number, reader = _open(frame, told)
    if number != len(clicks):
        raise ValueError(f"the peer answers about {number} detections, {len(clicks)} were announced")
    same = reader.bits(number).astype(np.bool_)
    kept_bases, kept_bits = clicks.bases[same], clicks.bits[same]
    intensities = reader.bits(kept_bases.size) << 1 | reader.bits(kept_bases.size)
    if kept_bases.size and intensities.max() > 2:
        raise ValueError("there are three intensities: 0, 1 and 2")
    check = kept_bases == CHECK_BASIS
    theirs = reader.bits(int(np.count_nonzero(check)))
    reader.end()
    return _sifted(kept_bases, intensities.astype(np.uint8), kept_bits, kept_bits[check] != theirs)


def _sifted(bases: Bits, intensities: Bits, bits: Bits, wrong: NDArray[np.bool_]) -> Sifted:
    detections = np.bincount(bases * 3 + intensities, minlength=6).reshape(2, 3)
    errors = np.bincount(intensities[bases == CHECK_BASIS][wrong], minlength=3)
    return Sifted(bits[bases == KEY_BASIS], detections, errors)


def _packed(bits: Bits) -> bytes:
    return np.packbits(bits).tobytes()


def _open(frame: int, told: bytes) -> tuple[int, _Reader]:
    reader = _Reader(told)
    told_frame, number = _HEAD.unpack(reader.take(_HEAD.size))
    if told_frame != frame:
        raise ValueError(f"the peer speaks of frame {told_frame}, it is the turn of frame {frame}")
    return number, reader


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def take(self, size: int) -> bytes:
        taken = self._data[self._place : self._place + size]
        if len(taken) != size:
            raise ValueError(f"a message about a frame ends after {len(self._data)} bytes, too early")
        self._place += size
        return taken

    def bits(self, number: int) -> Bits:
        bits = np.unpackbits(np.frombuffer(self.take((number + 7) // 8), dtype=np.uint8))
        if bits[number:].any():
            raise ValueError("the padding of a message about a frame is not zero")
        return bits[:number]

    def end(self) -> None:
        if self._place != len(self._data):
            raise ValueError(f"a message about a frame has {len(self._data) - self._place} bytes too many")
