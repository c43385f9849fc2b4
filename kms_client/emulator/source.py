"""The sources of the keys of an emulated QKD link."""

from __future__ import annotations

import os
from typing import Protocol

__all__ = ["KeySource", "OSRandomSource"]


class KeySource(Protocol):
    """A source of the keys that both ends of a link share."""

    @property
    def key_size(self) -> int:
        """Size of each key in bits, a multiple of 8."""
        ...

    def due(self, seconds: float) -> int:
        """Return the number of keys made in these `seconds`, which follow those of the last call."""
        ...

    def make(self) -> bytearray:
        """Return one key."""
        ...


class OSRandomSource:
    """Keys from the operating system's random number generator, at a constant rate.

    Args:
        rate: keys a second, 0 for none beyond the initial fill of the buffers.
        key_size: in bits, a multiple of 8.

    Raises:
        ValueError: the rate is negative or the size impossible.
    """

    def __init__(self, rate: float = 1000.0, key_size: int = 256) -> None:
        """Check the arguments."""
        if rate < 0:
            raise ValueError(f"rate must be 0 or more keys a second, not {rate}")
        if key_size < 8 or key_size % 8:
            raise ValueError(f"key size must be a positive multiple of 8 bits, not {key_size}")
        self._rate = rate
        self._key_size = key_size
        self._fraction = 0.0  # of a key

    @property
    def key_size(self) -> int:
        """Size of each key in bits."""
        return self._key_size

    def due(self, seconds: float) -> int:
        """Return the number of keys for these seconds at the rate; fractions are kept for the next call."""
        whole, self._fraction = divmod(self._fraction + self._rate * seconds, 1.0)
        return int(whole)

    def make(self) -> bytearray:
        """Return one key of random bits."""
        return bytearray(os.urandom(self._key_size // 8))
