"""Both ends of a connection over memory, in one thread's hands."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from typing import Any


class Side:
    """An object with its two memories."""

    def __init__(self, context: ssl.SSLContext, **wrap: Any) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: Any = context.wrap_bio(self.incoming, self.outgoing, **wrap)

    def do(self, call: Callable[[Any], Any], other: Side) -> Any:
        """Repeat a call until it goes through, carrying bytes in between."""
        for _ in range(100):
            try:
                return call(self.tls)
            except ssl.SSLWantReadError:
                carry(self, other)
                with contextlib.suppress(ssl.SSLWantReadError):
                    other.tls.do_handshake()
                carry(other, self)
        raise AssertionError("the two wait for each other")


def carry(sender: Side, receiver: Side) -> int:
    return receiver.incoming.write(sender.outgoing.read())


def sides(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[Side, Side]:
    return Side(client, server_hostname="localhost"), Side(server, server_side=True)


def shake_hands(client: Side, server: Side) -> None:
    unfinished = [(client, server), (server, client)]
    for _ in range(100):
        for one, other in list(unfinished):
            with contextlib.suppress(ssl.SSLWantReadError):
                one.tls.do_handshake()
                unfinished.remove((one, other))
            carry(one, other)
        if not unfinished:
            return
    raise AssertionError("the handshake hangs")
