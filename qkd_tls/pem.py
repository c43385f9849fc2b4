"""Certificates, CRLs and passwords from files and programs: PEM and DER (RFC 7468, X.690).

The input that the standard library accepts is accepted here, with its errors.
"""

from __future__ import annotations

import binascii
import os
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from qkd_tls.errors import ssl_error

__all__ = ["Passphrase", "Password", "StrPath", "read_chain", "read_pem", "split_der"]

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Password = str | bytes | bytearray | Callable[[], str | bytes | bytearray]

_PEM: Final = re.compile(
    r"-----BEGIN (CERTIFICATE|X509 CERTIFICATE|TRUSTED CERTIFICATE|X509 CRL)-----\s.+?-----END \1-----",
    re.DOTALL,
)
# OpenSSL's buffer for it (PEM_BUFSIZE).
_LONGEST_PASSWORD: Final = 1024


def read_pem(text: str) -> tuple[list[bytes], list[bytes]]:
    """Return the certificates and the CRLs in PEM text, each in DER; skip everything else."""
    certificates, crls = [], []
    for match in _PEM.finditer(text):
        if match.group(1) == "X509 CRL":
            crls.append(_der(match))
        else:
            certificates.append(_certificate(match))
    return certificates, crls


def _der(match: re.Match[str]) -> bytes:
    # The standard library's converter knows one label only.
    return ssl.PEM_cert_to_DER_cert(match.group().replace(f" {match.group(1)}-", " CERTIFICATE-"))


def _certificate(match: re.Match[str]) -> bytes:
    der = _der(match)
    # A trusted certificate has OpenSSL's own settings behind it.
    return next(split_der(der), b"") if match.group(1) == "TRUSTED CERTIFICATE" else der


def read_chain(file: str) -> list[bytes]:
    """Return the certificates of a PEM file, each in DER, in its order.

    Raises:
        ssl.SSLError: there is none, or one is damaged.
        OSError: the file cannot be read.
    """
    try:
        found = [m for m in _PEM.finditer(Path(file).read_text("latin-1")) if m.group(1) != "X509 CRL"]
        # As OpenSSL does: a trusted certificate may come first only.
        chain = [_certificate(m) for m in found[:1]]
        chain += [_der(m) for m in found[1:] if m.group(1) != "TRUSTED CERTIFICATE"]
    except binascii.Error as error:
        raise ssl_error(ssl.SSLError, f"[SSL] PEM lib: a certificate in {file} is damaged: {error}") from None
    if not chain:
        raise ssl_error(ssl.SSLError, f"[SSL] PEM lib: no certificate in {file}")
    return chain


def split_der(data: bytes) -> Iterator[bytes]:
    """Yield the certificates in concatenated DER; each is a SEQUENCE that says how long it is.

    Raises:
        ssl.SSLError: the data does not begin with one.
    """
    while data:
        if data[0] != 0x30 or len(data) < 2:
            raise ssl.SSLError(
                ssl.SSL_ERROR_SSL, "[SSL] not enough data: cadata does not contain a certificate"
            )
        size, header = data[1], 2
        if size & 0x80:
            header += size & 0x7F
            size = int.from_bytes(data[2:header], "big")
        yield data[: header + size]
        data = data[header + size :]


class Passphrase:
    """A callable that gives OpenSSL the password of a private key."""

    def __init__(self, password: Password) -> None:
        self.error: Exception | None = None
        """The error that the program's function raised instead of giving a password."""
        self._ask = password if callable(password) else None
        self._given = b"" if callable(password) else self._checked(password, "password should be a string")

    def __call__(self, *_: object) -> bytes:
        """Return the password.

        Raises the errors of the program's function, and TypeError or ValueError for an unusable password.
        """
        if self._ask is None:
            return self._given
        try:
            return self._checked(self._ask(), "password callback must return a string")
        except Exception as error:
            self.error = error
            raise

    @staticmethod
    def _checked(value: object, complaint: str) -> bytes:
        if not isinstance(value, str | bytes | bytearray):
            raise TypeError(complaint)
        password = value.encode() if isinstance(value, str) else bytes(value)
        if len(password) > _LONGEST_PASSWORD:
            raise ValueError(f"password cannot be longer than {_LONGEST_PASSWORD} bytes")
        return password
