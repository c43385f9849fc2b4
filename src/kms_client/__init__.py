"""Access to quantum key distribution (QKD) keys through a key management system (KMS).

Knows nothing of TLS connections between applications: that is `qkd_tls`.
"""

from .errors import (
    KeyAlreadyUsed,
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    UnknownKey,
    UnknownSAE,
)
from .etsi014 import Etsi014Client
from .keys import QKDKey, wipe_keys
from .local import LocalKeyManager
from .manager import KeyManager, KMSStatus

__all__ = [
    "Etsi014Client",
    "KMSAuthenticationError",
    "KMSError",
    "KMSProtocolError",
    "KMSRequestError",
    "KMSStatus",
    "KMSTimeout",
    "KMSUnavailable",
    "KeyAlreadyUsed",
    "KeyManager",
    "LocalKeyManager",
    "NoKeysLeft",
    "QKDKey",
    "UnknownKey",
    "UnknownSAE",
    "wipe_keys",
]
