"""From the secrets of a bootstrap and a QKD key to the PSK of a hybrid handshake: pure functions.

Three secrets are mixed: the TLS exporter of the bootstrap, the shared secret of an explicit KEM where one
was used, and the QKD key. Each is length-prefixed before HKDF-Extract takes their concatenation, the shape of
CatKDF in ETSI TS 103 744 and of NIST SP 800-56C rev. 2: the result is secret as long as one of them is. The
last step is the PSK importer of RFC 9258, which binds the PSK to its identity and to both SAE IDs.

What is wiped: the concatenations of secrets made here. What Python cannot wipe: the digests that `hmac`
returns, among them the intermediate HKDF key. They are immutable `bytes`, whose memory is freed uncleared.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Final

__all__ = [
    "ASSOCIATION_ID_SIZE",
    "ASSOCIATION_SECRET_SIZE",
    "EXPORTER_LABEL",
    "EXPORTER_SIZE",
    "KDF",
    "MAX_IDENTITY_SIZE",
    "MIN_QKD_KEY_SIZE",
    "PSKIdentity",
    "TagMismatch",
    "association_id",
    "association_secret",
    "derive_psk",
    "imported_identity",
    "tag_key",
]

EXPORTER_LABEL: Final = b"EXPERIMENTAL qkd-tls/1 association"
"""Label of the TLS exporter (RFC 8446 section 7.5) taken on the bootstrap, with an empty context."""

EXPORTER_SIZE: Final = 48
"""Bytes taken from that exporter."""

ASSOCIATION_SECRET_SIZE: Final = 48
"""Bytes of an association secret."""

ASSOCIATION_ID_SIZE: Final = 16
"""Bytes of an association ID."""

MIN_QKD_KEY_SIZE: Final = 32
"""Bytes that a QKD key must have at least."""

MAX_IDENTITY_SIZE: Final = 255
"""Bytes that a PSK identity may have at most: the limit of the older PSK callbacks of TLS stacks."""

_TAG_SIZE: Final = 9
_TLS13: Final = b"\x03\x04"
_ZERO_SALT: Final = bytes(48)
_SAE_ID_SIZE: Final = 255

# Exactly one text for each identity. The 22 base64url characters of an association ID hold 132 bits for its
# 128, so that the last four must be zero; the 12 characters of a tag hold its 72 bits without a remainder.
_IDENTITY: Final = re.compile(
    rb"qkd1\.(sha384|sha256)\.([A-Za-z0-9_-]{21}[AQgw])\.([A-Za-z0-9_-]{12})\.([!-~]{1,207})"
)
_KEY_ID: Final = re.compile(r"[!-~]{1,207}")


class TagMismatch(ValueError):
    """The tag of a PSK identity was not made by a holder of the association secret."""


class KDF(enum.Enum):
    """The hash that a hybrid PSK is for: TLS 1.3 ties every PSK to one (RFC 8446 section 4.2.11)."""

    SHA384 = "sha384"
    """The default."""
    SHA256 = "sha256"
    """For peers whose TLS stack fixes the hash of external PSKs, such as Node.js."""

    @property
    def target_kdf(self) -> int:
        """The value of `target_kdf` in an ImportedIdentity (RFC 9258 section 3.1)."""
        return 0x0002 if self is KDF.SHA384 else 0x0001

    @property
    def psk_size(self) -> int:
        """Size of the PSK in bytes."""
        return 48 if self is KDF.SHA384 else 32

    @property
    def cipher_suites(self) -> tuple[str, ...]:
        """The TLS 1.3 cipher suites that use this hash, by their OpenSSL names."""
        if self is KDF.SHA384:
            return ("TLS_AES_256_GCM_SHA384",)
        return ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256")


def association_secret(exporter_secret: bytes, kem_secret: bytes = b"") -> bytes:
    """The association secret, 48 bytes.

    Args:
        exporter_secret: what the bootstrap's TLS exporter gave for `EXPORTER_LABEL`, 48 bytes.
        kem_secret: the shared secret of the explicit KEM, or nothing.

    Raises:
        ValueError: the exporter secret has another size, or the KEM secret more than 65,535 bytes.
    """
    if len(exporter_secret) != EXPORTER_SIZE:
        raise ValueError(f"the exporter secret must have {EXPORTER_SIZE} bytes, not {len(exporter_secret)}")
    return _extract(b"qkd-tls/1 association secret", exporter_secret, kem_secret)


def tag_key(association_secret: bytes | bytearray) -> bytes:
    """The key that the tags of an association's PSK identities are made with, 48 bytes."""
    return _expand(association_secret, b"qkd-tls/1 identity tag", 48)


