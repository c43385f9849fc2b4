"""Access to quantum key distribution (QKD) keys through a key management system (KMS).

Knows nothing of TLS connections between applications: that is `qkd_tls`.
"""

from kms_client.breaker import BreakerState
from kms_client.errors import (
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
from kms_client.etsi014 import Etsi014Client
from kms_client.failover import FailoverKeyManager, MemberHealth
from kms_client.keys import QKDKey, wipe_keys
from kms_client.local import LocalKeyManager
from kms_client.manager import KeyManager, KMSStatus
from kms_client.pool import KeyPool, PoolStatistics
from kms_client.secure_site import SecureSite
from kms_client.skip import SkipClient
from kms_client.skip_messages import SkipCapabilities

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
