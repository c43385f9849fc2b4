"""The behaviour of a side if a QKD key, or ML-KEM, is not available."""

from __future__ import annotations

import enum

__all__ = ["Policy"]


class Policy(enum.StrEnum):
    """The need of a side for a QKD key. Every policy still requires certificates and ML-KEM."""

    REQUIRE = "require"
    """No QKD key, no connection (default)."""
    PREFER = "prefer"
    """Without a QKD key: certificates and X25519MLKEM768, with a warning."""
    OFF = "off"
    """Certificates and X25519MLKEM768 only; no KMS is asked."""
