"""How long things live: no crash in any order of finalizers, and nothing left when a connection has ended.

And exceptions of callbacks and signals reach the program as themselves.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qkd_tls import QKDContext, aio
from qkd_tls.association import Association
from qkd_tls.psk_context import PSKContext
from tests.support.lifetimes import KINDS
from tests.support.objects import Side, carry, shake_hands, sides
from tests.support.paths import ROOT
from tests.support.patience import PATIENCE, eventually_in_loop
from tests.support.sizes import FULL, sized
from tests.support.sockets import Lab, Server, connected, talk, tcp_pair

# --- cycles


@pytest.mark.parametrize("when", ["collect", "exit"])
@pytest.mark.parametrize(
    ("kind", "order"),
    [*itertools.product(KINDS, ["first", "second"]), ("asyncio", "first")],
)
def test_a_finalizer_that_uses_the_connection(kind: str, order: str, when: str) -> None:
    """Whichever of the two the collector takes first: the call works, or raises an error that programs expect."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-m", "tests.support.lifetimes", kind, order, when],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Fatal" not in ended.stderr
    assert "WRONG" not in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert when == "exit" or "collected" in ended.stderr


# --- what is left


def ours() -> collections.Counter[str]:
    """The objects of the package's classes that the collector knows of, but for associations: they are to stay."""
    return collections.Counter(
        f"{type(thing).__module__}.{type(thing).__qualname__}"
        for thing in gc.get_objects()
        if str(type(thing).__module__).startswith("qkd_tls") and not isinstance(thing, Association)
    )


INNER = ("qkd_tls.openssl.", "qkd_tls.psk.")
"""The modules whose objects hold secrets."""


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that what the block makes is gone at its end, without the collector's help."""
    gc.collect()
    gc.disable()
    try:
        before = ours()
        yield
        left = ours() - before
    finally:
        gc.enable()
        gc.collect()
    assert not left, f"the connection has ended, and these wait for the collector: {dict(left)}"


