"""Hints for a refusal, by its code or by OpenSSL's reason."""

from __future__ import annotations

import ssl
from typing import Final

from qkd_tls.control import RejectCode

__all__ = ["CLIENT_HINTS", "CLIENT_PSK_HINTS", "REJECT_HINTS", "SERVER_HINTS", "with_hint"]


def with_hint(error: ssl.SSLError, hint: str) -> ssl.SSLError:
    """Return the same error, with the hint behind its text."""
    if not hint:
        return error
    explained = type(error)(error.args[0], f"{error.args[1]}: {hint}")
    explained.library, explained.reason = error.library, error.reason
    return explained


REJECT_HINTS: Final[dict[str, str]] = {
    RejectCode.KMS_UNAVAILABLE: "check the server's KME and the QKD link",
    RejectCode.UNKNOWN_KEY: "check that the KMEs of both sites belong to one link and are in step",
    RejectCode.UNKNOWN_SAE: "check the SAE IDs at both ends and at both KMEs",
    RejectCode.UNSUPPORTED_KMS: "use key managers of one kind at both ends, and check the client's KME",
    RejectCode.UNSUPPORTED_KEM: "choose a KEM that the server has, ML-KEM-768 always",
    RejectCode.KEM_REQUIRED: "add X25519MLKEM768 to the groups, or set kem='ML-KEM-768' on the client",
    RejectCode.UNSUPPORTED_VERSION: "install versions that speak qkd-tls/1 at both ends",
    RejectCode.BUSY: "try again later",
    RejectCode.MALFORMED: "check the versions at both ends",
}

_NO_COMMON_GROUP: Final = (
    "no key exchange group in common: the client offers {theirs}, this server has {ours}. The client needs a TLS stack "
    "with X25519MLKEM768 (OpenSSL 3.5 or newer); a classical group has to be added by name"
)
_NOTHING_ACCEPTED: Final = "the client accepts nothing of what this server speaks"
_NO_COMMON_GROUND: Final = (
    "the server found no common ground: it may lack X25519MLKEM768 (OpenSSL 3.5 or newer); a classical group has to be "
    "added by name"
)
_TLS_1_3_ONLY: Final = "the peer does not speak TLS 1.3, which is the only version here"

SERVER_HINTS: Final = {
    "NO_SUITABLE_KEY_SHARE": _NO_COMMON_GROUP,
    "NO_SUITABLE_GROUPS": _NO_COMMON_GROUP,
    "BAD_KEY_SHARE": _NO_COMMON_GROUP,
    "UNSUPPORTED_PROTOCOL": _TLS_1_3_ONLY,
    "HTTP_REQUEST": "this port speaks TLS, the client sent plain HTTP",
    "WRONG_VERSION_NUMBER": "the client does not speak TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "this server requires a client certificate, and the client has sent none",
    "TLSV1_ALERT_UNKNOWN_CA": "the client does not trust the CA of this server's certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": _NOTHING_ACCEPTED,
}

CLIENT_HINTS: Final = {
    "SSLV3_ALERT_HANDSHAKE_FAILURE": _NO_COMMON_GROUND,
    "TLSV1_ALERT_PROTOCOL_VERSION": _TLS_1_3_ONLY,
    "UNSUPPORTED_PROTOCOL": _TLS_1_3_ONLY,
    "WRONG_VERSION_NUMBER": "the server does not speak TLS on this port",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the server requires a client certificate: load_cert_chain()",
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not trust the CA of our certificate",
}

# What other TLS stacks answer to a ClientHello with the PSK of a key.
CLIENT_PSK_HINTS: Final = {
    **CLIENT_HINTS,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": (
        "the server refused the handshake with QKD key {key_id}: it may lack X25519MLKEM768 (a classical group has to "
        "be added by name), or its PSKs may be for another hash (kdf)"
    ),
    "SSLV3_ALERT_ILLEGAL_PARAMETER": (
        "some TLS stacks say so where the two sides hold different keys, here for key ID {key_id}: check that the KMEs "
        "of both sites belong to one link and are in step"
    ),
}
