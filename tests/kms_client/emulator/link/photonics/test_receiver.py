"""The receiver: dead time, afterpulses and double clicks as a receiver has them that sees gate after gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kms_client.emulator.link.photonics.line import Line, Photons
from kms_client.emulator.link.photonics.parameters import DEFAULT, GYS, Detector, Eavesdropper, Fibre, Optics
from kms_client.emulator.link.photonics.receiver import Clicks, Receiver
from tests.support.link_optics import BRIGHT, assert_same_distribution

GATES = 150_000


def gate_by_gate(optics: Optics, photons: Photons, seed: int) -> Clicks:
    """The slow receiver."""
    rng = np.random.default_rng(seed)
    detector, rate = optics.detector, optics.source.pulse_rate
    arriving = dict(
        zip(
            photons.indices.tolist(),
            zip(photons.states.tolist(), photons.counts.tolist(), strict=True),
            strict=True,
        )
    )
    dead = detector.dead_gates(rate)
    free_from, doubles = 0, 0
    afterpulses: dict[int, set[int]] = {}
    found: list[tuple[int, int, int]] = []
    for gate in range(photons.pulses):
        basis = int(rng.random() >= optics.source.key_basis)
        late = afterpulses.pop(gate, set())
        if gate < free_from:
            continue
        fired = late | {which for which in (0, 1) if rng.random() < detector.dark_count}
        state, count = arriving.get(gate, (0, 0))
        for _ in range(count):
            if rng.random() < detector.efficiency:
                astray = detector.misalignment if state >> 1 == basis else 0.5
                fired.add((state & 1) ^ int(rng.random() < astray))
        if not fired:
            continue
        doubles += len(fired) == 2
        found.append((gate, basis, fired.copy().pop() if len(fired) == 1 else int(rng.random() < 0.5)))
        free_from = gate + dead + 1
        for which in fired:
            if rng.random() < detector.afterpulsing:
                delay = int(rng.geometric(min(1.0, 1 / (detector.afterpulse_lifetime * rate))))
                afterpulses.setdefault(gate + dead + delay, set()).add(which)
    columns = np.array(found).T
    return Clicks(
        columns[0].astype(np.uint32),
        columns[1].astype(np.uint8),
        columns[2].astype(np.uint8),
        photons.pulses,
        doubles,
    )


def steps(clicks: Clicks) -> NDArray[np.int64]:
    """One category for the distance from the click before, whether the bit is the same, and the basis."""
    gaps: NDArray[np.int64] = np.minimum(np.diff(clicks.indices.astype(np.int64)), 60)
    gaps *= 4
    gaps += (clicks.bits[1:] == clicks.bits[:-1]) * 2 + clicks.bases[1:]
    return gaps


LIGHT = replace(BRIGHT, fibre=Fibre(70, 0.2), eavesdropper=Eavesdropper())
SLOW = replace(LIGHT.detector, dark_count=0.01, dead_time=80e-9, afterpulsing=0.4, afterpulse_lifetime=100e-9)


@pytest.mark.parametrize(
    "detector",
    [
        SLOW,
        replace(SLOW, dead_time=0),
        replace(SLOW, dark_count=0.3, afterpulsing=0),
        replace(SLOW, dark_count=0.3, afterpulsing=0.8, dead_time=10e-9, afterpulse_lifetime=1e-9),
    ],
    ids=["dead time and afterpulses", "afterpulses", "mostly dead", "mostly afterpulses"],
)
def test_clicks_follow_each_other_as_gate_by_gate(detector: Detector) -> None:
    optics = replace(LIGHT, detector=detector)
    rng = np.random.default_rng(1)
    _, photons = Line(optics, rng).transmit(GATES)
    slow = gate_by_gate(optics, photons, seed=2)
    receiver = Receiver(detector, optics.source, rng)
    fast = [receiver.detect(photons) for _ in range(4)]
    assert_same_distribution(steps(slow), np.concatenate([steps(clicks) for clicks in fast]))
    # How many there are is given by the gaps; how many are double is not.
    mean = sum(clicks.doubles for clicks in fast) / 4
    assert abs(slow.doubles - mean) < 5 * (mean + 1) ** 0.5
    for clicks in fast:
        assert (np.diff(clicks.indices.astype(np.int64)) > detector.dead_gates(1e8)).all()
        assert clicks.pulses == GATES


def test_the_comparison_notices_other_afterpulses() -> None:
    optics = replace(LIGHT, detector=SLOW)
    rng = np.random.default_rng(3)
    _, photons = Line(optics, rng).transmit(GATES)
    slow = gate_by_gate(optics, photons, seed=2)
    other = Receiver(replace(SLOW, afterpulsing=0.25), optics.source, rng).detect(photons)
    with pytest.raises(AssertionError):
        assert_same_distribution(steps(slow), steps(other))


def test_frames_are_cut_from_one_time() -> None:
    # Short frames one after the other: gaps as in a long one, through dead times and afterpulses that cross the ends.
    optics = replace(LIGHT, detector=SLOW)
    rng = np.random.default_rng(4)
    line = Line(optics, rng)
    _, photons = line.transmit(GATES)
    whole = Receiver(SLOW, optics.source, rng).detect(photons)
    receiver = Receiver(SLOW, optics.source, rng)
    parts, start, frame = [], 0, 30
    while start < GATES:
        inside = slice(*np.searchsorted(photons.indices, [start, start + frame]))
        clicks = receiver.detect(
            Photons(
                photons.indices[inside] - np.uint32(start),
                photons.states[inside],
                photons.counts[inside],
                frame,
            )
        )
        parts.append((clicks.indices + np.uint32(start), clicks.bases, clicks.bits))
        start += frame
    indices, bases, bits = (np.concatenate(part) for part in zip(*parts, strict=True))
    joined = Clicks(indices, bases, bits, GATES, 0)
    assert_same_distribution(steps(whole), steps(joined))
    assert (np.diff(joined.indices.astype(np.int64)) > 8).all()


def frame_of(number: int, count: int, state: int = 0, every: int = 1) -> Photons:
    """Photons in every so-many-th pulse of a frame."""
    indices = np.arange(0, number * every, every, dtype=np.uint32)
    return Photons(
        indices,
        np.full(number, state, dtype=np.uint8),
        np.full(number, count, dtype=np.uint8),
        number * every,
    )


def test_a_perfect_receiver_sees_each_photon_right_in_the_right_basis() -> None:
    perfect = Detector(efficiency=1, dark_count=0, dead_time=0, misalignment=0)
    receiver = Receiver(perfect, BRIGHT.source, np.random.default_rng(5))
    clicks = receiver.detect(frame_of(20_000, 1, state=0b11))
    assert (clicks.indices == np.arange(20_000)).all()
    assert clicks.doubles == 0
    assert (clicks.bits[clicks.bases == 1] == 1).all()
    other = clicks.bits[clicks.bases == 0]
    assert abs(len(other) - 14_000) < 5 * (20_000 * 0.21) ** 0.5
    assert abs(int(other.sum()) - len(other) / 2) < 5 * (len(other) / 4) ** 0.5
    assert len(clicks) == 20_000


def test_many_photons_in_the_wrong_basis_click_twice_and_tell_nothing() -> None:
    perfect = Detector(efficiency=1, dark_count=0, dead_time=0, misalignment=0)
    receiver = Receiver(perfect, BRIGHT.source, np.random.default_rng(6))
    clicks = receiver.detect(frame_of(20_000, 20, state=0b10))
    assert clicks.doubles == int((clicks.bases == 0).sum())
    assert (clicks.bits[clicks.bases == 1] == 0).all()
    ones = int(clicks.bits[clicks.bases == 0].sum())
    assert abs(ones - clicks.doubles / 2) < 5 * (clicks.doubles / 4) ** 0.5


def test_a_dead_time_blocks_exactly_so_many_gates() -> None:
    perfect = Detector(efficiency=1, dark_count=0, dead_time=30e-9, misalignment=0)
    receiver = Receiver(perfect, BRIGHT.source, np.random.default_rng(7))
    seen = [receiver.detect(frame_of(10, 1)).indices.tolist() for _ in range(2)]
    assert seen == [[0, 4, 8], [2, 6]]
    # A dead time longer than some frames, in which nothing is sent.
    receiver.detector = replace(perfect, dead_time=250e-9)
    assert [receiver.detect(frame_of(10, 1)).indices.tolist() for _ in range(4)] == [[0], [], [6], []]


def test_a_blind_receiver_clicks_in_the_dark_only() -> None:
    blind = replace(GYS.detector, efficiency=0)
    receiver = Receiver(blind, GYS.source, np.random.default_rng(8))
    counts = [len(receiver.detect(frame_of(1000, 1, every=1_000_000))) for _ in range(3)]
    expected = 3 * 1e9 * 1.7e-6
    assert abs(sum(counts) - expected) < 5 * expected**0.5
    assert (
        len(
            Receiver(replace(blind, dark_count=0), GYS.source, np.random.default_rng()).detect(frame_of(9, 1))
        )
        == 0
    )


def test_an_afterpulse_may_come_many_frames_later() -> None:
    # Every click has a successor in nine of ten cases, some thousand gates later; frames have 100 gates.
    detector = Detector(1, 0, 0, 0, afterpulsing=0.9, afterpulse_lifetime=10e-6)
    source = replace(BRIGHT.source, key_basis=1 - 1e-6)
    receiver = Receiver(detector, source, np.random.default_rng(9))
    assert len(receiver.detect(frame_of(100, 1, state=0b01))) == 100
    dark = Photons(np.empty(0, np.uint32), np.empty(0, np.uint8), np.empty(0, np.uint8), 100)
    after = [receiver.detect(dark) for _ in range(3000)]
    # A chain of afterpulses ends with a chance of 1 in 10 at each: 9 for each click, with a spread of 9.5.
    assert abs(sum(len(clicks) for clicks in after) - 900) < 5 * 95
    assert sum(len(clicks) for clicks in after[-100:]) == 0
    # They come in the detector that has clicked.
    assert all((clicks.bits == 1).all() for clicks in after)


def test_the_default_link_loses_little_to_the_dead_time() -> None:
    rng = np.random.default_rng(10)
    _, photons = Line(DEFAULT, rng).transmit(2_000_000)
    counts = [
        len(Receiver(detector, DEFAULT.source, rng).detect(photons))
        for detector in (DEFAULT.detector, replace(DEFAULT.detector, dead_time=0))
    ]
    assert 0.8 < counts[0] / counts[1] < 0.95
