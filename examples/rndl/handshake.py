"""One TLS 1.3 handshake, computed from its messages. The client that takes part and the eavesdropper do the same."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from rndl import wire
from rndl.tls13 import SUITES, KeySchedule, TrafficKeys, transcript_hash

__all__ = ["Forged", "Handshake", "binder_fits"]


class Forged(Exception):
    """A signature or a MAC is wrong."""


class Handshake:
    """The handshake that follows a ClientHello and a ServerHello, RFC 8446 section 2.

    Args:
        client_hello: with its header, as are all messages.
        server_hello: the answer.
        shared_secret: of the key exchange.
        psk: used only if the server accepted it.
    """

    def __init__(
        self, client_hello: bytes, server_hello: bytes, *, shared_secret: bytes, psk: bytes | None = None
    ) -> None:
        self.client_hello = wire.parse_client_hello(client_hello)
        self.server_hello = wire.parse_server_hello(server_hello)
        self.suite = SUITES[self.server_hello.suites[0]]
        (self.group,) = self.server_hello.key_shares
        self.psk_taken = wire.PRE_SHARED_KEY in self.server_hello.extensions
        self.alpn: str | None = None
        self.certificates: dict[str, list[x509.Certificate]] = {"server": [], "client": []}
        self.signature_schemes: dict[str, int] = {}
        self.certificate_requested = False
        self.schedule = KeySchedule(self.suite.hash_name, psk if self.psk_taken else None)
        self.transcript = client_hello + server_hello
        self.schedule.enter_handshake(shared_secret, self.transcript)

    def keys(self, secret_name: str) -> TrafficKeys:
        """Return the keys of a traffic secret, by its name in key logs."""
        return TrafficKeys(self.suite, self.schedule.secrets[secret_name])

    def read_server_flight(self, server: wire.Inbound) -> None:
        """Read EncryptedExtensions to Finished and check all signatures and MACs.

        Raises:
            CannotDecrypt: the secrets are wrong.
            Ended: the server gave up.
            Forged: a message is not the server's.
        """
        self._read_flight(server, "server")
        self.schedule.enter_application(self.transcript)
        server.keys = self.keys("SERVER_TRAFFIC_SECRET_0")

    def read_client_flight(self, client: wire.Inbound) -> None:
        """Read the client's Finished, and its certificate if one was requested; raise as for the server's."""
        self._read_flight(client, "client")
        client.keys = self.keys("CLIENT_TRAFFIC_SECRET_0")

    def client_finished(self) -> bytes:
        """Return the client's last message."""
        secret = self.schedule.secrets["CLIENT_HANDSHAKE_TRAFFIC_SECRET"]
        return wire.handshake_message(wire.FINISHED, self.schedule.finished(secret, self.transcript))

    def _read_flight(self, inbound: wire.Inbound, side: str) -> None:
        secret_name = f"{side.upper()}_HANDSHAKE_TRAFFIC_SECRET"
        inbound.keys = self.keys(secret_name)
        finished = False
        while not finished:
            message = inbound.message()
            body = wire.Reader(message[4:])
            match message[0]:
                case wire.ENCRYPTED_EXTENSIONS:
                    alpn = wire.parse_extensions(body.vector(2)).get(wire.ALPN)
                    self.alpn = alpn[3:].decode() if alpn else None
                case wire.CERTIFICATE_REQUEST:
                    self.certificate_requested = True
                case wire.CERTIFICATE:
                    self.certificates[side] = _certificates(body)
                case wire.CERTIFICATE_VERIFY:
                    self._check_signature(side, body.integer(2), body.vector(2))
                case wire.FINISHED:
                    expected = self.schedule.finished(self.schedule.secrets[secret_name], self.transcript)
                    if message[4:] != expected:
                        raise Forged(f"the {side}'s Finished is wrong")
                    finished = True
                case unexpected:
                    raise Forged(f"a handshake message of type {unexpected} from the {side}")
            self.transcript += message

    def _check_signature(self, side: str, scheme: int, signature: bytes) -> None:
        digest = transcript_hash(self.suite.hash_name, self.transcript)
        signed = b" " * 64 + f"TLS 1.3, {side} CertificateVerify".encode() + b"\0" + digest
        key = self.certificates[side][0].public_key()
        try:
            match scheme, key:
                case 0x0403, ec.EllipticCurvePublicKey():
                    key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
                case 0x0804, rsa.RSAPublicKey():
                    pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256().digest_size)
                    key.verify(signature, signed, pss, hashes.SHA256())
                case 0x0807, ed25519.Ed25519PublicKey():
                    key.verify(signature, signed)
                case _:
                    raise Forged(f"a signature of the unexpected kind 0x{scheme:04x}")
        except InvalidSignature:
            raise Forged(f"the {side}'s CertificateVerify is wrong") from None
        self.signature_schemes[side] = scheme


def binder_fits(client_hello: bytes, psk: bytes) -> bool:
    """Return whether this ClientHello's binder was made with this PSK; the binder's length tells the hash."""
    offered = wire.parse_client_hello(client_hello).psk
    assert offered is not None
    schedule = KeySchedule("sha384" if len(offered.binder) == 48 else "sha256", psk)
    return schedule.binder(client_hello[: offered.binder_offset]) == offered.binder


def _certificates(body: wire.Reader) -> list[x509.Certificate]:
    body.vector(1)
    entries = wire.Reader(body.vector(3))
    found = []
    while entries.more:
        found.append(x509.load_der_x509_certificate(entries.vector(3)))
        entries.vector(2)
    return found
