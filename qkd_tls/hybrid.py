"""The PSK of a hybrid handshake, from the secrets of a bootstrap and a QKD key: pure functions.

Three secrets are mixed: the TLS exporter of the bootstrap, the shared secret of an explicit KEM if one
was used, and the QKD key. Each is length-prefixed before HKDF-Extract takes their concatenation, the shape of
CatKDF in ETSI TS 103 744 and of NIST SP 800-56C rev. 2: the result is secret as long as one of them is. The
last step is the PSK importer of RFC 9258, which binds the PSK to its identity and to both SAE IDs.

The concatenations of secrets made here are wiped, and the PSK by its caller. Python cannot wipe the
association secret and the tag key as HKDF returns them: immutable `bytes`, whose memory is freed uncleared.
"""

from __future__ import annotations

import binascii
import enum
import functools
import hmac
import re
from dataclasses import InitVar, dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA384, Hash
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

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
    "encode_identity",
    "imported_identity",
    "tag_hmac",
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
_TO_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL_SAFE: Final = bytes.maketrans(b"-_", b"+/")
_SHA384: Final = SHA384()
_ZERO_SALT: Final = bytes(48)
# Copied rather than made, which would check the algorithm's type each time.
_EMPTY_HASH: Final = Hash(_SHA384)
_SAE_ID_SIZE: Final = 255

# Exactly one text for each identity. The 22 base64url characters of an association ID hold 132 bits for its
# 128, so that the last four must be zero; the 12 characters of a tag hold its 72 bits without a remainder.
_IDENTITY: Final = re.compile(
    rb"qkd1\.(sha384|sha256)\.([A-Za-z0-9_-]{21}[AQgw])\.([A-Za-z0-9_-]{12})\.([!-~]{1,207})"
)
_KEY_ID: Final = re.compile(r"[!-~]{1,207}")
_BAD_KEY_ID: Final = "a key ID has 1 to 207 printable ASCII characters, none of them a space"


class TagMismatch(ValueError):
    """A PSK identity whose tag was not made by a holder of the association secret."""


class KDF(enum.Enum):
    """The hash that a hybrid PSK is for: TLS 1.3 ties every PSK to one (RFC 8446 section 4.2.11)."""

    SHA384 = "sha384"
    """The default."""
    SHA256 = "sha256"
    """The choice for peers whose TLS stack fixes the hash of external PSKs, such as Node.js."""

    # Members are singletons; Enum's own hash is a call of Python for each look-up.
    __hash__ = object.__hash__

    @property
    def target_kdf(self) -> int:
        """The value of `target_kdf` in an ImportedIdentity (RFC 9258 section 5.1)."""
        return 0x0002 if self is KDF.SHA384 else 0x0001

    @property
    def psk_size(self) -> int:
        """The size of the PSK in bytes."""
        return 48 if self is KDF.SHA384 else 32

    @property
    def cipher_suites(self) -> tuple[str, ...]:
        """The TLS 1.3 cipher suites that use this hash, by their OpenSSL names."""
        if self is KDF.SHA384:
            return ("TLS_AES_256_GCM_SHA384",)
        return ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256")


_KDF_BY_NAME: Final = {kdf.value.encode(): kdf for kdf in KDF}
# The end of an ImportedIdentity: TLS 1.3 and the hash that the PSK is for (RFC 9258 section 5.1).
_IMPORT_TARGET: Final = {kdf: b"\x03\x04" + kdf.target_kdf.to_bytes(2, "big") for kdf in KDF}
_PSK_SIZE: Final = {kdf: kdf.psk_size for kdf in KDF}
# What precedes the hash in the HkdfLabel of RFC 8446 section 7.1, which prepends "tls13 " to the label.
_LABEL_START: Final = {kdf: kdf.psk_size.to_bytes(2, "big") + b"\x11tls13 derived psk\x30" for kdf in KDF}


def association_secret(exporter_secret: bytes, kem_secret: bytes = b"") -> bytes:
    """Return the association secret, 48 bytes.

    Args:
        exporter_secret: the output of the bootstrap's TLS exporter for `EXPORTER_LABEL`, 48 bytes.
        kem_secret: the shared secret of the explicit KEM, or nothing.

    Raises:
        ValueError: the exporter secret has another size, or the KEM secret more than 65,535 bytes.
    """
    if len(exporter_secret) != EXPORTER_SIZE:
        raise ValueError(f"the exporter secret must have {EXPORTER_SIZE} bytes, not {len(exporter_secret)}")
    keying_material = _concatenation(exporter_secret, kem_secret)
    try:
        return HKDF.extract(_SHA384, b"qkd-tls/1 association secret", keying_material)
    finally:
        _wipe(keying_material)


def tag_key(association_secret: bytes | bytearray) -> bytes:
    """Return the key for the tags of an association's PSK identities, 48 bytes."""
    return HKDFExpand(_SHA384, 48, b"qkd-tls/1 identity tag").derive(association_secret)


def tag_hmac(association_secret: bytes | bytearray) -> HMAC:
    """Return HMAC-SHA-384, keyed with the tag key: OpenSSL wipes its copy when the object is freed."""
    return HMAC(tag_key(association_secret), _SHA384)


def association_id(association_secret: bytes | bytearray) -> bytes:
    """Return the association's name on both sides, 16 bytes; public, as part of each PSK identity."""
    return HKDFExpand(_SHA384, ASSOCIATION_ID_SIZE, b"qkd-tls/1 association id").derive(association_secret)


