"""Errors between a program and its key management system (KMS).

The class says who has to act: nothing but waiting helps (`KMSUnavailable`), the keeper of the certificates
(`KMSAuthenticationError`), the operator who defines the secure site (`KMSOutsideSecureSite`), the author of
the request (`KMSRequestError`), the vendor of the KME (`KMSProtocolError`), or our own program
(`KeyAlreadyUsed`). No error ever holds key material.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

__all__ = [
    "KMSAuthenticationError",
    "KMSError",
    "KMSOutsideSecureSite",
    "KMSProtocolError",
    "KMSRequestError",
    "KMSTimeout",
    "KMSUnavailable",
    "KeyAlreadyUsed",
    "NoKeysLeft",
    "UnknownKey",
    "UnknownSAE",
]

_MAX_SHOWN_IDS = 4
_MAX_SHOWN_LENGTH = 120


def shown(text: str) -> str:
    """Return `text` fit for a message or a log line: printable, on one line, not too long."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= _MAX_SHOWN_LENGTH else line[: _MAX_SHOWN_LENGTH - 3] + "..."


class KMSError(Exception):
    """A key management system could not be used as asked.

    Attributes:
        message: what happened, in a few words.
        kms: the KME's display name, usually its URL; "" if none was involved.
        peer: the SAE ID of the peer that the keys are shared with, if known.
        key_ids: the IDs of the keys concerned.
        status: the HTTP status code answered, if there was one.
        hint: what to do about it.
        keys_may_be_lost: True if the KME may have removed the keys from its store although none arrived here.
    """

    default_hint: ClassVar[str] = ""
    default_keys_may_be_lost: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        kms: str = "",
        peer: str | None = None,
        key_ids: Iterable[str] = (),
        status: int | None = None,
        hint: str = "",
        keys_may_be_lost: bool | None = None,
    ) -> None:
        """Keep the parts; `str()` puts them together."""
        super().__init__(message)
        self.message = message
        self.kms = kms
        self.peer = peer
        self.key_ids = tuple(key_ids)
        self.status = status
        self.hint = hint or self.default_hint
        self.keys_may_be_lost = (
            self.default_keys_may_be_lost if keys_may_be_lost is None else keys_may_be_lost
        )

    def __str__(self) -> str:
        """Return the summary and the hint."""
        return f"{self.summary}. {self.hint}" if self.hint else self.summary

    @property
    def summary(self) -> str:
        """The error, the KME, the peer and the keys concerned."""
        where = []
        if self.kms:
            where.append(f"KMS {shown(self.kms)}")
        if self.peer is not None:
            where.append(f"peer SAE {shown(self.peer)}")
        if self.key_ids:
            listed = ", ".join(shown(key_id) for key_id in self.key_ids[:_MAX_SHOWN_IDS])
            more = len(self.key_ids) - _MAX_SHOWN_IDS
            where.append(f"key ID {listed}" + (f" and {more} more" if more > 0 else ""))
        if self.status is not None:
            where.append(f"HTTP status {self.status}")
        return self.message + (f" ({'; '.join(where)})" if where else "")


class KMSUnavailable(KMSError):
    """The KMS cannot serve now: connection refused or lost, status 5xx, link down. Later it may."""

    default_hint = "Check that the KME runs and is reachable, then try again."


class KMSTimeout(KMSUnavailable):
    """The KMS did not answer in time; a key request may still have been carried out."""

    default_hint = "Check that the KME is not overloaded; any keys it delivered meanwhile are lost."
    default_keys_may_be_lost = True


class NoKeysLeft(KMSUnavailable):
    """The KMS has fewer keys for this peer than were asked for."""

    default_hint = "Wait for the QKD link to make more keys, or ask for fewer."


class KMSAuthenticationError(KMSError):
    """The KMS and this program could not authenticate each other."""

    default_hint = "Check the CA, the certificates of the KME and of this SAE, and their validity."


class KMSOutsideSecureSite(KMSError):
    """The KMS is at an address outside the secure site; no request was sent."""

    default_hint = "Name the KME's network if it is inside: site=SecureSite([...])."


class KMSRequestError(KMSError):
    """The KMS refused the request: it will refuse it again."""

    default_hint = "Check number and size of the keys against the KME's status."


class UnknownKey(KMSRequestError):
    """The KMS has no such key for this pair of SAEs, or has delivered it already."""

    default_hint = "A key is delivered once only: ask the master SAE for a new key."


class UnknownSAE(KMSRequestError):
    """The KMS knows no such peer SAE, or has no QKD link towards it."""

    default_hint = "Check the peer's SAE ID and that it is registered with the KMEs."


class KMSProtocolError(KMSError):
    """The KMS answered with something other than a valid answer."""

    default_hint = "Check that the URL is that of a KME and which version of the interface it speaks."
    default_keys_may_be_lost = True


class KeyAlreadyUsed(KMSError):
    """A key was used a second time, or after it was wiped."""

    default_hint = "A QKD key protects one thing once: ask the KMS for a new key."
