"""The optics, simulated the obvious way: pulse by pulse, photon by photon; and statistics to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.photonics.analytic import expected_counts
from kms_client.emulator.link.photonics.line import Line
from kms_client.emulator.link.photonics.parameters import Detector, Eavesdropper, Fibre, Optics, Source
from kms_client.emulator.link.photonics.receiver import Receiver

BRIGHT = Optics(
    Source(pulse_rate=1e8, intensities=(1.2, 0.5, 0.1), probabilities=(0.5, 0.3, 0.2), key_basis=0.7),
    Fibre(10, 0.2),
    Detector(efficiency=0.6, dark_count=0.05, dead_time=0, misalignment=0.1),
    Eavesdropper(intercept=0.3, splitting=0.4, extra_loss=0.5),
)
"""Everything happens so often that small samples show it."""


@dataclass(frozen=True)
class Trace:
    """Every pulse of a frame: choices, photons that arrive, and the click (0 none, else 1 + (basis << 1 | bit))."""

    bases: NDArray[np.int64]
    bits: NDArray[np.int64]
    intensities: NDArray[np.int64]
    counts: NDArray[np.int64]
    clicks: NDArray[np.int64]


def splitting_shares(optics: Optics) -> tuple[float, float]:
    """Which share of single and of multiple photons passes, if a splitting attack is to keep the signal's rate."""
    signal, efficiency = optics.source.intensities[0], optics.detector.efficiency
    wanted = 1 - exp(-signal * optics.transmittance * efficiency)
    # All pulses with two photons or more, less one photon: (exp(-signal * efficiency) with the first two terms off).
    passed = 1 - efficiency
    multiple = (1 - exp(-signal) * (1 + signal)) - (
        exp(-signal) / passed * (exp(signal * passed) - 1 - signal * passed)
    )
    if multiple > wanted:
        return 0.0, wanted / multiple
    return (wanted - multiple) / (signal * exp(-signal) * efficiency), 1.0


def dense(optics: Optics, pulses: int, seed: int) -> Trace:
    """The slow simulation, without dead time and afterpulses."""
    rng = np.random.default_rng(seed)
    single, multiple = splitting_shares(optics)
    source, detector, eve = optics.source, optics.detector, optics.eavesdropper
    trace = Trace(*(np.zeros(pulses, dtype=np.int64) for _ in range(5)))
    for i in range(pulses):
        basis = int(rng.random() >= source.key_basis)
        bit = int(rng.random() < 0.5)
        intensity = int(rng.choice(3, p=source.probabilities))
        photons = int(rng.poisson(source.intensities[intensity]))
        trace.bases[i], trace.bits[i], trace.intensities[i] = basis, bit, intensity
        survive = optics.transmittance
        if rng.random() < eve.intercept:
            guess = int(rng.random() < 0.5)
            basis, bit = guess, bit if guess == basis else int(rng.random() < 0.5)
        elif rng.random() < eve.splitting:
            passes = rng.random() < (multiple if photons > 1 else single)
            photons = max(photons - 1, min(photons, 1)) if passes else 0
            survive = 1.0
        arriving = sum(rng.random() < survive for _ in range(photons))
        trace.counts[i] = arriving
        measured = int(rng.random() >= source.key_basis)
        fired = {int(which) for which in (0, 1) if rng.random() < detector.dark_count}
        for _ in range(arriving):
            if rng.random() < detector.efficiency:
                astray = detector.misalignment if measured == basis else 0.5
                fired.add(bit ^ int(rng.random() < astray))
        if fired:
            result = fired.pop() if len(fired) == 1 else int(rng.random() < 0.5)
            trace.clicks[i] = 1 + (measured << 1 | result)
    return trace


def sparse(optics: Optics, pulses: int, seed: int) -> Trace:
    """The same from the library."""
    rng = np.random.default_rng(seed)
    sent, photons = Line(optics, rng).transmit(pulses)
    clicks = Receiver(optics.detector, optics.source, rng).detect(photons)
    counts, results = np.zeros(pulses, dtype=np.int64), np.zeros(pulses, dtype=np.int64)
    counts[photons.indices] = photons.counts
    results[clicks.indices] = 1 + (clicks.bases.astype(np.int64) << 1 | clicks.bits)
    # As the transmitter would be asked: for the clicks first.
    sent.look_up(clicks.indices)
    choices = sent.look_up(np.arange(pulses, dtype=np.uint32))
    return Trace(
        choices.bases.astype(np.int64),
        choices.bits.astype(np.int64),
        choices.intensities.astype(np.int64),
        counts,
        results,
    )


def assert_same_distribution(one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """A chi-square test of two samples of categories, at about four standard deviations."""
    cells = int(max(one.max(), other.max())) + 1
    a, b = np.bincount(one, minlength=cells), np.bincount(other, minlength=cells)
    # Rare categories count as one.
    rare = a + b < 20
    a, b = np.append(a[~rare], a[rare].sum()), np.append(b[~rare], b[rare].sum())
    keep = a + b > 0
    a, b = a[keep], b[keep]
    ratio = sqrt(b.sum() / a.sum())
    statistic = float((((a * ratio - b / ratio) ** 2) / (a + b)).sum())
    freedom = len(a) - 1
    assert freedom > 0
    assert statistic < freedom + 4 * sqrt(2 * freedom) + 6, (statistic, freedom)


def pulses_for(optics: Optics, key_bits: float) -> float:
    """How many pulses a block of so many key bits takes, on average."""
    return key_bits / sum(expected_counts(optics, 1e15).key) * 1e15
