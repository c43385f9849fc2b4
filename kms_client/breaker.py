"""A circuit breaker with jittered exponential backoff: it decides when to ask a failed KME again.

Pure: time comes in as an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable

__all__ = ["Breaker", "BreakerState"]

_MAX_DOUBLINGS = 30  # a float holds that


class BreakerState(enum.StrEnum):
    """The requests that a breaker lets through."""

    CLOSED = "closed"
    """All requests."""
    OPEN = "open"
    """No request."""
    HALF_OPEN = "half-open"
    """One request, the probe: its outcome decides."""


class Breaker:
    """A switch that opens after failures in a row, for longer each time; then one probe closes or reopens it.

    Args:
        threshold: failures in a row that open it.
        first_delay: seconds that it stays open the first time; twice as long each further time.
        max_delay: seconds, at most.
        jitter: gives a number from 0 to 1. A delay is shortened by up to half of it, so that many programs
            that lost one KME together do not come back together.

    Not thread-safe: threads that share one must hold a lock.
    """

    def __init__(
        self,
        threshold: int,
        first_delay: float,
        max_delay: float,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if threshold < 1 or not 0 < first_delay <= max_delay:
            raise ValueError("threshold must be 1 or more, and 0 < first delay <= maximum delay")
        self._threshold = threshold
        self._first_delay, self._max_delay = first_delay, max_delay
        self._jitter = jitter
        self._failures = 0  # in a row
        self._opened = 0  # times in a row
        self._retry_at = float("-inf")
        self._probing = False

    @property
    def failures(self) -> int:
        """Failures in a row."""
        return self._failures

    @property
    def retry_at(self) -> float:
        """Time from which the next request may be made; in the past if one may be made now."""
        return self._retry_at

    def state(self, now: float) -> BreakerState:
        """Return the state at the time `now`."""
        if not self._opened:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._retry_at else BreakerState.HALF_OPEN

    def acquire(self, now: float) -> bool:
        """Return True if a request may be made now, whose end is `succeeded`, `failed` or `released`."""
        if not self._opened:
            return True
        if now < self._retry_at or self._probing:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """Close: a request was answered."""
        self._failures = self._opened = 0
        self._retry_at = float("-inf")
        self._probing = False

    def failed(self, now: float) -> None:
        """Count a failed request."""
        self._failures += 1
        if self._opened and now < self._retry_at:
            return  # begun before the breaker opened: no news
        self._probing = False
        if self._opened or self._failures >= self._threshold:
            delay = min(self._max_delay, self._first_delay * 2.0 ** min(self._opened, _MAX_DOUBLINGS))
            self._opened += 1
            self._retry_at = now + delay * (1 - self._jitter() / 2)

    def released(self) -> None:
        """Let another caller make the probe: a request ended without an outcome."""
        self._probing = False
