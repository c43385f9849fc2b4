"""Client and server engines in memory: every kind of connection, what it says of itself, and how a driver uses it."""

from __future__ import annotations

import dataclasses
import ssl
from typing import Any

import pytest

from kms_client import KMSUnavailable
from qkd_tls.control import Reject, RejectCode
from qkd_tls.engine import TRANSITIONS, Event, FetchKeys, FetchKeysByID, NeedData, State
from qkd_tls.info import HandshakePath, Protection
from tests.support.memory import HOST, SAE_A, SAE_B, Conversation, World, hand_driven_server, link, pki
from tests.support.scenarios import (
    ASKS_FOR_CERTIFICATE,
    LONG_WAY,
    OFF,
    PREFER,
    SCENARIOS,
    WITH_CERTIFICATE,
    Scenario,
    scenario,
)

pytestmark = pytest.mark.pure


def check(expected: Scenario, world: World, conversation: Conversation) -> None:
    """It ended as it should, both sides say the same, and no secret is left over."""
    client, server = conversation.client, conversation.server
    assert conversation.ends == expected.ends, (client.error, server.error)
    if client.info is not None and server.info is not None:
        # Each side names its own KMS, counts its own requests and gives its own reason for a fallback.
        own: dict[str, Any] = {"kms": None, "kms_round_trips": 0, "fallback": None}
        assert dataclasses.replace(client.info, **own) == dataclasses.replace(server.info, **own)
        assert conversation.round_trips == expected.round_trips
        conversation.talk()
    assert world.loose_keys() == []
    for side in (client, server):
        assert side.engine._psk is None
        assert side.engine.state is (State.ESTABLISHED if side.info else State.FAILED)


class TestScenarios:
    @pytest.mark.parametrize("piece", [None, 1, 2, 7, 1000], ids=lambda piece: f"{piece or 'whole'}")
    @pytest.mark.parametrize("expected", SCENARIOS, ids=str)
    def test_whole_flights_and_pieces_come_to_the_same(self, expected: Scenario, piece: int | None) -> None:
        world = expected.world()
        check(expected, world, expected.begin(world).run(piece))

    def test_every_transition_is_taken(self) -> None:
        taken: set[tuple[State, Event]] = set()
        for each in SCENARIOS:
            conversation = each.begin(each.world()).run()
            taken.update(conversation.client.engine.steps, conversation.server.engine.steps)
        # Our server never rejects a discover for a reason that the client could live with; another may.
        peer = hand_driven_server(World(client=PREFER, peer_sae_id=None))
        peer.send(Reject(RejectCode.BUSY, "", "http/1.1"))
        assert peer.side.end == "pq-only"
        taken.update(peer.side.engine.steps)
        assert taken == set(TRANSITIONS)

    def test_every_state_can_be_reached_and_left(self) -> None:
        starts = {State.CLIENT_START, State.SERVER_HELLO}
        assert starts | set(TRANSITIONS.values()) == set(State) - {State.FAILED}
        assert {state for state, _ in TRANSITIONS} == set(State) - {State.FAILED, State.ESTABLISHED}
        # A role never ends in a state of the other.
        for (state, _), after in TRANSITIONS.items():
            role = state.value.partition(":")[0]
            assert after is State.ESTABLISHED or after.value.startswith(role)


