"""Associations and where they are kept: use, end, capacity, threads, and a forked process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from kms_client import KeyAlreadyUsed, QKDKey
from qkd_tls import association as association_module
from qkd_tls import certificate
from qkd_tls.association import Association, AssociationEnded, AssociationStore, KeySpent
from qkd_tls.engine import Event, State
from qkd_tls.hybrid import KDF, PSKIdentity, TagMismatch
from tests.support.memory import HOST, SAE_A, SAE_B, World, pki
from tests.support.scenarios import ASKS_FOR_CERTIFICATE, WITH_CERTIFICATE

pytestmark = pytest.mark.pure

NOW = 1_800_000_000.0


def made(number: int = 1, *, expires_at: float = NOW + 60) -> Association:
    """An association; the same number makes one with the same secret, as the peer has it."""
    return Association(bytearray([number] * 48), SAE_A, SAE_B, HOST, expires_at)


def key(name: str = "key-1", size: int = 32) -> QKDKey:
    return QKDKey(name, b"q" * size)


class TestPSK:
    @pytest.mark.parametrize("kdf", list(KDF))
    def test_both_sides_derive_the_same(self, kdf: KDF) -> None:
        client, server = made(), made()
        theirs = client.psk(key(), kdf)
        server.verify_tag(PSKIdentity.parse(theirs.identity))
        ours = server.psk(key(), kdf, identity=theirs.identity)
        assert (ours.secret, ours.identity, ours.kdf, ours.key_id) == (
            theirs.secret,
            theirs.identity,
            kdf,
            "key-1",
        )
        assert client.id == server.id

    def test_it_uses_the_key_up(self) -> None:
        association, the_key = made(), key()
        association.psk(the_key, KDF.SHA384)
        assert the_key.used
        with pytest.raises(KeyAlreadyUsed):
            association.psk(the_key, KDF.SHA384)

    def test_it_says_whether_the_key_was_announced(self) -> None:
        assert made().psk(key(), KDF.SHA384, announced=True).announced
        assert not made().psk(key(), KDF.SHA384).announced

    def test_a_short_key(self) -> None:
        the_key = key(size=31)
        with pytest.raises(ValueError, match="at least 32 bytes"):
            made().psk(the_key, KDF.SHA384)
        assert the_key.used

    def test_the_key_id_is_spent(self) -> None:
        association = made()
        association.psk(key(), KDF.SHA384)
        with pytest.raises(KeySpent, match="key-1"):
            association.spend("key-1")

    def test_a_tag_of_somebody_else(self) -> None:
        identity = PSKIdentity.parse(made(1).psk(key(), KDF.SHA384).identity)
        with pytest.raises(TagMismatch):
            made(2).verify_tag(identity)


class TestEnd:
    def test_close_wipes_everything(self) -> None:
        association, announced = made(), [key("a"), key("b")]
        association.announce(announced)
        association.close()
        assert all(each.used for each in announced)
        assert not any(association.secret)
        assert association.announced == 0
        assert association.take_announced() is None
        assert not association.usable(NOW)
        association.close()

    def test_a_closed_one_makes_no_psk_and_leaves_the_key_unused(self) -> None:
        """A PSK of a wiped secret would have zeros where X25519 and ML-KEM belong."""
        association, the_key = made(), key()
        association.close()
        with pytest.raises(AssociationEnded):
            association.psk(the_key, KDF.SHA384)
        assert not the_key.used

    def test_a_closed_one_verifies_no_tag(self) -> None:
        association = made()
        identity = PSKIdentity.parse(association.psk(key(), KDF.SHA384).identity)
        association.verify_tag(identity)
        association.close()
        with pytest.raises(AssociationEnded):
            association.verify_tag(identity)

    def test_a_closed_one_wipes_what_is_announced_to_it(self) -> None:
        association, announced = made(), [key("a"), key("b")]
        association.close()
        association.announce(announced)
        assert all(each.used for each in announced)
        assert association.announced == 0

    def test_expiry(self) -> None:
        association = made(expires_at=NOW)
        assert association.usable(NOW - 0.001)
        assert not association.usable(NOW)

    def test_number_of_connections(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(association_module, "MAX_CONNECTIONS", 2)
        association = made()
        association.spend("a")
        assert association.usable(NOW)
        association.spend("b")
        assert not association.usable(NOW)

    def test_repr_tells_no_secret(self) -> None:
        association = made(0xAB)
        association.announce([key("announced-key")])
        for secret in ("ab", "\\xab", "qqq", "announced-key"):
            assert secret not in repr(association)


class TestExpiry:
    """min(lifetime, the peer certificate's notAfter), on each side for its own peer."""

    @staticmethod
    def ends(world: World) -> tuple[float, float]:
        world.established("bootstrap")
        return world.association(0).expires_at, world.association(1).expires_at

    def test_the_lifetime_comes_first(self) -> None:
        world = World(server={"lifetime": 100}, client={"lifetime": 1000})
        client, server = self.ends(world)
        # The server grants whole seconds.
        assert server == world.now + 100
        assert world.now + 99 <= client <= world.now + 100

    def test_the_client_may_want_less_than_the_server_grants(self) -> None:
        world = World(server={"lifetime": 100}, client={"lifetime": 10})
        assert self.ends(world) == (world.now + 10, world.now + 100)

    def test_the_servers_certificate_ends_before_the_lifetime(self) -> None:
        end = certificate.not_after(pki().server.chain[0])
        world = World(now=end - 50, server={"lifetime": 1000})
        client, server = self.ends(world)
        assert client == end
        assert server == world.now + 1000

    def test_the_clients_certificate_ends_before_the_lifetime(self) -> None:
        end = certificate.not_after(pki().client.chain[0])
        world = World(
            now=end - 50,
            server={"lifetime": 1000},
            client_tls=WITH_CERTIFICATE,
            server_tls=ASKS_FOR_CERTIFICATE,
        )
        client, server = self.ends(world)
        assert server == end
        assert client <= end

    def test_a_certificate_that_ends_at_once(self) -> None:
        """The clock of the association and OpenSSL's may differ; accept grants at least a second."""
        end = certificate.not_after(pki().server.chain[0])
        world = World(now=end + 10)
        world.established("bootstrap")
        world.established("bootstrap")


class TestAnnouncedKeys:
    def test_the_client_takes_the_oldest(self) -> None:
        association = made()
        association.announce([key("a"), key("b")])
        association.announce([key("c")])
        taken = [association.take_announced() for _ in range(4)]
        assert [each.key_id if each else None for each in taken] == ["a", "b", "c", None]

    def test_the_server_takes_the_one_that_is_named(self) -> None:
        association = made()
        association.announce([key("a"), key("b")])
        found = association.spend("b")
        assert found is not None
        assert found.key_id == "b"
        assert association.spend("other") is None
        assert association.announced == 1


class TestServersStore:
    """Found by the ID that a ClientHello names."""

    def test_found_and_not_found(self) -> None:
        store, association = AssociationStore(), made()
        store.add(association)
        assert store.by_id(association.id, NOW) is association
        assert store.by_id(bytes(16), NOW) is None
        assert len(store) == 1

    def test_one_that_has_expired_is_dropped_and_wiped(self) -> None:
        store, association = AssociationStore(), made()
        store.add(association)
        assert store.by_id(association.id, NOW + 60) is None
        assert len(store) == 0
        assert not any(association.secret)

    def test_the_least_recently_used_goes_first(self) -> None:
        store = AssociationStore(capacity=3)
        first, second, third, fourth = (made(number) for number in range(1, 5))
        for association in (first, second, third):
            store.add(association)
        assert store.by_id(first.id, NOW) is first
        store.add(fourth)
        assert store.by_id(second.id, NOW) is None
        assert not any(second.secret)
        assert [store.by_id(each.id, NOW) for each in (first, third, fourth)] == [first, third, fourth]

    def test_discard_and_clear(self) -> None:
        store = AssociationStore()
        associations = [made(number) for number in range(1, 4)]
        for association in associations:
            store.add(association)
        store.discard(associations[0])
        assert len(store) == 2
        store.discard(associations[0])
        store.clear()
        assert len(store) == 0
        assert not any(any(association.secret) for association in associations)

    def test_one_of_the_same_id_is_not_mistaken_for_it(self) -> None:
        store, kept, other = AssociationStore(), made(), made()
        store.add(kept)
        store.discard(other)
        assert not any(other.secret)
        assert store.by_id(kept.id, NOW) is kept


class TestClientsStore:
    """Found by scope."""

    def test_only_in_its_own_scope(self) -> None:
        store, association = AssociationStore(), made()
        store.add(association, "scope")
        assert store.by_scope("scope", NOW) is association
        assert store.by_scope("another", NOW) is None

    def test_a_new_one_takes_the_place_of_the_old(self) -> None:
        store, old, new = AssociationStore(), made(1), made(2)
        store.add(old, "scope")
        store.add(new, "scope")
        assert store.by_scope("scope", NOW) is new
        assert not any(old.secret)
        assert len(store) == 1

    def test_announced_keys_are_kept_until_they_are_used(self) -> None:
        """Threads that start together make one association each; none of the keys they announce is lost."""
        store, first, second = AssociationStore(), made(1), made(2)
        first.announce([key("a")])
        second.announce([key("b")])
        store.add(first, "scope")
        store.add(second, "scope")
        assert len(store) == 2
        taken = set()
        for _ in range(2):
            association = store.by_scope("scope", NOW)
            assert association is not None
            announced = association.take_announced()
            assert announced is not None
            taken.add(announced.key_id)
        assert taken == {"a", "b"}
        assert store.by_scope("scope", NOW) in (first, second)

    def test_one_without_announced_keys_gives_way_to_one_with_them(self) -> None:
        store, with_key, without = AssociationStore(), made(1), made(2)
        with_key.announce([key("a")])
        store.add(with_key, "scope")
        store.add(without, "scope")
        assert store.by_scope("scope", NOW) is with_key
        with_key.take_announced()
        third = made(3)
        store.add(third, "scope")
        assert store.by_scope("scope", NOW) is third
        assert len(store) == 1

    def test_the_expired_are_dropped(self) -> None:
        store, short, long = AssociationStore(), made(1, expires_at=NOW + 1), made(2)
        short.announce([key("a")])
        store.add(short, "scope")
        store.add(long, "scope")
        assert store.by_scope("scope", NOW + 2) is long
        assert len(store) == 1
        assert store.by_scope("scope", NOW + 100) is None
        assert len(store) == 0
        assert store.by_scope("scope", NOW) is None

    @pytest.mark.parametrize(
        "what", ["host name", "trust store", "client certificate", "peer SAE", "own SAE"]
    )
    def test_what_has_to_be_equal_for_reuse(self, what: str) -> None:
        world = World(server_tls={"trusted": (pki().ca,), "verify_mode": 1}, client_tls=WITH_CERTIFICATE)
        world.established("bootstrap")
        world.established("associated")
        match what:
            case "host name":
                world.host = "127.0.0.1"
            case "trust store":
                world.client_tls |= {"trusted": (pki().ca, pki().server.chain[0])}
            case "client certificate":
                world.client_tls = {}
            case "peer SAE":
                world.peer_sae_id = None
            case "own SAE":
                world.client |= {"sae_id": "SAE-A2"}
        conversation = world.connect()
        assert conversation.client.engine.steps[0] == (State.CLIENT_START, Event.NO_KEY_NEEDED)
        # The KMSs here know the client by its first name only.
        assert conversation.ends[0] == ("QKDUnavailable unknown_sae" if what == "own SAE" else "bootstrap")

    def test_the_port_is_part_of_the_scope(self) -> None:
        world = World()
        world.established("bootstrap")
        client = world.new_client()
        client.engine._server_port = 8443  # type: ignore[attr-defined]
        assert world.stores[0].by_scope(client.engine._scope, world.now) is None  # type: ignore[attr-defined]


def run_in_threads(number: int, work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(which: int) -> None:
        try:
            work(which)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class TestThreads:
    def test_a_key_is_spent_once(self) -> None:
        association = made()
        association.announce([key(f"key-{number}") for number in range(200)])
        spent: list[str] = []

        def spend_all(_: int) -> None:
            for number in range(200):
                try:
                    if association.spend(f"key-{number}") is not None:
                        spent.append(f"key-{number}")
                except KeySpent:
                    pass

        run_in_threads(8, spend_all)
        assert sorted(spent) == sorted({f"key-{number}" for number in range(200)})

    def test_bootstraps_at_once(self) -> None:
        """Each thread makes an association and announces keys; every key is used, and none twice."""
        world = World(client={"announced_keys": 3})
        barrier = threading.Barrier(4)
        infos = []

        def connect(_: int) -> None:
            barrier.wait()
            for _ in range(4):
                infos.append(world.connect().infos[0])

        run_in_threads(4, connect)
        assert len({info.key_id for info in infos}) == 16
        bootstraps = sum(info.path == "bootstrap" for info in infos)
        announced = sum(info.announced for info in infos)
        # Whoever was first may have served others before they began.
        assert 1 <= bootstraps <= 4
        assert announced > 0
        while world.stores[0].by_scope(world.new_client().engine._scope, world.now).announced:  # type: ignore[attr-defined, union-attr]
            world.connect().infos  # noqa: B018
        world.restart()
        assert world.loose_keys() == []

    def test_close_while_others_use_it(self) -> None:
        """Either a whole PSK or AssociationEnded; never one of a half-wiped secret."""
        reference = made().psk(key(), KDF.SHA384, identity=b"identity").secret
        for _ in range(50):
            assert set(self.outcomes(made())) <= {"ended", bytes(reference)}

    @staticmethod
    def outcomes(association: Association) -> list[str | bytes]:
        found: list[str | bytes] = []

        def use(which: int) -> None:
            if which == 0:
                association.close()
                return
            try:
                found.append(bytes(association.psk(key(), KDF.SHA384, identity=b"identity").secret))
            except AssociationEnded:
                found.append("ended")

        run_in_threads(3, use)
        return found


class TestFork:
    def test_a_child_starts_with_none(self) -> None:
        """The parent goes on with its associations; a key announced there must not be used in two processes."""
        store, association = AssociationStore(), made()
        association.announce([key("a")])
        store.add(association, "scope")
        with store._lock:
            pid = os.fork()
            if pid == 0:
                # Neither a lock that another thread held nor an association comes along.
                found = store.by_id(association.id, NOW) or store.by_scope("scope", NOW)
                store.add(made(2), "scope")
                os._exit(0 if found is None and len(store) == 1 else 1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert store.by_scope("scope", NOW) is association
        assert association.announced == 1

    def test_what_the_child_does_at_first(self) -> None:
        """The same in this process, where it can be looked at."""
        store, association = AssociationStore(), made()
        store.add(association, "scope")
        store.forget()
        assert len(store) == 0
        assert store.by_scope("scope", NOW) is None
        # The parent's, not the child's to wipe.
        assert any(association.secret)
