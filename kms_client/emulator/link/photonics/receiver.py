"""The receiver: the gates that click, in which basis and with which bit.

For each pulse the receiver has chosen a basis at random, even if nothing arrives. Each photon is detected or
not on its own; a detected one goes to the detector of its bit, to the other one by misalignment, and to
either with the same probability if the bases differ. Detectors also click by themselves (dark counts), and
some time after a click (afterpulses). If both click in one gate, the bit is drawn at random, as the security
analysis demands.

Everything is computed for the gates only in which something may click. Dead times and afterpulses depend on
the clicks before: candidates that are not near others are decided all at once, the rest one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.arrays import Bits, Gates, Indices
from kms_client.emulator.link.photonics.line import Photons, bernoulli_indices
from kms_client.emulator.link.photonics.parameters import CHECK_BASIS, Detector, Source

__all__ = [
    "Clicks",
    "Receiver",
]


NO_PARENT = -1


@dataclass(frozen=True, eq=False)
class Clicks:
    """The receiver's detections in one frame."""

    indices: Indices
    """Ascending."""
    bases: Bits
    bits: Bits
    pulses: int
    """The number of pulses in the frame."""
    doubles: int
    """The number of gates in which both detectors clicked."""

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class _Events:
    """Clicks of single detectors that happen unless the dead time, or their cause, prevents it."""

    gates: Gates
    bases: Bits
    detectors: Bits
    parents: Gates
    """For an afterpulse: the place of the event that causes it."""

    @classmethod
    def join(cls, parts: list[_Events]) -> _Events:
        return cls(
            np.concatenate([part.gates for part in parts]),
            np.concatenate([part.bases for part in parts]),
            np.concatenate([part.detectors for part in parts]),
            np.concatenate([part.parents for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.gates)


class Receiver:
    """The receiver. `detector` may be replaced between frames; a dead time goes on in the next frame.

    `source` has the probability of the key basis, and the gates a second.
    """

    def __init__(self, detector: Detector, source: Source, rng: np.random.Generator) -> None:
        self.detector = detector
        self._source = source
        self._rng = rng
        self._dead_until = 0
        self._waiting_gates: Gates = np.empty(0, dtype=np.int64)
        self._waiting_detectors: Bits = np.empty(0, dtype=np.uint8)

    def detect(self, photons: Photons) -> Clicks:
        """Detect the next frame."""
        frame = photons.pulses
        events = self._afterpulses(
            _Events.join([self._photon_events(photons), *self._dark_events(frame), self._waiting_events()]),
            frame,
        )
        order = np.argsort(events.gates, kind="stable")
        gates = events.gates[order]
        detectors = events.detectors[order]
        parents = events.parents[order]
        if self.detector.afterpulsing > 0:
            place = np.empty(len(order), dtype=np.int64)
            place[order] = np.arange(len(order))
            parents = np.where(parents == NO_PARENT, NO_PARENT, place[parents])

        dead = self.detector.dead_gates(self._source.pulse_rate)
        inside = int(np.searchsorted(gates, frame))
        happened, first = self._decide(gates[:inside], detectors[:inside], parents[:inside], dead)

        clicks = np.flatnonzero(first)
        last = int(gates[clicks[-1]]) if len(clicks) else -1
        self._dead_until = max(self._dead_until - frame, last + 1 + dead - frame if last >= 0 else 0, 0)
        later_parents = parents[inside:]
        waiting = (
            np.flatnonzero((later_parents == NO_PARENT) | happened[later_parents]) if inside else slice(None)
        )
        self._waiting_gates = gates[inside:][waiting] - frame
        self._waiting_detectors = detectors[inside:][waiting]

        bits = detectors[clicks]
        doubles = np.searchsorted(clicks, np.flatnonzero(happened & ~first)) - 1
        bits[doubles] = self._rng.integers(0, 2, size=len(doubles), dtype=np.uint8)
        return Clicks(gates[clicks].astype(np.uint32), events.bases[order][clicks], bits, frame, len(doubles))

    def _bases(self, number: int) -> Bits:
        return (self._rng.random(number) >= self._source.key_basis).astype(np.uint8) * np.uint8(CHECK_BASIS)

    def _photon_events(self, photons: Photons) -> _Events:
        rng, detector = self._rng, self.detector
        single = photons.counts == 1
        lone = np.flatnonzero(single)
        lone = lone[rng.random(len(lone)) < detector.efficiency]
        many = np.flatnonzero(~single)
        detected = rng.binomial(photons.counts[many], detector.efficiency)
        many, detected = many[detected > 0], detected[detected > 0]

        chosen = np.concatenate([lone, many])
        bases = self._bases(len(chosen))
        states = photons.states[chosen]
        astray = np.where(states >> 1 == bases, detector.misalignment, 0.5)
        wrong = np.empty(len(chosen), dtype=np.int64)
        wrong[: len(lone)] = rng.random(len(lone)) < astray[: len(lone)]
        wrong[len(lone) :] = rng.binomial(detected, astray[len(lone) :])
        total = np.ones(len(chosen), dtype=np.int64)
        total[len(lone) :] = detected
        to_right = np.flatnonzero(wrong < total)
        to_wrong = np.flatnonzero(wrong > 0)
        events = np.concatenate([to_right, to_wrong])
        bits = states[events] & 1
        bits[len(to_right) :] ^= 1
        return _Events(
            photons.indices[chosen[events]].astype(np.int64),
            bases[events],
            bits,
            np.full(len(events), NO_PARENT, dtype=np.int64),
        )

    def _dark_events(self, pulses: int) -> list[_Events]:
        parts = []
        for bit in (0, 1):
            gates = bernoulli_indices(pulses, self.detector.dark_count, self._rng).astype(np.int64)
            parts.append(self._events(gates, np.full(len(gates), bit, dtype=np.uint8)))
        return parts

    def _waiting_events(self) -> _Events:
        return self._events(self._waiting_gates, self._waiting_detectors)

    def _events(self, gates: Gates, detectors: Bits) -> _Events:
        """Return events without light or cause. A photon's event is first in its gate: its basis counts."""
        return _Events(
            gates, self._bases(len(gates)), detectors, np.full(len(gates), NO_PARENT, dtype=np.int64)
        )

    def _afterpulses(self, events: _Events, frame: int) -> _Events:
        """Return the events and their afterpulses, and those of these, in this frame or the next."""
        chance = self.detector.afterpulsing
        if chance == 0:
            return events
        rate = self._source.pulse_rate
        dead = self.detector.dead_gates(rate)
        decay = min(1.0, 1 / (self.detector.afterpulse_lifetime * rate))
        parts, generation, offset = [events], events, 0
        while len(generation):
            causes = np.flatnonzero((self._rng.random(len(generation)) < chance) & (generation.gates < frame))
            gates = generation.gates[causes] + dead + self._rng.geometric(decay, size=len(causes))
            generation_offset, offset = offset, offset + len(generation)
            generation = _Events(
                gates, self._bases(len(causes)), generation.detectors[causes], causes + generation_offset
            )
            parts.append(generation)
        return _Events.join(parts)

    def _decide(
        self, gates: Gates, detectors: Bits, parents: Gates, dead: int
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return masks of the events that happen, and of those that are the first of their gate.

        An event in a detector that has clicked in this gate already is not another click, and so has no
        afterpulse.
        """
        happened = np.ones(len(gates), dtype=np.bool_)
        first = np.ones(len(gates), dtype=np.bool_)
        near = np.empty(len(gates), dtype=np.bool_)
        near[1:] = gates[1:] - gates[:-1] <= dead
        near[: int(np.searchsorted(gates, self._dead_until)) + 1] = True
        unsure = np.flatnonzero(near | (parents != NO_PARENT))
        before = unsure - 1
        last_gate, fired = -1, 0
        free_from = self._dead_until  # the first gate after the dead time of the last click
        previous = -1
        for i, gate, detector, parent, gate_before, detector_before in zip(
            unsure.tolist(),
            gates[unsure].tolist(),
            (detectors[unsure] + 1).tolist(),
            parents[unsure].tolist(),
            gates[before].tolist(),
            (detectors[before] + 1).tolist(),
            strict=True,
        ):
            if i and i - 1 != previous:  # the event before was not in doubt
                last_gate, fired = gate_before, detector_before
                free_from = gate_before + dead + 1
            previous = i
            if parent != NO_PARENT and not happened[parent]:
                happened[i] = first[i] = False
            elif gate == last_gate:
                happened[i] = not fired & detector
                first[i] = False
                fired |= detector
            elif gate < free_from:
                happened[i] = first[i] = False
            else:
                last_gate, fired = gate, detector
                free_from = gate + dead + 1
        return happened, first
