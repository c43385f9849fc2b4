"""The transmitter and the fibre: the right distribution, at a cost that only the photons that arrive determine."""

from __future__ import annotations

from dataclasses import replace
from time import thread_time

import numpy as np
import pytest
from numpy.typing import NDArray

from kms_client.emulator.link.photonics.line import Line, Photons, bernoulli_indices
from kms_client.emulator.link.photonics.parameters import DEFAULT, Eavesdropper, Fibre, Optics
from kms_client.emulator.link.photonics.receiver import Receiver
from tests.support.link_optics import BRIGHT, Trace, assert_same_distribution, dense, sparse

HONEST = replace(BRIGHT, eavesdropper=Eavesdropper())
FAR = replace(BRIGHT, fibre=Fibre(60, 0.2))
SIZES = {"bases": 2, "bits": 2, "intensities": 3, "counts": 16, "clicks": 5}


def joint(trace: Trace, *names: str) -> NDArray[np.int64]:
    """One category for each combination."""
    result = np.zeros(len(trace.bases), dtype=np.int64)
    for name in names:
        result = result * SIZES[name] + np.minimum(getattr(trace, name), SIZES[name] - 1)
    return result


@pytest.mark.parametrize("optics", [BRIGHT, HONEST, FAR], ids=["eavesdropper", "honest", "far"])
def test_the_sparse_simulation_has_the_distribution_of_the_dense_one(optics: Optics) -> None:
    slow = dense(optics, pulses=60_000, seed=1)
    fast = sparse(optics, pulses=400_000, seed=2)
    # Everything that either end sees of a pulse, also where nothing arrived and nothing clicked.
    ends = ("bases", "bits", "intensities", "clicks")
    for names in (ends, ("intensities", "counts", "clicks"), ("bases", "bits", "counts")):
        assert_same_distribution(joint(slow, *names), joint(fast, *names))
    # The pulses that the sparse simulation makes up when they are asked for: dark counts where nothing arrived.
    slow_dark, fast_dark = ((trace.counts == 0) & (trace.clicks > 0) for trace in (slow, fast))
    assert slow_dark.sum() > 700
    assert_same_distribution(joint(slow, *ends)[slow_dark], joint(fast, *ends)[fast_dark])


def test_the_comparison_notices_a_small_difference() -> None:
    slow = joint(dense(BRIGHT, pulses=60_000, seed=1), "intensities", "counts")
    other = replace(BRIGHT, fibre=Fibre(13, 0.2))
    with pytest.raises(AssertionError):
        assert_same_distribution(slow, joint(sparse(other, pulses=400_000, seed=2), "intensities", "counts"))


