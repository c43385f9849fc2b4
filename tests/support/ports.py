"""Ports that stay free until a test uses them, also while other tests run at the same time."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from typing import Final

__all__ = ["free_port"]

# Below the ports that systems give to programs that ask for any.
_FIRST: Final = 15_000
_NUMBER: Final = 15_000

# Each process of a parallel run begins elsewhere.
_next: Final = itertools.count(os.getpid() * 101)


def free_port() -> int:
    """Return a port of 127.0.0.1 at which nothing listens, each time another one."""
    for _ in range(_NUMBER):
        port = _FIRST + next(_next) % _NUMBER
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
