"""Access to quantum key distribution (QKD) keys through a key management system (KMS).

Knows nothing of TLS connections between applications: that is `qkd_tls`.
"""

from .breaker import BreakerState
from .errors import (
    KeyAlreadyUsed,
    KMSAuthenticationError,
    KMSError,
    KMSOutsideSecureSite,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    UnknownKey,
    UnknownSAE,
)
from .etsi014 import Etsi014Client
from .failover import FailoverKeyManager, MemberHealth
from .keys import QKDKey, wipe_keys
from .local import LocalKeyManager
from .manager import KeyManager, KMSStatus
from .pool import KeyPool, PoolStatistics
from .secure_site import SecureSite
from .skip import SkipClient
from .skip_messages import SkipCapabilities

__all__ = [
    "BreakerState",
    "Etsi014Client",
    "FailoverKeyManager",
    "KMSAuthenticationError",
    "KMSError",
    "KMSOutsideSecureSite",
    "KMSProtocolError",
    "KMSRequestError",
    "KMSStatus",
    "KMSTimeout",
    "KMSUnavailable",
    "KeyAlreadyUsed",
    "KeyManager",
    "KeyPool",
    "LocalKeyManager",
    "MemberHealth",
    "NoKeysLeft",
    "PoolStatistics",
    "QKDKey",
    "SecureSite",
    "SkipCapabilities",
    "SkipClient",
    "UnknownKey",
    "UnknownSAE",
    "wipe_keys",
]
