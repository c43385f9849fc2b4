"""Turns for the handshakes of one loop: asyncio runs everything that is ready before it looks further."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Turns"]

_SLICE: Final = 0.005
"""Seconds of handshakes at a time; one step that has begun, of some milliseconds, is finished."""


class Turns:
    """The turns of one loop."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object] | asyncio.Future[None]] = deque()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Turns:
        """Return the turns of this loop."""
        return _turns.setdefault(loop, cls())

    def queue(self, work: Callable[[], object] | asyncio.Future[None]) -> None:
        """Run `work` when its turn comes; it must not raise."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._take)
        self._waiting.append(work)

    async def wait(self) -> None:
        """Wait for a turn, which lasts until the caller next waits for something."""
        turn = asyncio.get_running_loop().create_future()
        self.queue(turn)
        await turn

    def _take(self) -> None:
        end = time.monotonic() + _SLICE
        while self._waiting and time.monotonic() < end:
            work = self._waiting.popleft()
            if not isinstance(work, asyncio.Future):
                work()
            elif not work.done():
                work.set_result(None)
                # Its time cannot be measured here.
                break
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._take)


_turns: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Turns]] = weakref.WeakKeyDictionary()
