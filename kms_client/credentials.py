"""Credentials towards a KME: certificate, private key and CA, loaded once into a TLS context.

No private key is written to a disk. The standard library loads keys from paths only, so a key from a PKCS#12
file passes through a file in memory that has no name (memfd_create(2)), encrypted under a random password.
"""

from __future__ import annotations

import os
import secrets
import ssl
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    pkcs12,
)

from kms_client.errors import KMSAuthenticationError

__all__ = ["FilePath", "Password", "client_context", "hidden"]

FilePath = str | os.PathLike[str]
Password = str | bytes | os.PathLike[str] | Callable[[], str | bytes]

_ENCRYPTED_HINT = "The private key is encrypted: give key_password."


class _Unusable(Exception):
    """A file that cannot be used: which one, why, and perhaps what to do."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem, self.hint = problem, hint


def hidden(password: Password | None) -> Callable[[], bytes] | None:
    """Wrap a password in a function, which error reports that list variables do not show; read when called.

    A path (other than a `str`) names a file that holds the password, without the end of its last line.
    """
    if password is None:
        return None

    def value() -> bytes:
        given = password() if callable(password) else password
        if isinstance(given, os.PathLike):
            given = _secret_file(Path(given)).rstrip(b"\r\n")
        return given.encode() if isinstance(given, str) else given

    return value


def client_context(
    *,
    cert: FilePath | None,
    key: FilePath | None,
    ca: FilePath | None,
    pkcs12: FilePath | None,
    key_password: Callable[[], bytes] | None,
    kms: str,
) -> ssl.SSLContext:
    """Return a context that presents this SAE's certificate and checks certificate and host name of the KME.

    Args:
        cert: certificate chain, PEM.
        key: private key, PEM; None if it is in the same file as the certificate.
        ca: CA certificates for the KME's certificate, PEM.
        pkcs12: certificate chain and private key in one PKCS#12 file, instead of `cert` and `key`.
        key_password: of the private key or of the PKCS#12 file.
        kms: name of the KME, for errors.

    Raises:
        ValueError: something is missing, or given twice.
        KMSAuthenticationError: a file cannot be loaded.

    A key log is never written, even if the environment asks for one: QKD keys could be read from a
    recording of the link.
    """
    if (cert is None) == (pkcs12 is None) or (pkcs12 is not None and key is not None):
        raise ValueError("a KME needs this SAE's certificate: give cert and key, or pkcs12")
    if ca is None:
        raise ValueError("a KME's certificate must be checked: give ca, the CA that has issued it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        if pkcs12 is not None:
            _load_pkcs12(context, Path(pkcs12), key_password)
        else:
            _load_pem(context, os.fspath(cert or ""), None if key is None else os.fspath(key), key_password)
        _load_ca(context, os.fspath(ca))
    except _Unusable as error:
        problem, hint = error.problem, error.hint
    else:
        return context
    # Out of the except block: the frames below hold what was read.
    raise KMSAuthenticationError(problem, kms=kms, hint=hint)


def _load_pem(
    context: ssl.SSLContext, cert: str, key: str | None, password: Callable[[], bytes] | None
) -> None:
    files = cert if key is None else f"{cert} and {key}"
    asked = False

    def give() -> bytes:
        # Never left to OpenSSL, which would ask on the terminal.
        nonlocal asked
        asked = True
        return password() if password is not None else b""

    try:
        context.load_cert_chain(cert, key, give)
    except OSError as error:
        raise _Unusable(
            f"this SAE's certificate and key cannot be loaded from {files}: {error}",
            "" if not asked else _ENCRYPTED_HINT if password is None else "Check key_password.",
        ) from None


def _load_pkcs12(context: ssl.SSLContext, path: Path, password: Callable[[], bytes] | None) -> None:
    what = f"this SAE's certificate and key cannot be loaded from {path}"
    try:
        content = pkcs12.load_pkcs12(path.read_bytes(), password() if password is not None else None)
    except (OSError, ValueError) as error:
        raise _Unusable(f"{what}: {error}", "Check key_password, and that the file is PKCS#12.") from None
    if content.key is None or content.cert is None:
        raise _Unusable(f"{what}: it has no {'private key' if content.key is None else 'certificate'}")
    wrapping = secrets.token_hex(32).encode()
    pem = content.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(wrapping))
    for entry in (content.cert, *content.additional_certs):
        pem += entry.certificate.public_bytes(Encoding.PEM)
    descriptor = os.memfd_create("pkcs12")
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=wrapping)
    except OSError as error:
        raise _Unusable(f"{what}: {error}") from None
    finally:
        os.close(descriptor)


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise _Unusable(f"the CA certificates cannot be loaded from {path}: {error}") from None


def _secret_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise _Unusable(
                    f"everybody on this machine may read or change {path} (mode {mode:04o})", "chmod 600 it."
                )
            return file.read()
    except OSError as error:
        raise _Unusable(f"the password cannot be read from {path}: {error.strerror}") from None
