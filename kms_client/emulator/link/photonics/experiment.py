"""Experiments with the optics alone: the combined data of both sides.

For plots and tests; the link's two sides never have each other's bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.photonics.analytic import (
    RANDOM_ERROR,
    Rates,
    asymptotic_rate,
    bound_single_photons,
)
from kms_client.emulator.link.photonics.line import Choices, Line
from kms_client.emulator.link.photonics.parameters import CHECK_BASIS, KEY_BASIS, Optics, Source
from kms_client.emulator.link.photonics.receiver import Clicks, Receiver
from kms_client.emulator.link.postprocessing.finite_key import BlockCounts

__all__ = [
    "ExperimentCounts",
    "measured_rate",
    "run",
    "total",
]


@dataclass(frozen=True, eq=False)
class ExperimentCounts:
    """Detections with equal bases, and errors in them; both by basis and intensity."""

    pulses: int
    detections: NDArray[np.int64]
    errors: NDArray[np.int64]

    @classmethod
    def of(cls, choices: Choices, clicks: Clicks) -> ExperimentCounts:
        """Count the detections and errors of a frame; `choices` are those for the pulses that clicked."""
        equal = choices.bases == clicks.bases
        wrong = equal & (choices.bits != clicks.bits)
        cells = choices.bases * np.intp(3) + choices.intensities
        return cls(
            clicks.pulses,
            np.bincount(cells[equal], minlength=6).reshape(2, 3),
            np.bincount(cells[wrong], minlength=6).reshape(2, 3),
        )

    def rates(self, source: Source) -> Rates:
        """Return gains and QBERs by intensity, from both bases."""
        equal_bases = source.key_basis**2 + (1 - source.key_basis) ** 2
        gains, qbers = [], []
        for i, probability in enumerate(source.probabilities):
            detected = int(self.detections[:, i].sum())
            gains.append(detected / (self.pulses * probability * equal_bases))
            qbers.append(int(self.errors[:, i].sum()) / detected if detected else RANDOM_ERROR)
        return Rates((gains[0], gains[1], gains[2]), (qbers[0], qbers[1], qbers[2]))

    def block_counts(self) -> BlockCounts:
        """Return the counts as those of a block of the link."""
        key, check = self.detections[KEY_BASIS].tolist(), self.detections[CHECK_BASIS].tolist()
        return BlockCounts(tuple(key), tuple(check), tuple(self.errors[CHECK_BASIS].tolist()))

    @property
    def key_qber(self) -> float:
        """The share of errors in the key basis, for reconciliation to find; one half without detections."""
        detected = int(self.detections[KEY_BASIS].sum())
        return int(self.errors[KEY_BASIS].sum()) / detected if detected else RANDOM_ERROR


def run(optics: Optics, pulses: int, rng: np.random.Generator, frames: int = 1) -> list[ExperimentCounts]:
    """Send some frames of so many pulses each over one line to one receiver."""
    line, receiver = Line(optics, rng), Receiver(optics.detector, optics.source, rng)
    outcomes = []
    for _ in range(frames):
        sent, photons = line.transmit(pulses)
        clicks = receiver.detect(photons)
        outcomes.append(ExperimentCounts.of(sent.look_up(clicks.indices), clicks))
    return outcomes


def total(outcomes: Sequence[ExperimentCounts]) -> ExperimentCounts:
    """Return all frames as one."""
    return ExperimentCounts(
        sum(outcome.pulses for outcome in outcomes),
        np.sum([outcome.detections for outcome in outcomes], axis=0),
        np.sum([outcome.errors for outcome in outcomes], axis=0),
    )


def measured_rate(
    outcomes: Sequence[ExperimentCounts], source: Source, reconciliation: float = 1.22
) -> tuple[float, float]:
    """Return the asymptotic key rate of the frames with two decoys, and its standard error (jackknife)."""

    def rate(some: Sequence[ExperimentCounts]) -> float:
        seen = total(some).rates(source)
        return asymptotic_rate(seen, bound_single_photons(seen, source), source, reconciliation)

    number = len(outcomes)
    without = [rate([*outcomes[:i], *outcomes[i + 1 :]]) for i in range(number)]
    mean = sum(without) / number
    return rate(outcomes), sqrt((number - 1) / number * sum((value - mean) ** 2 for value in without))
