"""An attacker who records now and decrypts later: recordings, and what the known secrets open in them."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from rndl import wire
from rndl.handshake import Handshake, binder_fits
from rndl.hybrid import ALPN_NAME, EXPORTER_LABEL, Association, identity_parts, read_frames
from rndl.tls13 import CannotDecrypt
from rndl.victim import EphemeralSecrets

__all__ = ["ML_KEM", "X25519", "Eavesdropper", "FutureComputer", "Opened", "Recording", "Sealed"]

X25519, ML_KEM = "X25519", "ML-KEM-768"


@dataclass
class Recording:
    """The bytes of one connection, each direction; `pieces` has them with their sender, in the order they came."""

    client: bytes = field(default=b"", repr=False)
    server: bytes = field(default=b"", repr=False)
    pieces: list[tuple[str, bytes]] = field(default_factory=list, repr=False)

    def handshakes(self) -> list[Recording]:
        """Return one recording for each TLS connection; each begins with a hello in the clear."""
        clients = _cut_at_hellos(self.client, wire.CLIENT_HELLO)
        servers = _cut_at_hellos(self.server, wire.SERVER_HELLO)
        return [Recording(*both) for both in zip(clients, servers, strict=True)]


class FutureComputer:
    """A computer that finds a key exchange's secret from its public values, if it can break the algorithm.

    There is no such computer. This one is told the clients' ephemeral secrets instead, and finds the one that
    belongs to a public value on the wire. It breaks one connection at a time, as the real one would.

    Args:
        breaks: the algorithms it can break: `X25519`, `ML_KEM`, both or none.
        told: the ephemeral secrets that the clients have handed over.
    """

    def __init__(self, breaks: Collection[str], told: Iterable[EphemeralSecrets]) -> None:
        told = list(told)
        self._x25519 = {one.x25519.public_key().public_bytes_raw(): one.x25519 for one in told}
        self._ml_kem = {one.ml_kem.public_key().public_bytes_raw(): one.ml_kem for one in told if one.ml_kem}
        if X25519 not in breaks:
            self._x25519.clear()
        if ML_KEM not in breaks:
            self._ml_kem.clear()

    def x25519(self, client_public: bytes, server_public: bytes) -> bytes | None:
        """Return the shared secret of two public keys, or None."""
        private = self._x25519.get(client_public)
        return private.exchange(X25519PublicKey.from_public_bytes(server_public)) if private else None

    def ml_kem(self, encapsulation_key: bytes, ciphertext: bytes) -> bytes | None:
        """Return the secret in a ciphertext, or None."""
        private = self._ml_kem.get(encapsulation_key)
        return private.decapsulate(ciphertext) if private else None


@dataclass
class Opened:
    """A TLS connection that was read, with the data of both directions."""

    handshake: Handshake
    client_data: bytes
    server_data: bytes
    association: Association | None = None
    """The association made by this connection, if it is a bootstrap."""


@dataclass
class Sealed:
    """A TLS connection that was not read.

    `missing` names the unknown secrets; `binder_fits` says whether the PSK is known (None: there was no PSK).
    """

    missing: list[str]
    binder_fits: bool | None = None


class Eavesdropper:
    """An attacker who reads recordings with every secret that is known.

    Every connection is tried before it counts as closed: zeros stand in for an unknown secret, and the first
    record that they do not open ends the attempt.

    Args:
        computer: breaks the key exchanges.
        qkd_keys: QKD keys, without their IDs; the binder of a ClientHello tells which fits.
        associations: those known from elsewhere; those of bootstraps that are read are added to them.
    """

    def __init__(
        self,
        computer: FutureComputer,
        qkd_keys: Iterable[bytes] = (),
        associations: Iterable[Association] = (),
    ) -> None:
        self._computer = computer
        self._qkd_keys = list(qkd_keys)
        self.associations = {association.id: association for association in associations}

    def read(self, recording: Recording) -> list[Opened | Sealed]:
        """Try each TLS connection of the recording."""
        return [self._read_one(one) for one in recording.handshakes()]

    def _read_one(self, recording: Recording) -> Opened | Sealed:
        client, server = _inbound(recording.client), _inbound(recording.server)
        client_hello, server_hello = client.message(), server.message()
        shared_secret, missing = self._shared_secret(client_hello, server_hello)
        psk, fits = None, None
        if offered := wire.parse_client_hello(client_hello).psk:
            psk, fits, missing_psk = self._find_psk(client_hello, offered.identity)
            missing += missing_psk
        handshake = Handshake(client_hello, server_hello, shared_secret=shared_secret, psk=psk)
        try:
            handshake.read_server_flight(server)
            handshake.read_client_flight(client)
            opened = Opened(handshake, client.all_data(), server.all_data())
        except CannotDecrypt:
            return Sealed(missing, fits)
        if handshake.alpn == ALPN_NAME and not handshake.psk_taken:
            opened.association = self._learn(opened)
        return opened

    def _shared_secret(self, client_hello: bytes, server_hello: bytes) -> tuple[bytes, list[str]]:
        ((group, answer),) = wire.parse_server_hello(server_hello).key_shares.items()
        share = wire.parse_client_hello(client_hello).key_shares[group]
        # In both groups that there are here X25519's part is the last 32 bytes.
        secrets = {X25519: self._computer.x25519(share[-32:], answer[-32:])}
        if group == wire.X25519MLKEM768:
            secrets = {ML_KEM: self._computer.ml_kem(share[:-32], answer[:-32]), **secrets}
        missing = [name for name, secret in secrets.items() if secret is None]
        return b"".join(secret or bytes(32) for secret in secrets.values()), missing

    def _find_psk(self, client_hello: bytes, identity: bytes) -> tuple[bytes, bool, list[str]]:
        association = self.associations.get(identity_parts(identity)[1])
        missing = [] if association else ["association secret"]
        association = association or Association(bytes(48), "", "")
        for qkd_key in self._qkd_keys:
            psk = association.psk(identity, qkd_key)
            if binder_fits(client_hello, psk):
                return psk, True, missing
        if not self._qkd_keys or not missing:
            missing.append("QKD key")
        return association.psk(identity, bytes(32)), False, missing

    def _learn(self, bootstrap: Opened) -> Association | None:
        offers = [message for message in read_frames(bootstrap.client_data) if message["type"] == "offer"]
        accepts = [message for message in read_frames(bootstrap.server_data) if message["type"] == "accept"]
        if not offers or not accepts:
            return None
        exported = bootstrap.handshake.schedule.export(EXPORTER_LABEL, b"", 48)
        association = Association.made(exported, offers[0]["sae_id"], accepts[0]["sae_id"])
        self.associations[association.id] = association
        return association


def _inbound(stream: bytes) -> wire.Inbound:
    return wire.Inbound(wire.record_source(io.BytesIO(stream).read))


def _cut_at_hellos(stream: bytes, kind: int) -> list[bytes]:
    pieces: list[bytes] = []
    for header, body in wire.record_source(io.BytesIO(stream).read):
        if header[0] == wire.HANDSHAKE and body[0] == kind:
            pieces.append(b"")
        if pieces:
            pieces[-1] += header + body
    return pieces
