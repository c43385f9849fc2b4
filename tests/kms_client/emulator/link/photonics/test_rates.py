"""Rates of the simulated optics against formulas and figures that are published, with and without an eavesdropper."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import exp, sqrt

import numpy as np
import pytest

from kms_client.emulator.link.photonics.analytic import (
    Rates,
    asymptotic_rate,
    bound_single_photons,
    expected_counts,
    intercepted_qber,
    live_share,
    rates,
    single_photons,
)
from kms_client.emulator.link.photonics.experiment import measured_rate, run, total
from kms_client.emulator.link.photonics.parameters import DEFAULT, GYS, Detector, Eavesdropper, Fibre, Optics
from kms_client.emulator.link.postprocessing.finite_key import Security, binary_entropy, secret_length
from tests.support.link_optics import pulses_for

# As in the paper: decoys of 0.05 and nothing, and as many signal pulses as one likes.
PAPER = replace(GYS, source=replace(GYS.source, intensities=(0.48, 0.05, 0.0)))


def rate_of(optics: Optics) -> float:
    return asymptotic_rate(rates(optics), single_photons(optics), optics.source)


def bounded_rate_of(optics: Optics) -> float:
    measured = rates(optics)
    return asymptotic_rate(measured, bound_single_photons(measured, optics.source), optics.source)


def finite_rate_of(optics: Optics, key_bits: float, efficiency: float = 1.22) -> float:
    """Secret bits for each pulse, with blocks of so many key bits."""
    pulses = pulses_for(optics, key_bits)
    counts = expected_counts(optics, pulses)
    leaked = key_bits * efficiency * binary_entropy(average_qber(optics))
    return secret_length(counts, optics.source, round(leaked), Security()).bits / pulses


def average_qber(optics: Optics) -> float:
    measured = rates(optics)
    weights = [p * gain for p, gain in zip(optics.source.probabilities, measured.gains, strict=True)]
    return sum(w * qber for w, qber in zip(weights, measured.qbers, strict=True)) / sum(weights)


def test_the_cut_off_is_where_the_paper_has_it() -> None:
    # Ma et al. 2005: 142.05 km with infinitely many decoys, 140.55 km with two.
    assert rate_of(PAPER.at(141.9)) > 0
    assert rate_of(PAPER.at(142.2)) == 0
    assert bounded_rate_of(PAPER.at(140.3)) > 0
    assert bounded_rate_of(PAPER.at(140.8)) == 0


def test_the_best_intensity_is_where_the_paper_has_it() -> None:
    # Ma et al. 2005: 0.48 for a reconciliation of 1.22, 0.54 at the Shannon limit. The signal alone counts here.
    def best(reconciliation: float) -> float:
        def rate(signal: float) -> float:
            source = replace(
                GYS.source, intensities=(signal, 0.001, 0.0), probabilities=(1 - 2e-6, 1e-6, 1e-6)
            )
            optics = replace(GYS.at(50), source=source)
            return asymptotic_rate(rates(optics), single_photons(optics), source, reconciliation)

        return max((n / 100 for n in range(30, 80)), key=rate)

    assert best(1.22) == pytest.approx(0.48, abs=0.011)
    assert best(1.0) == pytest.approx(0.54, abs=0.011)


def test_decoys_bound_what_infinitely_many_would_show() -> None:
    for length in range(0, 140, 20):
        optics = GYS.at(length)
        true, bound = single_photons(optics), bound_single_photons(rates(optics), optics.source)
        assert 0.8 * true.single_yield < bound.single_yield <= true.single_yield
        assert true.error <= bound.error < 1.6 * true.error
        assert bounded_rate_of(optics) <= rate_of(optics)


@pytest.mark.parametrize(
    ("length", "pulses"),
    [
        (0, 3_000_000),
        (25, 12_000_000),
        (50, 40_000_000),
        (75, 120_000_000),
        (100, 400_000_000),
        (115, 700_000_000),
    ],
)
def test_the_simulation_agrees_with_the_decoy_state_rate(length: float, pulses: int) -> None:
    """GYS with the parameters of Ma et al.: the key rate that is measured, against the analytic one.

    At three standard errors, which are small enough for the test to say something.
    """
    optics = GYS.at(length)
    outcomes = run(optics, pulses, np.random.default_rng(round(length)), frames=10)
    rate, error = measured_rate(outcomes, optics.source)
    expected = bounded_rate_of(optics)
    assert abs(rate - expected) < 3 * error
    assert error < (0.04 if length < 80 else 0.08) * expected
    # The parts that the rate is made of agree, too.
    everything = total(outcomes)
    measured, analytic = everything.rates(optics.source), rates(optics)
    for i in range(3):
        detected = int(everything.detections[:, i].sum())
        assert measured.gains[i] == pytest.approx(analytic.gains[i], rel=4.5 / sqrt(detected + 1))
        spread = sqrt(analytic.qbers[i] * (1 - analytic.qbers[i]) / max(detected, 1))
        assert abs(measured.qbers[i] - analytic.qbers[i]) < 4.5 * spread


@pytest.mark.parametrize("optics", [GYS, DEFAULT], ids=["GYS", "default"])
@pytest.mark.parametrize("key_bits", [1e6, 1e7, 1e8])
def test_the_finite_key_rate_stays_below_the_asymptotic_one(optics: Optics, key_bits: float) -> None:
    seen = []
    for length in range(0, 150, 10):
        there = optics.at(length)
        finite = finite_rate_of(there, key_bits)
        limit = bounded_rate_of(there) * live_share(there)
        assert finite < limit or finite == limit == 0
        seen.append(finite)
    assert all(one >= other for one, other in pairwise(seen))
    assert seen[0] > 0 or (optics is GYS and key_bits == 1e6)
    # It gets closer as blocks grow.
    assert finite_rate_of(optics, 10 * key_bits) > finite_rate_of(optics, key_bits) or key_bits == 1e6


def test_the_default_link_makes_some_hundred_thousand_bits_a_second() -> None:
    bits = finite_rate_of(DEFAULT, 1e6, 1.12) * DEFAULT.source.pulse_rate
    assert 800_000 < bits < 1_000_000
    assert finite_rate_of(DEFAULT, 4e6, 1.12) * DEFAULT.source.pulse_rate > 1_000_000


def test_the_dead_time_lowers_all_gains_as_computed() -> None:
    slow = replace(DEFAULT, detector=replace(DEFAULT.detector, dead_time=200e-9))
    [seen] = run(slow, 5_000_000, np.random.default_rng(1))
    live = live_share(slow)
    assert 0.3 < live < 0.75
    for measured, analytic, detected in zip(
        seen.rates(slow.source).gains, rates(slow).gains, seen.detections.sum(axis=0).tolist(), strict=True
    ):
        assert measured == pytest.approx(live * analytic, rel=4.5 / sqrt(detected))


def test_expected_counts_are_what_is_counted_on_average() -> None:
    seen = total(run(DEFAULT, 2_000_000, np.random.default_rng(2), frames=5))
    wanted = expected_counts(DEFAULT, seen.pulses)
    counted = seen.block_counts()
    for one, other in (
        (counted.key, wanted.key),
        (counted.check, wanted.check),
        (counted.errors, wanted.errors),
    ):
        for a, b in zip(one, other, strict=True):
            assert abs(a - b) <= 5 * sqrt(b) + 3
    assert seen.key_qber == pytest.approx(average_qber(DEFAULT), rel=0.05)


# The eavesdropper


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.8, 1.0])
def test_an_intercepted_fraction_adds_a_quarter_of_it_to_the_qber(fraction: float) -> None:
    """e_0 + f / 4, with e_0 = 0.1 %: at that size, second-order terms are below the statistical error."""
    optics = replace(
        DEFAULT,
        detector=replace(DEFAULT.detector, misalignment=0.001),
        eavesdropper=Eavesdropper(intercept=fraction),
    )
    [seen] = run(optics, 1_500_000, np.random.default_rng(round(100 * fraction)))
    detected = int(seen.detections.sum())
    expected = 0.001 + fraction / 4
    spread = sqrt(expected * (1 - expected) / detected)
    assert spread < 0.002
    assert abs(int(seen.errors.sum()) / detected - expected) < 4 * spread
    # In each basis alone, too, and the rate of clicks tells nothing.
    for basis in (0, 1):
        of_basis = int(seen.detections[basis].sum())
        assert abs(int(seen.errors[basis].sum()) / of_basis - expected) < 4 * sqrt(expected / of_basis)
    honest = replace(optics, eavesdropper=Eavesdropper())
    wanted = sum(expected_counts(honest, seen.pulses).key)
    assert abs(int(seen.detections[0].sum()) - wanted) < 4.5 * sqrt(wanted)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_errors_that_are_there_anyway_are_not_added_but_composed(fraction: float) -> None:
    """With 5 % misalignment and dark counts, e_0 + f / 4 is too much, and the exact formula is right."""
    noisy = Optics(
        DEFAULT.source,
        Fibre(50, 0.2),
        Detector(efficiency=0.2, dark_count=1e-3, dead_time=0, misalignment=0.05),
        Eavesdropper(intercept=fraction),
    )
    seen = run(noisy, 3_000_000, np.random.default_rng(5))[0]
    detected = int(seen.detections[:, 0].sum())
    qber = int(seen.errors[:, 0].sum()) / detected
    expected = intercepted_qber(noisy)
    spread = sqrt(expected * (1 - expected) / detected)
    assert abs(qber - expected) < 4 * spread
    simple = intercepted_qber(replace(noisy, eavesdropper=Eavesdropper())) + fraction / 4
    assert expected <= simple
    if fraction == 1:
        assert abs(qber - simple) > 5 * spread


@pytest.mark.parametrize(("fraction", "any_key"), [(0.0, True), (0.1, True), (0.5, False), (1.0, False)])
def test_interception_costs_the_key(fraction: float, any_key: bool) -> None:
    optics = replace(DEFAULT, eavesdropper=Eavesdropper(intercept=fraction))
    [seen] = run(optics, 25_000_000, np.random.default_rng(6))
    counts = seen.block_counts()
    key_bits = sum(counts.key)
    leaked = round(1.12 * key_bits * binary_entropy(seen.key_qber))
    length = secret_length(counts, optics.source, leaked, Security())
    assert (length.bits > 0) is any_key
    if fraction == 1:
        # Nothing is left even if reconciliation told nothing at all.
        assert secret_length(counts, optics.source, 0, Security()).bits < 0.05 * key_bits
        assert length.phase_error_bound > 0.25


def test_splitting_does_not_show_in_the_qber_but_in_the_decoys() -> None:
    """At 50 km, with the same rate of signal clicks and no error more, all bits are known, and the decoys tell."""
    honest = DEFAULT.at(50)
    attacked = replace(honest, eavesdropper=Eavesdropper(splitting=1))
    pulses = 60_000_000
    results = []
    for optics in (honest, attacked):
        [seen] = run(optics, pulses, np.random.default_rng(7))
        counts = seen.block_counts()
        leaked = round(1.12 * sum(counts.key) * binary_entropy(seen.key_qber))
        results.append((seen.rates(optics.source), secret_length(counts, optics.source, leaked, Security())))
    (fair, fair_length), (foul, foul_length) = results
    # Without decoys there would be nothing to see: the signal's rate and the QBER are what they were.
    signals = pulses * honest.source.probabilities[0] * fair.gains[0]
    assert foul.gains[0] == pytest.approx(fair.gains[0], rel=6 / sqrt(signals))
    assert foul.qbers[0] == pytest.approx(fair.qbers[0], rel=6 / sqrt(signals * fair.qbers[0]))
    assert foul_length.qber_check == pytest.approx(fair_length.qber_check, rel=0.2)
    # With them, single photons are missed.
    assert foul.gains[1] < 0.7 * fair.gains[1]
    assert fair_length.bits > 0.2 * fair_length.single_photon_bound
    assert foul_length.single_photon_bound < 0.3 * fair_length.single_photon_bound
    assert foul_length.bits == 0
    assert bound_single_photons(foul, honest.source).single_yield < 0.2 * single_photons(honest).single_yield


def test_extra_loss_lowers_the_rate_and_no_more() -> None:
    lossy = replace(DEFAULT, eavesdropper=Eavesdropper(extra_loss=10))
    [seen] = run(lossy, 20_000_000, np.random.default_rng(8))
    gains = seen.rates(lossy.source).gains
    for gain, intensity, detected in zip(
        gains, lossy.source.intensities, seen.detections.sum(axis=0).tolist(), strict=True
    ):
        expected = 1 - (1 - 2e-7) * exp(-intensity * 10**-1.4 * 0.7)
        assert gain == pytest.approx(live_share(lossy) * expected, rel=4.5 / sqrt(detected))
    assert 0.004 < int(seen.errors.sum()) / int(seen.detections.sum()) < 0.006
    assert rate_of(lossy) == pytest.approx(rate_of(DEFAULT.at(70)))


def test_without_light_there_are_no_rates() -> None:
    nothing = replace(DEFAULT, detector=Detector(efficiency=0, dark_count=0, dead_time=0, misalignment=0))
    assert rates(nothing) == Rates((0, 0, 0), (0.5, 0.5, 0.5))
    assert single_photons(nothing).single_yield == 0
    assert rate_of(nothing) == bounded_rate_of(nothing) == 0
    assert intercepted_qber(nothing) == 0.5
    [seen] = run(nothing, 1000, np.random.default_rng(9))
    assert seen.rates(nothing.source) == rates(nothing)
    assert seen.key_qber == 0.5
