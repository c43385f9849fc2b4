"""Many handshakes at once: neither event loop stalls, whatever the KMEs take.

Clients, server and KMEs are processes of their own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import pytest

from kms_client import Etsi014Client, KeyManager, QKDKey
from kms_client.emulator import run_pair
from qkd_tls import QKDContext, aio, create_default_context
from qkd_tls.engine import Event, State
from tests.support.patience import PATIENCE
from tests.support.sizes import sized
from tests.support.sockets import TIMEOUT, Lab, tcp_pair

CONNECTIONS: Final = sized(500, 100)
KME_DELAY: Final = 2.0
"""Seconds before each answer."""

STALL: Final = KME_DELAY / 2
"""Seconds: so long, or longer, a loop stands still that asks a KME itself."""

BEAT: Final = 0.005


@dataclass(frozen=True)
class Gap:
    """Between two heartbeats of a loop, in seconds."""

    wall: float
    ready: float
    """So long its threads were ready to run, and the operating system ran other programs."""

    @property
    def own(self) -> float:
        """Not the machine's doing."""
        return self.wall - self.ready


@dataclass
class Beats:
    """Of one loop."""

    number: int
    worst: Gap

    @property
    def stall(self) -> float:
        """Seconds."""
        return self.worst.own


class Pulse:
    """Heartbeats of the running loop."""

    def __init__(self) -> None:
        self.gaps: list[Gap] = []
        self._ready: dict[str, int] = {}

    async def __aenter__(self) -> Pulse:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        # A stall that goes on until now counts.
        await asyncio.sleep(2 * BEAT)
        self._task.cancel()
        for file in self._ready.values():
            os.close(file)

    async def _beat(self) -> None:
        last = self._clocks()
        while True:
            await asyncio.sleep(BEAT)
            now = self._clocks()
            self.gaps.append(Gap(*(after - before for after, before in zip(now, last, strict=True))))
            last = now

    def _clocks(self) -> tuple[float, float]:
        tasks = set(os.listdir("/proc/self/task"))
        for task in tasks - self._ready.keys():
            self._ready[task] = os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY)
        ready = 0
        for task in tasks:
            # Their second number: nanoseconds spent waiting on a run queue.
            ready += int(os.pread(self._ready[task], 100, 0).split()[1])
        return time.monotonic(), ready / 1e9

    def beats(self) -> Beats:
        return Beats(len(self.gaps), max(self.gaps, key=lambda gap: gap.own))


# --- the processes


@contextmanager
def process(target: Callable[..., object], *args: object) -> Iterator[Connection]:
    """Runs a function whose last argument is a pipe; it is told to end by a word through the pipe."""
    spawn = multiprocessing.get_context("spawn")
    near, far = spawn.Pipe()
    child = spawn.Process(target=target, args=(*args, far))
    child.start()
    far.close()
    try:
        yield near
    finally:
        with suppress(OSError):
            near.send("end")
        child.join(TIMEOUT)
        if child.is_alive():
            child.kill()
            child.join()
        near.close()


def get(pipe: Connection, patience: float = TIMEOUT) -> Any:
    assert pipe.poll(patience), "the process says nothing"
    return pipe.recv()


async def told_to_end(pipe: Connection) -> None:
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)


def run_kmes(folder: Path, pipe: Connection) -> None:
    with run_pair(folder, rate=2000.0, buffer=2 * CONNECTIONS) as pair:
        for side in ("a", "b"):
            pair.faults(side).delay = KME_DELAY
        pipe.send((pair.url_a, pair.url_b))
        pipe.recv()


def manager(folder: Path, side: str, url: str) -> Etsi014Client:
    return Etsi014Client(
        url,
        sae_id=f"SAE-{side.upper()}",
        cert=folder / f"sae-{side}.pem",
        key=folder / f"sae-{side}.key",
        ca=folder / "kms-ca.pem",
        read_timeout=PATIENCE,
    )


def run_server(folder: Path, url: str, pipe: Connection) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
        writer.close()

    async def main() -> None:
        context = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=manager(folder, "b", url))
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        async with await aio.start_server(echo, "127.0.0.1", 0, ssl=context) as server, Pulse() as pulse:
            pipe.send(server.sockets[0].getsockname()[1])
            await told_to_end(pipe)
        pipe.send(pulse.beats())

    asyncio.run(main())


def run_clients(folder: Path, url: str, port: int, connections: int, in_loop: bool, pipe: Connection) -> None:
    """`in_loop`: through asyncio's own function, which asks the KMS in the loop."""
    connect: Any = asyncio.open_connection if in_loop else aio.open_connection

    async def talk(context: QKDContext, number: int) -> str:
        reader, writer = await connect("localhost", port, ssl=context)
        text = b"%d" % number
        writer.write(text)
        assert await reader.readexactly(len(text)) == text
        key_id: str = writer.get_extra_info("ssl_object").qkd.key_id
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return key_id

    async def main() -> None:
        context = create_default_context(
            cafile=folder / "app-ca.pem", key_manager=manager(folder, "a", url), peer_sae_id="SAE-B"
        )
        async with Pulse() as pulse:
            key_ids = await asyncio.gather(*(talk(context, number) for number in range(connections)))
        pipe.send((key_ids, pulse.beats()))

    asyncio.run(main())


