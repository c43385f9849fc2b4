"""How long tests wait: until a condition holds, up to one generous limit that a busy machine does not reach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Literal, TypeVar

__all__ = ["PATIENCE", "eventually", "eventually_in_loop"]

PATIENCE: Final = 60
"""Seconds after which a test that hangs gives up. Nothing is expected to take as long on any machine."""

_PAUSE: Final = 0.005

T = TypeVar("T")


def eventually(condition: Callable[[], T | Literal[False] | None], what: str = "the condition") -> T:
    """Wait until the condition is true, and return its value. For what gives no event of its own."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} seconds in vain: {what}"
        time.sleep(_PAUSE)
    return value


async def eventually_in_loop(
    condition: Callable[[], T | Literal[False] | None], what: str = "the condition"
) -> T:
    """Do the same while the event loop goes on."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} seconds in vain: {what}"
        await asyncio.sleep(_PAUSE)
    return value
