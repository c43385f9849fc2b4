"""What a new bootstrap on the same connection heals, what it cannot heal, and a KMS that does not do as asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kms_client import KMSUnavailable, QKDKey, UnknownKey
from qkd_tls import association as association_module
from qkd_tls import control
from qkd_tls.errors import QKDKeyMismatch, QKDUnavailable
from qkd_tls.hybrid import PSKIdentity
from tests.support.memory import HOST, SAE_A, SAE_B, Conversation, World, hand_driven_server
from tests.support.scenarios import CLASSICAL, LONG_WAY, PREFER, server_gets_another_key, server_restarts

pytestmark = pytest.mark.pure


def associated(**changes: object) -> World:
    """Two sites with an association."""
    world = World(**changes)  # type: ignore[arg-type]
    world.established("bootstrap")
    return world


class TestHealing:
    """An associated connection becomes a bootstrap, and the next one is associated again."""

    @staticmethod
    def heals(world: World, *, server_asked: int) -> Conversation:
        """The server asks its KMS once for the new bootstrap, and before that only if the ClientHello deserves it."""
        before = world.kms[1].calls
        first = world.association(0)
        conversation = world.established("bootstrap")
        assert conversation.round_trips == 2
        assert world.kms[1].calls - before == server_asked
        assert world.association(0) is not first
        assert not any(first.secret)
        world.established("associated")
        return conversation

    def test_the_server_was_restarted(self) -> None:
        world = associated()
        world.stores[1].clear()
        self.heals(world, server_asked=1)

    def test_the_association_expired_at_the_server(self) -> None:
        world = associated()
        world.association(1).expires_at = world.now
        self.heals(world, server_asked=1)

    def test_it_expires_between_the_lookup_and_the_key(self) -> None:
        """The server's KMS takes its time; the association is closed when the answer comes."""
        world = associated()

        def slow(keys: list[QKDKey]) -> list[QKDKey]:
            world.stores[1].clear()
            world.kms[1].cheat = list
            return keys

        world.kms[1].cheat = slow
        self.heals(world, server_asked=2)
        assert world.loose_keys() == []

    def test_the_servers_kms_does_not_know_the_key(self) -> None:
        world = associated()
        world.kms[1].fail(UnknownKey("no such key"), times=1)
        conversation = self.heals(world, server_asked=2)
        assert conversation.infos[1].kms_round_trips == 2

    def test_the_servers_kms_is_down_for_a_moment(self) -> None:
        world = associated()
        world.kms[1].fail(KMSUnavailable("down"), times=1)
        self.heals(world, server_asked=2)

    def test_another_server_name(self) -> None:
        """A client looks associations up by name; here one has been moved to another name by force."""
        world = associated()
        world.association(1).server_name = "other.example"
        self.heals(world, server_asked=1)

    def test_another_association_of_this_id(self) -> None:
        """Somebody who knows the ID, which is public, but not the secret: the tag is wrong."""
        world = associated()
        forged = world.association(0)
        forged.secret[:] = bytes(48)
        impostor = association_module.Association(bytearray(48), SAE_A, SAE_B, HOST, world.now + 60)
        impostor.id = forged.id
        world.stores[0].clear()
        world.stores[0].add(impostor, world.new_client().engine._scope)  # type: ignore[attr-defined]
        before = world.kms[1].calls
        world.established("bootstrap")
        assert world.kms[1].calls - before == 1

    def test_under_mutual_tls_and_over_classical_groups(self) -> None:
        world = associated(client_tls=CLASSICAL, server_tls=CLASSICAL)
        server_restarts(world)
        assert world.established("bootstrap").round_trips == 3

    def test_the_client_wipes_its_association(self) -> None:
        world = associated(client={"announced_keys": 3})
        lost = world.association(0)
        server_restarts(world)
        world.established("bootstrap")
        assert (lost.announced, any(lost.secret)) == (0, False)

    def test_a_prefer_client_whose_server_has_given_qkd_up(self) -> None:
        world = associated(client=PREFER)
        world.server = {"kms": "", "policy": "off"}
        world.established("pq-only")
        assert len(world.stores[0]) == 0
        assert world.loose_keys() == []

    def test_the_key_of_an_association_that_ended_is_wiped_where_nobody_wants_it(self) -> None:
        world = associated(client=PREFER)
        world.server = {"kms": "", "policy": "off"}

        def slow(keys: list[QKDKey]) -> list[QKDKey]:
            world.stores[0].clear()
            return keys

        world.kms[0].cheat = slow
        world.established("pq-only")
        assert world.loose_keys() == []

    def test_an_announced_key_of_an_association_that_ends_just_now(self) -> None:
        """Another thread closes the association between the look-up and the use; the server has that key already."""
        world = associated(client={"announced_keys": 1})
        association = world.association(0)
        take = association.take_announced
        taken: list[QKDKey | None] = []

        def take_and_close() -> QKDKey | None:
            taken.append(take())
            world.stores[0].clear()
            return taken[0]

        association.take_announced = take_and_close  # type: ignore[method-assign]
        conversation = world.established("bootstrap")
        assert taken[0] is not None
        assert taken[0].used
        assert conversation.infos[0].key_id != taken[0].key_id


