"""What a side does where a QKD key, or ML-KEM, cannot be had."""

from __future__ import annotations

import enum

__all__ = ["Policy"]


class Policy(enum.StrEnum):
    """How much a side insists on a QKD key. Certificates and ML-KEM are never given up by policy."""

    REQUIRE = "require"
    """No QKD key, no connection (default)."""
    PREFER = "prefer"
    """Without a QKD key: certificates and X25519MLKEM768, with a warning."""
    OFF = "off"
    """Certificates and X25519MLKEM768 only; no KMS is asked."""
