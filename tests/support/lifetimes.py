"""Connections and contexts in cycles with objects whose finalizer uses them: run as a program.

Arguments: the kind of thing, whether it is made before its owner ("first") or after it ("second"), and "collect" or
"exit" for what ends them. Each use is named on stderr before it begins, so that after a crash the last line says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from qkd_tls import QKDContext, aio
from qkd_tls.psk_context import PSKContext
from tests.support.in_step import Arrive, Call, Contexts, OverSocket, Run, Script, our_contexts
from tests.support.sockets import Authority, local_lab

__all__ = ["KINDS", "USES"]

USES: Final[dict[str, Callable[[Any], object]]] = {
    "close": lambda end: end.close(),
    "send": lambda end: end.send(b"QUIT\r\n" * 100) if hasattr(end, "send") else end.write(b"QUIT\r\n" * 100),
    "receive": lambda end: end.read(10),
    "pending": lambda end: end.pending(),
    "shutdown": lambda end: end.shutdown(socket.SHUT_RDWR) if hasattr(end, "shutdown") else end.unwrap(),
    "unwrap": lambda end: end.unwrap(),
    "do_handshake": lambda end: end.do_handshake(),
    "version": lambda end: end.version(),
    "cipher": lambda end: end.cipher(),
    "getpeercert": lambda end: end.getpeercert(),
    "channel binding": lambda end: end.get_channel_binding("tls-exporter"),
    "another connection": lambda end: _begin(end.context),
    "everything": lambda end: _everything(end),
}
_NOT_OF: Final = {
    "object": {"close", "shutdown"},
    "object not connected": {"close", "shutdown"},
    "asyncio": {"close", "shutdown"},
}


def _everything(end: Any) -> None:
    for name, use in USES.items():
        if name != "everything":
            _tried(use, end)


def _tried(use: Callable[[Any], object], end: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        use(end)


def _begin(context: Any) -> None:
    """Begin a connection, which nothing ends."""
    if isinstance(context, PSKContext):
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            _tried(lambda end: context.wrap_socket(end, do_handshake_on_connect=False).do_handshake(), near)
        return
    _tried(
        lambda _: context.wrap_bio(
            ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost"
        ).do_handshake(),
        None,
    )


class Owner:
    """An object of a program that has the connection, and itself."""

    def __init__(self, use: str) -> None:
        self.use = use
        self.end: Any = None
        self.itself = self

    def take(self, end: Any) -> None:
        self.end = end
        with contextlib.suppress(AttributeError):
            end.owner = self

    def __del__(self) -> None:
        if self.end is None:
            return
        print(self.use, file=sys.stderr, flush=True)
        try:
            USES[self.use](self.end)
        except (OSError, ValueError):
            pass
        except (ImportError, NameError, LookupError) as error:
            # The interpreter is at its end: it imports nothing any more, and `open` is gone.
            if sys.meta_path is not None:
                print(f"WRONG: {error}", file=sys.stderr, flush=True)
        except BaseException as error:  # noqa: BLE001 - told to the test
            print(f"WRONG: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _connected(contexts: Contexts, mode: Any, side: Any) -> Any:
    run = Run(contexts, mode, side, Script("associated", (), Arrive(0), 0, Call("do_handshake"), ()), 5)
    run.hand_over()
    if isinstance(run.transport, OverSocket):
        run.tls.settimeout(0)
        # What is to be left over is the connection, not its peer.
        run.transport.far.close()
    return run.tls


def _not_connected(contexts: Contexts, mode: Any) -> Any:
    return Run(
        contexts, mode, "client", Script("bootstrap", (), Arrive(0), 0, Call("do_handshake"), ()), 5
    ).tls


def _psk(_: Contexts) -> Any:
    near, far = socket.socketpair()
    for end in (near, far):
        end.setblocking(False)
    client = PSKContext("x", bytes(range(32))).wrap_socket(near, do_handshake_on_connect=False)
    server = PSKContext("x", bytes(range(32)), server_side=True).wrap_socket(
        far, do_handshake_on_connect=False
    )
    for end in (client, server, client, server):
        with contextlib.suppress(BlockingIOError, OSError):
            end.do_handshake()
    assert client.version() == "TLSv1.3"
    server.close()
    return client


class _Context:
    """A context, as if it were a connection: the only use is to make one."""

    def __init__(self, contexts: Contexts) -> None:
        self.context = contexts.client


KINDS: Final[dict[str, Callable[[Contexts], Any]]] = {
    "socket of a client": lambda contexts: _connected(contexts, "blocking", "client"),
    "socket of a server": lambda contexts: _connected(contexts, "blocking", "server"),
    "socket not connected": lambda contexts: _not_connected(contexts, "non-blocking"),
    "object": lambda contexts: _connected(contexts, "object", "client"),
    "object not connected": lambda contexts: _not_connected(contexts, "object"),
    "PSK socket": _psk,
    "context": _Context,
}


def _contexts() -> Contexts:
    folder = Path(tempfile.mkdtemp())
    authority = Authority(folder)
    identity = authority.issue()
    return our_contexts(local_lab(authority, identity, identity), folder)


def _uses(kind: str) -> Iterator[str]:
    for use in USES:
        if use not in _NOT_OF.get(kind, ()) and (kind != "context" or use == "another connection"):
            yield use


def _synchronously(kind: str, order: str) -> list[Owner]:
    owners = []
    for use in _uses(kind):
        # A context of its own for each, so that it ends with the others.
        contexts = _contexts()
        owner = Owner(use) if order == "second" else None
        end = KINDS[kind](contexts)
        owner = owner or Owner(use)
        owner.take(end)
        owners.append(owner)
    return owners


class _Protocol(asyncio.Protocol):
    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.owner.take(transport.get_extra_info("ssl_object"))
        self.owner.protocol = self  # type: ignore[attr-defined]


async def _in_loop() -> list[Owner]:
    contexts, owners = _contexts(), []
    assert isinstance(contexts.client, QKDContext)
    assert isinstance(contexts.server, QKDContext)
    server = await aio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=contexts.server)
    port = server.sockets[0].getsockname()[1]
    for use in _uses("asyncio"):
        owner = Owner(use)
        await aio.create_connection(
            lambda owner=owner: _Protocol(owner),  # type: ignore[misc]
            "127.0.0.1",
            port,
            ssl=contexts.client,
            server_hostname="localhost",
        )
        owner.protocol.transport.abort()  # type: ignore[attr-defined]
        owners.append(owner)
    server.close()
    await asyncio.sleep(0)
    return owners


def main() -> None:
    kind, order, when = sys.argv[1:]
    gc.disable()
    owners = asyncio.run(_in_loop()) if kind == "asyncio" else _synchronously(kind, order)
    assert owners
    if when == "exit":
        # Until the interpreter ends.
        sys.modules["tests.support.lifetimes_left"] = owners  # type: ignore[assignment]
        return
    owners.clear()
    gc.collect()
    print("collected", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