@dataclass(slots=True)
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
    _parsed: InitVar[bool] = False
    """True if made by `parse`, which has checked everything."""

    def __post_init__(self, _parsed: bool) -> None:
        """Check everything, so that every instance can be encoded."""
        if _parsed:
            return
        if len(self.association_id) != ASSOCIATION_ID_SIZE:
            raise ValueError(f"an association ID has {ASSOCIATION_ID_SIZE} bytes")
        if len(self.tag) != _TAG_SIZE:
            raise ValueError(f"the tag of a PSK identity has {_TAG_SIZE} bytes")
        if not _KEY_ID.fullmatch(self.key_id):
            raise ValueError(_BAD_KEY_ID)

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
            _KDF_BY_NAME[kdf],
            binascii.a2b_base64(association_id.translate(_FROM_URL_SAFE) + b"=="),
            binascii.a2b_base64(tag.translate(_FROM_URL_SAFE)),
            key_id.decode(),
            _parsed=True,
        )

    def encode(self) -> bytes:
        """Return the identity as on the wire: ASCII, at most 255 bytes."""
        return b".".join((_head(self.kdf, self.association_id), _base64url(self.tag), self.key_id.encode()))

    def verify_tag(self, tagger: HMAC) -> None:
        """Check, in constant time, that the sender of this identity holds the association secret.

        `tagger` is the association's `tag_hmac`.

        Raises:
            TagMismatch: it does not.
        """
        expected = _tag(_head(self.kdf, self.association_id), tagger, self.key_id)
        if not hmac.compare_digest(expected, self.tag):
            raise TagMismatch("the tag of the PSK identity does not belong to this association and key ID")


def encode_identity(kdf: KDF, association_id: bytes, tagger: HMAC, key_id: str) -> bytes:
    """Return the PSK identity on the wire for the QKD key `key_id`; `tagger` is the association's `tag_hmac`.

    Raises:
        ValueError: as `PSKIdentity`.
    """
    if len(association_id) != ASSOCIATION_ID_SIZE:
        raise ValueError(f"an association ID has {ASSOCIATION_ID_SIZE} bytes")
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError(_BAD_KEY_ID)
    start = _head(kdf, association_id)
    return b".".join((start, _base64url(_tag(start, tagger, key_id)), key_id.encode()))


def derive_psk(
    qkd_key: bytes | bytearray | memoryview,
    association_secret: bytes | bytearray,
    identity: bytes,
    client_sae_id: str,
    server_sae_id: str,
    kdf: KDF,
) -> bytearray:
    """Derive the PSK of a hybrid handshake, `kdf.psk_size` bytes (RFC 9258 section 5.1).

    The caller must wipe it.

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
    digest = _EMPTY_HASH.copy()
    digest.update(imported)
    label = _LABEL_START[kdf] + digest.finalize()
    keying_material, psk = _concatenation(qkd_key, association_secret), bytearray(_PSK_SIZE[kdf])
    try:
        # HKDF-Extract gives epskx, HKDF-Expand with that label the PSK: one call, which keeps epskx to itself.
        HKDF(_SHA384, _PSK_SIZE[kdf], _ZERO_SALT, label).derive_into(keying_material, psk)
    finally:
        _wipe(keying_material)
    return psk


def imported_identity(identity: bytes, client_sae_id: str, server_sae_id: str, kdf: KDF) -> bytes:
    """Return the ImportedIdentity structure (RFC 9258 section 5.1) that a PSK is bound to; it is never sent.

    Its context holds the client's SAE ID before the server's, so that a message reflected to its sender
    meets a different PSK (RFC 9258 appendix A, the Selfie attack).

    Raises:
        ValueError: the identity is empty or has more than 255 bytes, or an SAE ID does not have 1 to 255
            bytes in UTF-8.
    """
    if not 1 <= len(identity) <= MAX_IDENTITY_SIZE:
        raise ValueError(f"a PSK identity has 1 to {MAX_IDENTITY_SIZE} bytes, not {len(identity)}")
    return _v16(identity) + _context(client_sae_id, server_sae_id) + _IMPORT_TARGET[kdf]


# These two caches spare 7 of a handshake's 650 microseconds, both sides together.
@functools.lru_cache(maxsize=256)
def _context(client_sae_id: str, server_sae_id: str) -> bytes:
    return _v16(_v8(_encoded_sae_id(client_sae_id)) + _v8(_encoded_sae_id(server_sae_id)))


def _encoded_sae_id(sae_id: str) -> bytes:
    encoded = sae_id.encode()
    if not 1 <= len(encoded) <= _SAE_ID_SIZE:
        raise ValueError(f"an SAE ID has 1 to {_SAE_ID_SIZE} bytes in UTF-8, not {len(encoded)}")
    return encoded


@functools.lru_cache(maxsize=1024)
def _head(kdf: KDF, association_id: bytes) -> bytes:
    return b".".join((b"qkd1", kdf.value.encode(), _base64url(association_id)))


def _tag(start: bytes, tagger: HMAC, key_id: str) -> bytes:
    keyed = tagger.copy()
    keyed.update(start + b"." + key_id.encode())
    return keyed.finalize()[:_TAG_SIZE]


def _base64url(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False).translate(_TO_URL_SAFE).rstrip(b"=")


def _v8(data: bytes) -> bytes:
    return len(data).to_bytes(1, "big") + data


def _v16(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _concatenation(
    first: bytes | bytearray | memoryview, second: bytes | bytearray | memoryview
) -> bytearray:
    """Concatenate two secrets, each behind its length in two bytes; the caller must wipe the result."""
    sizes = memoryview(first).nbytes, memoryview(second).nbytes
    if max(sizes) > 0xFFFF:
        raise ValueError(f"a secret of {max(sizes)} bytes is too long: the limit is 65535")
    # Joined without copies in between.
    return bytearray().join((sizes[0].to_bytes(2, "big"), first, sizes[1].to_bytes(2, "big"), second))


def _wipe(data: bytearray) -> None:
    data[:] = bytes(len(data))
