"""Key schedule and control messages of qkd-tls/1, from the page "The wire protocol qkd-tls/1"."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rndl.tls13 import expand, expand_label, extract
from rndl.wire import Reader, vector

__all__ = ["ALPN_NAME", "EXPORTER_LABEL", "Association", "frame", "identity_parts", "read_frames"]

ALPN_NAME = "qkd-tls/1"
EXPORTER_LABEL = "EXPERIMENTAL qkd-tls/1 association"
_TARGETS = {"sha384": (0x0002, 48), "sha256": (0x0001, 32)}


@dataclass(frozen=True)
class Association:
    """A bootstrap's outcome that both sides remember: the association secret A, and the SAE IDs."""

    secret: bytes = field(repr=False)
    client_sae: str
    server_sae: str

    @classmethod
    def made(cls, exported: bytes, client_sae: str, server_sae: str, kem: bytes = b"") -> Association:
        """Make an association from H, the exporter's 48 bytes, and K, the secret of an explicit KEM."""
        salt = b"qkd-tls/1 association secret"
        return cls(extract("sha384", salt, vector(2, exported) + vector(2, kem)), client_sae, server_sae)

    @property
    def id(self) -> bytes:
        """The association's public name, 16 bytes."""
        return expand("sha384", self.secret, b"qkd-tls/1 association id", 16)

    def identity(self, key_id: str, kdf: str = "sha384") -> bytes:
        """Return the PSK identity of a connection with this QKD key."""
        head = f"qkd1.{kdf}.{_base64url(self.id)}"
        tag_key = expand("sha384", self.secret, b"qkd-tls/1 identity tag", 48)
        tag = hmac.digest(tag_key, f"{head}.{key_id}".encode(), "sha384")[:9]
        return f"{head}.{_base64url(tag)}.{key_id}".encode()

    def psk(self, identity: bytes, qkd_key: bytes) -> bytes:
        """Return the PSK of that connection: epskx is imported for the identity."""
        epskx = extract("sha384", bytes(48), vector(2, qkd_key) + vector(2, self.secret))
        target, length = _TARGETS[identity_parts(identity)[0]]
        context = vector(1, self.client_sae.encode()) + vector(1, self.server_sae.encode())
        imported = vector(2, identity) + vector(2, context) + b"\x03\x04" + target.to_bytes(2, "big")
        return expand_label("sha384", epskx, "derived psk", hashlib.sha384(imported).digest(), length)


def identity_parts(identity: bytes) -> tuple[str, bytes, str]:
    """Return KDF, association ID and key ID of a PSK identity."""
    _, kdf, association, _, key_id = identity.decode().split(".", 4)
    return kdf, base64.urlsafe_b64decode(association + "=="), key_id


def frame(message: Mapping[str, Any]) -> bytes:
    """Return a control message framed for the bootstrap channel."""
    return vector(2, json.dumps({**message, "version": 1}).encode())


def read_frames(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the control messages in application data of a bootstrap."""
    reader = Reader(data)
    while reader.more:
        yield json.loads(reader.vector(2))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