def association_id(association_secret: bytes | bytearray) -> bytes:
    """What both sides know an association by, 16 bytes; public, as it is part of each PSK identity."""
    return _expand(association_secret, b"qkd-tls/1 association id", ASSOCIATION_ID_SIZE)


@dataclass(frozen=True, slots=True)
class PSKIdentity:
    """The PSK identity of a hybrid handshake: which association and which QKD key. All of it is public.

    Raises:
        ValueError: a size is wrong, or the key ID is empty, longer than 207 characters or has characters
            other than printable ASCII without space.
    """

    kdf: KDF
    association_id: bytes
    """16 bytes."""
    tag: bytes
    """9 bytes; shows that the peer holds the association secret."""
    key_id: str
    """The QKD key's ID."""

    def __post_init__(self) -> None:
        """Check everything, so that whatever exists can be encoded."""
        if len(self.association_id) != ASSOCIATION_ID_SIZE:
            raise ValueError(f"an association ID has {ASSOCIATION_ID_SIZE} bytes")
        if len(self.tag) != _TAG_SIZE:
            raise ValueError(f"the tag of a PSK identity has {_TAG_SIZE} bytes")
        if not _KEY_ID.fullmatch(self.key_id):
            raise ValueError("a key ID has 1 to 207 printable ASCII characters, none of them a space")

    @classmethod
    def create(cls, kdf: KDF, association_id: bytes, tag_key: bytes | bytearray, key_id: str) -> PSKIdentity:
        """The identity for the QKD key `key_id`, with its tag.

        Raises:
            ValueError: as the class; also for a key ID that is not ASCII.
        """
        return cls(kdf, association_id, _tag(kdf, association_id, tag_key, key_id), key_id)

    @classmethod
    def parse(cls, identity: bytes) -> PSKIdentity:
        """Read an identity as found in a ClientHello; the tag is not verified yet.

        Raises:
            ValueError: it is not exactly what `encode` gives for some identity.
        """
        match = _IDENTITY.fullmatch(identity)
        if match is None:
            raise ValueError("not a PSK identity of qkd-tls/1")
        kdf, association_id, tag, key_id = match.groups()
        return cls(
            KDF(kdf.decode()),
            base64.urlsafe_b64decode(association_id + b"=="),
            base64.urlsafe_b64decode(tag),
            key_id.decode(),
        )

    def encode(self) -> bytes:
        """The identity as it goes over the wire: ASCII, at most 255 bytes."""
        return b".".join((_head(self.kdf, self.association_id), _base64url(self.tag), self.key_id.encode()))

    def verify_tag(self, tag_key: bytes | bytearray) -> None:
        """Check, in constant time, that the sender of this identity holds the association secret.

        Raises:
            TagMismatch: it does not.
        """
        expected = _tag(self.kdf, self.association_id, tag_key, self.key_id)
        if not hmac.compare_digest(expected, self.tag):
            raise TagMismatch("the tag of the PSK identity does not belong to this association and key ID")


