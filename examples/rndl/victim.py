"""A client that takes part in real connections, keeps its ephemeral secrets, and hands them over later."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.x509.verification import PolicyBuilder, Store

from rndl import wire
from rndl.handshake import Handshake
from rndl.hybrid import ALPN_NAME, EXPORTER_LABEL, Association, frame, read_frames
from rndl.tls13 import KeySchedule, TrafficKeys

__all__ = ["Client", "EphemeralSecrets", "HybridClient", "QKDKeyMaterial", "connect_hybrid"]

SUITE = 0x1302  # TLS_AES_256_GCM_SHA384


@dataclass(frozen=True, repr=False)
class EphemeralSecrets:
    """The private keys of one ClientHello's key share."""

    x25519: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    ml_kem: MLKEM768PrivateKey | None = None

    @classmethod
    def for_group(cls, group: int) -> EphemeralSecrets:
        """Generate new private keys for a group."""
        return cls(ml_kem=MLKEM768PrivateKey.generate() if group == wire.X25519MLKEM768 else None)

    @property
    def share(self) -> bytes:
        """The client's key share: ML-KEM's encapsulation key, if any, and then X25519's public key."""
        ml_kem = self.ml_kem.public_key().public_bytes_raw() if self.ml_kem else b""
        return ml_kem + self.x25519.public_key().public_bytes_raw()

    def shared_secret(self, server_share: bytes) -> bytes:
        """Return ML-KEM's secret, if any, and then X25519's."""
        ml_kem = self.ml_kem.decapsulate(server_share[:-32]) if self.ml_kem else b""
        return ml_kem + self.x25519.exchange(X25519PublicKey.from_public_bytes(server_share[-32:]))


class Client:
    """The client of one TLS 1.3 connection over a transport that may carry another one before and after.

    Args:
        transport: connected; read record by record, so that what follows this connection is left on it.
        server_name: host name, which the certificate must have.
        ca: the CA that must have issued the certificate.
        group: of the key exchange, `X25519` or `X25519MLKEM768`; no other is offered.
        alpn: protocols, the preferred one first.
        psk: identity and external PSK of SHA-384, if there is one; without it, certificates are used.
    """

    def __init__(
        self,
        transport: socket.socket,
        *,
        server_name: str,
        ca: x509.Certificate,
        group: int = wire.X25519MLKEM768,
        alpn: Sequence[str] = ("http/1.1",),
        psk: tuple[bytes, bytes] | None = None,
    ) -> None:
        self._transport = transport
        self._server_name = server_name
        self._ca = ca
        self._psk = psk
        self._inbound = wire.Inbound(wire.record_source(self._read))
        self.ephemeral = EphemeralSecrets.for_group(group)
        self._hello = self._client_hello(group, alpn)
        self._keys: TrafficKeys | None = None
        self._handshake: Handshake | None = None

    @property
    def handshake(self) -> Handshake:
        """The computed handshake."""
        assert self._handshake is not None, "there was no handshake yet"
        return self._handshake

    def connect(self) -> Handshake:
        """Run the handshake."""
        self.send_hello()
        return self.finish()

    def send_hello(self) -> None:
        """Send the first flight."""
        self._transport.sendall(b"\x16\x03\x01" + wire.vector(2, self._hello))

    def finish(self) -> Handshake:
        """Finish the handshake after the first flight.

        Raises:
            Ended, CannotDecrypt, Forged: it failed.
            ssl errors of `cryptography.x509.verification`: the certificate does not match the server name.
        """
        server_hello = self._inbound.message()
        (share,) = wire.parse_server_hello(server_hello).key_shares.values()
        handshake = self._handshake = Handshake(
            self._hello,
            server_hello,
            shared_secret=self.ephemeral.shared_secret(share),
            psk=self._psk[1] if self._psk else None,
        )
        handshake.read_server_flight(self._inbound)
        if handshake.psk_taken != (self._psk is not None):
            raise wire.Ended("the server did not take the PSK")
        if not handshake.psk_taken:
            self._check_certificate(handshake.certificates["server"])
        finished = handshake.client_finished()
        keys = handshake.keys("CLIENT_HANDSHAKE_TRAFFIC_SECRET")
        self._transport.sendall(keys.seal(wire.HANDSHAKE, finished))
        self._keys = handshake.keys("CLIENT_TRAFFIC_SECRET_0")
        return handshake

    def send(self, data: bytes) -> None:
        """Send application data, at most 16,384 bytes."""
        assert self._keys is not None, "there was no handshake yet"
        self._transport.sendall(self._keys.seal(wire.APPLICATION_DATA, data))

    def receive(self) -> bytes:
        """Return the next record's application data."""
        return self._inbound.data()

    def receive_all(self) -> bytes:
        """Return all application data until the server ends its stream."""
        return self._inbound.all_data()

    def close(self) -> None:
        """Send close_notify and close the transport."""
        assert self._keys is not None, "there was no handshake yet"
        self._transport.sendall(self._keys.seal(wire.ALERT, b"\x01\x00"))
        self._transport.close()

    def _client_hello(self, group: int, alpn: Sequence[str]) -> bytes:
        identity, secret = self._psk or (None, b"")
        hello = wire.client_hello(
            random=os.urandom(32),
            server_name=self._server_name,
            alpn=alpn,
            suites=[SUITE],
            group=group,
            share=self.ephemeral.share,
            psk_identity=identity,
            binder_length=48,
        )
        if identity is None:
            return hello
        offered = wire.parse_client_hello(hello).psk
        assert offered is not None
        binder = KeySchedule("sha384", secret).binder(hello[: offered.binder_offset])
        return hello[: -len(binder)] + binder

    def _check_certificate(self, chain: list[x509.Certificate]) -> None:
        policy = PolicyBuilder().store(Store([self._ca]))
        policy.build_server_verifier(x509.DNSName(self._server_name)).verify(chain[0], chain[1:])

    def _read(self, size: int) -> bytes:
        received = b""
        while len(received) < size and (chunk := self._transport.recv(size - len(received))):
            received += chunk
        return received