@pytest.mark.parametrize("probability", [1e-6, 0.01, 0.3, 0.9, 1.0])
def test_successes_are_where_independent_trials_have_them(probability: float) -> None:
    rng = np.random.default_rng(3)
    trials = 2_000_000 if probability < 0.1 else 200_000
    counts = []
    for _ in range(10):
        indices = bernoulli_indices(trials, probability, rng)
        assert (indices[1:] > indices[:-1]).all()
        assert len(indices) == 0 or indices[-1] < trials
        counts.append(len(indices))
    expected = 10 * trials * probability
    assert abs(sum(counts) - expected) <= 4.5 * (expected * (1 - probability)) ** 0.5
    if probability == 1:
        assert indices.tolist() == list(range(trials))
    else:
        # The middle of the frame, and its ends, have what is theirs.
        for low, high in ((0, 1000), (trials // 2, trials // 2 + 1000), (trials - 1000, trials)):
            inside = int(((indices >= low) & (indices < high)).sum())
            assert abs(inside - 1000 * probability) <= 5 * (1000 * probability) ** 0.5 + 1


def test_no_trial_succeeds_without_a_chance() -> None:
    rng = np.random.default_rng(4)
    assert len(bernoulli_indices(10**9, 0.0, rng)) == 0
    assert len(bernoulli_indices(0, 0.5, rng)) == 0
    # Gaps near 2**63 are not added up.
    assert len(bernoulli_indices(1 << 32, 1e-30, rng)) == 0


def test_the_number_of_trials_of_a_frame_that_was_drawn_too_short_goes_on() -> None:
    class Short:
        """A generator whose gaps are all 1: as many successes as trials, far more than expected."""

        def geometric(self, probability: float, size: int) -> NDArray[np.int64]:
            return np.ones(size, dtype=np.int64)

    indices = bernoulli_indices(1000, 0.001, Short())  # type: ignore[arg-type]
    assert indices.tolist() == list(range(1000))


def test_what_was_sent_is_the_same_however_often_it_is_looked_up() -> None:
    sent, photons = Line(DEFAULT, np.random.default_rng(5)).transmit(100_000)
    rng = np.random.default_rng(6)
    asked = rng.integers(0, 100_000, size=5000).astype(np.uint32)
    first = sent.look_up(asked)
    again = sent.look_up(asked[::-1].copy())
    for one, other in (
        (first.bases, again.bases),
        (first.bits, again.bits),
        (first.intensities, again.intensities),
    ):
        assert (one == other[::-1]).all()
    assert len(first) == 5000
    # Between and after them are others, and photons carry what was sent.
    everything = sent.look_up(np.arange(100_000, dtype=np.uint32))
    assert (everything.bits[asked] == first.bits).all()
    states = everything.bases[photons.indices] << 1 | everything.bits[photons.indices]
    assert (states == photons.states).all()


def test_a_pulse_outside_of_the_frame_was_not_sent() -> None:
    sent, _ = Line(DEFAULT, np.random.default_rng(7)).transmit(1000)
    with pytest.raises(ValueError, match="pulse 1000 is not in a frame of 1000 pulses"):
        sent.look_up(np.array([3, 1000], dtype=np.uint32))
    assert len(sent.look_up(np.empty(0, dtype=np.uint32))) == 0


def test_a_frame_may_be_empty_of_light() -> None:
    optics = replace(DEFAULT, eavesdropper=Eavesdropper(extra_loss=1000))
    line = Line(optics, np.random.default_rng(8))
    sent, photons = line.transmit(1000)
    assert len(photons.indices) == 0
    assert len(line.known) == 0
    assert len(sent.look_up(np.array([0, 999, 500], dtype=np.uint32))) == 3
    assert Photons.from_bytes(photons.to_bytes()).pulses == 1000


@pytest.mark.parametrize("pulses", [0, -1, (1 << 32) + 1])
def test_a_frame_has_a_sensible_size(pulses: int) -> None:
    with pytest.raises(ValueError, match="a frame has 1 to"):
        Line(DEFAULT, np.random.default_rng()).transmit(pulses)


def test_the_largest_frame_has_indices_of_its_own() -> None:
    optics = replace(DEFAULT, fibre=Fibre(300, 0.2))
    sent, photons = Line(optics, np.random.default_rng(9)).transmit(1 << 32)
    assert photons.indices[-1] > 1 << 31
    assert len(sent.look_up(np.array([(1 << 32) - 1], dtype=np.uint32))) == 1


def test_who_intercepts_knows_half_of_the_bits_and_who_splits_all_of_them() -> None:
    rng = np.random.default_rng(10)
    line = Line(replace(DEFAULT, eavesdropper=Eavesdropper(intercept=1)), rng)
    sent, photons = line.transmit(2_000_000)
    arrived = len(photons.indices)
    assert abs(len(line.known) - arrived / 2) < 4 * (arrived / 4) ** 0.5
    # What she knows arrives as it was sent; of the rest, half is wrong in the basis in which it was sent, if at all.
    choices = sent.look_up(photons.indices)
    untouched = photons.states == (choices.bases << 1 | choices.bits)
    assert untouched[np.isin(photons.indices, line.known)].all()
    assert not untouched[~np.isin(photons.indices, line.known)].any()

    # At 60 km splitting alone keeps up the rate.
    line.optics = replace(DEFAULT, fibre=Fibre(60, 0.2), eavesdropper=Eavesdropper(splitting=1))
    _, photons = line.transmit(2_000_000)
    assert (line.known == photons.indices).all()
    # At 20 km single photons have to help, and nothing is known of them.
    line.optics = replace(DEFAULT, eavesdropper=Eavesdropper(splitting=1))
    _, photons = line.transmit(2_000_000)
    assert 0.3 < len(line.known) / len(photons.indices) < 0.7
    # Without a fibre nothing can be hidden in its loss: fewer clicks than there should be.
    line.optics = replace(DEFAULT, fibre=Fibre(0, 0), eavesdropper=Eavesdropper(splitting=1))
    _, attacked = line.transmit(2_000_000)
    line.optics = replace(DEFAULT, fibre=Fibre(0, 0))
    _, honest = line.transmit(2_000_000)
    assert int(attacked.counts.sum()) < int(honest.counts.sum())
    assert len(line.known) == 0


def test_splitting_in_front_of_a_blind_receiver_has_nothing_to_keep_up() -> None:
    blind = replace(DEFAULT.detector, efficiency=0)
    line = Line(
        replace(DEFAULT, detector=blind, eavesdropper=Eavesdropper(splitting=1)), np.random.default_rng(11)
    )
    _, photons = line.transmit(10_000)
    assert len(photons.indices) == 0


def test_photons_travel_as_bytes() -> None:
    _, photons = Line(BRIGHT, np.random.default_rng(12)).transmit(5000)
    data = photons.to_bytes()
    assert len(data) == 12 + 6 * len(photons.indices)
    again = Photons.from_bytes(data)
    assert again.pulses == 5000
    assert (again.indices == photons.indices).all()
    assert (again.states == photons.states).all()
    assert (again.counts == photons.counts).all()


@pytest.mark.parametrize(
    ("indices", "states", "counts", "pulses"),
    [
        ([1, 1], [0, 0], [1, 1], 10),
        ([2, 1], [0, 0], [1, 1], 10),
        ([1, 10], [0, 0], [1, 1], 10),
        ([1, 2], [0, 4], [1, 1], 10),
        ([1, 2], [0, 0], [1, 0], 10),
        ([1, 2], [0, 0], [1, 1], (1 << 32) + 1),
    ],
)
def test_bytes_that_are_not_photons_are_refused(
    indices: list[int], states: list[int], counts: list[int], pulses: int
) -> None:
    def frame(*, pulses: int) -> Photons:
        return Photons(
            np.array(indices, dtype=np.uint32),
            np.array(states, dtype=np.uint8),
            np.array(counts, dtype=np.uint8),
            pulses,
        )

    with pytest.raises(ValueError, match="frame of"):
        Photons.from_bytes(frame(pulses=pulses).to_bytes())


def test_bytes_of_a_wrong_length_are_refused() -> None:
    _, photons = Line(BRIGHT, np.random.default_rng(13)).transmit(50)
    data = photons.to_bytes()
    for size in range(len(data)):
        with pytest.raises(ValueError, match="bytes"):
            Photons.from_bytes(data[:size])
    with pytest.raises(ValueError, match="bytes"):
        Photons.from_bytes(data + b"\0")


def test_a_second_of_the_default_link_takes_less_than_a_second() -> None:
    """Far less than the pulses of it would take one by one; benchmarks/link_rate.py has the figures."""
    rng = np.random.default_rng(14)
    line, receiver = Line(DEFAULT, rng), Receiver(DEFAULT.detector, DEFAULT.source, rng)
    pulses = 22_000_000
    started = thread_time()
    _, photons = line.transmit(pulses)
    clicks = receiver.detect(photons)
    simulated = thread_time() - started
    assert len(clicks) > 1_500_000
    started = thread_time()
    # What a dense simulation draws for a pulse at the very least: intensity, bit, both bases, detector, photons.
    for _ in range(5):
        rng.integers(0, 3, pulses)
    rng.poisson(0.5, pulses)
    print(f"{simulated:.2f} s, dense {thread_time() - started:.2f} s")
    assert simulated < thread_time() - started
