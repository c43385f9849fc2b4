"""The number of secret bits in a block: decoy-state BB84 with blocks of finite size.

C. C. W. Lim, M. Curty, N. Walenta, F. Xu and H. Zbinden, "Concise security bounds for practical decoy-state quantum key
distribution", Phys. Rev. A 89, 022307 (2014), with its names: X is the key basis, Z the check basis, 1 to 3 are the
intensities from signal to weakest decoy, n are detections, m errors; the equations are given below by their numbers.

It holds against any attack that quantum mechanics allows on the light, if the transmitter and the receiver
are as assumed: phases are random, nothing but the photon number tells the intensity, a pulse's chance to be
detected does not depend on the receiver's basis. The block's counts must be those of all pulses sent in it,
its key bits those of all three intensities.

Two things differ from the paper, both to the safe side. The step from Z to X, equation 5, takes a normal approximation,
which is too good for a handful of errors: with none it would allow none. So at least ``2 ln(21 / secrecy)`` errors are
taken to have been there. And it is too good for a small X: so Z counts as no larger than X. With both, the bound holds
for the exact (hypergeometric) distribution; the tests compute it.

The length depends on the counts of the block, so that the protocol is one of variable length, which later
work has looked at more closely than the paper: J. Wiesemann et al., "A consolidated and accessible security
proof for finite-size decoy-state quantum key distribution", arXiv:2405.16578.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, factorial, floor, isfinite, log, log2, sqrt

from kms_client.emulator.link.photonics.parameters import Source

__all__ = [
    "BlockCounts",
    "SecretLength",
    "Security",
    "binary_entropy",
    "secret_length",
]

Counts = tuple[int, int, int]

TERMS = 21
"""The number of parts into which the proof splits the secrecy parameter."""


def binary_entropy(probability: float) -> float:
    """Return the entropy of a bit in bits; 0 at 0 and at 1."""
    if probability <= 0 or probability >= 1:
        return 0.0
    return -probability * log2(probability) - (1 - probability) * log2(1 - probability)


@dataclass(frozen=True)
class Security:
    """The secrecy and the equality of the keys: the probabilities that they fail, for one block.

    The keys are secret and equal, up to ``secrecy + correctness``, for any use (composable security).
    """

    secrecy: float = 1e-10
    correctness: float = 1e-15

    def __post_init__(self) -> None:
        for name, value in (("secrecy", self.secrecy), ("correctness", self.correctness)):
            if not (isfinite(value) and 0 < value < 1):
                raise ValueError(f"{name} must be a probability between 0 and 1, not {value!r}")


@dataclass(frozen=True)
class BlockCounts:
    """The counts of both sides in a block; three numbers each, by intensity, signal first.

    Raises `ValueError` for negative counts and for more errors than detections.
    """

    key: Counts
    """Detections for which both sides chose the key basis: all bits of the block."""
    check: Counts
    """Detections for which both sides chose the check basis, all of which are made public."""
    errors: Counts
    """The number of those that differ."""

    def __post_init__(self) -> None:
        for counts in (self.key, self.check, self.errors):
            if len(counts) != 3 or min(counts) < 0:
                raise ValueError(f"a block has three counts of at least 0 for each kind, not {counts!r}")
        if any(errors > check for errors, check in zip(self.errors, self.check, strict=True)):
            raise ValueError(f"a block cannot have errors {self.errors!r} in {self.check!r} detections")


@dataclass(frozen=True)
class SecretLength:
    """The allowed length of the key, and its reasons."""

    bits: int
    qber_check: float
    """The share of errors in the check basis; 0.5 if there were no detections."""
    phase_error_bound: float
    """The error rate that single photons would have had in the other basis, at most (from 0 to 0.5)."""
    vacuum_bound: float
    """The number of bits of the block that come from pulses without photons, at least."""
    single_photon_bound: float
    """The number of bits of the block that come from pulses with one photon, at least."""


def secret_length(counts: BlockCounts, source: Source, leaked_bits: int, security: Security) -> SecretLength:
    """Return the number of secret bits in a block, after `leaked_bits` were told in public to reconcile it.

    `leaked_bits` counts all bits that reconciliation has told, and verification's tag. (In the paper,
    ``log2(2 / correctness)`` stands for a tag of just that length; it is taken off as well.) If nothing is
    secret, for any reason, there are 0 bits. Raises `ValueError` if `leaked_bits` is negative.
    """
    if leaked_bits < 0:
        raise ValueError(f"leaked_bits must be at least 0, not {leaked_bits}")
    detected = sum(counts.check)
    qber = sum(counts.errors) / detected if detected else 0.5
    vacuum = _vacuum(counts.key, source, security)
    single = _single(counts.key, source, security)
    check_single = _single(counts.check, source, security)
    phase_error = 0.5
    if single > 0 and check_single > 0:
        errors = _single_errors(counts.errors, source, security)
        phase_error = _phase_error(errors, check_single, single, security)
    # Equation 1. (The entropy of a rate above a half would fall again; the bound says nothing then.)
    length = (
        vacuum
        + single * (1 - binary_entropy(phase_error))
        - leaked_bits
        - 6 * log2(TERMS / security.secrecy)
        - log2(2 / security.correctness)
    )
    return SecretLength(max(floor(length), 0), qber, phase_error, vacuum, single)


def _tau(photons: int, source: Source) -> float:
    """Return the probability that a pulse has this many photons."""
    return sum(
        exp(-intensity) * intensity**photons * probability / factorial(photons)
        for intensity, probability in zip(source.intensities, source.probabilities, strict=True)
    )


def _limits(counts: Counts, source: Source, security: Security) -> tuple[list[float], list[float]]:
    """Return counts by intensity, weighted, with their statistical error taken off and added (Hoeffding)."""
    deviation = sqrt(sum(counts) / 2 * log(TERMS / security.secrecy))
    weights = [exp(k) / p for k, p in zip(source.intensities, source.probabilities, strict=True)]
    low = [weight * (count - deviation) for weight, count in zip(weights, counts, strict=True)]
    high = [weight * (count + deviation) for weight, count in zip(weights, counts, strict=True)]
    return low, high


def _vacuum(counts: Counts, source: Source, security: Security) -> float:
    """Return equation 2: detections of pulses without photons, at least."""
    _, decoy, weakest = source.intensities
    low, high = _limits(counts, source, security)
    bound = _tau(0, source) * (decoy * low[2] - weakest * high[1]) / (decoy - weakest)
    return max(bound, 0.0)


def _single(counts: Counts, source: Source, security: Security) -> float:
    """Return equation 3: detections of pulses with one photon, at least."""
    signal, decoy, weakest = source.intensities
    low, high = _limits(counts, source, security)
    others = high[0] - _vacuum(counts, source, security) / _tau(0, source)
    bound = (
        _tau(1, source)
        * signal
        * (low[1] - high[2] - (decoy**2 - weakest**2) / signal**2 * others)
        / (signal * (decoy - weakest) - decoy**2 + weakest**2)
    )
    return max(bound, 0.0)


def _single_errors(errors: Counts, source: Source, security: Security) -> float:
    """Return equation 4: errors in pulses with one photon, at most."""
    _, decoy, weakest = source.intensities
    low, high = _limits(errors, source, security)
    return max(_tau(1, source) * (high[1] - low[2]) / (decoy - weakest), 0.0)


def _phase_error(errors: float, check: float, key: float, security: Security) -> float:
    """Return equation 5: the error rate in `key` detections, at most, for `errors` in `check` other ones."""
    sample = min(check, key)
    rate = max(errors / check, 2 * log(TERMS / security.secrecy) / sample)
    if rate >= 0.5:
        return 0.5
    both = (sample + key) / (sample * key)
    spread = rate * (1 - rate)
    gamma = sqrt(both * spread / log(2) * log2(both / spread * TERMS**2 / security.secrecy**2))
    return min(rate + gamma, 0.5)
