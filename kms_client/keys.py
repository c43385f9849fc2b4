"""A QKD key: an ID and a secret that can be used once.

Limits of wiping in Python: the secret lives in one `bytearray`, which is overwritten with zeros after its
single use. Copies made outside this class are not wiped: the `bytes` a caller passed in or made from the
secret, buffers of the TLS and JSON libraries, memory swapped to disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NoReturn

from kms_client.errors import KeyAlreadyUsed, shown

__all__ = ["QKDKey", "wipe_keys"]


class QKDKey:
    """One key delivered by a KMS; it can be used once and is then wiped.

    Args:
        key_id: the ID both sides know the key by; public.
        secret: the key, at least one byte; copied. Wiping the caller's copy is up to the caller.
        kms: name or URL of the KME that delivered the key, for display.

    Raises:
        ValueError: the ID or the secret is empty.

    Two keys are never equal, even with the same ID; a key cannot be copied or pickled.
    """

    __slots__ = ("__weakref__", "_key_id", "_kms", "_size", "_unused")

    def __init__(self, key_id: str, secret: bytes | bytearray | memoryview, *, kms: str = "") -> None:
        """Copy the secret."""
        # First of all, for __del__ runs even where the checks below raise.
        self._unused: list[bytearray] = []
        if not key_id:
            raise ValueError("a key needs an ID")
        if not len(secret):
            raise ValueError("a key needs a secret of at least one byte")
        self._key_id = key_id
        self._kms = kms
        held = bytearray(secret)
        self._size = 8 * len(held)
        # `list.pop` takes the secret out atomically: of two threads one gets it. Unlike a lock, it can also
        # be called by the garbage collector (__del__) in the middle of anything.
        self._unused.append(held)

    @property
    def key_id(self) -> str:
        """The ID both sides know the key by."""
        return self._key_id

    @property
    def size(self) -> int:
        """Size of the secret in bits, also after it was wiped."""
        return self._size

    @property
    def kms(self) -> str:
        """Name or URL of the KME that delivered the key."""
        return self._kms

    @property
    def used(self) -> bool:
        """True once the secret was taken for use, or wiped."""
        return not self._unused

    def use(self) -> AbstractContextManager[bytearray]:
        """Lend the secret for the length of a `with` block, once; wipe it on leaving the block.

        Raises:
            KeyAlreadyUsed: on entering the block, if the key was used or wiped before, by any thread.
        """
        return _Use(self)

    def wipe(self) -> None:
        """Overwrite an unused secret. One in use is left to its user: leaving the block wipes it."""
        try:
            secret = self._unused.pop()
        except IndexError:
            return
        _zero(secret)

    def __del__(self) -> None:
        """Wipe a key that was not used."""
        if self._unused:
            self.wipe()

    def __repr__(self) -> str:
        """Show the ID and the size, never the secret."""
        return f"<QKDKey id={shown(self._key_id)} {self._size} bits {'used' if self.used else 'unused'}>"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: a second copy would be a second use."""
        raise TypeError("a QKDKey cannot be copied or pickled: it can be used once only")


def wipe_keys(keys: Iterable[QKDKey]) -> None:
    """Wipe keys that will not be used."""
    for key in keys:
        key.wipe()


class _Use:
    """The `with` block of one use. A generator would take 9 of a handshake's 650 microseconds, both sides together."""

    __slots__ = ("_key", "_secret")

    def __init__(self, key: QKDKey) -> None:
        self._key = key

    def __enter__(self) -> bytearray:
        key = self._key
        try:
            self._secret = key._unused.pop()
        except IndexError:
            raise KeyAlreadyUsed(
                "this QKD key was used already", kms=key._kms, key_ids=[key._key_id]
            ) from None
        return self._secret

    def __exit__(self, *_: object) -> None:
        _zero(self._secret)


def _zero(secret: bytearray) -> None:
    # An assignment of the same length writes in place, also while memoryviews are held.
    secret[:] = bytes(len(secret))
