"""Authentication of messages: by a one-time key, a signature, a shared secret, or two of these at once.

| authenticator | forgery |
| --- | --- |
| one-time key | bounded by `forgery_bound`, even for unlimited computing power |
| signature | needs a break of the scheme, or the CA, at the time; a later break is of no use |
| shared secret | needs a break of HMAC-SHA-384; a quantum computer does not help |
"""

from __future__ import annotations

import datetime
import hmac
from collections.abc import Callable, Sequence
from math import ceil
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.poly1305 import Poly1305
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError

from kms_client.emulator.link.authentication.errors import AuthenticationFailed

__all__ = [
    "SECRET_BYTES",
    "TAG_BYTES",
    "Authenticator",
    "Certificates",
    "SharedSecret",
    "Together",
    "check_one_time_tag",
    "forgery_bound",
    "one_time_tag",
]

TAG_BYTES: Final = 16
SECRET_BYTES: Final = 32  # of a shared secret, at least
_DOMAIN: Final = b"qkd-link authentication"
_CERTIFICATES: Final = 8  # in a chain, at most


def one_time_tag(key: bytes, message: bytes) -> bytes:
    """Return the Wegman-Carter tag of a message: Poly1305 (RFC 8439, section 2.5) under a key used once."""
    return Poly1305.generate_tag(key, message)


def check_one_time_tag(key: bytes, message: bytes, tag: bytes) -> None:
    """Check a one-time tag.

    Raises:
        AuthenticationFailed: the tag is of another message, or made under another key.
    """
    try:
        Poly1305.verify_tag(key, message, tag)
    except InvalidSignature:
        raise AuthenticationFailed("the one-time tag is wrong") from None


def forgery_bound(size: int) -> float:
    """Return the probability that one forgery of up to `size` bytes passes `check_one_time_tag`.

    ``8 * ceil(size / 16) / 2**106`` for a key that is uniform and unknown, for a forger of any computing
    power, even with a tagged message in hand: D. J. Bernstein, "The Poly1305-AES message-authentication
    code", FSE 2005, theorem 3.3. A session ends at the first failure, so there is one attempt for each
    message; bounds add up. The probability that the keys themselves fall short of privacy amplification's
    promise comes on top.
    """
    return 8 * ceil(size / 16) / 2**106


class Authenticator(Protocol):
    """The authentication of a bootstrap; keeps no state between messages."""

    @property
    def name(self) -> str:
        """The operator's name for it; equal on both sides."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return a proof that this message comes from this side."""
        ...

    def verify(self, message: bytes, proof: bytes) -> None:
        """Check the peer's proof; raise `AuthenticationFailed` if it is invalid."""
        ...


class SharedSecret:
    """HMAC-SHA-384 under a secret that both sides have: computational, no quantum computer known to break it.

    The messages of a session carry both sides' fresh nonces, so a proof is of use once.

    Args:
        secret: `SECRET_BYTES` random bytes or more; not a password.
        name: its name for the operator.

    Raises:
        ValueError: the secret is too short.
    """

    def __init__(self, secret: bytes, name: str = "pre-shared secret") -> None:
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"the secret has {len(secret)} bytes: make {SECRET_BYTES} random ones or more")
        self._secret = secret
        self.name = name

    def sign(self, message: bytes) -> bytes:
        """Return the HMAC, 48 bytes."""
        return hmac.digest(self._secret, _block(_DOMAIN) + _block(self.name.encode()) + message, "sha384")

    def verify(self, message: bytes, proof: bytes) -> None:
        """Check the HMAC; raise `AuthenticationFailed` for another message or another secret."""
        if not hmac.compare_digest(self.sign(message), proof):
            raise AuthenticationFailed(
                f"{self.name}: the proof is wrong; do both sides have the same secret?"
            )


