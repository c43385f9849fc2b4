"""Disconnects, drains and reloads at random, through real tunnel processes: no byte is lost unseen.

What each end sent and received is compared afterwards. A clean end at a receiver means that the sender ended cleanly,
and that every byte has arrived; whatever was cut shows as an error.
"""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.sizes import sized
from tests.support.tunnels import TIMEOUT, Backend, Process, Sites, dial, tunnel

EVENTS = sized(1000, 400)
"""Connections cut by one of the ends or in between, drains and reloads, together."""
QUOTAS = {"reload": 3, "drain": 3, "cut by an end": 3, "undisturbed": 20, "clean end": 100}
"""How often each of these happens at least: the storm goes on until then."""
CUTS = 3
"""The same for each way of cutting in between."""
WORKERS = 8
HEAD = 8
BLOCK = random.Random(1).randbytes(1 << 20)
RESET = struct.pack("ii", 1, 0)


@dataclass
class Half:
    """What one end did, and what it saw."""

    data: bytes
    cut: int | None = None
    """Cut after so many bytes..."""
    how: str = "end"
    """...by "reset" or by "close"; without a cut the end is clean."""
    sent: int = 0
    ended: bool = False
    """Whether it has ended its stream cleanly, after `sent` bytes."""
    received: bytearray = field(default_factory=bytearray)
    saw_end: bool = False
    error: str | None = None

    def converse(self, sock: socket.socket) -> None:
        """Send and receive at once, until both streams have ended or the connection breaks."""
        with sock:
            sock.setblocking(False)
            try:
                while not (self.ended and self.saw_end):
                    self._step(sock)
                    if self.cut is not None and self.sent >= self.cut:
                        if self.how == "reset":
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        self.ended = self.how == "close"
                        return
            except OSError as error:
                self.error = str(error)

    def _step(self, sock: socket.socket) -> None:
        limit = len(self.data) if self.cut is None else self.cut
        readable, writable, _ = select.select(
            [] if self.saw_end else [sock], [] if self.ended else [sock], [], TIMEOUT
        )
        assert readable or writable, "nothing happens any more"
        if readable:
            chunk = sock.recv(1 << 16)
            self.received += chunk
            self.saw_end = not chunk
        if writable:
            with contextlib.suppress(BlockingIOError):
                self.sent += sock.send(self.data[self.sent : min(limit, self.sent + 100_000)])
            if self.cut is None and self.sent == len(self.data):
                self.ended = True
                sock.shutdown(socket.SHUT_WR)


@dataclass
class Plan:
    """One connection."""

    app: Half
    backend: Half
    disturbed: bool = False
    """Something else than its two ends may have cut it."""

    @property
    def clean(self) -> bool:
        return self.app.cut is None and self.backend.cut is None and not self.disturbed


