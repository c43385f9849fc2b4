"""Bytes changed, mixed up, repeated or made up: a documented error, no other exception, no secret left over."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkd_tls.control import Offer
from qkd_tls.engine import State
from qkd_tls.errors import QKDError
from tests.support.memory import (
    Conversation,
    Hand,
    Side,
    World,
    hand_driven_client,
    hand_driven_server,
    only_alerts,
    records,
)
from tests.support.scenarios import LONG_WAY, OFF, PREFER, SCENARIOS, Scenario, scenario
from tests.support.sizes import sized

pytestmark = pytest.mark.pure

ROUNDS = settings(max_examples=40, suppress_health_check=list(HealthCheck))


def well_behaved(world: World, conversation: Conversation) -> None:
    """Whatever came: an end at both sides, errors of the documented kinds, alerts at most, nothing left over."""
    conversation.hang_up()
    for side in (conversation.client, conversation.server):
        assert side.over
        error = side.error or side.late_error
        assert error is None or isinstance(error, ssl.SSLError)
        assert side.engine._psk is None
        if side.error is not None:
            assert side.engine.state is State.FAILED
            assert only_alerts(side.flight())
    assert world.loose_keys() == []


def tampered(which: Scenario, number: int, change: Callable[[bytes], bytes]) -> tuple[World, Conversation]:
    """The scenario with one flight changed on its way."""
    world = which.world()
    conversation = which.begin(world)
    for receiver, flight in conversation.each_flight():
        receiver.deliver(change(flight) if len(conversation.flights) == number + 1 else flight)
    return world, conversation


def flights_of(which: Scenario) -> list[bytes]:
    return [flight for _, flight in which.begin(which.world()).run().flights]


def flipped(flight: bytes, offset: int, bit: int) -> bytes:
    changed = bytearray(flight)
    changed[offset % len(flight)] ^= 1 << bit
    return bytes(changed)


def offsets_to_flip(flight: bytes) -> Iterator[int]:
    """Every byte of each record's header and the first ones of its content, and some of the rest."""
    start = 0
    begin, rest = sized(12, 6), sized(12, 4)
    for record in records(flight):
        yield from range(start, start + min(len(record), begin))
        yield from range(start + begin, start + len(record), 1 + len(record) // rest)
        start += len(record)


class TestChangedFlights:
    @pytest.mark.parametrize(
        "name",
        [
            "bootstrap",
            "bootstrap with discover",
            "bootstrap with HelloRetryRequests",
            "associated",
            "both prefer, the server's KMS fails",
            "both prefer, the client's KMS fails",
        ],
    )
    def test_a_bit_flipped(self, name: str) -> None:
        which = scenario(name)
        for number, flight in enumerate(flights_of(which)):
            for offset in offsets_to_flip(flight):

                def flip(flight: bytes, offset: int = offset) -> bytes:
                    return flipped(flight, offset, offset % 8)

                world, conversation = tampered(which, number, flip)
                well_behaved(world, conversation)
                if conversation.client.info and conversation.server.info:
                    # Only what nobody authenticates may change: the version in the headers of records in the clear,
                    # and what comes when the handshake is over.
                    over = conversation.client.late_error or conversation.server.late_error
                    assert over or conversation.ends == which.ends

    @pytest.mark.parametrize("which", SCENARIOS[::4], ids=str)
    def test_a_flight_twice_left_out_or_cut_out(self, which: Scenario) -> None:
        for number, whole in enumerate(flights_of(which)):
            parts = len(records(whole))
            changes: list[Callable[[bytes], bytes]] = [lambda flight: flight * 2, lambda _: b""]
            for part in range(parts):
                changes += [
                    lambda flight, part=part: b"".join(  # type: ignore[misc]
                        record for place, record in enumerate(records(flight)) if place != part
                    ),
                    lambda flight, part=part: b"".join(  # type: ignore[misc]
                        record * (1 + (place == part)) for place, record in enumerate(records(flight))
                    ),
                ]
            changes.append(lambda flight: b"".join(reversed(records(flight))))
            for change in changes:
                well_behaved(*tampered(which, number, change))

    @ROUNDS
    @given(data=st.data())
    def test_anything_spliced_in(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(SCENARIOS))
        flights = flights_of(which)
        if not flights:
            return
        number = data.draw(st.integers(0, 9)) % len(flights)
        # In 10,000ths: flights differ in size by a byte or two.
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, 10_000)] * 2)))
        middle = data.draw(st.binary(max_size=200))

        def splice(flight: bytes) -> bytes:
            return flight[: start * len(flight) // 10_000] + middle + flight[end * len(flight) // 10_000 :]

        well_behaved(*tampered(which, number, splice))


def in_every_state() -> dict[str, Callable[[], tuple[World, Side]]]:
    """A world and one side of it that waits for bytes, for each state in which an engine can do so."""

    def fresh(role: str) -> tuple[World, Side]:
        world = World()
        return world, world.new_client().pump() if role == "client" else world.new_server()

    def by_hand(world: World, make: Callable[[World], Hand]) -> tuple[World, Side]:
        return world, make(world).side

    def client_hybrid() -> tuple[World, Side]:
        world = World(client=LONG_WAY)
        conversation = world.conversation()
        for receiver, flight in conversation.each_flight():
            receiver.deliver(flight)
            if conversation.client.engine.state is State.CLIENT_HYBRID:
                break
        return world, conversation.client

    def server_handshake() -> tuple[World, Side]:
        world = World()
        server = world.new_server()
        server.deliver(world.new_client().flight())
        return world, server.pump()

    def server_skip() -> tuple[World, Side]:
        world = World()
        return world, hand_driven_client(world).send(Offer("local", "SAE-A", ("none",), None, True)).side

    return {
        "CLIENT_HELLO": lambda: fresh("client"),
        "CLIENT_DISCOVER": lambda: by_hand(World(peer_sae_id=None), hand_driven_server),
        "CLIENT_OFFER": lambda: by_hand(World(), hand_driven_server),
        "CLIENT_HYBRID": client_hybrid,
        "SERVER_HELLO": lambda: fresh("server"),
        "SERVER_HANDSHAKE": server_handshake,
        "SERVER_CONTROL": lambda: by_hand(World(), hand_driven_client),
        "SERVER_SKIP": server_skip,
    }


RECORD_LIKE = st.builds(
    lambda kind, minor, size, content: bytes([kind, 3, minor]) + size.to_bytes(2, "big") + content,
    st.integers(18, 25),
    st.integers(0, 4),
    st.integers(0, 0xFFFF),
    st.binary(max_size=64),
)
WHOLE_RECORD = st.builds(
    lambda kind, content: bytes([kind, 3, 3]) + len(content).to_bytes(2, "big") + content,
    st.sampled_from([20, 21, 22, 23]),
    st.binary(max_size=64),
)
GARBAGE = st.lists(st.one_of(st.binary(max_size=64), RECORD_LIKE, WHOLE_RECORD), min_size=1, max_size=4)


class TestGarbageInEveryState:
    @pytest.mark.parametrize("state", in_every_state())
    @ROUNDS
    @given(garbage=GARBAGE)
    def test_bytes_and_things_like_records(self, state: str, garbage: list[bytes]) -> None:
        world, side = in_every_state()[state]()
        assert side.engine.state is State[state]
        for part in garbage:
            side.deliver(part)
        side.end_of_stream()
        assert side.over
        assert side.info is None
        assert isinstance(side.error, ssl.SSLError)
        assert side.engine._psk is None
        if state.startswith("CLIENT"):
            assert world.loose_keys() == []

    @pytest.mark.parametrize("state", in_every_state())
    @pytest.mark.parametrize("description", [0, 10, 40, 51, 90, 120, 255])
    def test_an_alert_in_the_clear(self, state: str, description: int) -> None:
        _, side = in_every_state()[state]()
        side.deliver(bytes([21, 3, 3, 0, 2, 2, description]))
        side.end_of_stream()
        assert isinstance(side.error, ssl.SSLError)

    @pytest.mark.parametrize(
        ("description", "advice"),
        [
            (47, "some TLS stacks say so where the two sides hold different keys"),
            (40, "for another hash (kdf)"),
        ],
    )
    def test_an_alert_of_another_stack_names_the_key(self, description: int, advice: str) -> None:
        _, side = in_every_state()["CLIENT_HYBRID"]()
        assert side.engine._psk is not None
        key_id = side.engine._psk.key_id
        side.deliver(bytes([21, 3, 3, 0, 2, 2, description]))
        assert advice in str(side.error)
        assert key_id in str(side.error)

    @pytest.mark.parametrize("state", in_every_state())
    def test_a_record_longer_than_any(self, state: str) -> None:
        """Nobody waits for it, or keeps it."""
        _, side = in_every_state()[state]()
        side.deliver(bytes([23, 3, 3, 0xFF, 0xFF]) + bytes(100))
        if side.engine.state is not State.SERVER_HANDSHAKE:
            assert isinstance(side.error, ssl.SSLError)
        side.end_of_stream()
        assert side.over

    @pytest.mark.parametrize(
        "what", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"SSH-2.0-OpenSSH\r\n"]
    )
    @pytest.mark.parametrize("config", [{}, PREFER, OFF], ids=["require", "prefer", "off"])
    @pytest.mark.parametrize("piece", [None, 1])
    def test_a_client_that_speaks_something_else(
        self, what: bytes, config: dict[str, object], piece: int | None
    ) -> None:
        server = World(server=config).new_server()
        server.deliver(what, piece)
        server.end_of_stream()
        assert isinstance(server.error, ssl.SSLError)
        assert not isinstance(server.error, QKDError)
        if what.startswith(b"GET"):
            assert "plain HTTP" in str(server.error)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("002b0003020304", "002b0003010304"),
            ("002b0003020304", "002b0003020303"),
            ("000a0004000211ec", "000a0004000111ec"),
            ("000a0004000211ec", "000a0004000200ff"),
        ],
        ids=["versions broken", "only TLS 1.2", "groups broken", "groups unknown"],
    )
    @pytest.mark.parametrize("config", [{}, PREFER], ids=["require", "prefer"])
    def test_a_client_hello_that_openssl_names_better(
        self, old: str, new: str, config: dict[str, object]
    ) -> None:
        hello = World(client=OFF).new_client().flight()
        assert hello.count(bytes.fromhex(old)) == 1
        server = World(server=config).new_server()
        server.deliver(hello.replace(bytes.fromhex(old), bytes.fromhex(new)))
        assert isinstance(server.error, ssl.SSLError)
        assert only_alerts(server.flight())

    @ROUNDS
    @given(garbage=st.binary(max_size=300))
    def test_made_up_frames_for_a_server(self, garbage: bytes) -> None:
        world = World()
        peer = hand_driven_client(world).send(len(garbage).to_bytes(2, "big") + garbage)
        assert peer.side.end == "QKDProtocolError malformed"

    @ROUNDS
    @given(garbage=st.binary(max_size=300))
    def test_made_up_frames_for_a_client(self, garbage: bytes) -> None:
        world = World()
        peer = hand_driven_server(world).send(len(garbage).to_bytes(2, "big") + garbage)
        assert peer.side.end == "QKDProtocolError malformed"
        assert world.loose_keys() == []