def over_sockets(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    with connected(client, server) as (one, other):
        one.sendall(b"hello")
        assert other.recv(10) == b"hello"


def without_waiting(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    near, far = socket.socketpair()
    for end in (near, far):
        end.setblocking(False)
    one = client.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False)
    other = server.wrap_socket(far, server_side=True, do_handshake_on_connect=False)
    with one, other:
        while one.version() is None or other.version() is None:
            for end in (one, other):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        one.send(b"hello")
        assert other.recv(10) == b"hello"


def over_memory(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    one, other = sides(client, server)
    shake_hands(one, other)
    one.tls.write(b"hello")
    carry(one, other)
    assert other.tls.read(10) == b"hello"


def unwrapped(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    one, other = sides(client, server)
    shake_hands(one, other)
    for _ in range(2):
        for this, that in ((one, other), (other, one)):
            with contextlib.suppress(ssl.SSLError):
                this.tls.unwrap()
            carry(this, that)


def failing(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    """The client does not trust the server."""
    stranger = QKDContext(ssl.PROTOCOL_TLS_CLIENT, key_manager=lab.manager("client"), peer_sae_id="SAE-B")
    one, other = sides(stranger, server)
    try:
        shake_hands(one, other)
    except ssl.SSLCertVerificationError:
        carry(one, other)
    try:
        other.tls.do_handshake()
    except ssl.SSLError:
        return
    pytest.fail("the handshake did not fail")


def failing_over_sockets(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    """The peer speaks no TLS."""
    with tcp_pair() as (near, far):
        far.sendall(b"220 mail.example ESMTP\r\n" * 10)
        try:
            client.wrap_socket(near, server_hostname="localhost")
        except ssl.SSLError:
            return
    pytest.fail("the handshake did not fail")


def given_up(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    one, other = sides(client, server)
    with contextlib.suppress(ssl.SSLWantReadError):
        one.tls.do_handshake()
    carry(one, other)
    with contextlib.suppress(ssl.SSLWantReadError):
        other.tls.do_handshake()


def given_up_over_sockets(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    with tcp_pair() as (near, _):
        near.settimeout(0.01)
        try:
            client.wrap_socket(near, server_hostname="localhost")
        except TimeoutError:
            return
    pytest.fail("there was nobody to shake hands with")


def with_a_psk(lab: Lab, client: QKDContext, server: QKDContext) -> None:
    near, far = socket.socketpair()
    for end in (near, far):
        end.setblocking(False)
    one = PSKContext("x", bytes(32)).wrap_socket(near, do_handshake_on_connect=False)
    other = PSKContext("x", bytes(32), server_side=True).wrap_socket(far, do_handshake_on_connect=False)
    with one, other:
        for end in (one, other, one, other):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        one.send(b"hello")
        assert other.recv(10) == b"hello"


LIVES: tuple[Callable[[Lab, QKDContext, QKDContext], None], ...] = (
    over_sockets,
    without_waiting,
    over_memory,
    unwrapped,
    failing,
    failing_over_sockets,
    given_up,
    given_up_over_sockets,
    with_a_psk,
)


@pytest.mark.parametrize("live", LIVES, ids=lambda live: live.__name__)
def test_nothing_is_left_of_a_connection(local: Lab, live: Any) -> None:
    client, server = local.client(), local.server()
    # An association, and what else is made once.
    over_memory(local, client, server)
    live(local, client, server)
    with nothing_left():
        live(local, client, server)


async def _talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"x" * 1000)
    await reader.readexactly(1000)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        writer.write(await reader.readexactly(1000))
        await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _live_and_die(
    number: int, connect: Any, listen: Any, client: ssl.SSLContext, server: ssl.SSLContext
) -> tuple[collections.Counter[str], int, int]:
    """Make connections without the collector; return what they leave: objects, bytes of Python, bytes of memory."""
    listening: Any = await listen(_echo, "127.0.0.1", 0, ssl=server)
    port = listening.sockets[0].getsockname()[1]

    async def one() -> None:
        await _talk(*await connect("127.0.0.1", port, ssl=client, server_hostname="localhost"))

    async def over() -> None:
        await eventually_in_loop(lambda: len(asyncio.all_tasks()) == 1, "the server's tasks end")
        # The last transport's end is a callback of the loop.
        for _ in range(3):
            await asyncio.sleep(0)

    for _ in range(5):
        await one()
    await over()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before, traced, resident = ours(), tracemalloc.get_traced_memory()[0], _resident()
        for _ in range(number):
            await one()
        await over()
        return ours() - before, tracemalloc.get_traced_memory()[0] - traced, _resident() - resident
    finally:
        tracemalloc.stop()
        gc.enable()
        gc.collect()
        listening.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loop", ["qkd_tls.aio", "EventLoop"])
def test_nothing_is_left_of_connections_of_asyncio(local: Lab, loop: str) -> None:
    """Clients and servers, with our functions and with asyncio's own on our loop.

    asyncio itself leaves its transports to the collector, before Python 3.13.
    """
    number = sized(10_000, 200)
    connect, listen = (
        (aio.open_connection, aio.start_server)
        if loop == "qkd_tls.aio"
        else (asyncio.open_connection, asyncio.start_server)
    )
    asyncios = asyncio.run(
        _live_and_die(
            number, asyncio.open_connection, asyncio.start_server, local.stock_client(), local.stock_server()
        )
    )
    with asyncio.Runner(loop_factory=aio.EventLoop if loop == "EventLoop" else None) as runner:
        left, grown, resident = runner.run(
            _live_and_die(number, connect, listen, local.client(), local.server())
        )
    assert not left, f"of {number} connections these wait for the collector: {dict(left)}"
    more = grown - asyncios[1]
    assert more < 1000 * number, f"{more / number:.0f} bytes of Python's memory for each connection"
    if FULL:
        more = resident - asyncios[2]
        assert more < 1000 * number, f"{more / number:.0f} bytes for each connection"


@pytest.mark.parametrize("loop", ["qkd_tls.aio", "EventLoop"])
@pytest.mark.parametrize("how", ["failed", "given up"])
def test_nothing_is_left_of_handshakes_of_asyncio_that_failed(local: Lab, how: str, loop: str) -> None:
    """The server does not talk TLS, or does not talk at all.

    asyncio leaves the TLS object of a handshake that failed to the collector, and the error's traceback the engine:
    neither holds a secret any more.
    """
    client = local.client()
    connect: Any = aio.open_connection if loop == "qkd_tls.aio" else asyncio.open_connection

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if how == "failed":
            writer.write(b"220 mail.example ESMTP\r\n" * 10)
        with contextlib.suppress(OSError):
            await reader.read(-1)
        writer.close()

    async def main() -> collections.Counter[str]:
        listening = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]

        async def one() -> None:
            connecting = connect("127.0.0.1", port, ssl=client, server_hostname="localhost")
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(connecting, PATIENCE if how == "failed" else 0.05)
                pytest.fail("there was nobody to shake hands with")
            await eventually_in_loop(lambda: len(asyncio.all_tasks()) == 1, "the server's tasks end")
            for _ in range(3):
                await asyncio.sleep(0)

        await one()
        gc.collect()
        gc.disable()
        try:
            before = ours()
            for _ in range(5):
                await one()
            return ours() - before
        finally:
            gc.enable()
            listening.close()

    with asyncio.Runner(loop_factory=aio.EventLoop if loop == "EventLoop" else None) as runner:
        left = runner.run(main())
    if how == "failed":
        left = collections.Counter({name: left[name] for name in left if name.startswith(INNER)})
    assert not left, f"the handshakes are over, and these wait for the collector: {dict(left)}"


def _resident() -> int:
    """The bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- exceptions of signals and callbacks


class Interrupt:
    """Ctrl-C when the package's code calls a function for the `at`th time."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.happened = False

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        if not self.happened:
            sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        # Python itself tells of an exception in a finalizer, and goes on.
        if f"{os.sep}qkd_tls{os.sep}" not in code.co_filename or code.co_name in {"__del__", "<lambda>"}:
            return
        self._left -= 1
        if self._left < 0:
            self.happened = True
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # What a callback could not raise is told as unraisable. The test sees that it has not been raised.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(one: Side, other: Side, interrupt: Interrupt) -> str:
    """Shake hands, and have the first side interrupted; return what came of it."""
    for _ in range(20):
        try:
            with interrupt:
                one.tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except BaseException as error:  # noqa: BLE001 - that is the question
            return type(error).__name__
        carry(one, other)
        done = False
        with contextlib.suppress(ssl.SSLWantReadError):
            other.tls.do_handshake()
            done = True
        carry(other, one)
        if done and one.tls.version() is not None:
            break
    return "nothing"


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("path", ["bootstrap", "associated"])
@pytest.mark.parametrize("victim", ["client", "server"])
def test_ctrl_c_at_any_time_of_a_handshake(local: Lab, victim: str, path: str, tmp_path: Path) -> None:
    """Also in OpenSSL's callbacks: for the PSK, for ALPN, for the key log."""
    client, server = local.client(), local.server()
    for context, name in ((client, "client"), (server, "server")):
        context.set_alpn_protocols(["http/1.1"])
        context.keylog_filename = str(tmp_path / name)
    server.sni_callback = lambda *_: None
    wrong: collections.Counter[str] = collections.Counter()
    step = sized(1, 2)
    for at in itertools.count(0, step):
        client.forget_associations()
        if path == "associated":
            shake_hands(*sides(client, server))
        one, other = sides(client, server)
        interrupt = Interrupt(at)
        outcome = interrupted(*((one, other) if victim == "client" else (other, one)), interrupt)
        if not interrupt.happened:
            break
        wrong[outcome] += outcome != "KeyboardInterrupt"
    assert at > 50
    assert not +wrong, f"instead of KeyboardInterrupt: {dict(+wrong)}"


class Unexpected(BaseException):
    """Not an Exception: like KeyboardInterrupt, nobody but the program's main loop catches it."""


@pytest.mark.parametrize("where", ["sni_callback", "observer of the client", "observer of the server"])
def test_an_exception_of_a_callback_reaches_the_program(local: Lab, where: str) -> None:
    client, server = local.client(), local.server()

    def refuse(*_: object) -> None:
        raise Unexpected

    if where == "sni_callback":
        server.sni_callback = refuse
    else:
        (client if "client" in where else server).observer = refuse
    with pytest.raises(Unexpected):
        shake_hands(*sides(client, server))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_wrap_socket(local: Lab) -> None:
    """The socket is closed, and other connections of the context work."""
    context = local.client()
    with Server(local.server()) as server:
        for at in range(0, 400, sized(5, 40)):
            interrupt = Interrupt(at)
            raw = server.tcp()
            with raw, pytest.raises(KeyboardInterrupt), interrupt:
                context.wrap_socket(raw, server_hostname="localhost")
        with server.connect(context) as sock:
            talk(sock)
