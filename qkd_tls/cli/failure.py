"""Error messages and exit codes of the commands."""

from __future__ import annotations

import enum
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from kms_client import KMSError
from qkd_tls.cli.terminal import printable
from qkd_tls.errors import QKDError

__all__ = ["CommandError", "ExitCode", "Failure", "explain_error"]


class ExitCode(enum.IntEnum):
    """The exit codes of every command."""

    OK = 0
    """Success."""
    CONNECTION = 1
    """No connection, TLS failed, or the connection broke."""
    USAGE = 2
    """Wrong options, environment variables, configuration or files."""
    QKD = 3
    """No QKD key, different keys at both ends, or a peer that broke qkd-tls/1."""
    CERTIFICATE = 4
    """A certificate was refused or is missing."""
    INTERRUPTED = 130
    """Ended by Ctrl-C."""


class CommandError(Exception):
    """A command that cannot go on; `hint` says what to do."""

    def __init__(self, message: str, *, hint: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message, self.hint, self.code = message, hint, code


@dataclass(frozen=True, slots=True)
class Failure:
    """The message, hint and exit code for an exception."""

    kind: str
    message: str
    hint: str
    code: ExitCode

    def as_dict(self) -> dict[str, Any]:
        """Return the member `error` of a command's JSON."""
        return {"type": self.kind, "message": self.message, "hint": self.hint, "exit_code": int(self.code)}

    def __str__(self) -> str:
        return f"error: {self.message}\nhint: {self.hint}"


_REASON: Final = re.compile(r"^\[SSL(: \S+)?\] ")
# OpenSSL's reasons for alerts about certificates, and for those that should have come.
_ABOUT_CERTIFICATES: Final = re.compile("CERTIFICATE|UNKNOWN_CA")
_CERTIFICATE_HINTS: Final = (
    ("mismatch", "connect by a name that is in the certificate, or give that name with --server-name"),
    ("self-signed", "give the CA of the peer's certificate with --ca"),
    ("self signed", "give the CA of the peer's certificate with --ca"),
    ("issuer", "give the CA of the peer's certificate with --ca"),
    ("expired", "the peer's certificate has to be renewed; if it is not that, look at this machine's clock"),
    ("not yet valid", "look at this machine's clock"),
    ("revoked", "the peer's certificate has been revoked: it must not be trusted"),
)


def explain_error(error: BaseException) -> Failure | None:
    """Return the message for an expected exception; None for a mistake in this program."""
    cause = _root(error)
    kind = type(cause).__name__
    if isinstance(cause, CommandError):
        return Failure(kind, cause.message, cause.hint, cause.code)
    if isinstance(cause, KMSError):
        return Failure(
            kind, printable(cause.summary), cause.hint.rstrip(".") or "look at the KME's log", ExitCode.QKD
        )
    if isinstance(cause, QKDError):
        message = (cause.strerror or "").partition(". What to do: ")[0]
        return Failure(kind, printable(message), printable(cause.hint.rstrip(".")), ExitCode.QKD)
    if isinstance(cause, KeyboardInterrupt):
        return Failure(kind, "interrupted", "start it again to go on", ExitCode.INTERRUPTED)
    if isinstance(cause, ssl.SSLError):
        return _tls_failure(cause, kind)
    if isinstance(cause, OSError):
        return _system_failure(cause, kind)
    return None


def _tls_failure(error: ssl.SSLError, kind: str) -> Failure:
    if isinstance(error, ssl.SSLCertVerificationError):
        message = f"the peer's certificate was refused: {error.verify_message}".rstrip(".")
        hint = next(
            (hint for word, hint in _CERTIFICATE_HINTS if word in error.verify_message.lower()),
            "look at the certificate, for instance with: openssl x509 -text",
        )
        return Failure(kind, printable(message), hint, ExitCode.CERTIFICATE)
    # Where there is a hint, the engine has put it behind OpenSSL's own words.
    message, _, hint = _REASON.sub("", str(error.args[1])).partition(": ")
    code = ExitCode.CERTIFICATE if _ABOUT_CERTIFICATES.search(error.reason or "") else ExitCode.CONNECTION
    return Failure(kind, printable(message), printable(hint) or "look at the peer's log", code)


def _system_failure(error: OSError, kind: str) -> Failure:
    message = error.strerror or str(error) or kind
    code, hint = ExitCode.CONNECTION, "check the network between the two machines"
    if error.filename is not None:
        message = f"{error.filename}: {message}"
        code, hint = ExitCode.USAGE, "check the path and its permissions"
    elif isinstance(error, BrokenPipeError | ConnectionResetError):
        hint = "the peer has gone: look at its log"
    elif isinstance(error, ConnectionRefusedError):
        hint = "check host and port, and that the server runs"
    elif isinstance(error, socket.gaierror):
        hint = "check the spelling of the host name, and the name service"
    elif isinstance(error, TimeoutError):
        hint = "check that the peer answers; a slow KME counts too; --timeout gives more time"
    return Failure(kind, printable(message), hint, code)


def _root(error: BaseException) -> BaseException:
    """Return the error that says most: `requests` and `urllib3` put others around it."""
    if isinstance(error, CommandError | QKDError | KMSError):
        return error
    links = list(_links(error))
    for wanted in (QKDError, ssl.SSLError, OSError):
        found = [link for link in links if isinstance(link, wanted)]
        if found:
            return found[-1]
    return error


def _links(error: BaseException) -> Iterator[BaseException]:
    yield error
    for inner in (*error.args, getattr(error, "reason", None), error.__cause__):
        if isinstance(inner, BaseException):
            yield from _links(inner)
