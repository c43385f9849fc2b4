"""What both sides together would count in a frame: for simulations of the optics alone, without post-processing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkd_link.photonics.analytic import RANDOM_ERROR, Rates
from qkd_link.photonics.line import Choices
from qkd_link.photonics.parameters import CHECK_BASIS, KEY_BASIS, Source
from qkd_link.photonics.receiver import Clicks
from qkd_link.postprocessing.finite_key import BlockCounts

__all__ = [
    "Tally",
    "tally",
]


@dataclass(frozen=True, eq=False)
class Tally:
    """Detections with equal bases, and errors in them; both by basis and intensity. Tallies of frames can be added."""

    pulses: int
    detections: NDArray[np.int64]
    errors: NDArray[np.int64]

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.pulses + other.pulses, self.detections + other.detections, self.errors + other.errors
        )

    def rates(self, source: Source) -> Rates:
        """Gains and QBERs by intensity, from both bases."""
        equal_bases = source.key_basis**2 + (1 - source.key_basis) ** 2
        gains, qbers = [], []
        for i, probability in enumerate(source.probabilities):
            detected = int(self.detections[:, i].sum())
            gains.append(detected / (self.pulses * probability * equal_bases))
            qbers.append(int(self.errors[:, i].sum()) / detected if detected else RANDOM_ERROR)
        return Rates((gains[0], gains[1], gains[2]), (qbers[0], qbers[1], qbers[2]))

    def block_counts(self) -> BlockCounts:
        """As a block, if all frames are one."""
        key, check = self.detections[KEY_BASIS].tolist(), self.detections[CHECK_BASIS].tolist()
        return BlockCounts(tuple(key), tuple(check), tuple(self.errors[CHECK_BASIS].tolist()))

    @property
    def key_errors(self) -> int:
        """Errors in the key basis, which reconciliation has to find."""
        return int(self.errors[KEY_BASIS].sum())


def tally(choices: Choices, clicks: Clicks) -> Tally:
    """Counts a frame; `choices` are those for the pulses that clicked."""
    equal = choices.bases == clicks.bases
    wrong = equal & (choices.bits != clicks.bits)
    cells = choices.bases * np.intp(3) + choices.intensities
    return Tally(
        clicks.pulses,
        np.bincount(cells[equal], minlength=6).reshape(2, 3),
        np.bincount(cells[wrong], minlength=6).reshape(2, 3),
    )
