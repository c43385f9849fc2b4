"""The PSK of one hybrid handshake, for a TLS program that knows external PSKs and nothing of qkd-tls/1.

The server needs nothing special: it finds the association in the PSK's identity and fetches the QKD key by
its ID. The stock program needs: TLS 1.3, this one PSK with (EC)DHE, the server name of the bootstrap, a
cipher suite whose hash is the PSK's, and a group that the server has. It checks no certificate: only a holder
of the association could know the PSK.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from kms_client import wipe_keys
from qkd_tls.association import Association
from qkd_tls.errors import QKDUnavailable
from qkd_tls.hybrid import KDF
from qkd_tls.psk import PSK
from qkd_tls.socket import QKDSocket

__all__ = ["ExportedPSK", "export_psk"]

_BOOTSTRAP_AGAIN: Final = "connect to the server again, and export the PSK at once"


@dataclass(slots=True)
class ExportedPSK:
    """The PSK and settings for one handshake of a stock TLS program.

    Wipe it, or use it as a context manager. `secret` is 32 bytes (`KDF.SHA256`) or 48 (`KDF.SHA384`).
    `expires_at` is the association's end, in Unix seconds.
    """

    identity: str
    secret: bytearray = field(repr=False)
    kdf: KDF
    key_id: str
    server_name: str | None
    expires_at: float

    @property
    def cipher_suites(self) -> tuple[str, ...]:
        """The cipher suites that the program may offer, by OpenSSL's names."""
        return self.kdf.cipher_suites

    def psk(self) -> PSK:
        """Return a copy for `qkd_tls.openssl.TLSConnection`."""
        return PSK(self.identity.encode(), bytearray(self.secret), self.kdf, self.key_id)

    def wipe(self) -> None:
        """Overwrite the secret."""
        self.secret[:] = bytes(len(self.secret))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()


def export_psk(sock: QKDSocket, kdf: KDF = KDF.SHA256) -> ExportedPSK:
    """Use up a fresh QKD key for one more handshake of a client's association, and return its PSK.

    Args:
        sock: a client's hybrid connection; it may be closed meanwhile, as long as its context is not.
        kdf: the hash of the PSK. Most stock programs fix it to SHA-256.

    The secret leaves the library's care: any program that has it can connect as this client, once.

    Raises:
        ValueError: the socket is a server's, or has not finished its handshake.
        QKDUnavailable: the connection has no QKD key in it, or its association has ended.
        kms_client.KMSError: the KMS gave no key.
    """
    info, manager = sock.qkd, sock.context.key_manager
    if sock.server_side or info is None:
        raise ValueError("a PSK is exported of a client's connection, after its handshake")
    if info.association is None or manager is None:
        raise QKDUnavailable(
            "this connection has no association: no QKD key protects it",
            hint="see why: " + (info.fallback or "the policy is 'off'"),
            peer=info.server_sae_id,
        )
    association = sock.context._associations.by_id(bytes.fromhex(info.association), time.time())
    if association is None:
        raise QKDUnavailable("the association has ended", hint=_BOOTSTRAP_AGAIN, peer=info.server_sae_id)
    keys = manager.get_keys(association.server_sae_id, 1)
    try:
        psk = association.psk(keys[0], kdf)
    except ValueError as error:
        raise QKDUnavailable(
            f"no PSK could be made of key {keys[0].key_id}: {error}",
            hint=_BOOTSTRAP_AGAIN,
            peer=association.server_sae_id,
            kms=manager.name,
            key_ids=(keys[0].key_id,),
        ) from None
    finally:
        wipe_keys(keys)
    return _exported(psk, association)


def _exported(psk: PSK, association: Association) -> ExportedPSK:
    return ExportedPSK(
        psk.identity.decode(),
        psk.secret,
        psk.kdf,
        psk.key_id,
        association.server_name,
        association.expires_at,
    )
