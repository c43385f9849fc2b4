"""The explicit KEM of an offer: ML-KEM from `cryptography`, and those of liboqs if it is installed.

`import oqs` (liboqs-python) without the liboqs shared library starts to download and compile it. So the
library is looked for first, in the same places as in that package, and `oqs` is imported only if one of them
loads. That happens when `names` is first called or a name is used that is not an ML-KEM; importing this
module does not.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib
import importlib.util
import logging
import os
import platform
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
    MLKEM1024PrivateKey,
    MLKEM1024PublicKey,
)

__all__ = ["KEMError", "KEMKey", "UnsupportedKEM", "encapsulate", "generate", "names"]

_MLKEMPrivateKey: TypeAlias = type[MLKEM768PrivateKey] | type[MLKEM1024PrivateKey]
_MLKEMPublicKey: TypeAlias = type[MLKEM768PublicKey] | type[MLKEM1024PublicKey]

_MLKEM: Final[Mapping[str, tuple[_MLKEMPrivateKey, _MLKEMPublicKey]]] = {
    "ML-KEM-768": (MLKEM768PrivateKey, MLKEM768PublicKey),
    "ML-KEM-1024": (MLKEM1024PrivateKey, MLKEM1024PublicKey),
}

# What fits, in base64 and beside the key IDs, into a control message of 65,535 bytes. This leaves out Classic
# McEliece alone, whose encapsulation keys start at 261,120 bytes.
_MAX_SIZE: Final = 45_000


class UnsupportedKEM(ValueError):
    """A KEM that is not available here."""


class KEMError(ValueError):
    """An unusable encapsulation key or ciphertext, or a key that was used already."""


class _DecapsulationKey(Protocol):
    def decapsulate(self, ciphertext: bytes, /) -> bytes: ...


class KEMKey:
    """A fresh key pair for one encapsulation.

    Attributes:
        name: the KEM's name.
        encapsulation_key: the public half, for the peer.
    """

    __slots__ = ("_unused", "encapsulation_key", "name")

    def __init__(self, name: str, encapsulation_key: bytes, decapsulation_key: _DecapsulationKey) -> None:
        """Store the key pair that `generate` has made."""
        self.name = name
        self.encapsulation_key = encapsulation_key
        # `list.pop` takes the key out atomically: of two threads one gets it.
        self._unused = [decapsulation_key]

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """Return the shared secret, once; the key is freed, and so wiped by the library that holds it.

        A ciphertext that has the right size but was made for another key gives another secret, not an error
        (implicit rejection, FIPS 203 section 6.3).

        Raises:
            KEMError: the ciphertext is unusable, or the key was used before.
        """
        try:
            key = self._unused.pop()
        except IndexError:
            raise KEMError(f"this {self.name} key was used already") from None
        try:
            return key.decapsulate(ciphertext)
        except (ValueError, RuntimeError):
            raise KEMError(f"{len(ciphertext)} bytes that are no {self.name} ciphertext") from None

    def __repr__(self) -> str:
        """Return the name, and whether the key can still be used."""
        return f"<KEMKey {self.name} {'unused' if self._unused else 'used'}>"


@functools.cache
def names() -> tuple[str, ...]:
    """Return the KEMs available here, the recommended first."""
    return (*filter(_has_mlkem, _MLKEM), *(name for name in _liboqs_names() if name not in _MLKEM))


def generate(name: str) -> KEMKey:
    """Generate a fresh key pair.

    Raises:
        UnsupportedKEM: the KEM is not available here.
    """
    if name in _MLKEM:
        try:
            private_key = _MLKEM[name][0].generate()
        except UnsupportedAlgorithm:
            raise _unsupported(name) from None
        return KEMKey(name, private_key.public_key().public_bytes_raw(), private_key)
    key = _LiboqsKey(name)
    return KEMKey(name, key.encapsulation_key, key)


def encapsulate(name: str, encapsulation_key: bytes) -> tuple[bytes, bytes]:
    """Make a fresh secret for the holder of an encapsulation key.

    Returns:
        The ciphertext for the peer, and the shared secret.

    Raises:
        UnsupportedKEM: the KEM is not available here.
        KEMError: the encapsulation key is not one of this KEM.
    """
    try:
        if name in _MLKEM:
            secret, ciphertext = _MLKEM[name][1].from_public_bytes(encapsulation_key).encapsulate()
            return ciphertext, secret
        with _liboqs_kem(name) as kem:
            return _liboqs_encapsulate(kem, encapsulation_key)
    except UnsupportedAlgorithm:
        raise _unsupported(name) from None
    except UnsupportedKEM:
        raise
    except (ValueError, RuntimeError):
        raise KEMError(f"{len(encapsulation_key)} bytes that are no {name} encapsulation key") from None


def _unsupported(name: str) -> UnsupportedKEM:
    return UnsupportedKEM(f"the KEM {name!r} is not available here; available: {', '.join(names())}")


def _has_mlkem(name: str) -> bool:
    """Return whether the OpenSSL that `cryptography` was built with has this ML-KEM."""
    try:
        _MLKEM[name][0].generate()
    except UnsupportedAlgorithm:
        return False
    return True


class _LiboqsKey:
    """A decapsulation key in liboqs, cleansed and freed after use or when it is thrown away."""

    def __init__(self, name: str) -> None:
        self._kem = _liboqs_kem(name)
        # liboqs-python frees nothing by itself, and freeing twice would crash: a finalizer runs once.
        self._free = weakref.finalize(self, self._kem.free)
        self.encapsulation_key: bytes = self._kem.generate_keypair()

    def decapsulate(self, ciphertext: bytes, /) -> bytes:
        try:
            # liboqs-python pads what is too short with zeros.
            if len(ciphertext) != self._kem.details["length_ciphertext"]:
                raise ValueError("wrong size")
            secret: bytes = self._kem.decap_secret(ciphertext)
        finally:
            self._free()
        return secret


def _liboqs_encapsulate(kem: Any, encapsulation_key: bytes) -> tuple[bytes, bytes]:
    if len(encapsulation_key) != kem.details["length_public_key"]:
        raise ValueError("wrong size")
    ciphertext, secret = kem.encap_secret(encapsulation_key)
    return ciphertext, secret


def _liboqs_kem(name: str) -> Any:
    """Return an `oqs.KeyEncapsulation`, to be freed."""
    if name not in _liboqs_names():
        raise _unsupported(name)
    return _oqs().KeyEncapsulation(name)


@functools.cache
def _liboqs_names() -> tuple[str, ...]:
    """Return the KEMs of liboqs whose keys and ciphertexts fit into a control message."""
    oqs = _oqs()
    if oqs is None:
        return ()
    fitting = []
    for name in oqs.get_enabled_kem_mechanisms():
        with oqs.KeyEncapsulation(name) as kem:
            if max(kem.details["length_public_key"], kem.details["length_ciphertext"]) <= _MAX_SIZE:
                fitting.append(name)
    return tuple(fitting)


@functools.cache
def _oqs() -> Any:
    """Return the module `oqs`; None if it or its shared library is missing or does not work."""
    if importlib.util.find_spec("oqs") is None or not _liboqs_loads():
        return None
    # On import it writes a line about faulthandler to standard output.
    logger = logging.getLogger("oqs.oqs")
    logger.disabled = True
    try:
        oqs = importlib.import_module("oqs")
    except (AttributeError, RuntimeError, SystemExit):
        # The shared library is older than liboqs-python and lacks a function, for example.
        return None
    finally:
        logger.disabled = False
    # PyPI has another package that is imported by this name.
    return oqs if hasattr(oqs, "KeyEncapsulation") else None


def _liboqs_loads() -> bool:
    """Return whether liboqs-python will find its shared library."""
    try:
        paths = list(_liboqs_paths())
    except RuntimeError:
        # No home directory: liboqs-python would fail for the same reason.
        return False
    for path in paths:
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return True
    return False


def _liboqs_paths() -> Iterator[str]:
    """Yield all paths that versions of liboqs-python search: the system's libraries, then its own folder."""
    for name in ("oqs", "liboqs"):
        if found := ctypes.util.find_library(name):
            yield found
    folder = (
        Path(os.environ["OQS_INSTALL_PATH"]) if "OQS_INSTALL_PATH" in os.environ else Path.home() / "_oqs"
    )
    match platform.system():
        case "Windows":
            files = ("bin/oqs.dll", "bin/liboqs.dll")
        case "Darwin":
            files = ("lib/liboqs.dylib", "lib64/liboqs.dylib")
        case _:
            files = ("lib/liboqs.so", "lib64/liboqs.so")
    for file in files:
        yield str((folder / file).absolute())
