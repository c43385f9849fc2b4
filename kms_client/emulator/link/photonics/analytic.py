"""The averages of the optics in closed form: rates of clicks, error rates, key rate without statistics.

X. Ma, B. Qi, Y. Zhao and H.-K. Lo, "Practical decoy state for quantum key distribution", Phys. Rev. A 72, 012326
(2005), with its names: the gain Q is the probability that a pulse is detected, the QBER E the share of errors, the
yield Y_n the gain of pulses with n photons. The key rate is that of D. Gottesman, H.-K. Lo, N. Lütkenhaus and
J. Preskill, Quant. Inf. Comput. 4, 325 (2004), with single photons known from decoys. No eavesdropper, except that
extra loss counts as loss.

The formulas are for detectors without afterpulses; a dead time lowers all gains by `live_share`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1

from kms_client.emulator.link.photonics.parameters import Optics, Source
from kms_client.emulator.link.postprocessing.finite_key import BlockCounts, binary_entropy

__all__ = [
    "Rates",
    "SinglePhotons",
    "asymptotic_rate",
    "bound_single_photons",
    "expected_counts",
    "intercepted_qber",
    "live_share",
    "rates",
    "single_photons",
]

RANDOM_ERROR = 0.5  # e_0, the error rate of dark counts


@dataclass(frozen=True)
class Rates:
    """The measurable rates, by intensity."""

    gains: tuple[float, float, float]
    qbers: tuple[float, float, float]


@dataclass(frozen=True)
class SinglePhotons:
    """Pulses with a single photon: the probability that one is detected, and its error rate."""

    single_yield: float
    error: float


def _background(optics: Optics) -> float:
    """Return Y_0: the probability that a gate without light clicks."""
    return 1 - (1 - optics.detector.dark_count) ** 2


def rates(optics: Optics) -> Rates:
    """Return gains and QBERs without dead time: equations 10 and 11, with Y_0 (1 - eta) for Y_0 in the gain.

    (The paper leaves out that a dark count in a gate with a photon makes no second click.)
    """
    detector = optics.detector
    background = _background(optics)
    gains, qbers = [], []
    for intensity in optics.source.intensities:
        light = -expm1(-intensity * optics.transmittance * detector.efficiency)
        gain = background + light - background * light
        gains.append(gain)
        errors = RANDOM_ERROR * background * (1 - light) + detector.misalignment * light
        qbers.append(errors / gain if gain > 0 else RANDOM_ERROR)
    return Rates((gains[0], gains[1], gains[2]), (qbers[0], qbers[1], qbers[2]))


def single_photons(optics: Optics) -> SinglePhotons:
    """Return the true Y_1 and e_1, which infinitely many decoys would show: equations 7 and 9."""
    background = _background(optics)
    light = optics.transmittance * optics.detector.efficiency
    single_yield = background + light - background * light
    if single_yield == 0:
        return SinglePhotons(0.0, RANDOM_ERROR)
    errors = RANDOM_ERROR * background * (1 - light) + optics.detector.misalignment * light
    return SinglePhotons(single_yield, errors / single_yield)


def bound_single_photons(measured: Rates, source: Source) -> SinglePhotons:
    """Return Y_1 at least and e_1 at most, from the measurable rates: equations 18, 21 and 25."""
    signal, decoy, weakest = source.intensities
    weighted = [gain * exp(k) for gain, k in zip(measured.gains, source.intensities, strict=True)]
    vacuum = max((decoy * weighted[2] - weakest * weighted[1]) / (decoy - weakest), 0.0)
    single_yield = (
        signal
        * (weighted[1] - weighted[2] - (decoy**2 - weakest**2) / signal**2 * (weighted[0] - vacuum))
        / (signal * decoy - signal * weakest - decoy**2 + weakest**2)
    )
    if single_yield <= 0:
        return SinglePhotons(0.0, RANDOM_ERROR)
    errors = weighted[1] * measured.qbers[1] - weighted[2] * measured.qbers[2]
    return SinglePhotons(
        single_yield, min(max(errors / ((decoy - weakest) * single_yield), 0.0), RANDOM_ERROR)
    )


def asymptotic_rate(
    measured: Rates, single: SinglePhotons, source: Source, reconciliation: float = 1.22
) -> float:
    """Return the secret bits per pulse of infinitely many: equation 1 for each intensity; 0 if none.

    As in `finite_key`, the key comes from all intensities, but here not from an intensity that would cost
    more bits than it has. It comes from the key basis, so that q is ``key_basis**2`` (the paper has 1/2, for
    a key from both of two equally likely bases). `reconciliation` is the information that reconciliation
    leaks, in units of the Shannon limit; the paper takes 1.22.
    """
    total = 0.0
    for intensity, probability, gain, qber in zip(
        source.intensities, source.probabilities, measured.gains, measured.qbers, strict=True
    ):
        single_gain = single.single_yield * intensity * exp(-intensity)
        secret = single_gain * (1 - binary_entropy(single.error)) - gain * reconciliation * binary_entropy(
            qber
        )
        total += probability * max(secret, 0.0)
    return source.key_basis**2 * total


def live_share(optics: Optics) -> float:
    """Return the share of gates that are not in a dead time, if clicks come independently."""
    measured = rates(optics)
    clicks = sum(p * gain for p, gain in zip(optics.source.probabilities, measured.gains, strict=True))
    return 1 / (1 + clicks * optics.detector.dead_gates(optics.source.pulse_rate))


def expected_counts(optics: Optics, pulses: float) -> BlockCounts:
    """Return the average counts, rounded, of a block of `pulses` pulses, for the finite-size key length."""
    measured = rates(optics)
    source = optics.source
    live = live_share(optics)
    detected = [
        pulses * live * p * gain for p, gain in zip(source.probabilities, measured.gains, strict=True)
    ]
    key = [round(number * source.key_basis**2) for number in detected]
    check = [round(number * (1 - source.key_basis) ** 2) for number in detected]
    errors = [round(number * qber) for number, qber in zip(check, measured.qbers, strict=True)]
    return BlockCounts(
        (key[0], key[1], key[2]), (check[0], check[1], check[2]), (errors[0], errors[1], errors[2])
    )


def intercepted_qber(optics: Optics) -> float:
    """Return the signal's QBER if a fraction of the pulses is intercepted and sent again.

    An eavesdropper who measures in a random basis takes the wrong one for half of the pulses, and then half
    of the bits are wrong. So a fraction f adds f / 4, but not to errors that are there anyway: two errors
    make a right bit, and a dark count is independent of the pulse. With an error rate of e_0 without an
    eavesdropper the sum is ``e_0 + f / 4`` if e_0 is small, and ``e_0 + f / 4 * (1 - 2 * misalignment)`` for
    clicks of photons exactly.
    """
    background = _background(optics)
    detector = optics.detector
    light = -expm1(-optics.source.intensities[0] * optics.transmittance * detector.efficiency)
    gain = background + light - background * light
    if gain == 0:
        return RANDOM_ERROR
    astray = detector.misalignment + optics.eavesdropper.intercept / 4 * (1 - 2 * detector.misalignment)
    return (RANDOM_ERROR * background * (1 - light) + astray * light) / gain