class TestRoundTrips:
    """Before the client can send its first byte; docs/protocol.md has the same table."""

    @pytest.mark.parametrize(
        ("name", "round_trips", "kms_requests"),
        [
            ("no QKD at either end", 1, (0, 0)),
            ("associated, announced key", 1, (0, 0)),
            ("associated", 1, (1, 1)),
            ("bootstrap", 2, (1, 1)),
            ("bootstrap with announced keys", 2, (1, 1)),
            ("bootstrap the long way", 3, (1, 1)),
            ("bootstrap with ML-KEM-768", 3, (1, 1)),
            ("bootstrap with discover", 4, (1, 1)),
        ],
    )
    def test_counted_on_the_wire(self, name: str, round_trips: int, kms_requests: tuple[int, int]) -> None:
        which = scenario(name)
        world = which.world()
        conversation = which.begin(world)
        before = [kms.calls for kms in world.kms]
        conversation.run()
        asked = tuple(kms.calls - earlier for kms, earlier in zip(world.kms, before, strict=True))
        assert (conversation.round_trips, asked) == (round_trips, kms_requests)
        assert tuple(info.kms_round_trips for info in conversation.infos) == kms_requests

    def test_a_hello_retry_request_costs_what_it_costs_in_tls(self) -> None:
        late, usual = scenario("associated with HelloRetryRequest"), scenario("associated")
        assert late.begin(late.world()).run().round_trips == 2
        assert usual.begin(usual.world()).run().round_trips == 1


class TestInfo:
    def test_a_bootstrap(self) -> None:
        world = World()
        conversation = world.connect()
        client, server = conversation.infos
        assert (client.protection, client.path) == (Protection.HYBRID, HandshakePath.BOOTSTRAP)
        assert (client.group, client.cipher, client.alpn) == (
            "X25519MLKEM768",
            "TLS_AES_256_GCM_SHA384",
            "http/1.1",
        )
        assert (client.client_sae_id, client.server_sae_id) == (SAE_A, SAE_B)
        assert [client.key_id] == [key.key_id for key in world.kms[0].given]
        assert (client.kms, server.kms) == (world.kms[0].name, world.kms[1].name)
        assert client.association == world.association(0).id.hex() == world.association(1).id.hex()
        assert (client.announced, client.kem, client.fallback) == (False, None, None)

    def test_an_announced_key(self) -> None:
        world = World(client={"announced_keys": 2})
        bootstrap, later = world.connect(), world.connect()
        assert bootstrap.infos[0].announced is bootstrap.infos[1].announced is False
        assert later.infos[0].announced is later.infos[1].announced is True
        assert later.infos[0].key_id == world.kms[0].given[1].key_id
        assert later.infos[0].association == bootstrap.infos[0].association

    @pytest.mark.parametrize("kem", ["ML-KEM-768", "ML-KEM-1024"])
    def test_an_explicit_kem_is_named_on_later_connections_too(self, kem: str) -> None:
        world = World(client={"kem": kem})
        assert [info.kem for _ in range(2) for info in world.connect().infos] == [kem] * 4

    def test_a_classical_group_gets_an_explicit_kem(self) -> None:
        which = scenario("bootstrap over a classical group")
        client, _ = which.begin(which.world()).run().infos
        assert (client.protection, client.group, client.kem) == (Protection.HYBRID, "X25519", "ML-KEM-768")

    @pytest.mark.parametrize(
        ("name", "client_says", "server_says"),
        [
            ("a client that prefers, a stock server", "does not speak qkd-tls/1, or has no KMS", None),
            ("a stock client, a server that prefers", None, "does not speak qkd-tls/1, or has no QKD key"),
            (
                "both prefer, the client's KMS fails",
                "no keys (KMS local SAE-A",
                "unsupported_kms (the client has no QKD key to offer)",
            ),
            (
                "both prefer, the client's KMS fails before an associated connection",
                "no keys (KMS local SAE-A",
                "does not speak qkd-tls/1, or has no QKD key",
            ),
            (
                "both prefer, the server's KMS fails",
                "the server rejected the QKD keys: kms_unavailable (local KMS of the server)",
                "no QKD key for client SAE 'SAE-A': kms_unavailable (no answer",
            ),
        ],
    )
    def test_a_fallback_says_why(self, name: str, client_says: str | None, server_says: str | None) -> None:
        which = scenario(name)
        client, server = which.begin(which.world()).run().infos
        assert client.protection is server.protection is Protection.PQ_ONLY
        for info, says in ((client, client_says), (server, server_says)):
            assert (says in info.fallback) if says and info.fallback else (says is info.fallback is None)

    def test_the_servers_kms_is_not_quoted_to_the_client(self) -> None:
        which = scenario("both prefer, the server's KMS fails")
        world = which.world()
        client, _ = which.begin(world).run().infos
        assert "no answer" not in str(client.fallback)
        assert world.kms[1].name not in str(client.fallback)


