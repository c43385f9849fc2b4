"""All kinds of connections between two sites, with what has to come of them.

The tests run each of them with whole flights and in pieces, cut at any byte, and with bytes changed.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from kms_client import KMSTimeout, NoKeysLeft, QKDKey, UnknownKey, UnknownSAE
from qkd_tls.hybrid import KDF
from qkd_tls.openssl import DEFAULT_CIPHER_SUITES
from qkd_tls.policy import Policy
from tests.support.memory import HOST, HYBRID_GROUP, SAE_B, Changes, Conversation, World, pki


@dataclass(frozen=True)
class Scenario:
    """A connection, with a bootstrap before it if it is `associated`; `meanwhile` says what happens in between."""

    name: str
    client_ends: str
    server_ends: str = ""
    """As the client, unless said."""
    round_trips: float | None = None
    client: Changes = field(default_factory=dict)
    server: Changes = field(default_factory=dict)
    client_tls: Changes = field(default_factory=dict)
    server_tls: Changes = field(default_factory=dict)
    host: str | None = HOST
    peer_sae_id: str | None = SAE_B
    associated: bool = False
    meanwhile: Callable[[World], None] = lambda _world: None

    @property
    def ends(self) -> tuple[str, str]:
        return self.client_ends, self.server_ends or self.client_ends

    def world(self) -> World:
        return World(
            dict(self.client),
            dict(self.server),
            dict(self.client_tls),
            dict(self.server_tls),
            self.host,
            self.peer_sae_id,
        )

    def begin(self, world: World) -> Conversation:
        """The connection, with nothing delivered yet. A world may be used again and again."""
        for kms in world.kms:
            kms.behave()
        if not (self.associated and self._still_associated(world)):
            world.restart()
            if self.associated:
                world.established("bootstrap")
        self.meanwhile(world)
        return world.conversation()

    def _still_associated(self, world: World) -> bool:
        if not len(world.stores[0]) == len(world.stores[1]) == 1:
            return False
        client, server = world.association(0), world.association(1)
        return (
            client.id == server.id
            and client.usable(world.now)
            and server.usable(world.now)
            and (client.announced > 0 or not self.client.get("announced_keys"))
        )

    def __str__(self) -> str:
        return self.name


PREFER: Changes = {"policy": Policy.PREFER}
OFF: Changes = {"policy": Policy.OFF, "kms": "", "kms_protocol": "", "sae_id": ""}
LONG_WAY: Changes = {"pipelined": False}
SECOND_CHOICE: Changes = {"groups": ("X25519", HYBRID_GROUP)}
"""The client's key share is one that the server does not take: HelloRetryRequest."""
CLASSICAL: Changes = {"groups": ("X25519",)}
BY_NAME: Changes = {"chooses_by_name": True}
SHA256: Changes = {"kdf": KDF.SHA256}
SHA256_FIRST: Changes = {"cipher_suites": DEFAULT_CIPHER_SUITES[KDF.SHA256]}
WITH_CERTIFICATE: Changes = {"credentials": pki().client}
ASKS_FOR_CERTIFICATE: Changes = {"trusted": (pki().ca,), "verify_mode": ssl.CERT_REQUIRED}


def client_kms_fails(world: World) -> None:
    world.kms[0].fail(NoKeysLeft("no keys", kms=world.kms[0].name, peer=SAE_B))


def server_kms_fails(world: World) -> None:
    world.kms[1].fail(KMSTimeout("no answer", kms=world.kms[1].name))


def server_kms_lost_the_key(world: World) -> None:
    world.kms[1].fail(UnknownKey("no such key", kms=world.kms[1].name), times=1)


def server_kms_knows_no_such_sae(world: World) -> None:
    world.kms[1].fail(UnknownSAE("no such SAE", kms=world.kms[1].name))


def server_restarts(world: World) -> None:
    world.stores[1].clear()


def association_ends_during_the_fetch(world: World) -> None:
    def cheat(keys: list[QKDKey]) -> list[QKDKey]:
        world.stores[0].clear()
        return keys

    world.kms[0].cheat = cheat


