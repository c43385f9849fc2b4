"""A fork is an event of every live connection: no two processes ever protect records with one key and sequence number.

Afterwards neither process sends or receives of its own accord. The first one that the program has send owns that
direction, and so does the first one that receives; in the other one such a call raises OSError before a byte leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import json
import os
import selectors
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_tls import QKDSocket, aio
from tests.support.forked import LEAVING_IT_ALONE, OVER_MEMORY, OVER_SOCKET
from tests.support.paths import ROOT
from tests.support.patience import PATIENCE
from tests.support.sizes import sized
from tests.support.sockets import Lab, Server, talk, tcp_pair

pytestmark = [
    # The tests' own processes have threads. What they fork does little, and ends by os._exit.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

Run = Callable[[dict[str, Any]], str]
PROCESSES = ("parent", "child")
LIMIT = 20
"""Seconds after which a server's child gives up, if what it waits for was taken by its parent."""


# --- on the wire


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a script with tests/support/forked.py; return what went wrong."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "examples")))
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "tests.support.forked"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def run_one(script: dict[str, Any]) -> str:
            program.stdin.write(json.dumps(script) + "\n")  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            line = program.stdout.readline()  # type: ignore[union-attr]
            assert line, "the program has ended"
            return str(json.loads(line))

        yield run_one
        program.stdin.close()
    assert program.returncode == 0


def scripts(*, memory: bool) -> st.SearchStrategy[dict[str, Any]]:
    orders = st.sampled_from(OVER_MEMORY if memory else OVER_SOCKET)
    steps = st.tuples(
        st.sampled_from(PROCESSES),
        st.one_of(st.sampled_from(["send", "receive", "peer sends", "peer asks for a KeyUpdate"]), orders),
    )

    def fitting(script: dict[str, Any]) -> dict[str, Any]:
        shaking = script["handshake"]
        if shaking == "before":
            return script
        # Who has not shaken hands has nothing to send with. And a child has no associations yet.
        fit = [(who, do) for who, do in script["steps"] if who == shaking or do in LEAVING_IT_ALONE]
        return {**script, "path": "bootstrap", "steps": fit}

    return st.fixed_dictionaries(
        {
            "memory": st.just(memory),
            "side": st.sampled_from(["client", "server"]),
            "path": st.sampled_from(["bootstrap", "associated"]),
            "handshake": st.sampled_from(["before", "before", "parent", "child"]),
            "steps": st.lists(steps, min_size=1, max_size=10),
        }
    ).map(fitting)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("memory", [False, True], ids=["socket", "object"])
@settings(max_examples=sized(2500, 50))
@given(data=st.data())
def test_every_record_has_a_nonce_of_its_own(run: Run, memory: bool, data: st.DataObject) -> None:
    assert run(data.draw(scripts(memory=memory))) == ""


