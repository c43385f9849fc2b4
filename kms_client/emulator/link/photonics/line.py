"""The transmitter, and the fibre with an eavesdropper: the photons that reach the receiver, and their states.

Most pulses of a link leave nothing at its far end. So no array here has an entry for each pulse: only the pulses of
which something arrives are made, and the result has exactly the distribution that a simulation pulse by pulse has.

- Pulses are independent and alike. So the arrival of anything is a Bernoulli trial, and the gaps between
  pulses of which something arrives are geometric.
- The history of such a pulse (intensity, attack, photons that arrive) is drawn from the conditional
  distribution, which is a small table.
- Basis and bit are independent of all that.
- A pulse of which nothing arrives gets its choices when they are looked up, as after a dark count: its
  intensity then comes from the distribution on condition that nothing arrived.

Bits and bases are uint8 arrays of 0 and 1, a pulse's index is its position in the frame.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import exp, expm1, factorial

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.arrays import Bits, Indices
from kms_client.emulator.link.photonics.parameters import CHECK_BASIS, Optics

__all__ = [
    "MAXIMUM_PULSES",
    "Choices",
    "Line",
    "Photons",
    "Sent",
    "bernoulli_indices",
]

MAXIMUM_PULSES = 1 << 32
"""Pulses in a frame."""


PHOTON_LIMIT = 40  # 5 photons on average: more than 40 have a probability below 2e-24
HEADER = struct.Struct(">QI")


def bernoulli_indices(trials: int, probability: float, rng: np.random.Generator) -> Indices:
    """Return the successful ones of `trials` independent trials, ascending; only successes cost time."""
    if probability <= 0 or trials <= 0:
        return np.empty(0, dtype=np.uint32)
    parts = []
    last = -1
    while last < trials:
        rest = trials - 1 - last
        expected = rest * probability
        gaps = rng.geometric(probability, size=int(expected + 6 * expected**0.5 + 16))
        # A gap beyond the end ends the frame, whatever its size, which may be near 2**63.
        places = np.minimum(gaps, rest + 1).cumsum() + last
        parts.append(places)
        last = int(places[-1])
    indices = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return indices[: np.searchsorted(indices, trials)].astype(np.uint32)


@dataclass(frozen=True)
class Choices:
    """The choices of the transmitter for some pulses."""

    bases: Bits
    """`KEY_BASIS` or `CHECK_BASIS`"""
    bits: Bits
    intensities: Bits
    """0, 1 or 2: an index of `Source.intensities`"""

    def __len__(self) -> int:
        return len(self.bases)


@dataclass(frozen=True, eq=False)
class Photons:
    """The photons that leave the fibre in one frame."""

    indices: Indices
    """Ascending: the pulses of which at least one photon arrives."""
    states: Bits
    """``basis << 1 | bit``"""
    counts: Bits
    """Numbers of photons, at least 1."""
    pulses: int
    """The number of pulses in the frame."""

    def to_bytes(self) -> bytes:
        """Return the frame as bytes, for `from_bytes`: 12, and 6 per pulse of which something arrives."""
        head = HEADER.pack(self.pulses, len(self.indices))
        return b"".join(
            (head, self.indices.astype("<u4").tobytes(), self.states.tobytes(), self.counts.tobytes())
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Photons:
        """Parse a frame. Raises `ValueError` for anything that is not from `to_bytes`."""
        if len(data) < HEADER.size:
            raise ValueError(f"a frame of photons has at least {HEADER.size} bytes, not {len(data)}")
        pulses, number = HEADER.unpack_from(data)
        if pulses > MAXIMUM_PULSES or len(data) != HEADER.size + 6 * number:
            raise ValueError(
                f"{len(data)} bytes are not a frame of {pulses} pulses with photons in {number} of them"
            )
        place = HEADER.size
        indices = np.frombuffer(data, dtype="<u4", count=number, offset=place).astype(np.uint32)
        states = np.frombuffer(data, dtype=np.uint8, count=number, offset=place + 4 * number)
        counts = np.frombuffer(data, dtype=np.uint8, count=number, offset=place + 5 * number)
        if number and (
            indices[-1] >= pulses
            or (indices[1:] <= indices[:-1]).any()
            or states.max() > 3
            or not counts.all()
        ):
            raise ValueError(
                "a frame of photons has indices out of order, unknown states or pulses without photons"
            )
        return cls(indices, states, counts, pulses)


class Sent:
    """The transmitter's record of a frame."""

    def __init__(
        self,
        pulses: int,
        indices: Indices,
        choices: Choices,
        key_basis: float,
        dark_intensities: NDArray[np.float64],
        rng: np.random.Generator,
    ) -> None:
        self.pulses = pulses
        self._indices = indices
        self._choices = choices
        self._key_basis = key_basis
        self._dark_intensities = dark_intensities
        self._rng = rng

    def look_up(self, indices: Indices) -> Choices:
        """Return the choices for these pulses, in the order asked; always the same for a pulse.

        Raises `ValueError` for an index outside the frame.
        """
        indices = np.asarray(indices, dtype=np.uint32)
        if len(indices) and int(indices.max()) >= self.pulses:
            raise ValueError(f"pulse {int(indices.max())} is not in a frame of {self.pulses} pulses")
        places, found = self._find(indices)
        if not found.all():
            self._add(np.unique(indices[~found]))
            places, _ = self._find(indices)
        chosen = self._choices
        return Choices(chosen.bases[places], chosen.bits[places], chosen.intensities[places])

    def _find(self, indices: Indices) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        places = np.searchsorted(self._indices, indices)
        inside = np.minimum(places, max(len(self._indices) - 1, 0))
        found = (
            self._indices[inside] == indices if len(self._indices) else np.zeros(len(indices), dtype=np.bool_)
        )
        return places, found

    def _add(self, indices: Indices) -> None:
        number = len(indices)
        intensities = self._rng.choice(3, size=number, p=self._dark_intensities).astype(np.uint8)
        new = Choices(*_bases_and_bits(number, self._key_basis, self._rng), intensities)
        old = self._choices
        at = np.searchsorted(self._indices, indices)
        self._indices = np.insert(self._indices, at, indices)
        self._choices = Choices(
            np.insert(old.bases, at, new.bases),
            np.insert(old.bits, at, new.bits),
            np.insert(old.intensities, at, new.intensities),
        )


