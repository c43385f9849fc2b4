"""Both parties of a link in one process, joined in memory: the real protocol on the real authenticated channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kms_client.emulator.link.alice import Alice
from kms_client.emulator.link.authentication.authenticators import SharedSecret
from kms_client.emulator.link.authentication.channel import ClassicalChannel
from kms_client.emulator.link.authentication.reserve import Direction, KeyReserve
from kms_client.emulator.link.authentication.session import Rebootstrap, Session
from kms_client.emulator.link.bob import Bob
from kms_client.emulator.link.controls import Controls
from kms_client.emulator.link.figures import Figures
from kms_client.emulator.link.messages import Part
from kms_client.emulator.link.party import SecretKey, Settings
from kms_client.emulator.link.photonics.line import Line, Photons
from kms_client.emulator.link.photonics.parameters import DEFAULT, Optics
from kms_client.emulator.link.photonics.receiver import Receiver
from tests.support.patience import PATIENCE


class Cut(Exception):
    """The classical channel was cut."""


@dataclass
class MemorySink:
    """A store for the keys; those in doubt apart."""

    capacity: int = 100_000
    held: dict[str, bytes] = field(default_factory=dict)
    offered: dict[str, bytes] = field(default_factory=dict)
    doubt: set[str] = field(default_factory=set)
    mine_is_a: bool = True
    open: asyncio.Event = field(default_factory=asyncio.Event)

    def room(self) -> tuple[int, int]:
        here, there = self.capacity - len(self.offered), self.capacity - len(self.held)
        return (here, there) if self.mine_is_a else (there, here)

    async def wait_for_room(self) -> None:
        await self.open.wait()

    def hold(self, keys: list[SecretKey]) -> None:
        self._put(self.held, keys)

    def offer(self, keys: list[SecretKey]) -> None:
        self._put(self.offered, keys)

    def settle(self) -> None:
        self.doubt.clear()

    def drop(self) -> None:
        for key_id in self.doubt:
            self.held.pop(key_id, None)
            self.offered.pop(key_id, None)
        self.doubt.clear()

    def _put(self, where: dict[str, bytes], keys: list[SecretKey]) -> None:
        for key in keys:
            assert key.key_id not in self.held.keys() | self.offered.keys()
            where[key.key_id] = bytes(key.secret)
            self.doubt.add(key.key_id)

    @property
    def keys(self) -> dict[str, bytes]:
        return self.held | self.offered


class MemoryConversation:
    """One end of a session.

    Attributes:
        before_sending: called with each part and whether it is the last; what it returns goes out instead. May raise.
    """

    def __init__(self, channel: ClassicalChannel) -> None:
        self.channel = channel
        self.arriving: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.peer: MemoryConversation = self
        self.before_sending: Callable[[bytes, bool], bytes] = lambda data, last: data
        self.sent_tags = 0
        self._parts: list[Part] = []

    async def send(self, data: bytes, *, last: bool) -> None:
        data = self.before_sending(data, last)
        self.sent_tags += last
        self.peer.arriving.put_nowait(self.channel.seal(data) if last else self.channel.seal_part(data))
        await asyncio.sleep(0)

    async def receive(self) -> Part:
        while not self._parts:
            data = await self.arriving.get()
            if data is None:
                raise Cut
            self._parts = [Part(*received) for received in self.channel.receive_data(data)]
        return self._parts.pop(0)

    def cut(self) -> None:
        """Nothing more arrives, at either end."""
        for end in (self, self.peer):
            end.arriving.put_nowait(None)


@dataclass
class MemoryLink:
    """Both parties, and their sessions."""

    settings: Settings
    optics: Optics = DEFAULT
    other_settings: Settings | None = None
    capacity: int = 100_000
    capacity_b: int | None = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(20261125)
        self.controls = Controls(self.optics.fibre.length)
        self.secret = SharedSecret(bytes(32))
        self.figures = {side: Figures(side) for side in "ab"}
        self.line = Line(self.optics, rng)
        self.receiver = Receiver(self.optics.detector, self.optics.source, rng)
        self.new_alice()
        self.new_bob()

    def new_alice(self) -> None:
        """A process that knows nothing of earlier sessions."""
        self.sink_a, self.reserve_a = MemorySink(self.capacity), KeyReserve()
        self.sink_a.open.set()
        self.alice = Alice(
            *(self.settings, self.sink_a, self.reserve_a, self.capacity, self.figures["a"]),
            *(self.line, self.controls),
            paced=False,
        )

    def new_bob(self) -> None:
        """The same on the other side."""
        capacity = self.capacity if self.capacity_b is None else self.capacity_b
        self.sink_b, self.reserve_b = MemorySink(capacity, mine_is_a=False), KeyReserve()
        self.bob = Bob(
            *(self.other_settings or self.settings, self.sink_b, self.reserve_b, capacity),
            *(self.figures["b"], self.receiver),
        )

    def session(self) -> tuple[MemoryConversation, MemoryConversation]:
        """Start a session."""
        ends = [
            Session(direction, "test", reserve, self.secret, rebootstrap=Rebootstrap.ALLOWED, minimum_keys=4)
            for direction, reserve in zip(Direction, (self.reserve_a, self.reserve_b), strict=True)
        ]
        a, b = ends
        hello_a, hello_b = a.start(), b.start()
        proof_a, proof_b = a.receive_data(hello_b), b.receive_data(hello_a)
        a.receive_data(proof_b)
        b.receive_data(proof_a)
        assert a.channel is not None
        assert b.channel is not None
        ours, theirs = MemoryConversation(a.channel), MemoryConversation(b.channel)
        ours.peer, theirs.peer = theirs, ours
        return ours, theirs

    def run(
        self,
        until: Callable[[], bool],
        prepare: Callable[[MemoryConversation, MemoryConversation], None] = lambda ours, theirs: None,
    ) -> list[BaseException | None]:
        """One session, until the condition holds or a party ends: what they raised, if anything."""
        return asyncio.run(self._run(until, prepare))

    async def _run(
        self,
        until: Callable[[], bool],
        prepare: Callable[[MemoryConversation, MemoryConversation], None],
    ) -> list[BaseException | None]:
        ours, theirs = self.session()
        prepare(ours, theirs)
        fibre: asyncio.Queue[tuple[int, Photons]] = asyncio.Queue(2)

        async def send_photons(number: int, photons: Photons) -> None:
            await fibre.put((number, photons))

        tasks = [
            asyncio.create_task(self.alice.run(ours, send_photons)),
            asyncio.create_task(self.bob.run(theirs, fibre.get)),
        ]
        async with asyncio.timeout(4 * PATIENCE):
            while not until() and not any(task.done() for task in tasks):
                await asyncio.sleep(0)
        if any(task.done() for task in tasks):
            ours.cut()
            await asyncio.wait(tasks, timeout=PATIENCE)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return [None if isinstance(result, asyncio.CancelledError) else result for result in results]

    def assert_equal(self) -> None:
        """Both sides have the same keys, in mirrored places, and the same reserves."""
        assert self.sink_a.offered == self.sink_b.held
        assert self.sink_a.held == self.sink_b.offered
        for direction in Direction:
            assert self.reserve_a.next(direction) == self.reserve_b.next(direction)
            assert self.reserve_a.end(direction) == self.reserve_b.end(direction)
