"""Types of the arrays that go from module to module."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "Gates", "Indices", "Places"]

Bits: TypeAlias = NDArray[np.uint8]
"""Bits, or small numbers such as a basis or an intensity: one a byte."""
Indices: TypeAlias = NDArray[np.uint32]
"""Pulses, by their place in a frame."""
Gates: TypeAlias = NDArray[np.int64]
"""Gates of the detectors, counted from the start of the link."""
Places: TypeAlias = NDArray[np.int32]
"""Bits, by their place in a block."""