class TestWrongOrder:
    def test_a_server_that_speaks_before_it_is_asked(self) -> None:
        """What it says early counts when its turn has come, no sooner; nobody hangs."""
        world = World(client=PREFER, peer_sae_id=None)
        peer = hand_driven_server(world)
        assert peer.side.engine.state is State.CLIENT_DISCOVER
        peer.send({"type": "offer", "version": 1, "kms": "a", "sae_id": "b", "key_ids": ["c"]})
        assert peer.side.end == "QKDProtocolError malformed"

    def test_a_ticket_and_an_answer_in_one_flight(self) -> None:
        """OpenSSL's servers send tickets nobody wants; what comes behind them has to be read at once."""
        conversation = scenario("both prefer, the server's KMS fails").begin(
            world := scenario("both prefer, the server's KMS fails").world()
        )
        conversation.run()
        well_behaved(world, conversation)
        assert len(records(conversation.flights[3][1])) == 3

    def test_shuffled_records(self) -> None:
        numbers = random.Random(7)
        which = scenario("bootstrap")
        for number, flight in enumerate(flights_of(which)):
            for _ in range(4):
                order = list(range(len(records(flight))))
                numbers.shuffle(order)

                def shuffle(flight: bytes, order: list[int] = order) -> bytes:
                    parts = records(flight)
                    return b"".join(parts[place] for place in order)

                well_behaved(*tampered(which, number, shuffle))
