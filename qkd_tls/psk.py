"""The external PSK of one handshake."""

from __future__ import annotations

from dataclasses import dataclass, field

from qkd_tls.hybrid import KDF

__all__ = ["PSK"]


@dataclass(slots=True)
class PSK:
    """An external PSK: the identity on the wire (ASCII, at most 255 bytes) and the secret (32 or 48 bytes)."""

    identity: bytes
    secret: bytearray = field(repr=False)
    kdf: KDF
    key_id: str
    announced: bool = False
    kms: str = ""
    """The KME that delivered the key; "" if the key does not say."""

    def wipe(self) -> None:
        """Overwrite the secret. OpenSSL cleanses its own copies when the connection is freed."""
        self.secret[:] = bytes(len(self.secret))
