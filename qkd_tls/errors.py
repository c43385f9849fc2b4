"""Errors and warnings of a hybrid connection: the class says who is at fault, the text says what to do.

All errors are `ssl.SSLError`, hence `OSError`: a program that copes with TLS errors copes with these. What OpenSSL
refuses (certificates, protocol version, groups) is raised as the standard library's own classes.
"""

from __future__ import annotations

import ssl
from typing import Final, TypeVar

__all__ = [
    "ClassicalGroupWarning",
    "QKDError",
    "QKDFallbackWarning",
    "QKDKeyMismatch",
    "QKDProtocolError",
    "QKDUnavailable",
    "raised_anew",
    "ssl_error",
]

_SSLError = TypeVar("_SSLError", bound=ssl.SSLError)

_NUMBERS: Final[dict[type[ssl.SSLError], int]] = {
    ssl.SSLWantReadError: ssl.SSL_ERROR_WANT_READ,
    ssl.SSLWantWriteError: ssl.SSL_ERROR_WANT_WRITE,
    ssl.SSLZeroReturnError: ssl.SSL_ERROR_ZERO_RETURN,
    ssl.SSLEOFError: ssl.SSL_ERROR_EOF,
}


def ssl_error(kind: type[_SSLError], text: str, reason: str | None = None) -> _SSLError:
    """Return an error like the standard library's: with number, `library` and `reason` (None if unknown)."""
    error = kind(_NUMBERS.get(kind, ssl.SSL_ERROR_SSL), text)
    error.library, error.reason = "SSL" if reason else None, reason  # type: ignore[assignment]
    return error


def raised_anew(error: OSError) -> OSError:
    """Return a copy of an error, to raise what an object has kept.

    An error that has been raised leads to all that its callers held: kept by one of them, it is a reference cycle.
    """
    kind = type(error)
    copy = kind.__new__(kind, *error.args)
    copy.args = error.args
    copy.errno, copy.strerror = error.errno, error.strerror
    copy.__dict__.update(error.__dict__)
    copy.__cause__, copy.__suppress_context__ = error.__cause__, True
    return copy


class QKDError(ssl.SSLError):
    """A failure of the QKD key to protect this connection.

    Attributes: ``peer`` (the peer's SAE ID or name, if known), ``kms`` (name of the KME asked), ``key_ids``,
    ``code`` (the reject code of qkd-tls/1, if the peer gave one), ``hint``.
    """

    def __init__(
        self,
        text: str,
        *,
        hint: str,
        peer: str | None = None,
        kms: str = "",
        key_ids: tuple[str, ...] = (),
        code: str | None = None,
    ) -> None:
        self.hint = hint
        self.peer = peer
        self.kms = kms
        self.key_ids = key_ids
        self.code = code
        super().__init__(ssl.SSL_ERROR_SSL, f"{text}. What to do: {hint.rstrip('.')}")
        self.library, self.reason = "QKD", type(self).__name__


class QKDUnavailable(QKDError):
    """No QKD key under policy `require`: a KME failed, the peer refused, or it does not speak qkd-tls/1."""


class QKDKeyMismatch(QKDError):
    """Different keys from the two KMEs for one key ID, or an attacker in between without the key."""


class QKDProtocolError(QKDError):
    """A peer that broke the rules of qkd-tls/1."""


class QKDFallbackWarning(UserWarning):
    """Policy `prefer`: this connection has no QKD key."""


class ClassicalGroupWarning(UserWarning):
    """The key exchange of this connection has no ML-KEM, since the operator has added a classical group by name."""
