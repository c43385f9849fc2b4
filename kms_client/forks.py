"""Forks: what starts afresh in a child, and what only one of the processes may go on with.

The parent keeps using its locks, threads and keys; the child makes its own (`forget_in_children`). A live connection
cannot be made anew: both processes have it, and each of its directions belongs to the first that uses it
(`share_with_children`, `SharedDirection`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import struct
import tempfile
import threading
import weakref
from typing import Final, NoReturn, Protocol

__all__ = ["Claims", "Forgetful", "Shared", "SharedDirection", "forget_in_children", "share_with_children"]

_CLAIM: Final = struct.Struct("=Q16s")


class Forgetful(Protocol):
    """An object whose locks, threads and keys stay with the process that made them."""

    def forget(self) -> None:
        """Start afresh. Called in a new child, whose only thread this is."""
        ...


class Shared(Protocol):
    """An object that parent and child both have after a fork, and of which each part is for one of them."""

    def _before_fork(self, claims: Claims) -> None:
        """Get ready: no other thread may be changing the object while the process is copied."""
        ...

    def _after_fork(self, *, in_child: bool) -> None:
        """Go on, in the parent and in the child."""
        ...


class Claims:
    """Numbers that a process and its forked children share: the first that claims one has it for good.

    They are kept in a file without a name, to whose end each claim is appended: the system appends one after the other.
    If there can be no such file, the numbers are the process' that made them, and its children have none.
    """

    def __init__(self) -> None:
        self._maker = os.getpid()
        self._numbers = itertools.count()
        self._file: tuple[int, int, int] | None = None
        with contextlib.suppress(OSError):
            descriptor = _unnamed_file()
            weakref.finalize(self, _close, descriptor, identity := _identity(descriptor))
            self._file = descriptor, *identity

    def new(self) -> int:
        """Return a number that nobody has claimed. Called before the fork."""
        return next(self._numbers)

    def claim(self, number: int) -> bool:
        """Return whether this process has the number from now on."""
        if self._file is None:
            return os.getpid() == self._maker
        descriptor, *identity = self._file
        mine = _CLAIM.pack(number, os.urandom(16))
        try:
            # A program may have closed all descriptors, and this one's number be another file's by now.
            if _identity(descriptor) != tuple(identity):
                return False
            os.write(descriptor, mine)
            claims = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        except OSError:
            return False
        first = next(claim for claim in _CLAIM.iter_unpack(claims) if claim[0] == number)
        return _CLAIM.pack(*first) == mine


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("qkd-tls-claims", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
    return descriptor


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _close(descriptor: int, identity: tuple[int, int]) -> None:
    with contextlib.suppress(OSError):
        if _identity(descriptor) == identity:
            os.close(descriptor)


class SharedDirection:
    """One direction of a connection; after a fork, the first process that uses it owns it."""

    __slots__ = ("_claim", "lost")

    def __init__(self) -> None:
        self._claim: tuple[Claims, int] | None = None
        self.lost = False
        """True if another process owns it."""

    @property
    def owned(self) -> bool:
        """True if this process owns it: alone, or by the first use after a fork."""
        return self._claim is None and not self.lost

    def share(self, claims: Claims) -> None:
        """Let the first user have it: the process is about to fork.

        If nobody has used it since an earlier fork, that one's claim still says who is the first of all.
        """
        if self.owned:
            self._claim = claims, claims.new()

    def use(self) -> None:
        """Own it, or raise OSError (EBUSY) if another process does."""
        if self._claim is not None:
            (claims, number), self._claim = self._claim, None
            self.lost = not claims.claim(number)
        if self.lost:
            _busy()

    def lose(self) -> None:
        """Leave it to the other process."""
        self._claim, self.lost = None, True


def _busy() -> NoReturn:
    raise OSError(
        errno.EBUSY,
        f"{os.strerror(errno.EBUSY)}: after a fork, another process goes on with this connection; let one process "
        "send, and one receive, or make a connection in each",
    )


_forgetful: Final[weakref.WeakSet[Forgetful]] = weakref.WeakSet()
_shared: Final[weakref.WeakSet[Shared]] = weakref.WeakSet()


class _Fork:
    """The fork that is under way; two threads may fork at a time."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._things: list[Shared] = []

    def before(self) -> None:
        self._one_at_a_time.acquire()
        self._things = list(_shared)
        if self._things:
            claims = Claims()
            for thing in self._things:
                thing._before_fork(claims)

    def after_in_parent(self) -> None:
        things, self._things = self._things, []
        for thing in things:
            thing._after_fork(in_child=False)
        self._one_at_a_time.release()

    def after_in_child(self) -> None:
        things, self._things = self._things, []
        self._one_at_a_time = threading.Lock()
        for forgetful in list(_forgetful):
            forgetful.forget()
        for thing in things:
            thing._after_fork(in_child=True)


def forget_in_children(thing: Forgetful) -> None:
    """Have `thing.forget()` called in every child that this process forks."""
    _forgetful.add(thing)


def share_with_children(thing: Shared) -> None:
    """Have `thing._before_fork()` and `thing._after_fork()` called around every fork, as long as it lives."""
    _shared.add(thing)


_fork: Final = _Fork()
os.register_at_fork(
    before=_fork.before, after_in_parent=_fork.after_in_parent, after_in_child=_fork.after_in_child
)