KNOWN: dict[str, list[tuple[str, str]]] = {
    "nothing": [("parent", "send"), ("parent", "peer sends"), ("parent", "receive")],
    "the child goes": [("child", "exit"), ("parent", "send")],
    "the child goes politely": [("child", "sys.exit"), ("parent", "send")],
    "the child's copy is collected": [("child", "collect"), ("parent", "send"), ("parent", "receive")],
    "the child's copy is collected, unread data stay": [
        ("parent", "peer sends"),
        ("child", "collect"),
        ("parent", "receive"),
        ("parent", "send"),
    ],
    "the parent's copy is collected": [("parent", "collect"), ("child", "send"), ("child", "collect")],
    "both send": [("child", "send"), ("parent", "send"), ("child", "send")],
    "both send, the parent first": [("parent", "send"), ("child", "send"), ("parent", "send")],
    "both receive": [
        ("parent", "peer sends"),
        ("parent", "peer sends"),
        ("child", "receive"),
        ("parent", "receive"),
        ("child", "receive"),
    ],
    "one sends and one receives": [
        ("parent", "send"),
        ("parent", "peer sends"),
        ("child", "receive"),
        ("parent", "peer sends"),
        ("child", "receive"),
        ("parent", "send"),
    ],
    "a KeyUpdate for who only receives": [
        ("parent", "send"),
        ("parent", "peer asks for a KeyUpdate"),
        ("child", "receive"),
        ("parent", "send"),
        ("child", "collect"),
        ("parent", "send"),
    ],
    "a KeyUpdate for who does both": [
        ("child", "send"),
        ("parent", "peer asks for a KeyUpdate"),
        ("child", "receive"),
        ("child", "send"),
        ("parent", "send"),
    ],
    "unwrap in the child, the parent sends": [("parent", "send"), ("child", "unwrap")],
}
CLOSING: dict[str, list[tuple[str, str]]] = {
    "the child closes": [
        ("parent", "peer sends"),
        ("child", "close"),
        ("parent", "send"),
        ("parent", "receive"),
        ("parent", "close"),
    ],
    "the parent closes, the child serves": [
        ("parent", "close"),
        ("parent", "peer sends"),
        ("child", "receive"),
        ("child", "send"),
        ("child", "close"),
    ],
    "the sender's copy is closed in the other process": [
        ("child", "send"),
        ("parent", "close"),
        ("child", "send"),
    ],
    "shutdown in the child, the parent sends": [("parent", "send"), ("child", "shutdown")],
}


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize(
    ("memory", "name"),
    [*((False, name) for name in (*KNOWN, *CLOSING)), *((True, name) for name in KNOWN)],
    ids=lambda value: {False: "socket", True: "object"}.get(value, value),
)
def test_what_programs_do(run: Run, memory: bool, name: str, side: str) -> None:
    steps = {**KNOWN, **CLOSING}[name]
    script = {"memory": memory, "side": side, "path": "associated", "handshake": "before", "steps": steps}
    assert run(script) == ""


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("memory", [False, True], ids=["socket", "object"])
@pytest.mark.parametrize("shaking", PROCESSES)
def test_the_handshake_may_come_after_the_fork(run: Run, memory: bool, side: str, shaking: str) -> None:
    other = "child" if shaking == "parent" else "parent"
    steps = [(other, "collect"), (shaking, "send"), (shaking, "peer sends"), (shaking, "receive")]
    script = {"memory": memory, "side": side, "path": "bootstrap", "handshake": shaking, "steps": steps}
    assert run(script) == ""


# --- programs