class Line:
    """The transmitter and the fibre. `optics` may be replaced between frames.

    The physics and the transmitter's choices come from `rng`. Outside of tests, seed it from the operating
    system, as `numpy.random.default_rng()` does.
    """

    def __init__(self, optics: Optics, rng: np.random.Generator) -> None:
        self.optics = optics
        self.known: Indices = np.empty(0, dtype=np.uint32)
        """Pulses of the last frame whose bit the eavesdropper knows once the bases are announced."""
        self._rng = rng

    def transmit(self, pulses: int) -> tuple[Sent, Photons]:
        """Send a frame; return the transmitter's record, and the photons that leave the fibre.

        Raises `ValueError` if there are fewer than 1 or more than `MAXIMUM_PULSES` pulses.
        """
        if not 1 <= pulses <= MAXIMUM_PULSES:
            raise ValueError(f"a frame has 1 to {MAXIMUM_PULSES} pulses, not {pulses}")
        rng = self._rng
        source = self.optics.source
        table = _arrivals(self.optics)
        arriving = float(table.sum())
        indices = bernoulli_indices(pulses, arriving, rng)
        number = len(indices)
        intensities, fates, counts = _draw(table, number, rng)
        bases, bits = _bases_and_bits(number, source.key_basis, rng)
        states = bases << np.uint8(1) | bits

        intercepted = np.flatnonzero(fates == INTERCEPTED)
        guesses = rng.integers(0, 2, size=len(intercepted), dtype=np.uint8)
        right = guesses == bases[intercepted]
        results = np.where(
            right, bits[intercepted], rng.integers(0, 2, size=len(intercepted), dtype=np.uint8)
        )
        states[intercepted] = guesses << np.uint8(1) | results
        known = fates == SPLIT
        known[intercepted] = right
        self.known = indices[known]

        nothing = np.asarray(source.probabilities) - table.sum(axis=(1, 2))
        sent = Sent(
            pulses,
            indices,
            Choices(bases, bits, intensities),
            source.key_basis,
            np.maximum(nothing, 0) / np.maximum(nothing, 0).sum(),
            rng,
        )
        return sent, Photons(indices, states, counts, pulses)