def server_gets_another_key(world: World) -> None:
    world.kms[1].cheat = lambda keys: [QKDKey(key.key_id, bytes(32)) for key in keys]


def server_forgets_what_it_accepts(world: World) -> None:
    world.stores[1]._capacity = 0


SCENARIOS = (
    Scenario("bootstrap", "bootstrap", round_trips=2),
    Scenario("bootstrap the long way", "bootstrap", round_trips=3, client=LONG_WAY),
    Scenario("bootstrap with discover", "bootstrap", round_trips=4, peer_sae_id=None),
    Scenario("bootstrap with ML-KEM-768", "bootstrap", round_trips=3, client={"kem": "ML-KEM-768"}),
    Scenario("bootstrap with ML-KEM-1024", "bootstrap", round_trips=3, client={"kem": "ML-KEM-1024"}),
    Scenario(
        "bootstrap over a classical group",
        "bootstrap",
        round_trips=3,
        client_tls=CLASSICAL,
        server_tls=CLASSICAL,
    ),
    Scenario("bootstrap with announced keys", "bootstrap", round_trips=2, client={"announced_keys": 3}),
    Scenario("bootstrap with SHA-256", "bootstrap", round_trips=2, client=SHA256, client_tls=SHA256_FIRST),
    Scenario(
        "bootstrap with mutual TLS",
        "bootstrap",
        round_trips=2,
        client_tls=WITH_CERTIFICATE,
        server_tls=ASKS_FOR_CERTIFICATE,
    ),
    Scenario("bootstrap with HelloRetryRequests", "bootstrap", round_trips=4, client_tls=SECOND_CHOICE),
    Scenario("bootstrap with a context chosen by name", "bootstrap", round_trips=2, server=BY_NAME),
    Scenario("bootstrap to an IP address", "bootstrap", round_trips=2, host="127.0.0.1"),
    Scenario("bootstrap without a host name", "bootstrap", round_trips=2, host=None),
    Scenario("bootstrap without a common ALPN", "bootstrap", round_trips=2, client={"alpn": ("h2",)}),
    Scenario("bootstrap without ALPN", "bootstrap", round_trips=2, client={"alpn": ()}),
    Scenario("associated", "associated", round_trips=1, associated=True),
    Scenario(
        "associated, announced key",
        "associated",
        round_trips=1,
        client={"announced_keys": 3},
        associated=True,
    ),
    Scenario(
        "associated with a context chosen by name",
        "associated",
        round_trips=1,
        server=BY_NAME,
        associated=True,
    ),
    Scenario(
        "associated with SHA-256",
        "associated",
        round_trips=1,
        client=SHA256,
        client_tls=SHA256_FIRST,
        associated=True,
    ),
    Scenario(
        "associated over a classical group",
        "associated",
        round_trips=1,
        client_tls=CLASSICAL,
        server_tls=CLASSICAL,
        associated=True,
    ),
    Scenario(
        "associated with mutual TLS",
        "associated",
        round_trips=1,
        client_tls=WITH_CERTIFICATE,
        server_tls=ASKS_FOR_CERTIFICATE,
        associated=True,
    ),
    Scenario(
        "associated with HelloRetryRequest",
        "associated",
        round_trips=2,
        client_tls=SECOND_CHOICE,
        associated=True,
    ),
    Scenario("associated to an IP address", "associated", round_trips=1, host="127.0.0.1", associated=True),
    Scenario("associated without a host name", "associated", round_trips=1, host=None, associated=True),
    Scenario(
        "the server was restarted", "bootstrap", round_trips=2, associated=True, meanwhile=server_restarts
    ),
    Scenario(
        "the server's KMS lost the key",
        "bootstrap",
        round_trips=2,
        associated=True,
        meanwhile=server_kms_lost_the_key,
    ),
    Scenario(
        "the association ends while the client's KMS is asked",
        "bootstrap",
        round_trips=2,
        associated=True,
        meanwhile=association_ends_during_the_fetch,
    ),
    Scenario("no QKD at either end", "pq-only", round_trips=1, client=OFF, server=OFF),
    Scenario("a client that prefers, a stock server", "pq-only", round_trips=1, client=PREFER, server=OFF),
    Scenario("a stock client, a server that prefers", "pq-only", round_trips=1, client=OFF, server=PREFER),
    Scenario(
        "stock peers over a classical group",
        "classical",
        round_trips=1,
        client=OFF,
        server=OFF,
        client_tls=CLASSICAL,
        server_tls=CLASSICAL,
    ),
    Scenario(
        "both prefer, the client's KMS fails",
        "pq-only",
        round_trips=2,
        client=PREFER,
        server=PREFER,
        meanwhile=client_kms_fails,
    ),
    Scenario(
        "both prefer, the client's KMS fails after discover",
        "pq-only",
        round_trips=3,
        client=PREFER,
        server=PREFER,
        peer_sae_id=None,
        meanwhile=client_kms_fails,
    ),
    Scenario(
        "both prefer, the client's KMS fails before an associated connection",
        "pq-only",
        round_trips=1,
        client=PREFER,
        server=PREFER,
        associated=True,
        meanwhile=client_kms_fails,
    ),
    Scenario(
        "both prefer, the server's KMS fails",
        "pq-only",
        round_trips=2,
        client=PREFER,
        server=PREFER,
        meanwhile=server_kms_fails,
    ),
    Scenario(
        "both prefer, the server's KMS fails, the long way",
        "pq-only",
        round_trips=2,
        client={**PREFER, **LONG_WAY},
        server=PREFER,
        meanwhile=server_kms_fails,
    ),
    Scenario(
        "both prefer, the server's KMS fails before an associated connection",
        "pq-only",
        round_trips=2,
        client=PREFER,
        server=PREFER,
        associated=True,
        meanwhile=server_kms_fails,
    ),
    Scenario(
        "both prefer, the server does not allow the client's SAE",
        "pq-only",
        round_trips=2,
        client=PREFER,
        server={**PREFER, "allowed_peer_sae_ids": frozenset({"SAE-X"})},
    ),
    Scenario("the client's KMS fails", "QKDUnavailable", meanwhile=client_kms_fails),
    Scenario(
        "the client's KMS fails before an associated connection",
        "QKDUnavailable",
        "SSLEOFError",
        associated=True,
        meanwhile=client_kms_fails,
    ),
    Scenario("the server's KMS fails", "QKDUnavailable kms_unavailable", meanwhile=server_kms_fails),
    Scenario(
        "the server's KMS fails, the long way",
        "QKDUnavailable kms_unavailable",
        client=LONG_WAY,
        meanwhile=server_kms_fails,
    ),
    Scenario(
        "the server's KMS does not know the client's SAE",
        "QKDUnavailable unknown_sae",
        meanwhile=server_kms_knows_no_such_sae,
    ),
    Scenario("a client that requires, a stock server", "QKDUnavailable", "pq-only", server=OFF),
    Scenario("a stock client, a server that requires", "QKDUnavailable", client=OFF),
    Scenario("different keys for one ID", "QKDKeyMismatch", meanwhile=server_gets_another_key),
    Scenario(
        "different keys for one ID, associated",
        "QKDKeyMismatch",
        associated=True,
        meanwhile=server_gets_another_key,
    ),
    Scenario("an untrusted server", "SSLCertVerificationError", "SSLError", client_tls={"trusted": ()}),
    Scenario("a server of another name", "SSLCertVerificationError", "SSLError", host="other.example"),
    Scenario("a client without a certificate", "SSLError", server_tls=ASKS_FOR_CERTIFICATE),
    Scenario("no group in common", "SSLError", client_tls=CLASSICAL),
)


def scenario(name: str) -> Scenario:
    """The scenario of this name."""
    (found,) = (each for each in SCENARIOS if each.name == name)
    return found