class Certificates:
    """Signatures by ECDSA (P-256, P-384) or ML-DSA, with the X.509 chain that names the key's owner.

    Args:
        key: this side's private key.
        chain: its certificate, then those between it and the CA.
        authorities: the CAs that the peer's chain may end at.
        peer_id: KME ID that the peer's certificate must name: its common name.
        clock: returns the time at which certificates must be valid; now by default.

    Raises:
        ValueError: the key is of another kind, or does not match the certificate.
    """

    name = "X.509 certificates"

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey,
        chain: Sequence[x509.Certificate],
        authorities: Sequence[x509.Certificate],
        peer_id: str,
        *,
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        _check_kind(key.public_key())
        if not chain or chain[0].public_key() != key.public_key():
            raise ValueError("the private key is not that of the first certificate of the chain")
        self._key = key
        self._chain = b"".join(_block(cert.public_bytes(Encoding.DER)) for cert in chain)
        self._authorities = list(authorities)
        self._peer_id = peer_id
        self._clock = clock

    def sign(self, message: bytes) -> bytes:
        """Return the certificates and the signature."""
        text = _signed(message)
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            signature = self._key.sign(text, ec.ECDSA(_hash_for(self._key.curve)))
        else:
            signature = self._key.sign(text)
        return _block(self._chain) + _block(signature)

    def verify(self, message: bytes, proof: bytes) -> None:
        """Check both; `AuthenticationFailed` names the certificate that was rejected, or the signature."""
        chain, signature = _blocks(proof, 2)
        key = self._peer_key(chain)
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, _signed(message), ec.ECDSA(_hash_for(key.curve)))
            else:
                key.verify(signature, _signed(message))
        except InvalidSignature:
            raise AuthenticationFailed(f"the signature is not that of {self._peer_id}") from None

    def _peer_key(
        self, chain: bytes
    ) -> ec.EllipticCurvePublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey:
        try:
            leaf, *between = [x509.load_der_x509_certificate(der) for der in _blocks(chain)]
            policy = PolicyBuilder().store(Store(self._authorities)).time(self._clock())
            # A KME has no name that a browser would look for: what is required of a leaf is looked at below.
            policy = policy.extension_policies(
                ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=ExtensionPolicy.permit_all()
            )
            policy.build_client_verifier().verify(leaf, between)
            names = [name.value for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
            key = leaf.public_key()
            _check_kind(key)
        except (ValueError, VerificationError, x509.DuplicateExtension) as error:
            raise AuthenticationFailed(f"the certificate of {self._peer_id} does not do: {error}") from None
        if names != [self._peer_id]:
            raise AuthenticationFailed(f"the peer's certificate is for {names}, not for KME {self._peer_id}")
        assert isinstance(key, ec.EllipticCurvePublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey)
        return key


class Together:
    """Two authenticators, both of which must agree: an attacker who breaks one has gained nothing."""

    def __init__(self, first: Authenticator, second: Authenticator) -> None:
        self._first, self._second = first, second
        self.name = f"{first.name} and {second.name}"

    def sign(self, message: bytes) -> bytes:
        """Return both proofs."""
        return _block(self._first.sign(message)) + _block(self._second.sign(message))

    def verify(self, message: bytes, proof: bytes) -> None:
        """Check both; raise `AuthenticationFailed` if one of them is wrong."""
        first, second = _blocks(proof, 2)
        self._first.verify(message, first)
        self._second.verify(message, second)


def _check_kind(key: object) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return
    if not isinstance(key, mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey):
        raise ValueError("the key is neither of ECDSA P-256 or P-384 nor of ML-DSA-65 or ML-DSA-87")


def _hash_for(curve: ec.EllipticCurve) -> hashes.HashAlgorithm:
    return hashes.SHA256() if curve.name == "secp256r1" else hashes.SHA384()


def _signed(message: bytes) -> bytes:
    return _block(_DOMAIN) + message


def _block(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _blocks(data: bytes, count: int | None = None) -> list[bytes]:
    """Undo `_block` for blocks behind each other."""
    found: list[bytes] = []
    while data and len(found) < (count or _CERTIFICATES):
        size = int.from_bytes(data[:4], "big")
        found.append(data[4 : 4 + size])
        if len(data) < 4 or len(found[-1]) != size:
            raise AuthenticationFailed("a proof is cut short")
        data = data[4 + size :]
    if data or not found or (count and len(found) != count):
        raise AuthenticationFailed("a proof has not the parts that it should have")
    return found