UNTOUCHED, INTERCEPTED, SPLIT, LET_PASS = range(4)


def _bases_and_bits(number: int, key_basis: float, rng: np.random.Generator) -> tuple[Bits, Bits]:
    bases = (rng.random(number) >= key_basis).astype(np.uint8) * np.uint8(CHECK_BASIS)
    return bases, rng.integers(0, 2, size=number, dtype=np.uint8)


def _poisson(mean: float) -> NDArray[np.float64]:
    return np.array([exp(-mean) * mean**n / factorial(n) for n in range(PHOTON_LIMIT + 1)])


def _splitting(optics: Optics) -> tuple[float, float]:
    """Return the shares of pulses with one photon, and with more, that a splitting eavesdropper lets pass.

    She knows the signal's intensity and the receiver, and wants the signal's rate of clicks to be as it was.
    """
    signal = optics.source.intensities[0]
    efficiency = optics.detector.efficiency
    sent = _poisson(signal)
    wanted = -expm1(-signal * optics.transmittance * efficiency)
    clicks = 1 - (1 - efficiency) ** np.arange(PHOTON_LIMIT)  # of 0, 1, ... photons that reach the receiver
    multiple = float(sent[2:] @ clicks[1:])
    if multiple >= wanted:
        return 0.0, wanted / multiple if multiple > 0 else 0.0
    return min(1.0, (wanted - multiple) / (float(sent[1]) * efficiency)), 1.0


def _arrivals(optics: Optics) -> NDArray[np.float64]:
    """Return the probability of (intensity, fate, photons arriving - 1), given that something arrives."""
    source, eavesdropper = optics.source, optics.eavesdropper
    single, multiple = _splitting(optics)
    table = np.zeros((3, 4, PHOTON_LIMIT))
    for i, (intensity, probability) in enumerate(zip(source.intensities, source.probabilities, strict=True)):
        # Of a Poisson distribution, losses leave a Poisson distribution. Who resends, resends as many photons.
        arriving = _poisson(intensity * optics.transmittance)[1:]
        sent = _poisson(intensity)
        left = 1 - eavesdropper.intercept
        table[i, UNTOUCHED] = probability * left * (1 - eavesdropper.splitting) * arriving
        table[i, INTERCEPTED] = probability * eavesdropper.intercept * arriving
        table[i, SPLIT, : PHOTON_LIMIT - 1] = (
            probability * left * eavesdropper.splitting * multiple * sent[2:]
        )
        table[i, LET_PASS, 0] = probability * left * eavesdropper.splitting * single * sent[1]
    return table


def _draw(table: NDArray[np.float64], number: int, rng: np.random.Generator) -> tuple[Bits, Bits, Bits]:
    """Return intensities, fates and photons for `number` pulses, drawn from the table of `_arrivals`."""
    cells = np.flatnonzero(table)
    if number == 0:
        cells = np.zeros(1, dtype=np.intp)
    limits = table.ravel()[cells].cumsum()
    drawn = np.searchsorted(limits, rng.random(number) * limits[-1], side="right")
    intensities, fates, counts = np.unravel_index(cells, table.shape)
    return (
        intensities.astype(np.uint8)[drawn],
        fates.astype(np.uint8)[drawn],
        (counts + 1).astype(np.uint8)[drawn],
    )
