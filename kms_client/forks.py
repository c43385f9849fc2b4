"""Objects that start afresh in a forked child: the parent keeps using their locks, threads and keys."""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol

__all__ = ["Forgetful", "forget_in_children"]


class Forgetful(Protocol):
    """An object whose locks, threads and keys stay with the process that made them."""

    def forget(self) -> None:
        """Start afresh. Called in a new child, whose only thread this is."""
        ...


_forgetful: Final[weakref.WeakSet[Forgetful]] = weakref.WeakSet()


def forget_in_children(thing: Forgetful) -> None:
    """Have `thing.forget()` called in every child that this process forks."""
    _forgetful.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_forgetful):
        thing.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
