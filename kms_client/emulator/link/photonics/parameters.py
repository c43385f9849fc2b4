"""The parameters of the optics: source, fibre, detector, and the eavesdropper that may sit on the fibre.

Two sets of parameters come with it: `DEFAULT`, a link of 20 km as sold today, and `GYS`, the experiment of C.
Gobby, Z. L. Yuan and A. J. Shields, Appl. Phys. Lett. 84, 3762 (2004), as modelled in X. Ma, B. Qi, Y. Zhao
and H.-K. Lo, Phys. Rev. A 72, 012326 (2005), table I.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf, isclose, isfinite

__all__ = [
    "CHECK_BASIS",
    "DEFAULT",
    "GYS",
    "KEY_BASIS",
    "MAXIMUM_INTENSITY",
    "Detector",
    "Eavesdropper",
    "Fibre",
    "Optics",
    "Source",
]

KEY_BASIS = 0
"""The basis whose bits become key (X in the literature that `finite_key` cites)."""
CHECK_BASIS = 1
"""The basis whose bits are made public, to detect an eavesdropper's actions (Z)."""
MAXIMUM_INTENSITY = 5.0
"""Photons a pulse, on average: above it there is nothing secret in a pulse, and photon numbers would not fit a byte."""


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (isfinite(value) and low <= value <= high):
        limits = f"from {low:g} to {high:g}" if high < inf else f"of at least {low:g}"
        raise ValueError(f"{name} must be a number {limits}, not {value!r}")


@dataclass(frozen=True)
class Source:
    """The transmitter: a pulsed laser, attenuated to one of three intensities, with a random phase for each pulse.

    The random phase makes each pulse a mixture of photon numbers with a Poisson distribution, as the decoy-
    state method needs. Raises `ValueError` if the intensities do not suit the bounds in `finite_key`.
    """

    pulse_rate: float
    """Pulses a second."""
    intensities: tuple[float, float, float]
    """Photons a pulse on average: signal, decoy, weakest decoy (may be 0). The signal exceeds the sum of the others."""
    probabilities: tuple[float, float, float]
    """The probability of each intensity; their sum is 1."""
    key_basis: float
    """The probability that a side chooses the key basis; it chooses the check basis otherwise."""

    def __post_init__(self) -> None:
        _check("pulse_rate", self.pulse_rate, 1, 1e12)
        if len(self.intensities) != 3 or len(self.probabilities) != 3:
            raise ValueError("a source has three intensities and three probabilities")
        for intensity in self.intensities:
            _check("an intensity", intensity, 0, MAXIMUM_INTENSITY)
        signal, decoy, weakest = self.intensities
        if not (decoy > weakest and signal > decoy + weakest):
            raise ValueError(
                f"intensities must be signal > decoy + weakest and decoy > weakest, not {self.intensities!r}"
            )
        for probability in self.probabilities:
            _check("the probability of an intensity", probability, 1e-9, 1)
        if not isclose(sum(self.probabilities), 1, abs_tol=1e-9):
            raise ValueError(
                f"the probabilities of the intensities must sum up to 1, not {self.probabilities!r}"
            )
        _check("key_basis", self.key_basis, 1e-6, 1 - 1e-6)


@dataclass(frozen=True)
class Fibre:
    """The fibre between transmitter and receiver."""

    length: float
    """km"""
    attenuation: float
    """dB/km"""

    def __post_init__(self) -> None:
        _check("the fibre's length in km", self.length, 0, 10_000)
        _check("the fibre's attenuation in dB/km", self.attenuation, 0, 100)

    @property
    def loss(self) -> float:
        """dB"""
        return self.length * self.attenuation


