"""Waiting for a file descriptor, with whatever function a program has put in place of the standard library's."""

from __future__ import annotations

import select
from typing import Final

__all__ = ["READ", "WRITE", "is_ready"]

READ: Final = 0x1
WRITE: Final = 0x4
"""The events of `poll`, which a program may take away."""


def is_ready(descriptor: int, event: int, seconds: float | None) -> bool:
    """Wait at most `seconds`, or without limit, until the descriptor can be read or written; return whether it can."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(descriptor, event)
        return bool(poll.poll(None if seconds is None else seconds * 1000))
    # eventlet takes `poll` away.
    reading, writing = ([descriptor], []) if event == READ else ([], [descriptor])
    return any(select.select(reading, writing, [], seconds))