@dataclass(frozen=True)
class QKDKeyMaterial:
    """A QKD key as its KME delivered it."""

    key_id: str
    secret: bytes = field(repr=False)


@dataclass
class HybridClient:
    """A connection of qkd-tls/1, and the client's association and secrets.

    `bootstrap` is None on an associated connection.
    """

    association: Association
    hybrid: Client
    bootstrap: Client | None = None

    @property
    def ephemeral(self) -> list[EphemeralSecrets]:
        """The secrets of its one or two handshakes."""
        return [client.ephemeral for client in (self.bootstrap, self.hybrid) if client]


def connect_hybrid(
    transport: socket.socket,
    key: QKDKeyMaterial,
    *,
    server_name: str,
    ca: x509.Certificate,
    client_sae: str = "SAE-A",
    server_sae: str = "SAE-B",
    association: Association | None = None,
    pipelined: bool = False,
) -> HybridClient:
    """Connect with a QKD key, after a bootstrap unless there is an association.

    Args:
        transport: connected.
        key: for this connection.
        server_name: host name.
        ca: of the server's certificate.
        client_sae: SAE ID of this side.
        server_sae: SAE ID of the server.
        association: of an earlier connection.
        pipelined: send the second ClientHello right behind the offer.
    """
    protocols = (ALPN_NAME, "http/1.1")
    bootstrap = None
    if association is None:
        bootstrap = Client(transport, server_name=server_name, ca=ca, alpn=protocols)
        if bootstrap.connect().alpn != ALPN_NAME:
            raise wire.Ended("the server does not speak qkd-tls/1")
        exported = bootstrap.handshake.schedule.export(EXPORTER_LABEL, b"", 48)
        association = Association.made(exported, client_sae, server_sae)
    identity = association.identity(key.key_id)
    psk = association.psk(identity, key.secret)
    hybrid = Client(transport, server_name=server_name, ca=ca, alpn=protocols, psk=(identity, psk))
    offer = {"type": "offer", "kms": "etsi-014", "sae_id": client_sae, "key_ids": [key.key_id]}
    if bootstrap is not None:
        bootstrap.send(frame({**offer, "pipelined": pipelined}))
    if pipelined or bootstrap is None:
        hybrid.send_hello()
    if bootstrap is not None:
        (answer,) = read_frames(bootstrap.receive())
        if answer["type"] != "accept" or answer["sae_id"] != server_sae:
            raise wire.Ended(f"the server answered the offer with {answer}")
        if not pipelined:
            hybrid.send_hello()
    hybrid.finish()
    return HybridClient(association, hybrid, bootstrap)
