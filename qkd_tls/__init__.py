"""TLS 1.3 connections keyed by X25519, ML-KEM-768 and a QKD key, authenticated with X.509 certificates."""

from importlib.metadata import version as _version

from qkd_tls.context import QKDContext, create_default_context
from qkd_tls.errors import (
    ClassicalGroupWarning,
    QKDError,
    QKDFallbackWarning,
    QKDKeyMismatch,
    QKDProtocolError,
    QKDUnavailable,
)
from qkd_tls.hybrid import KDF
from qkd_tls.info import HandshakePath, Protection, QKDInfo
from qkd_tls.policy import Policy
from qkd_tls.socket import QKDSocket
from qkd_tls.sslobject import QKDObject

__all__ = [
    "KDF",
    "ClassicalGroupWarning",
    "HandshakePath",
    "Policy",
    "Protection",
    "QKDContext",
    "QKDError",
    "QKDFallbackWarning",
    "QKDInfo",
    "QKDKeyMismatch",
    "QKDObject",
    "QKDProtocolError",
    "QKDSocket",
    "QKDUnavailable",
    "create_default_context",
]

__version__ = _version("qkd-tls")
