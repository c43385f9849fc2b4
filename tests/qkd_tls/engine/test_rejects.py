"""Rejections: every code, under both policies, and what a peer that breaks the rules of the control messages gets."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from qkd_tls import control, kems
from qkd_tls.control import Accept, Discover, Identity, KEMOffer, Offer, Reject, RejectCode
from qkd_tls.engine import State
from qkd_tls.errors import QKDError, QKDProtocolError, QKDUnavailable
from qkd_tls.policy import Policy
from tests.support.memory import (
    SAE_A,
    SAE_B,
    Changes,
    Hand,
    World,
    hand_driven_client,
    hand_driven_server,
    only_alerts,
)
from tests.support.scenarios import (
    ASKS_FOR_CERTIFICATE,
    CLASSICAL,
    LONG_WAY,
    PREFER,
    server_kms_fails,
    server_kms_knows_no_such_sae,
    server_kms_lost_the_key,
)

pytestmark = pytest.mark.pure

KEY_ID = "00000000-0000-0000-0000-000000000001"


def offer(**changes: Any) -> dict[str, Any]:
    """An offer as JSON, with members changed; None leaves one out."""
    members = {"type": "offer", "version": 1, "kms": "local", "sae_id": SAE_A, "key_ids": [KEY_ID], **changes}
    return {name: value for name, value in members.items() if value is not None}


def accept(key_ids: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    return {
        "type": "accept",
        "version": 1,
        "sae_id": SAE_B,
        "lifetime": 60,
        "key_ids": key_ids,
        **changes,
    }


# --- the codes that policy decides about


@dataclass(frozen=True)
class Cause:
    """What makes a server reject an offer for want of a QKD key."""

    code: RejectCode
    says: str
    server: Changes = field(default_factory=dict)
    meanwhile: Callable[[World], None] = lambda _world: None

    def world(self, client: Policy, server: Policy, *, pipelined: bool) -> World:
        world = World({"policy": client, "pipelined": pipelined}, {"policy": server, **self.server})
        self.meanwhile(world)
        return world

    def __str__(self) -> str:
        return f"{self.code}: {self.says}"


CAUSES = (
    Cause(RejectCode.KMS_UNAVAILABLE, "local KMS of the server", meanwhile=server_kms_fails),
    Cause(RejectCode.UNKNOWN_KEY, "local KMS of the server", meanwhile=server_kms_lost_the_key),
    Cause(RejectCode.UNKNOWN_SAE, "local KMS of the server", meanwhile=server_kms_knows_no_such_sae),
    Cause(
        RejectCode.UNKNOWN_SAE,
        "SAE 'SAE-A' is not allowed here",
        server={"allowed_peer_sae_ids": frozenset({"SAE-X", "SAE-Y"})},
    ),
    Cause(
        RejectCode.UNSUPPORTED_KMS,
        "no keys of a KMS of kind 'local' here, only of 'etsi-014'",
        server={"kms_protocol": "etsi-014"},
    ),
)


@pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "the long way"])
@pytest.mark.parametrize("cause", CAUSES, ids=str)
class TestNoKey:
    def test_both_prefer(self, cause: Cause, pipelined: bool) -> None:
        world = cause.world(Policy.PREFER, Policy.PREFER, pipelined=pipelined)
        conversation = world.established("pq-only")
        client, server = conversation.infos
        assert client.fallback == f"the server rejected the QKD keys: {cause.code} ({cause.says})"
        assert f"no QKD key for client SAE 'SAE-A': {cause.code}" in str(server.fallback)
        assert (client.alpn, server.alpn) == ("http/1.1", "http/1.1")
        assert (client.key_id, client.path, client.association) == (None, None, None)
        conversation.talk()
        assert world.loose_keys() == []
        assert all(len(store) == 0 for store in world.stores)

    def test_both_require(self, cause: Cause, pipelined: bool) -> None:
        world = cause.world(Policy.REQUIRE, Policy.REQUIRE, pipelined=pipelined)
        conversation = world.connect()
        for error in conversation.errors:
            assert isinstance(error, QKDUnavailable)
            assert error.code == cause.code
            assert error.hint in str(error)
        assert cause.says in str(conversation.errors[0])
        assert world.loose_keys() == []

    def test_only_the_client_requires(self, cause: Cause, pipelined: bool) -> None:
        world = cause.world(Policy.REQUIRE, Policy.PREFER, pipelined=pipelined)
        conversation = world.connect()
        assert conversation.ends == (f"QKDUnavailable {cause.code}", "pq-only")
        # The server goes on alone, and reads that the client has closed.
        assert isinstance(conversation.server.late_error, ssl.SSLZeroReturnError)

    def test_only_the_server_requires(self, cause: Cause, pipelined: bool) -> None:
        world = cause.world(Policy.PREFER, Policy.REQUIRE, pipelined=pipelined)
        conversation = world.connect()
        assert conversation.ends == ("pq-only", f"QKDUnavailable {cause.code}")
        assert isinstance(conversation.client.late_error, ssl.SSLZeroReturnError)


class TestUnsupportedKEM:
    @pytest.mark.parametrize("policy", [Policy.REQUIRE, Policy.PREFER])
    def test_a_kem_that_the_server_does_not_have(
        self, policy: Policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kems, "names", lambda: ("ML-KEM-768",))
        world = World({"policy": policy, "kem": "ML-KEM-1024"}, {"policy": policy})
        end = "pq-only" if policy is Policy.PREFER else "QKDUnavailable unsupported_kem"
        assert world.connect().ends == (end, end)


class TestClientWithoutKey:
    """A client that prefers says so by an offer of a KMS "none"; see docs/protocol.md."""

    def test_a_server_that_requires(self) -> None:
        world = World(client=PREFER)
        world.kms[0].close()
        conversation = world.connect()
        assert conversation.ends == ("pq-only", "QKDUnavailable unsupported_kms")
        assert isinstance(conversation.client.late_error, ssl.SSLZeroReturnError)
        assert "the client has no QKD key to offer" in str(conversation.server.error)
        assert world.kms[1].calls == 0

    def test_a_server_that_requires_and_an_associated_connection(self) -> None:
        """Without qkd-tls/1 in ALPN the server refuses before any handshake; the client names the cause."""
        world = World(client=PREFER)
        world.established("bootstrap")
        world.kms[0].close()
        conversation = world.connect()
        assert conversation.ends == ("QKDUnavailable", "QKDUnavailable")
        assert "this key manager is closed" in str(conversation.client.error)
        assert only_alerts(conversation.flights[-1][1])

    def test_over_a_classical_group(self) -> None:
        """The want of ML-KEM weighs more than that of a QKD key, and policy never gives it up."""
        world = World(PREFER, PREFER, CLASSICAL, CLASSICAL)
        world.kms[0].close()
        assert world.connect().ends == ("QKDProtocolError kem_required", "QKDProtocolError kem_required")


# --- a client that breaks the rules


@pytest.mark.parametrize("policy", [Policy.REQUIRE, Policy.PREFER])
class TestBrokenClient:
    """The server answers with the code, closes with close_notify, and asks no KMS, whatever its policy."""

    @staticmethod
    def rejected(peer: Hand, world: World, code: RejectCode, *, asked: int = 0) -> str:
        error = peer.side.error
        assert isinstance(error, QKDProtocolError)
        assert error.code == code
        *_, reject = peer.messages()
        assert isinstance(reject, Reject)
        assert (reject.code, reject.alpn) == (code, None)
        assert peer.closed()
        assert peer.side.engine.state is State.FAILED
        assert world.kms[1].calls == asked
        assert world.loose_keys() == []
        return reject.detail

    @pytest.mark.parametrize(
        ("frame", "says"),
        [
            (b"\0\0", "not JSON"),
            (b"\0\5hello", "not JSON"),
            (b"\0\2[]", "not a JSON object"),
            (offer(version=None), "version"),
            (offer(version="1"), "version"),
            (offer(type="offers"), "type"),
            (offer(type=None), "type"),
            (offer(kms=None), "kms"),
            (offer(kms=7), "kms"),
            (offer(sae_id="S" * 256), "SAE ID"),
            (offer(key_ids=[]), "key_ids is empty"),
            (offer(key_ids=KEY_ID), "key_ids"),
            (offer(key_ids=[KEY_ID, KEY_ID]), "an entry twice"),
            (offer(key_ids=["a b"]), "key_ids"),
            (offer(pipelined="yes"), "pipelined"),
            (offer(pipelined=True, kem={"name": "ML-KEM-768", "ek": "AAAA"}), "cannot be pipelined"),
            (offer(kem={"name": "ML-KEM-768"}), "ek"),
            (offer(kem={"name": "ML-KEM-768", "ek": "AA"}), "base64"),
            (Identity(SAE_A, ("local",), (), 1), "identity where it does not belong"),
            (accept((KEY_ID,)), "accept where it does not belong"),
            (Reject(RejectCode.BUSY, "", None), "reject where it does not belong"),
        ],
        ids=str,
    )
    def test_malformed(self, policy: Policy, frame: Any, says: str) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world).send(frame)
        assert says in self.rejected(peer, world, RejectCode.MALFORMED)

    def test_bytes_behind_the_offer(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world).send(offer(), b"x")
        assert "bytes after the offer" in self.rejected(peer, world, RejectCode.MALFORMED)

    def test_two_offers(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world).send(offer(), offer())
        assert "bytes after the offer" in self.rejected(peer, world, RejectCode.MALFORMED)

    def test_discover_twice(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world).send(Discover())
        (identity,) = peer.messages()
        assert identity == Identity(SAE_B, ("local",), kems.names(), 64)
        peer.send(Discover())
        assert self.rejected(peer, world, RejectCode.MALFORMED) == "discover where it does not belong"

    def test_discover_twice_at_once(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world).send(Discover(), Discover())
        assert self.rejected(peer, world, RejectCode.MALFORMED) == "discover where it does not belong"

    def test_more_keys_than_the_server_takes(self, policy: Policy) -> None:
        world = World(server={"policy": policy, "max_keys": 2})
        peer = hand_driven_client(world).send(offer(key_ids=["a", "b", "c"]))
        assert self.rejected(peer, world, RejectCode.MALFORMED) == "3 keys offered, at most 2"

    def test_another_version(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world).send(offer(version=2))
        assert "this is version 1" in self.rejected(peer, world, RejectCode.UNSUPPORTED_VERSION)

    def test_no_ml_kem_at_all(self, policy: Policy) -> None:
        world = World(server={"policy": policy}, client_tls=CLASSICAL, server_tls=CLASSICAL)
        peer = hand_driven_client(world).send(offer())
        assert "the group X25519 has no ML-KEM" in self.rejected(peer, world, RejectCode.KEM_REQUIRED)

    def test_an_encapsulation_key_that_is_none(self, policy: Policy) -> None:
        """The server learns it after its KMS has answered; the key is lost."""
        world = World(server={"policy": policy})
        (key,) = world.kms[0].get_keys(SAE_B)
        key.wipe()
        peer = hand_driven_client(world).send(
            Offer("local", SAE_A, (key.key_id,), KEMOffer("ML-KEM-768", bytes(1184 - 1)))
        )
        says = self.rejected(peer, world, RejectCode.MALFORMED, asked=1)
        assert says == "1183 bytes that are no ML-KEM-768 encapsulation key"

    def test_a_frame_in_many_records_is_fine(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world)
        for byte in control.encode(Discover()):
            peer.send(bytes([byte]))
        assert [type(message) for message in peer.messages()] == [Identity]

    def test_the_largest_frame(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        peer = hand_driven_client(world)
        body = b'{"type":"discover","version":1,"more":"' + b"x" * (0xFFFF - 41) + b'"}'
        assert len(body) == 0xFFFF
        peer.send(b"\xff\xff" + body)
        assert [type(message) for message in peer.messages()] == [Identity]

    def test_a_pipelined_offer_without_its_client_hello(self, policy: Policy) -> None:
        world = World(server={"policy": policy})
        world.kms[1].close()
        peer = hand_driven_client(world).send(offer(pipelined=True))
        assert peer.side.engine.state is State.SERVER_SKIP
        assert [type(message) for message in peer.messages()] == [Reject]
        peer.send(b"application data, where a ClientHello must be")
        assert isinstance(peer.side.error, QKDProtocolError)
        assert "a pipelined offer without its ClientHello" in str(peer.side.error)

    def test_an_accepted_offer_without_its_client_hello(self, policy: Policy) -> None:
        """What follows an accept is another TLS connection, and records of the bootstrap are none."""
        world = World(server={"policy": policy})
        keys = world.kms[0].get_keys(SAE_B)
        peer = hand_driven_client(world).send(Offer("local", SAE_A, (keys[0].key_id,)))
        assert [type(message) for message in peer.messages()] == [Accept]
        peer.send(b"application data, where a ClientHello must be")
        assert peer.side.end == "SSLError"
        keys[0].wipe()


class TestClientThatLeaves:
    def test_close_notify_instead_of_an_offer(self) -> None:
        world = World()
        peer = hand_driven_client(world)
        peer.tls.shutdown()
        peer.side.deliver(peer.tls.take())
        assert peer.side.pump().end == "QKDUnavailable"
        assert "without an offer" in str(peer.side.error)

    def test_a_pipelined_offer_is_rejected_and_the_client_is_gone(self) -> None:
        for policy, end in ((Policy.REQUIRE, "QKDUnavailable unknown_key"), (Policy.PREFER, "pq-only")):
            peer = hand_driven_client(World(server={"policy": policy})).send(offer(pipelined=True))
            peer.side.end_of_stream()
            assert peer.side.end == end

    def test_half_a_client_hello_behind_a_rejected_offer(self) -> None:
        peer = hand_driven_client(World(server=PREFER)).send(offer(pipelined=True), after=b"\x16\x03\x01")
        assert peer.side.end == "unfinished"

    def test_an_alert_instead_of_an_offer(self) -> None:
        """A client that does not like the server's certificate may find out late."""
        peer = hand_driven_client(World())
        peer.side.deliver(bytes([23, 3, 3, 0, 20]) + bytes(20))
        assert peer.side.end == "SSLError"