class TestIdentities:
    """A ClientHello's PSK identity: only one with a right tag and a fresh key ID makes the server ask its KMS."""

    def asks(self, world: World, change: Callable[[bytes], bytes]) -> bool:
        """Whether the server asks its KMS for a key, given the client's hello with this change."""
        flight = world.conversation().client.flight()
        server = world.new_server()
        before = world.kms[1].calls
        server.deliver(change(flight))
        server.flight()
        server.end_of_stream()
        return world.kms[1].calls > before

    @staticmethod
    def replacing(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
        def change(flight: bytes) -> bytes:
            assert flight.count(old) == 1
            assert len(old) == len(new)
            return flight.replace(old, new)

        return change

    def test_the_right_one(self) -> None:
        assert self.asks(associated(), bytes)

    def test_a_replayed_client_hello(self) -> None:
        """The key ID is spent when it is looked up, whatever comes of the handshake."""
        world = associated()
        hello = world.conversation().client.flight()
        answers = []
        for _ in range(2):
            server = world.new_server()
            server.deliver(hello)
            server.flight()
            answers.append((world.kms[1].calls, server.engine.state.value))
            server.end_of_stream()
        assert answers == [(2, "server: TLS handshake")] * 2

    def test_a_key_id_that_the_bootstrap_has_used(self) -> None:
        world = associated()
        world.kms[0].cheat = renamed(world.kms[0].given[0].key_id)
        assert not self.asks(world, bytes)

    @pytest.mark.parametrize("part", ["head", "kdf", "association", "tag", "key ID", "server name"])
    def test_any_part_changed(self, part: str) -> None:
        world = associated()
        hello = world.conversation().client.flight()
        start = hello.index(b"qkd1.")
        offset = {
            "head": start,
            "kdf": start + len(b"qkd1.sha38"),
            "association": start + len(b"qkd1.sha384.") + 3,
            "tag": start + len(b"qkd1.sha384.") + 22 + 1 + 3,
            "key ID": start + len(b"qkd1.sha384.") + 22 + 1 + 12 + 1 + 3,
            "server name": hello.index(HOST.encode()),
        }[part]
        changed = bytearray(hello)
        changed[offset] = ord("b") if changed[offset] == ord("a") else ord("a")
        server = world.new_server()
        before = world.kms[1].calls
        server.deliver(bytes(changed))
        assert world.kms[1].calls == before
        assert server.end == "unfinished"
        assert not server.engine.steps[-1][1].name.startswith("KEY_")

    def test_the_kdf_is_part_of_what_the_tag_covers(self) -> None:
        world = associated()
        assert not self.asks(world, self.replacing(b"qkd1.sha384.", b"qkd1.sha256."))

    def test_of_another_client(self) -> None:
        """Two clients of one server: neither can use the other's association ID."""
        world, other = associated(), World()
        other.stores = (other.stores[0], world.stores[1])
        other.kms = world.kms
        other.established("bootstrap")
        mine, theirs = world.association(0), other.association(0)
        assert mine.id != theirs.id
        tag_of_mine = self.identity_with(world, theirs.id)
        assert not self.asks(world, tag_of_mine)

    @staticmethod
    def identity_with(world: World, association_id: bytes) -> Callable[[bytes], bytes]:
        def change(flight: bytes) -> bytes:
            start = flight.index(b"qkd1.")
            end = start + flight[start:].index(world.kms[0].given[-1].key_id.encode()) + 36
            identity = PSKIdentity.parse(flight[start:end])
            other = PSKIdentity(identity.kdf, association_id, identity.tag, identity.key_id)
            return flight[:start] + other.encode() + flight[end:]

        return change

    def test_each_client_has_its_own_association(self) -> None:
        world, other = associated(), World()
        other.stores = (other.stores[0], world.stores[1])
        other.established("bootstrap")
        for each in (world, other):
            each.established("associated")
        assert len(world.stores[1]) == 2


class TestSecondHandshake:
    """A client that is in the second handshake of a bootstrap fails: it must not loop."""

    @pytest.mark.parametrize("pipelined", [True, False])
    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_the_server_forgets_what_it_has_accepted(self, pipelined: bool, policy: str) -> None:
        world = World(client={"policy": policy, "pipelined": pipelined}, server={"policy": policy})
        world.stores[1]._capacity = 0
        conversation = world.connect()
        error = conversation.client.error
        assert isinstance(error, QKDUnavailable)
        assert "accepted key" in str(error)
        assert error.key_ids == (world.kms[0].given[0].key_id,)
        # The server has found itself in a new bootstrap, without an offer.
        assert conversation.server.end == "QKDUnavailable"
        assert [kms.calls for kms in world.kms] == [1, 1]
        assert world.loose_keys() == []
        assert len(world.stores[0]) == 0


class TestMismatch:
    """The two KMSs gave different keys for one ID: an error that names it, under every policy."""

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    @pytest.mark.parametrize("how", ["pipelined", "the long way", "associated"])
    def test_both_sides_name_the_key(self, policy: str, how: str) -> None:
        changes = LONG_WAY if how == "the long way" else {}
        world = World(client={"policy": policy, **changes}, server={"policy": policy})
        if how == "associated":
            world.established("bootstrap")
        server_gets_another_key(world)
        conversation = world.connect()
        key_id = world.kms[0].given[-1].key_id
        for error, kms in zip(conversation.errors, world.kms, strict=True):
            assert isinstance(error, QKDKeyMismatch)
            assert error.key_ids == (key_id,)
            assert key_id in str(error)
            assert error.kms == kms.name
        assert world.loose_keys() == []

    def test_one_bad_key_is_not_the_end_of_an_association(self) -> None:
        world = associated()
        server_gets_another_key(world)
        assert world.connect().ends == ("QKDKeyMismatch", "QKDKeyMismatch")
        world.kms[1].cheat = list
        world.established("associated")


class TestExhaustion:
    def test_an_association_is_retired_after_so_many_connections(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both sides count alike, so that the client does not ask in vain."""
        monkeypatch.setattr(association_module, "MAX_CONNECTIONS", 4)
        world = World()
        paths = [world.connect().ends for _ in range(9)]
        one_life = [("bootstrap", "bootstrap"), *[("associated", "associated")] * 3]
        assert paths == [*one_life, *one_life, one_life[0]]
        assert [kms.calls for kms in world.kms] == [9, 9]

    def test_announced_keys_come_first(self) -> None:
        world = associated(client={"announced_keys": 2})
        announced = [world.connect().infos[0].announced for _ in range(4)]
        assert announced == [True, True, False, False]

    def test_a_lifetime_of_the_servers_choice(self) -> None:
        world = World(server={"lifetime": 10})
        world.established("bootstrap")
        world.now += 9
        world.established("associated")
        world.now += 1
        world.established("bootstrap")

    def test_a_lifetime_of_the_clients_choice(self) -> None:
        world = World(client={"lifetime": 10}, server={"lifetime": 1000})
        world.established("bootstrap")
        world.now += 10
        world.established("bootstrap")


# --- a KMS that does not do what it was asked


def too_short(keys: list[QKDKey]) -> list[QKDKey]:
    return [QKDKey(key.key_id, bytes(31)) for key in keys]


def too_long(keys: list[QKDKey]) -> list[QKDKey]:
    return [QKDKey(key.key_id, bytes(1 << 16)) for key in keys]


def one_too_many(keys: list[QKDKey]) -> list[QKDKey]:
    return [*keys, QKDKey("one-more", bytes(32))]


def none_at_all(keys: list[QKDKey]) -> list[QKDKey]:
    for key in keys:
        key.wipe()
    return []


def used_ones(keys: list[QKDKey]) -> list[QKDKey]:
    for key in keys:
        key.wipe()
    return keys


def renamed(name: str) -> Callable[[list[QKDKey]], list[QKDKey]]:
    def cheat(keys: list[QKDKey]) -> list[QKDKey]:
        for key in keys:
            key.wipe()
        return [QKDKey(name, bytes(32)) for _ in keys]

    return cheat


class TestKMSThatCheats:
    """What it gives is wiped, and the connection ends as if the KMS had failed."""

    @pytest.mark.parametrize(
        ("cheat", "says"),
        [
            (too_short, "a key of 248 bits, not of 256 to 524280"),
            (too_long, "a key of 524288 bits, not of 256 to 524280"),
            (one_too_many, "gave 2 keys, 1 were asked for"),
            (none_at_all, "gave 0 keys, 1 were asked for"),
            (used_ones, "a key that is used already"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    @pytest.mark.parametrize("site", [0, 1], ids=["client", "server"])
    @pytest.mark.parametrize("path", ["bootstrap", "associated"])
    def test_at_either_end(
        self, cheat: Callable[[list[QKDKey]], list[QKDKey]], says: str, site: int, path: str
    ) -> None:
        world = World()
        if path == "associated":
            world.established("bootstrap")
        world.kms[site].cheat = cheat
        conversation = world.connect()
        side = (conversation.client, conversation.server)[site]
        assert isinstance(side.error, QKDUnavailable)
        assert says in str(side.error)
        assert side.error.kms == world.kms[site].name
        assert world.loose_keys() == []

    @pytest.mark.parametrize("name", ["a b", "x" * 201, "schlüssel", "\n"])
    @pytest.mark.parametrize("path", ["bootstrap", "associated"])
    def test_key_ids_that_no_peer_can_be_told(self, name: str, path: str) -> None:
        world = World(client=PREFER, server=PREFER)
        if path == "associated":
            world.established("bootstrap")
        world.kms[0].cheat = renamed(name)
        client, _ = world.established("pq-only").infos
        assert "IDs that no peer can be told" in str(client.fallback)
        assert world.loose_keys() == []

    def test_one_key_twice(self) -> None:
        world = World(client={"announced_keys": 1})
        world.kms[0].cheat = renamed("the-same")
        assert "IDs that no peer can be told" in str(world.connect().client.error)

    def test_other_keys_than_those_asked_for(self) -> None:
        world = World()
        world.kms[1].cheat = renamed("another")
        conversation = world.connect()
        assert conversation.ends == ("QKDUnavailable kms_unavailable", "QKDUnavailable kms_unavailable")
        assert "other keys than those asked for" in str(conversation.server.error)

    def test_in_another_order(self) -> None:
        world = World(client={"announced_keys": 3})
        world.kms[1].cheat = lambda keys: keys[::-1]
        assert "other keys than those asked for" in str(world.connect().server.error)
        assert world.loose_keys() == []


def test_a_third_partys_accept_may_hold_fewer_keys() -> None:
    """What the server does not hold is wiped at the client; the first key is enough to go on."""
    world = World(client={"announced_keys": 2})
    peer = hand_driven_server(world)
    (sent,) = peer.messages()
    assert isinstance(sent, control.Offer)
    peer.send(control.Accept(SAE_B, 60, (sent.key_ids[0], sent.key_ids[2])))
    first, second, third = world.kms[0].given
    assert (first.used, second.used, third.used) == (True, True, False)
    peer.side.end_of_stream()
    assert third.used
