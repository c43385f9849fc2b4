"""Sifting: what both sides keep is the same, and messages that make no sense are refused."""

from __future__ import annotations

import numpy as np
import pytest

from kms_client.emulator.link.photonics.line import Line, Sent
from kms_client.emulator.link.photonics.parameters import CHECK_BASIS, DEFAULT
from kms_client.emulator.link.photonics.receiver import Clicks, Receiver
from kms_client.emulator.link.sifting import Tally, announcement, reply, take_reply

pytestmark = pytest.mark.pure

Frame = tuple[Sent, Clicks]


def frame(pulses: int) -> Frame:
    rng = np.random.default_rng(7)
    sent, photons = Line(DEFAULT, rng).transmit(pulses)
    return sent, Receiver(DEFAULT.detector, DEFAULT.source, rng).detect(photons)


@pytest.mark.parametrize("pulses", [1, 10, 1000, 100_000])
def test_both_keep_the_same(pulses: int) -> None:
    sent, clicks = frame(pulses)
    answer, ours = reply(3, sent, announcement(3, clicks))
    theirs = take_reply(3, clicks, answer)
    assert (ours.detections == theirs.detections).all()
    assert (ours.errors == theirs.errors).all()
    assert ours.key_bits.size == theirs.key_bits.size == ours.detections[0].sum()
    tally = Tally()
    assert (tally.qber, tally.key_bits().size) == (0.5, 0)
    tally.add(ours)
    if pulses == 100_000:
        assert 0 < np.count_nonzero(ours.key_bits != theirs.key_bits) < 0.02 * ours.key_bits.size
        assert 0 < tally.qber < 0.02
        # What is told leaves out the bits of the key basis.
        number = len(clicks)
        checked = int((clicks.bases == CHECK_BASIS).sum())
        assert len(announcement(3, clicks)) == 9 + number + (number + 7) // 8 + (checked + 7) // 8


def test_widths_of_distances() -> None:
    sent, _ = frame(100_000)
    for last, width in ((255, 1), (256, 2), (65_535, 2), (65_537, 4)):
        clicks = Clicks(
            np.array([0, last], dtype=np.uint32), np.zeros(2, np.uint8), np.ones(2, np.uint8), 100_000, 0
        )
        told = announcement(0, clicks)
        assert told[8] == width
        assert take_reply(0, clicks, reply(0, sent, told)[0]).key_bits.size <= 2


def test_announcements_that_make_no_sense() -> None:
    sent, clicks = frame(1000)
    told = announcement(1, clicks)
    for wrong, text in (
        (announcement(2, clicks), "speaks of frame 2, it is the turn of frame 1"),
        (told[:8] + b"\x03" + told[9:], "1, 2 or 4 bytes, not 3"),
        (told[:9] + b"\x00" + told[10:], "ascending"),
        (told[:9] + b"\xff" * len(clicks) + told[9 + len(clicks) :], "is not in a frame of 1000 pulses"),
        (told[:-1], "too early"),
        (told[:5], "too early"),
        (told + b"\x00", "1 bytes too many"),
    ):
        with pytest.raises(ValueError, match=text):
            reply(1, sent, wrong)


def test_answers_that_make_no_sense() -> None:
    sent, clicks = frame(1001)
    answer, _ = reply(1, sent, announcement(1, clicks))
    number = len(clicks)
    assert number % 8
    mask = 8 + (number + 7) // 8
    kept = int(np.unpackbits(np.frombuffer(answer[8:mask], dtype=np.uint8)).sum())
    planes = mask + 2 * ((kept + 7) // 8)
    for wrong, text in (
        (answer[:3] + b"\x02" + answer[4:], "speaks of frame 2"),
        (answer[:7] + bytes([answer[7] ^ 1]) + answer[8:], "detections"),
        (answer[: mask - 1] + bytes([answer[mask - 1] | 1]) + answer[mask:], "padding"),
        (answer[:mask] + b"\xff" * (planes - mask) + answer[planes:], "three intensities|padding"),
        (answer[:-1], "too early"),
        (answer + b"\x00", "too many"),
    ):
        with pytest.raises(ValueError, match=text):
            take_reply(1, clicks, wrong)
    eight = (kept // 8) * 8
    high = answer[:mask] + b"\xff" * (eight // 8) + answer[mask + eight // 8 :]
    half = mask + (kept + 7) // 8
    both = high[:half] + b"\xff" * (eight // 8) + high[half + eight // 8 :]
    with pytest.raises(ValueError, match="three intensities"):
        take_reply(1, clicks, both)