@dataclass(frozen=True)
class Detector:
    """The receiver: a basis chosen at random for each pulse, and two detectors, one for each value of the bit.

    After a click both detectors are off for the dead time. If each had a dead time of its own, the one that
    is off would reveal the next bit.
    """

    efficiency: float
    """The probability that a photon which reaches the receiver makes a detector click, optical losses included."""
    dark_count: float
    """The probability that a detector clicks in a gate without light; for each of the two detectors."""
    dead_time: float
    """Seconds after a click in which neither detector clicks."""
    misalignment: float
    """The probability that a photon goes to the wrong detector though the bases are equal."""
    afterpulsing: float = 0.0
    """The probability that a click causes one more in the same detector, after the dead time."""
    afterpulse_lifetime: float = 1e-6
    """Seconds after the dead time in which it comes, on average."""

    def __post_init__(self) -> None:
        _check("efficiency", self.efficiency, 0, 1)
        _check("dark_count", self.dark_count, 0, 0.5)
        _check("dead_time in seconds", self.dead_time, 0, 1)
        _check("misalignment", self.misalignment, 0, 0.5)
        _check("afterpulsing", self.afterpulsing, 0, 0.9)
        _check("afterpulse_lifetime in seconds", self.afterpulse_lifetime, 1e-12, 1)

    def dead_gates(self, pulse_rate: float) -> int:
        """Return the number of gates lost to the dead time after a click, at `pulse_rate` pulses a second."""
        return ceil(self.dead_time * pulse_rate * (1 - 1e-12))


@dataclass(frozen=True)
class Eavesdropper:
    """Actions on the pulses between the two sites. By default: nothing."""

    intercept: float = 0.0
    """The fraction of pulses that are intercepted, measured in a random basis, and sent again as found."""
    splitting: float = 0.0
    """The fraction of the other pulses under a photon-number splitting attack.

    Of a pulse with two or more photons one is kept until the bases are announced, the others go on without any loss.
    Pulses with a single photon are held back, as many as are needed to keep the rate of clicks that the
    signal pulses would have after the fibre's loss. """
    extra_loss: float = 0.0
    """dB"""

    def __post_init__(self) -> None:
        _check("intercept", self.intercept, 0, 1)
        _check("splitting", self.splitting, 0, 1)
        _check("extra_loss in dB", self.extra_loss, 0, 1000)


@dataclass(frozen=True)
class Optics:
    """All optics of a link. `dataclasses.replace` makes a changed one."""

    source: Source
    fibre: Fibre
    detector: Detector
    eavesdropper: Eavesdropper = Eavesdropper()

    def at(self, length: float) -> Optics:
        """Return the same optics with `length` km of fibre."""
        return replace(self, fibre=replace(self.fibre, length=length))

    @property
    def transmittance(self) -> float:
        """The probability that a photon which leaves the transmitter reaches the receiver, without splitting."""
        return float(10 ** (-(self.fibre.loss + self.eavesdropper.extra_loss) / 10))


DEFAULT = Optics(
    source=Source(
        pulse_rate=50e6,
        intensities=(0.5, 0.2, 0.001),
        probabilities=(0.5, 0.3, 0.2),
        key_basis=0.8,
    ),
    fibre=Fibre(length=20, attenuation=0.2),
    detector=Detector(efficiency=0.7, dark_count=1e-7, dead_time=30e-9, misalignment=0.005),
)
"""20 km of fibre, superconducting nanowire detectors (85 %) behind 0.8 dB of receiver optics.

Intensities and probabilities are near the best ones for blocks of a million key bits.
"""

GYS = Optics(
    source=Source(
        pulse_rate=2e6,
        intensities=(0.48, 0.15, 0.0),
        probabilities=(0.5, 0.3, 0.2),
        key_basis=0.8,
    ),
    fibre=Fibre(length=50, attenuation=0.21),
    detector=Detector(efficiency=0.045, dark_count=0.85e-6, dead_time=0, misalignment=0.033),
)
"""GYS: 1550 nm, 0.21 dB/km, 4.5 % at the receiver, 1.7e-6 dark counts a gate in both detectors, 3.3 % misalignment.

The signal's intensity is the best one in the paper. The decoys and the biased bases are additions: the
experiment had none. Its dead time is not in the model.
"""