def in_child(act: Callable[[], object]) -> None:
    """Fork, act in the child, and wait for its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


class TestClient:
    """What redis-py, huggingface_hub and others do: a child closes the connections that it finds open."""

    @pytest.mark.parametrize(
        "end",
        [
            lambda sock: sock.close(),
            lambda sock: sock.detach(),
            lambda sock: (sock.settimeout(0), sock.close()),
            lambda sock: sock.__del__() if hasattr(sock, "__del__") else None,
        ],
        ids=["close", "detach", "close at once", "finalizer"],
    )
    def test_goes_on_when_its_child_has_closed_its_copy(self, local: Lab, end: Any) -> None:
        with Server(local.server()) as server, server.connect(local.client()) as sock:
            talk(sock, b"one")
            for number in range(3):
                in_child(lambda: end(sock))
                talk(sock, b"more %d" % number)

    def test_child_may_take_the_connection_over(self, local: Lab) -> None:
        with Server(local.server()) as server, server.connect(local.client()) as sock:
            talk(sock, b"one")
            in_child(lambda: talk(sock, b"two"))
            # The parent does not know: nothing of its own may leave any more.
            with contextlib.suppress(OSError):
                sock.sendall(b"three")
                pytest.fail("the parent has sent under the nonce that the child has used")

    @pytest.mark.parametrize("how", ["close", "abort"])
    def test_asyncio_transport_that_ends_in_the_child(self, local: Lab, how: str) -> None:
        """A transport's close may say goodbye in the child. Then it is the child's, and the parent's write fails."""
        got: list[bytes] = []

        def collect(sock: QKDSocket) -> None:
            while data := sock.recv(100):
                got.append(data)
                sock.sendall(data)

        async def main() -> bytes:
            reader, writer = await aio.open_connection(
                *server.address, ssl=local.client(), server_hostname="localhost"
            )
            writer.write(b"one")
            await reader.readexactly(3)
            in_child(getattr(writer.transport, how))
            try:
                writer.write(b"two")
                return await asyncio.wait_for(reader.read(3), PATIENCE)
            except OSError:
                return b""
            finally:
                writer.transport.abort()

        with Server(local.server(), collect) as server:
            # A selector that the kernel keeps would be one for both processes.
            with asyncio.Runner(
                loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
            ) as runner:
                answer = runner.run(main())
            seen = server.seen()
        assert seen.error is None
        # What came was in order: no record failed to open.
        assert seen.handler_error is None or "EOF" in str(seen.handler_error), seen.handler_error
        assert b"".join(got) in (b"one", b"onetwo")
        if how == "abort":
            assert answer == b"two"


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = LIMIT

    def do_GET(self) -> None:
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class ForkingServer(socketserver.ForkingMixIn, http.server.HTTPServer):
    """A child for each connection."""

    def handle_error(self, *_: Any) -> None:
        """A connection that ends early is seen at the client."""


@pytest.mark.parametrize("handshake", ["in accept", "in the child"])
class TestServers:
    REQUESTS = sized(200, 20)

    def ask(self, lab: Lab, address: tuple[str, int]) -> set[int]:
        """Make a connection for each request; return the processes that have answered."""
        context, processes = lab.client(), set()
        for _ in range(self.REQUESTS):
            client = http.client.HTTPSConnection("localhost", address[1], context=context, timeout=LIMIT)
            with contextlib.closing(client):
                client.request("GET", "/")
                response = client.getresponse()
                assert response.status == 200
                processes.add(int(response.read()))
        return processes

    def test_forking_server(self, lab: Lab, handshake: str) -> None:
        with ForkingServer(("127.0.0.1", 0), Answer) as server:
            server.socket = lab.server().wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=handshake == "in accept"
            )
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                processes = self.ask(lab, server.server_address[:2])  # type: ignore[arg-type]
            finally:
                server.shutdown()
                thread.join(PATIENCE)
        assert os.getpid() not in processes
        assert len(processes) > 1

    def test_server_that_forks_before_it_accepts(self, lab: Lab, handshake: str) -> None:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(http.server.HTTPServer(("127.0.0.1", 0), Answer))
            server.socket = lab.server().wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=handshake == "in accept"
            )
            for _ in range(2):
                pid = os.fork()
                if pid == 0:
                    try:
                        server.serve_forever()
                    finally:
                        os._exit(1)
                stack.callback(os.waitpid, pid, 0)
                stack.callback(os.kill, pid, signal.SIGKILL)
            assert os.getpid() not in self.ask(lab, server.server_address[:2])  # type: ignore[arg-type]


def test_a_fork_between_the_two_ends_of_a_handshake(local: Lab) -> None:
    """The process that began it goes on; a close of the other one's copy tells the peer nothing."""
    client, server = local.client(), local.server()
    with tcp_pair() as (near, far):
        accepted: list[Any] = []
        with client.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False) as sock:
            thread = threading.Thread(
                target=lambda: accepted.append(server.wrap_socket(far, server_side=True))
            )
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, OSError):
                sock.do_handshake()
            in_child(sock.close)
            sock.settimeout(PATIENCE)
            thread.start()
            sock.do_handshake()
            thread.join(PATIENCE)
            with accepted.pop() as other:
                sock.sendall(b"hello")
                assert other.recv(100) == b"hello"
                assert isinstance(other, socket.socket)