def derive_psk(
    qkd_key: bytes | bytearray | memoryview,
    association_secret: bytes | bytearray,
    identity: bytes,
    client_sae_id: str,
    server_sae_id: str,
    kdf: KDF,
) -> bytes:
    """The PSK of a hybrid handshake, `kdf.psk_size` bytes (RFC 9258 section 4.1).

    Args:
        qkd_key: at least 32 bytes; wiping it is up to the caller.
        association_secret: 48 bytes.
        identity: the encoded PSK identity.
        client_sae_id: of the TLS client, the master SAE; 1 to 255 bytes in UTF-8.
        server_sae_id: of the TLS server, the slave SAE; 1 to 255 bytes in UTF-8.
        kdf: the hash the PSK is for.

    Raises:
        ValueError: a size is wrong.
    """
    size = memoryview(qkd_key).nbytes
    if size < MIN_QKD_KEY_SIZE:
        raise ValueError(f"a QKD key must have at least {MIN_QKD_KEY_SIZE} bytes; this one has {size}")
    if len(association_secret) != ASSOCIATION_SECRET_SIZE:
        raise ValueError(f"an association secret has {ASSOCIATION_SECRET_SIZE} bytes")
    imported = imported_identity(identity, client_sae_id, server_sae_id, kdf)
    # HKDF-Expand-Label (RFC 8446 section 7.1) prepends "tls13 " to the label.
    label = (
        kdf.psk_size.to_bytes(2, "big") + _v8(b"tls13 derived psk") + _v8(hashlib.sha384(imported).digest())
    )
    return _expand(_extract(_ZERO_SALT, qkd_key, association_secret), label, kdf.psk_size)


def imported_identity(identity: bytes, client_sae_id: str, server_sae_id: str, kdf: KDF) -> bytes:
    """The ImportedIdentity structure (RFC 9258 section 3.1) that a PSK is bound to; never sent.

    Its context holds the client's SAE ID before the server's, so that a message reflected to its sender
    meets a different PSK (RFC 9258 section 4.1, the Selfie attack).

    Raises:
        ValueError: the identity is empty or has more than 255 bytes, or an SAE ID does not have 1 to 255
            bytes in UTF-8.
    """
    if not 1 <= len(identity) <= MAX_IDENTITY_SIZE:
        raise ValueError(f"a PSK identity has 1 to {MAX_IDENTITY_SIZE} bytes, not {len(identity)}")
    context = _v8(_encoded_sae_id(client_sae_id)) + _v8(_encoded_sae_id(server_sae_id))
    return _v16(identity) + _v16(context) + _TLS13 + kdf.target_kdf.to_bytes(2, "big")


def _encoded_sae_id(sae_id: str) -> bytes:
    encoded = sae_id.encode()
    if not 1 <= len(encoded) <= _SAE_ID_SIZE:
        raise ValueError(f"an SAE ID has 1 to {_SAE_ID_SIZE} bytes in UTF-8, not {len(encoded)}")
    return encoded


def _head(kdf: KDF, association_id: bytes) -> bytes:
    return b".".join((b"qkd1", kdf.value.encode(), _base64url(association_id)))


def _tag(kdf: KDF, association_id: bytes, tag_key: bytes | bytearray, key_id: str) -> bytes:
    text = _head(kdf, association_id) + b"." + key_id.encode("ascii")
    return hmac.digest(tag_key, text, "sha384")[:_TAG_SIZE]


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _v8(data: bytes) -> bytes:
    return len(data).to_bytes(1, "big") + data


def _v16(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _extract(salt: bytes, *secrets: bytes | bytearray | memoryview) -> bytes:
    """HKDF-Extract (RFC 5869 section 2.2) with SHA-384 of the length-prefixed secrets."""
    keying_material = bytearray()
    try:
        for secret in secrets:
            view = memoryview(secret)
            if view.nbytes > 0xFFFF:
                raise ValueError(f"a secret of {view.nbytes} bytes is too long: the limit is 65535")
            keying_material += view.nbytes.to_bytes(2, "big")
            keying_material += view
        return hmac.digest(salt, keying_material, "sha384")
    finally:
        keying_material[:] = bytes(len(keying_material))


def _expand(key: bytes | bytearray, info: bytes, size: int) -> bytes:
    """HKDF-Expand (RFC 5869 section 2.3) with SHA-384, to at most 48 bytes: one block is enough."""
    return hmac.digest(key, info + b"\x01", "sha384")[:size]