class TestPeerCertificate:
    def test_of_this_connection_and_of_its_association(self) -> None:
        world = World(client_tls=WITH_CERTIFICATE, server_tls=ASKS_FOR_CERTIFICATE)
        for path in ("bootstrap", "associated"):
            conversation = world.established(path)
            assert conversation.client.engine.peer_certificate == pki().server.chain[0]
            assert conversation.server.engine.peer_certificate == pki().client.chain[0]

    def test_of_a_connection_without_a_qkd_key(self) -> None:
        conversation = World(client=OFF, server=OFF).connect()
        assert conversation.client.engine.peer_certificate == pki().server.chain[0]
        assert conversation.server.engine.peer_certificate is None

    def test_none_yet(self) -> None:
        world = World()
        assert world.new_client().engine.peer_certificate is None
        assert world.new_server().engine.peer_certificate is None


class TestALPN:
    @pytest.mark.parametrize(
        ("client", "server", "selected"),
        [
            (("h2", "http/1.1"), ("http/1.1", "h2"), "http/1.1"),
            (("h2", "http/1.1"), ("h2",), "h2"),
            (("h2",), ("http/1.1",), None),
            ((), ("http/1.1",), None),
            (("h2",), (), None),
        ],
    )
    @pytest.mark.parametrize("policies", ["require", "prefer without keys", "off"])
    def test_the_servers_first_choice_that_the_client_offers(
        self, client: tuple[str, ...], server: tuple[str, ...], selected: str | None, policies: str
    ) -> None:
        world = World(client={"alpn": client}, server={"alpn": server})
        if policies == "off":
            world.client |= OFF
            world.server |= OFF
        elif policies == "prefer without keys":
            world.client |= PREFER
            world.server |= PREFER
            world.kms[1].fail(KMSUnavailable("down"))
        for _ in range(2):
            assert [info.alpn for info in world.connect().infos] == [selected] * 2


class TestPipelining:
    """The client's second ClientHello follows its offer at once where it can derive everything by itself."""

    @staticmethod
    def flights(world: World) -> int:
        conversation = world.established("bootstrap")
        return int(2 * (conversation.round_trips or 0))

    def test_only_where_the_servers_sae_id_is_known_and_no_kem_is_offered(self) -> None:
        assert self.flights(World()) == 4
        assert self.flights(World(client=LONG_WAY)) == 6
        assert self.flights(World(client={"kem": "ML-KEM-768"})) == 6
        assert self.flights(World(peer_sae_id=None)) == 8

    def test_as_many_keys_as_the_server_takes(self) -> None:
        """A client that has asked knows how many; one that has not is rejected if they are too many."""
        world = World(client={"announced_keys": 9}, server={"max_keys": 4}, peer_sae_id=None)
        world.established("bootstrap")
        assert world.association(0).announced == world.association(1).announced == 3
        world = World(client={"announced_keys": 9}, server={"max_keys": 4})
        assert world.connect().ends == ("QKDProtocolError malformed", "QKDProtocolError malformed")