class Middle:
    """Between the two tunnels: passes TCP on, resets included, and cuts some connections itself, by FIN or RST."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self.cuts: Counter[str] = Counter()
        self._backend = Backend(self._pass_on)
        self.address = self._backend.address

    def close(self) -> None:
        self._backend.__exit__()

    def _pass_on(self, near: socket.socket) -> None:
        try:
            far = dial(self._target)
        except OSError:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            return
        how = self._random.choice(["none", "none", "fin", "reset"])
        left = self._random.randrange(6000, 400_000) if how != "none" else 1 << 60
        other = {near: far, far: near}
        with far:
            try:
                while other:
                    for sock in select.select(list(other), [], [], TIMEOUT)[0]:
                        data = sock.recv(min(1 << 16, left))
                        left -= len(data)
                        if data:
                            (far if sock is near else near).sendall(data)
                        else:
                            (far if sock is near else near).shutdown(socket.SHUT_WR)
                            del other[sock]
                    if left <= 0:
                        self.cuts[how] += 1
                        if how == "reset":
                            raise ConnectionResetError
                        self._truncate(near, far)
                        return
            except OSError:
                for sock in (near, far):
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    @staticmethod
    def _truncate(*socks: socket.socket) -> None:
        """A FIN to both, without a word of TLS; what they still send is swallowed."""
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        for sock in socks:
            with contextlib.suppress(OSError):
                while sock.recv(1 << 16):
                    pass


class Storm:
    """Everything that happens in the test."""

    def __init__(self, sites: Sites, folder: Path) -> None:
        self.random = random.Random(2)
        self.plans: dict[int, Plan] = {}
        self.lock = threading.Lock()
        self.epoch = 0
        """Odd while a drain may cut connections."""
        self.events: Counter[str] = Counter()
        self.done = threading.Event()
        self.failure: BaseException | None = None
        self._sites, self._folder = sites, folder
        self._generation = 0
        self._backend = Backend(self._serve)
        self._ports = {name: free_port() for name in ("direct", "cut", "server")}
        self._processes: dict[str, Process] = {}
        self.middle = Middle(("127.0.0.1", self._ports["server"]), 3)

    # --- the processes

    def start(self) -> None:
        self._start("server")
        self._start("client")

    def _start(self, side: str) -> None:
        self._generation += 1
        process = self._processes[side] = Process(
            self._folder / f"{side}{self._generation}.toml", self._config(side)
        )
        process.address("server" if side == "server" else "cut")

    def _config(self, side: str, more: str = "") -> str:
        server = ("127.0.0.1", self._ports["server"])
        targets = (
            {"server": self._backend.address}
            if side == "server"
            else {"direct": server, "cut": self.middle.address}
        )
        entries = [
            tunnel(side, target, name=name, listen=f"127.0.0.1:{self._ports[name]}", more=more)
            for name, target in targets.items()
        ]
        return self._sites.config(side, "".join(entries), service="drain_timeout = 0.3\n")

    def reload(self) -> None:
        """A changed limit each time, so that there is something to change."""
        side = self.random.choice(["client", "server"])
        more = f"max_connections = {self.random.randrange(50, 100)}\n"
        self._processes[side].reload(self._config(side, more))
        self.events["reload"] += 1

    def drain(self) -> None:
        """One process ends and another one takes its place: at once, while the old one still drains."""
        side = self.random.choice(["client", "server"])
        old = self._processes[side]
        with self.lock:
            self.epoch += 1
        old.signal(signal.SIGTERM)
        old.wait_for("stopping")
        self._start(side)
        assert old.wait() == 0, old.log
        with self.lock:
            self.epoch += 1
        self.events["drain"] += 1

    def stop(self) -> None:
        for process in self._processes.values():
            process.stop()
        self.middle.close()
        self._backend.__exit__()

    # --- the connections

    def _serve(self, sock: socket.socket) -> None:
        head = b""
        while len(head) < HEAD and (more := sock.recv(HEAD - len(head))):
            head += more
        if len(head) < HEAD:
            return
        plan = self.plans[int.from_bytes(head, "big")]
        plan.backend.received += head
        plan.backend.converse(sock)

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not self.done.is_set():
                self._one(rng, "direct" if seed % 2 else "cut")
        except BaseException as error:  # noqa: BLE001 - raised in the test
            self.failure = error
            self.done.set()

    def _one(self, rng: random.Random, way: str) -> None:
        with self.lock:
            number = len(self.plans)
            plan = self.plans[number] = Plan(
                self._half(rng, number.to_bytes(HEAD, "big")), self._half(rng, b""), disturbed=way == "cut"
            )
            epoch = self.epoch
        try:
            sock = dial(("127.0.0.1", self._ports[way]))
        except ConnectionError:
            # Between the end of one process's listening and the start of the next one's.
            plan.disturbed = True
            self.done.wait(0.05)
            return
        plan.app.converse(sock)
        with self.lock:
            plan.disturbed |= epoch != self.epoch or epoch % 2 == 1
            self.events["connection"] += 1
            self.events["clean end"] += plan.app.saw_end + plan.backend.saw_end
            if plan.app.cut is not None or plan.backend.cut is not None:
                self.events["cut by an end"] += 1
            elif plan.clean:
                self.events["undisturbed"] += 1

    @staticmethod
    def _half(rng: random.Random, head: bytes) -> Half:
        size = rng.choice([0, 10, 20_000, 200_000, 600_000])
        start = rng.randrange(len(BLOCK) - size)
        half = Half(head + BLOCK[start : start + size])
        if rng.random() < 0.4:
            half.how = rng.choice(["reset", "close"])
            half.cut = rng.randrange(len(head), len(half.data) + 1)
        return half

    @property
    def number(self) -> int:
        cuts = self.events["cut by an end"] + self.middle.cuts.total()
        return cuts + self.events["drain"] + self.events["reload"]

    @property
    def over(self) -> bool:
        """There was enough of everything."""
        return (
            self.number >= EVENTS
            and all(self.events[kind] >= quota for kind, quota in QUOTAS.items())
            and all(self.middle.cuts[how] >= CUTS for how in ("fin", "reset"))
        )


@pytest.fixture(scope="module")
def storm(all_sites: Sites, tmp_path_factory: pytest.TempPathFactory) -> Storm:
    storm = Storm(all_sites, tmp_path_factory.mktemp("storm"))
    workers = [threading.Thread(target=storm.work, args=(seed,)) for seed in range(WORKERS)]
    try:
        storm.start()
        for worker in workers:
            worker.start()
        turn = 0
        while not (storm.over or storm.done.is_set()):
            storm.reload()
            turn += 1
            # Hardly a connection is undisturbed on a machine that takes long for a drain: then there are no more.
            if turn % 3 == 0 and (storm.number < EVENTS or storm.events["drain"] < QUOTAS["drain"]):
                storm.drain()
            storm.done.wait(0.1)
        storm.done.set()
        for worker in workers:
            worker.join(2 * TIMEOUT)
    finally:
        storm.done.set()
        storm.stop()
    assert storm.failure is None, storm.failure
    return storm


def test_there_was_a_storm(storm: Storm) -> None:
    print(dict(storm.events), dict(storm.middle.cuts), len(storm.plans))
    assert storm.over


def test_what_arrives_is_what_was_sent(storm: Storm) -> None:
    for number, plan in storm.plans.items():
        for sender, receiver in ((plan.app, plan.backend), (plan.backend, plan.app)):
            assert sender.data.startswith(bytes(receiver.received)), number


def test_a_clean_end_means_that_nothing_is_missing(storm: Storm) -> None:
    seen = 0
    for number, plan in storm.plans.items():
        for sender, receiver in ((plan.app, plan.backend), (plan.backend, plan.app)):
            if receiver.saw_end:
                seen += 1
                assert sender.ended, (number, sender.sent, sender.error)
                assert len(receiver.received) == sender.sent, number
    assert seen >= QUOTAS["clean end"]


def test_what_nobody_cut_arrives_in_full(storm: Storm) -> None:
    """Neither reloads nor what happens to other connections disturb it."""
    whole = [plan for plan in storm.plans.values() if plan.clean]
    assert len(whole) >= QUOTAS["undisturbed"]
    for plan in whole:
        assert (plan.app.error, plan.backend.error) == (None, None)
        assert (len(plan.app.received), len(plan.backend.received)) == (
            len(plan.backend.data),
            len(plan.app.data),
        )