# --- a server that breaks the rules


@pytest.mark.parametrize("policy", [Policy.REQUIRE, Policy.PREFER])
class TestBrokenServer:
    @staticmethod
    def failed(peer: Hand, world: World) -> QKDError:
        error = peer.side.error
        assert isinstance(error, QKDError)
        assert world.loose_keys() == []
        assert len(world.stores[0]) == 0
        assert peer.side.engine._association is None
        return error

    @pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "the long way"])
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"key_ids": ["another"]}, "accept does not name the key"),
            ({"key_ids": []}, "key_ids is empty"),
            ({"sae_id": "SAE-C"}, "the server is SAE 'SAE-C', the keys are for 'SAE-B'"),
            ({"kem": {"ct": "AAAA"}}, "disagree about an explicit KEM"),
            ({"lifetime": 0}, "lifetime"),
            ({"type": "discover"}, "discover where it does not belong"),
            ({"type": "rejected"}, "type is missing or unknown"),
            ({"version": 2}, "another version"),
        ],
        ids=str,
    )
    def test_accept(self, policy: Policy, changes: Changes, says: str, pipelined: bool) -> None:
        world = World(client={"policy": policy, "pipelined": pipelined})
        peer = hand_driven_server(world)
        (sent,) = peer.messages()
        assert isinstance(sent, Offer)
        assert sent.pipelined is pipelined
        association = peer.side.engine._association
        assert (association is not None) is pipelined
        peer.send({**accept(sent.key_ids), **changes})
        error = self.failed(peer, world)
        assert isinstance(error, QKDProtocolError)
        assert says in str(error)
        assert association is None or not any(association.secret)

    def test_a_key_that_was_not_offered(self, policy: Policy) -> None:
        world = World(client={"policy": policy, "announced_keys": 2})
        peer = hand_driven_server(world)
        (sent,) = peer.messages()
        assert isinstance(sent, Offer)
        peer.send(accept((*sent.key_ids, "one-more")))
        assert "accept does not name the key" in str(self.failed(peer, world))

    def test_the_first_key_has_to_be_there(self, policy: Policy) -> None:
        world = World(client={"policy": policy, "announced_keys": 2})
        peer = hand_driven_server(world)
        (sent,) = peer.messages()
        assert isinstance(sent, Offer)
        peer.send(accept(sent.key_ids[1:]))
        assert "accept does not name the key" in str(self.failed(peer, world))

    def test_bytes_behind_accept(self, policy: Policy) -> None:
        world = World(client={"policy": policy})
        peer = hand_driven_server(world)
        (sent,) = peer.messages()
        assert isinstance(sent, Offer)
        peer.send(accept(sent.key_ids), b"x")
        assert "bytes after the control exchange was over" in str(self.failed(peer, world))

    def test_bytes_behind_reject(self, policy: Policy) -> None:
        world = World(client={"policy": policy})
        peer = hand_driven_server(world).send(Reject(RejectCode.BUSY, "", None), b"x")
        assert "bytes after the control exchange was over" in str(self.failed(peer, world))

    @pytest.mark.parametrize("ciphertext", ["AAAA", None])
    def test_a_kem_ciphertext_that_is_none(self, policy: Policy, ciphertext: str | None) -> None:
        world = World(client={"policy": policy, "kem": "ML-KEM-768"})
        peer = hand_driven_server(world)
        (sent,) = peer.messages()
        assert isinstance(sent, Offer)
        peer.send(accept(sent.key_ids, **({"kem": {"ct": ciphertext}} if ciphertext else {})))
        says = "3 bytes that are no ML-KEM-768 ciphertext" if ciphertext else "disagree about an explicit KEM"
        assert says in str(self.failed(peer, world))

    @pytest.mark.parametrize(
        "code", [RejectCode.MALFORMED, RejectCode.KEM_REQUIRED, RejectCode.UNSUPPORTED_VERSION]
    )
    def test_codes_that_end_it_under_every_policy(self, policy: Policy, code: RejectCode) -> None:
        world = World(client={"policy": policy})
        peer = hand_driven_server(world).send(Reject(code, "you are wrong", None))
        error = self.failed(peer, world)
        assert isinstance(error, QKDProtocolError)
        assert error.code == code
        assert "you are wrong" in str(error)
        assert peer.closed()

    @pytest.mark.parametrize("code", [RejectCode.BUSY, "sold_out"])
    def test_codes_that_no_server_of_ours_sends(self, policy: Policy, code: str) -> None:
        """`busy` is reserved; what a client does not know is a rejection all the same."""
        world = World(client={"policy": policy})
        peer = hand_driven_server(world).send(Reject(code, "", "http/1.1"))
        assert world.loose_keys() == []
        if policy is Policy.REQUIRE:
            error = self.failed(peer, world)
            assert isinstance(error, QKDUnavailable)
            assert (error.code, error.peer) == (code, SAE_B)
        else:
            info = peer.side.info
            assert info is not None
            assert info.fallback == f"the server rejected the QKD keys: {code}"
            assert info.alpn == "http/1.1"

    def test_a_protocol_that_was_not_offered(self, policy: Policy) -> None:
        world = World(client={"policy": policy})
        peer = hand_driven_server(world).send(Reject(RejectCode.BUSY, "", "h2"))
        error = self.failed(peer, world)
        assert isinstance(error, QKDProtocolError)
        assert "protocol that was not offered" in str(error)

    def test_identity_where_nobody_asked(self, policy: Policy) -> None:
        world = World(client={"policy": policy})
        peer = hand_driven_server(world).send(Identity(SAE_B, ("local",), (), 1))
        assert "identity where it does not belong" in str(self.failed(peer, world))

    def test_accept_where_nobody_offered(self, policy: Policy) -> None:
        world = World(client={"policy": policy}, peer_sae_id=None)
        peer = hand_driven_server(world).send(accept(("a",)))
        assert "accept where it does not belong" in str(self.failed(peer, world))

    def test_accept_of_an_offer_without_a_key(self, policy: Policy) -> None:
        """A client that prefers has offered the placeholder "none"; nothing can be accepted of that."""
        world = World(client=PREFER)
        world.kms[0].close()
        peer = hand_driven_server(world)
        (sent,) = peer.messages()
        assert isinstance(sent, Offer)
        assert (sent.kms, sent.key_ids) == ("none", ("none",))
        peer.send(accept(sent.key_ids))
        assert "accept does not name the key" in str(self.failed(peer, world))

    def test_a_server_that_is_not_allowed(self, policy: Policy) -> None:
        world = World(
            client={"policy": policy, "allowed_peer_sae_ids": frozenset({"SAE-B"})}, peer_sae_id=None
        )
        peer = hand_driven_server(world).send(Identity("SAE-C", ("local",), (), 1))
        error = self.failed(peer, world)
        assert (error.code, error.peer) == (RejectCode.UNKNOWN_SAE, "SAE-C")
        assert world.kms[0].calls == 0
        peer = hand_driven_server(world).send(Identity("SAE-B", ("local",), (), 1))
        assert [type(message) for message in peer.messages()] == [Discover, Offer]

    def test_close_notify_instead_of_an_answer(self, policy: Policy) -> None:
        world = World(client={"policy": policy})
        peer = hand_driven_server(world)
        peer.tls.shutdown()
        peer.side.deliver(peer.tls.take())
        error = self.failed(peer, world)
        assert isinstance(error, QKDUnavailable)
        assert "before it had answered the offer" in str(error)

    def test_an_alert_instead_of_an_answer(self, policy: Policy) -> None:
        """TLS 1.3: a server that refuses the client's certificate can say so only after its own handshake."""
        world = World(client={"policy": policy}, server_tls=ASKS_FOR_CERTIFICATE)
        conversation = world.connect()
        assert "the server requires a client certificate" in str(conversation.client.error)
        assert "the client has sent none" in str(conversation.server.error)
        assert world.loose_keys() == []

    def test_an_offer_of_many_records(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
        """Encapsulation keys of FrodoKEM have 20,000 bytes and more."""
        large = kems.KEMKey("large", bytes(45_000), MLKEM768PrivateKey.generate())
        monkeypatch.setattr(kems, "generate", lambda _name: large)
        (sent,) = hand_driven_server(World(client={"policy": policy, "kem": "large"})).messages()
        assert isinstance(sent, Offer)
        assert sent.kem == KEMOffer("large", large.encapsulation_key)

    def test_the_long_way_is_the_clients_choice(self, policy: Policy) -> None:
        world = World(client={"policy": policy, **LONG_WAY})
        (sent,) = hand_driven_server(world).messages()
        assert isinstance(sent, Offer)
        assert not sent.pipelined


def test_a_server_that_forces_qkd_on_a_stock_client() -> None:
    """OpenSSL refuses a protocol that was not offered in ALPN."""
    world = World(client={"policy": Policy.OFF, "kms": ""})
    assert hand_driven_server(world).side.end == "SSLError"
