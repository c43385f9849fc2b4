"""Two sides of a link in memory, with a wire that tests cut and change."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.x509.oid import NameOID

from kms_client.emulator.link.authentication.authenticators import Authenticator, Certificates, SharedSecret
from kms_client.emulator.link.authentication.channel import ClassicalChannel
from kms_client.emulator.link.authentication.interceptor import Interceptor
from kms_client.emulator.link.authentication.reserve import Direction, KeyReserve
from kms_client.emulator.link.authentication.session import Rebootstrap, Session

A, B = Direction.A_TO_B, Direction.B_TO_A
LINK = "fibre 1: KME-A - KME-B"
Key = ec.EllipticCurvePrivateKey | mldsa.MLDSA65PrivateKey
NOW = datetime.datetime(2026, 11, 25, tzinfo=datetime.UTC)


def new_key(kind: str = "P-256") -> Key:
    if kind == "ML-DSA-65":
        return mldsa.MLDSA65PrivateKey.generate()
    return ec.generate_private_key(
        {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}[kind]
    )


def certificate(
    key: Key, name: str, issuer_key: Key, issuer: str, *, ca: bool = False, expires: int = 365
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=400))
        .not_valid_after(NOW + datetime.timedelta(days=expires))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, decipher_only=False, **usage
            ),
            critical=True,
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("kme.example")]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    return builder.sign(
        issuer_key, hashes.SHA384() if isinstance(issuer_key, ec.EllipticCurvePrivateKey) else None
    )


class PKI:
    """A CA and the certificates of the two KMEs."""

    def __init__(self, kind: str = "P-256") -> None:
        self.ca_key = new_key(kind)
        self.ca = certificate(self.ca_key, "CA", self.ca_key, "CA", ca=True)
        self.keys = {name: new_key(kind) for name in ("KME-A", "KME-B")}
        self.certs = {name: certificate(key, name, self.ca_key, "CA") for name, key in self.keys.items()}

    def of(self, name: str, peer: str) -> Certificates:
        return Certificates(self.keys[name], [self.certs[name]], [self.ca], peer, clock=lambda: NOW)

    def both(self) -> tuple[Certificates, Certificates]:
        return self.of("KME-A", "KME-B"), self.of("KME-B", "KME-A")


def secrets(secret: bytes = bytes(range(48))) -> tuple[SharedSecret, SharedSecret]:
    return SharedSecret(secret), SharedSecret(secret)


class Pair:
    """Both sides: what outlives the sessions, and the session under way."""

    def __init__(
        self,
        bootstrap: tuple[Authenticator, Authenticator],
        *,
        rebootstrap: Rebootstrap = Rebootstrap.FORBIDDEN,
        minimum_keys: int = 2,
    ) -> None:
        self.bootstrap = bootstrap
        self.rebootstrap = rebootstrap
        self.minimum_keys = minimum_keys
        self.reserves = [KeyReserve(), KeyReserve()]
        self.events: list[str] = []
        self.sessions: list[Session] = []

    def session(self, side: Direction, bootstrap: Authenticator | None = None) -> Session:
        return Session(
            side,
            LINK,
            self.reserves[side],
            bootstrap or self.bootstrap[side],
            rebootstrap=self.rebootstrap,
            minimum_keys=self.minimum_keys,
            on_event=self.events.append,
        )

    def connect(self, middle: Sequence[Callable[[bytes], bytes]] = (bytes, bytes)) -> None:
        """Start a session with somebody on each direction's wire; raises what a side raises."""
        self.sessions = [self.session(A), self.session(B)]
        on_wire = [middle[side](self.sessions[side].start()) for side in (A, B)]
        while any(on_wire):
            arrived, on_wire = on_wire, [b"", b""]
            for side in (A, B):
                if arrived[side.opposite]:
                    receiver = self.sessions[side]
                    if receiver.channel is not None:
                        receiver.channel.receive_data(arrived[side.opposite])
                    else:
                        on_wire[side] += middle[side](receiver.receive_data(arrived[side.opposite]))

    def channel(self, side: Direction) -> ClassicalChannel:
        channel = self.sessions[side].channel
        assert channel is not None
        return channel

    def fill(self, counts: tuple[int, int] = (20, 20), sides: tuple[Direction, ...] = (A, B)) -> None:
        material = os.urandom(self.reserves[sides[0]].material_size(counts))
        for side in sides:
            self.reserves[side].put(material, counts)

    def say(self, sender: Direction, text: bytes = b"text") -> None:
        received = self.channel(sender.opposite).receive_data(self.channel(sender).seal(text))
        assert [part.payload for part in received] == [text]


def started(phase: str) -> Pair:
    """A pair in a session: "signatures", "secret" (bootstrap), "one-time" (after it) or "resumed"."""
    pair = Pair(secrets() if phase == "secret" else PKI().both())
    pair.connect()
    if phase in ("one-time", "resumed"):
        pair.fill()
        pair.say(A)
        pair.say(B)
    if phase == "resumed":
        pair.connect()
    return pair


def middle(attack: str, side: Direction, first: int) -> list[Callable[[bytes], bytes]]:
    """An interceptor in one direction only."""
    wires: list[Callable[[bytes], bytes]] = [bytes, bytes]
    wires[side] = Interceptor(attack, first).feed
    return wires