class TestDriver:
    """What `next_action`, `keys`, `receive_data`, `data_to_send` and `abort` promise to whoever does the I/O."""

    def test_a_client_asks_for_keys_for_the_servers_sae(self) -> None:
        world = World(client={"announced_keys": 2})
        conversation = world.conversation()
        client, server = conversation.client.engine, conversation.server
        assert isinstance(client.next_action(), NeedData)
        server.deliver(client.data_to_send())
        client.receive_data(server.flight())
        assert client.next_action() == FetchKeys(SAE_B, 3)

    def test_a_server_asks_for_the_keys_that_were_offered(self) -> None:
        world = World()
        conversation = world.conversation()
        client, server = conversation.client, conversation.server.engine
        server.receive_data(client.flight())
        client.deliver(server.data_to_send())
        server.receive_data(client.flight())
        assert server.next_action() == FetchKeysByID(SAE_A, (world.kms[0].given[0].key_id,))

    def test_keys_that_nobody_asked_for_are_wiped(self) -> None:
        kms, _ = link()
        side = World().new_server()
        keys = kms.get_keys(SAE_B)
        with pytest.raises(RuntimeError, match="has not asked for keys"):
            side.engine.keys(keys)
        assert keys[0].used
        with pytest.raises(RuntimeError, match="has not asked for keys"):
            side.engine.keys(KMSUnavailable("down"))

    def test_keys_that_come_after_the_end_are_wiped(self) -> None:
        world = World()
        world.connect()
        side = world.new_client()
        assert isinstance(side.engine.next_action(), FetchKeys)
        side.engine.receive_data(b"")
        keys = world.kms[0].get_keys(SAE_B)
        side.engine.keys(keys)
        assert keys[0].used
        with pytest.raises(ssl.SSLEOFError):
            side.engine.next_action()

    def test_the_error_is_raised_again_and_again(self) -> None:
        side = World().new_client()
        side.engine.receive_data(b"")
        for _ in range(2):
            with pytest.raises(ssl.SSLEOFError, match="first TLS handshake"):
                side.engine.next_action()
            side.engine.receive_data(b"more")
            side.engine.receive_data(b"")
            side.engine.abort()

    def test_abort_wipes_and_closes(self) -> None:
        world = World()
        conversation = world.conversation()
        flights = conversation.each_flight()
        for _ in range(3):
            receiver, flight = next(flights)
            receiver.deliver(flight)
        client = conversation.client
        association = client.engine._association
        assert association is not None
        client.engine.abort()
        client.pump()
        assert client.end == "SSLError"
        assert "given up" in str(client.error)
        assert not any(association.secret)
        assert all(key.used for key in world.kms[0].given)

    def test_abort_leaves_an_established_connection_alone(self) -> None:
        conversation = World().connect()
        conversation.client.engine.abort()
        conversation.server.engine.abort()
        conversation.talk()

    def test_application_data_may_come_with_the_last_flight(self) -> None:
        conversation = World().conversation()
        for receiver, flight in conversation.each_flight():
            if conversation.client.info is not None and receiver is conversation.server:
                conversation.client.write(b"early")
                flight += conversation.client.flight()
            receiver.deliver(flight)
        assert conversation.server.received == b"early"

    def test_what_comes_after_the_handshake_is_for_the_connection(self) -> None:
        conversation = World().connect()
        for data in (b"more", b""):
            with pytest.raises(RuntimeError, match="for the connection"):
                conversation.client.engine.receive_data(data)
        conversation.talk()

    def test_a_host_name_that_openssl_refuses(self) -> None:
        side = World(host="x" * 300, client_tls={"check_hostname": False}).new_client().pump()
        assert side.end == "SSLError"

    def test_the_next_flight_may_come_while_the_kms_is_asked(self) -> None:
        """A pipelined ClientHello is there before the server's KMS has answered."""
        world = World()
        conversation = world.conversation()
        flights = conversation.each_flight()
        for _ in range(2):
            receiver, flight = next(flights)
            receiver.deliver(flight)
        server, flight = next(flights)
        cut = flight.rindex(b"\x16\x03\x01")
        server.engine.receive_data(flight[:cut])
        assert isinstance(server.engine.next_action(), FetchKeysByID)
        server.engine.receive_data(flight[cut:])
        assert isinstance(server.engine.next_action(), FetchKeysByID)
        for receiver, flight in flights:
            receiver.deliver(flight)
        assert conversation.ends == ("bootstrap", "bootstrap")

    def test_nothing_is_offered_to_the_kms_by_a_plain_connection(self) -> None:
        world = World(client=OFF, server=OFF)
        world.established("pq-only")
        assert [kms.calls for kms in world.kms] == [0, 0]
        assert HOST.encode() in world.conversation().client.flight()
