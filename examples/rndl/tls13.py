"""The key schedule and the record protection of TLS 1.3, RFC 8446 sections 4.2.11.2, 4.4 and 5.2, and 7."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

__all__ = [
    "SUITES",
    "CannotDecrypt",
    "CipherSuite",
    "KeySchedule",
    "TrafficKeys",
    "expand",
    "expand_label",
    "extract",
    "transcript_hash",
]


class CannotDecrypt(Exception):
    """The keys do not open this record."""


class _AEAD(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


@dataclass(frozen=True)
class CipherSuite:
    """A cipher suite of TLS 1.3: `hash_name` is hashlib's, `key_length` is in bytes."""

    name: str
    hash_name: str
    aead: Callable[[bytes], _AEAD]
    key_length: int


SUITES = {
    0x1301: CipherSuite("TLS_AES_128_GCM_SHA256", "sha256", AESGCM, 16),
    0x1302: CipherSuite("TLS_AES_256_GCM_SHA384", "sha384", AESGCM, 32),
    0x1303: CipherSuite("TLS_CHACHA20_POLY1305_SHA256", "sha256", ChaCha20Poly1305, 32),
}


def extract(hash_name: str, salt: bytes, secret: bytes) -> bytes:
    """Compute HKDF-Extract, RFC 5869 section 2.2."""
    return hmac.digest(salt, secret, hash_name)


def expand(hash_name: str, key: bytes, info: bytes, length: int) -> bytes:
    """Compute HKDF-Expand, RFC 5869 section 2.3."""
    result = block = b""
    counter = 0
    while len(result) < length:
        counter += 1
        block = hmac.digest(key, block + info + bytes([counter]), hash_name)
        result += block
    return result[:length]


def expand_label(hash_name: str, key: bytes, label: str, context: bytes, length: int) -> bytes:
    """Compute HKDF-Expand-Label, RFC 8446 section 7.1."""
    full = b"tls13 " + label.encode()
    info = length.to_bytes(2, "big") + bytes([len(full)]) + full + bytes([len(context)]) + context
    return expand(hash_name, key, info, length)


def transcript_hash(hash_name: str, messages: bytes) -> bytes:
    """Hash handshake messages with their headers: Transcript-Hash, RFC 8446 section 4.4.1.

    A HelloRetryRequest is not supported.
    """
    return hashlib.new(hash_name, messages).digest()


class KeySchedule:
    """The secrets of one connection, RFC 8446 section 7.1.

    `secrets` has them by their names in key logs, as far as the handshake has come.

    Args:
        hash_name: of the cipher suite, or of the PSK before there is one.
        psk: the pre-shared key; None for a handshake without one.
    """

    def __init__(self, hash_name: str, psk: bytes | None = None) -> None:
        self.hash_name = hash_name
        self._size = hashlib.new(hash_name).digest_size
        self._current = extract(hash_name, b"", psk if psk is not None else bytes(self._size))
        self.secrets: dict[str, bytes] = {}

    def binder(self, truncated_hello: bytes) -> bytes:
        """Return the binder of an external PSK over a ClientHello up to its binders, section 4.2.11.2."""
        return self.finished(self._derive("ext binder", b""), truncated_hello)

    def enter_handshake(self, shared_secret: bytes, messages: bytes) -> None:
        """Go on with the (EC)DHE or hybrid secret; `messages` are ClientHello and ServerHello."""
        self._next(shared_secret)
        for name, label in (("CLIENT", "c hs traffic"), ("SERVER", "s hs traffic")):
            self.secrets[f"{name}_HANDSHAKE_TRAFFIC_SECRET"] = self._derive(label, messages)

    def enter_application(self, messages: bytes) -> None:
        """Go on to the master secret; `messages` are those up to the server's Finished."""
        self._next(bytes(self._size))
        for name, label in (
            ("CLIENT_TRAFFIC_SECRET_0", "c ap traffic"),
            ("SERVER_TRAFFIC_SECRET_0", "s ap traffic"),
            ("EXPORTER_SECRET", "exp master"),
        ):
            self.secrets[name] = self._derive(label, messages)

    def finished(self, base_key: bytes, messages: bytes) -> bytes:
        """Return the MAC of a Finished message, or a binder, section 4.4.4."""
        key = expand_label(self.hash_name, base_key, "finished", b"", self._size)
        return hmac.digest(key, transcript_hash(self.hash_name, messages), self.hash_name)

    def export(self, label: str, context: bytes, length: int) -> bytes:
        """Return the exporter's output, section 7.5."""
        secret = expand_label(
            self.hash_name,
            self.secrets["EXPORTER_SECRET"],
            label,
            transcript_hash(self.hash_name, b""),
            self._size,
        )
        digest = transcript_hash(self.hash_name, context)
        return expand_label(self.hash_name, secret, "exporter", digest, length)

    def _derive(self, label: str, messages: bytes) -> bytes:
        digest = transcript_hash(self.hash_name, messages)
        return expand_label(self.hash_name, self._current, label, digest, self._size)

    def _next(self, secret: bytes) -> None:
        self._current = extract(self.hash_name, self._derive("derived", b""), secret)


class TrafficKeys:
    """Keys that protect or open the records of one direction, RFC 8446 sections 5.2 and 5.3."""

    def __init__(self, suite: CipherSuite, secret: bytes) -> None:
        self._suite = suite
        self._secret = secret
        self._aead = suite.aead(expand_label(suite.hash_name, secret, "key", b"", suite.key_length))
        self._iv = int.from_bytes(expand_label(suite.hash_name, secret, "iv", b"", 12), "big")
        self._sequence = 0

    def seal(self, content_type: int, content: bytes) -> bytes:
        """Return a protected record with its header."""
        header = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2, "big")
        return header + self._aead.encrypt(self._nonce(), content + bytes([content_type]), header)

    def open(self, header: bytes, body: bytes) -> tuple[int, bytes]:
        """Return content type and content of a record.

        Raises:
            CannotDecrypt: the authentication tag is wrong: the record was protected with other keys.
        """
        try:
            inner = self._aead.decrypt(self._nonce(), body, header).rstrip(b"\0")
        except InvalidTag:
            raise CannotDecrypt(f"record {self._sequence - 1} of this direction does not open") from None
        return inner[-1], inner[:-1]

    def updated(self) -> TrafficKeys:
        """Return the keys after a KeyUpdate, section 7.2."""
        size = len(self._secret)
        secret = expand_label(self._suite.hash_name, self._secret, "traffic upd", b"", size)
        return TrafficKeys(self._suite, secret)

    def _nonce(self) -> bytes:
        nonce = self._iv ^ self._sequence
        self._sequence += 1
        return nonce.to_bytes(12, "big")