@dataclass
class Load:
    key_ids: list[str]
    clients: Beats
    server: Beats


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Load]:
    # What is measured is not what measuring coverage costs.
    for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
        monkeypatch.delenv(name)

    def load(connections: int, *, in_loop: bool = False) -> Load:
        with process(run_kmes, tmp_path) as kmes:
            kme_a, kme_b = get(kmes)
            with process(run_server, tmp_path, kme_b) as server:
                with process(run_clients, tmp_path, kme_a, get(server), connections, in_loop) as clients:
                    key_ids, worst = get(clients, 3 * PATIENCE)
                server.send("end")
                return Load(key_ids, worst, get(server))

    return load


# --- 500 connections


@pytest.mark.slow
def test_neither_loop_stalls_under_500_connections(loaded: Callable[..., Load]) -> None:
    """500 at full size."""
    load = loaded(CONNECTIONS)
    assert len(set(load.key_ids)) == CONNECTIONS
    # The loops ran all the time: 64 threads ask for the keys, 2 seconds each.
    assert min(load.clients.number, load.server.number) > CONNECTIONS
    assert load.clients.stall < STALL, load.clients
    assert load.server.stall < STALL, load.server


def test_a_kms_asked_in_the_loop_would_be_seen(loaded: Callable[..., Load]) -> None:
    load = loaded(1, in_loop=True)
    assert load.clients.stall > STALL
    assert load.server.stall < STALL


# --- turns


async def all_streams(client: QKDContext, server: QKDContext, number: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def connect() -> None:
        _, writer = await aio.open_connection("localhost", port, ssl=client)
        writer.close()
        await writer.wait_closed()

    async with await aio.start_server(serve, "127.0.0.1", 0, ssl=server) as listening:
        port = listening.sockets[0].getsockname()[1]
        await asyncio.gather(*(connect() for _ in range(number)))


async def all_sockets(client: QKDContext, server: QKDContext, number: int) -> None:
    async def connect(near: socket.socket, far: socket.socket) -> None:
        for tls in await asyncio.gather(
            aio.wrap_socket(near, client, server_hostname="localhost"),
            aio.wrap_socket(far, server, server_side=True),
        ):
            tls.close()

    with ExitStack() as stack:
        pairs = [stack.enter_context(tcp_pair()) for _ in range(number)]
        await asyncio.gather(*(connect(*pair) for pair in pairs))


@pytest.mark.parametrize("shake_hands", [all_streams, all_sockets], ids=["streams", "sockets"])
def test_others_have_their_turn_between_handshakes(
    local: Lab, shake_hands: Callable[[QKDContext, QKDContext, int], Coroutine[Any, Any, None]]
) -> None:
    steps = [0]
    """Of handshakes, in each turn of the loop."""
    client, server = local.client(), local.server()

    def observe(step: Any) -> None:
        # The first step only says hello.
        steps[-1] += step.before is not State.CLIENT_START

    client.observer = server.observer = observe

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            steps.append(0)

    async def main() -> None:
        async with asyncio.timeout(TIMEOUT):
            turning = asyncio.create_task(others())
            await shake_hands(client, server, 160)
            turning.cancel()

    asyncio.run(main())
    assert max(steps) < sum(steps) / 10, (max(steps), sum(steps))


class AllAtOnce:
    """A key manager that answers when so many have asked."""

    def __init__(self, inner: KeyManager, number: int) -> None:
        self.protocol, self.name, self.sae_id = inner.protocol, inner.name, inner.sae_id
        self.status, self.get_keys_by_id, self.close = inner.status, inner.get_keys_by_id, inner.close
        self._inner, self._all = inner, threading.Barrier(number)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        keys = self._inner.get_keys(peer_sae_id, number, size)
        self._all.wait(PATIENCE)
        return keys


@pytest.mark.parametrize("shake_hands", [all_streams, all_sockets], ids=["streams", "sockets"])
def test_answers_that_come_at_once_take_turns(
    local: Lab, shake_hands: Callable[[QKDContext, QKDContext, int], Coroutine[Any, Any, None]]
) -> None:
    number = aio.MAX_KMS_REQUESTS - 4
    answers = [0]
    """Taken by clients, in each turn of the loop."""
    client = local.client(key_manager=AllAtOnce(local.manager("client"), number))

    def observe(step: Any) -> None:
        if step.event is Event.KEYS:
            answers[-1] += 1
            # However fast the machine is, a turn has time for a few.
            time.sleep(0.001)

    client.observer = observe

    async def main() -> None:
        async with asyncio.timeout(TIMEOUT):
            turning = asyncio.create_task(others())
            await shake_hands(client, local.server(), number)
            turning.cancel()

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            answers.append(0)

    asyncio.run(main())
    assert sum(answers) == number
    assert max(answers) < number / 2


def test_the_end_of_the_stream_does_not_overtake_an_alert(local: Lab) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(bytes.fromhex("15 0303 0002 0228"))  # fatal: handshake_failure
        writer.close()

    async def main() -> list[Any]:
        context = local.client(policy="off", key_manager=None)
        async with asyncio.timeout(TIMEOUT), await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.gather(
                *(aio.open_connection("localhost", port, ssl=context) for _ in range(80)),
                return_exceptions=True,
            )

    for error in asyncio.run(main()):
        assert isinstance(error, ssl.SSLError), error
        assert "ALERT_HANDSHAKE_FAILURE" in str(error)


def test_one_who_does_not_wait_any_more_has_no_turn(local: Lab) -> None:
    async def main() -> None:
        async with asyncio.timeout(TIMEOUT):
            context = local.client()
            given_up = [
                asyncio.create_task(aio.open_connection("localhost", 1, ssl=context)) for _ in range(5)
            ]
            await asyncio.sleep(0)
            for task in given_up:
                task.cancel()
            await all_streams(context, local.server(), 1)
            assert all(task.cancelled() for task in given_up)

    asyncio.run(main())
