"""The protection of a connection."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

__all__ = ["HandshakePath", "Protection", "QKDInfo"]


class Protection(enum.StrEnum):
    """The secrets that an eavesdropper would need, beside breaking X25519."""

    HYBRID = "hybrid"
    """A QKD key, and ML-KEM (in the group or as explicit KEM)."""
    PQ_ONLY = "pq-only"
    """ML-KEM; no QKD key."""
    CLASSICAL = "classical"
    """No secret: only if the operator has added a classical group by name."""


class HandshakePath(enum.StrEnum):
    """The way in which a hybrid connection came about."""

    BOOTSTRAP = "bootstrap"
    """Certificates were checked on this connection."""
    ASSOCIATED = "associated"
    """Certificates were checked on the connection that made the association."""


@dataclass(slots=True, kw_only=True)
class QKDInfo:
    """The protection of a connection; contains no secrets.

    ``group``, ``cipher``: by OpenSSL's names. ``kem``: the explicit KEM that is in the association's secret,
    if any. ``association``: its ID in hexadecimal (32 digits). ``kms``: the KME (or other KMS) that this side
    got the key from, ``kms_round_trips``: requests to it during this handshake. ``announced``: True if the
    key was fetched with an earlier connection's offer. ``fallback``: the reason for having no QKD key, if the
    policy is `prefer`.
    """

    protection: Protection
    group: str
    cipher: str
    alpn: str | None = None
    path: HandshakePath | None = None
    key_id: str | None = None
    kms: str | None = None
    kms_protocol: str | None = None
    client_sae_id: str | None = None
    server_sae_id: str | None = None
    association: str | None = None
    kem: str | None = None
    announced: bool = False
    kms_round_trips: int = 0
    fallback: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, e.g. an audit log."""
        return {
            name: str(value) if isinstance(value, enum.Enum) else value
            for name in self.__slots__
            for value in [getattr(self, name)]
        }
