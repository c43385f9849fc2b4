"""The JSON of SKIP (draft-cisco-skip-02), parsed; no I/O. Sizes are in bits.

Strict about what matters (IDs, sizes, encodings). Each tolerance that was needed is recorded by name in a set of
quirks.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kms_client.etsi014_messages import Malformed, json_object
from kms_client.keys import QKDKey

__all__ = ["SkipCapabilities", "parse_capabilities", "parse_entropy", "parse_key"]

# The draft has hexadecimal IDs; whatever has no space and is not too long can be told to the peer as well.
_KEY_ID = re.compile(r"[!-~]{1,200}")
_HEXADECIMAL = re.compile(r"(?:[0-9A-Fa-f]{2})+")


@dataclass(frozen=True)
class SkipCapabilities:
    """A key provider's report about itself."""

    entropy: bool
    """True if it gives random bits."""
    key: bool
    """True if it gives keys."""
    algorithm: str
    """Its algorithm for sharing keys with the provider at the other end."""
    local_system_id: str
    """Its name for this end, which the peer has to use."""
    remote_system_ids: tuple[str, ...]
    """Systems at other ends that it shares keys with: IDs, or globs of IDs."""

    def shares_keys_with(self, system_id: str) -> bool:
        """Return True if an ID is one of `remote_system_ids`.

        In a glob, `*` stands for any characters or none, `?` for one, `[list]` for one of a list, in which
        `a-z` is a range, and `[!list]` for one that is not in it. Letter case counts; a slash is a character
        like any other.
        """
        return any(fnmatch.fnmatchcase(system_id, pattern) for pattern in self.remote_system_ids)


def parse_capabilities(body: bytes | bytearray, *, quirks: set[str]) -> SkipCapabilities:
    """Parse the answer to GET /capabilities.

    Accepted besides the draft's form: extra members; no `algorithm`, which becomes ""; one string for a list of one.

    Args:
        body: the answer, JSON.
        quirks: receives the names of the deviations met.

    Raises:
        Malformed: a member is missing or of another kind.
    """
    document = json_object(body)
    _compare(document, {"entropy", "key", "algorithm", "localSystemID", "remoteSystemID"}, quirks)
    remote = document.get("remoteSystemID")
    if isinstance(remote, str):
        quirks.add("remoteSystemID is no list")
        remote = [remote]
    if not isinstance(remote, list) or not all(isinstance(entry, str) for entry in remote):
        raise Malformed("remoteSystemID is missing or not a list of strings")
    algorithm = document.get("algorithm")
    if algorithm is None:
        quirks.add("no algorithm")
    return SkipCapabilities(
        entropy=_boolean(document, "entropy"),
        key=_boolean(document, "key"),
        algorithm="" if algorithm is None else _string(document, "algorithm"),
        local_system_id=_string(document, "localSystemID"),
        remote_system_ids=tuple(remote),
    )


def parse_key(body: bytes | bytearray, *, kms: str, quirks: set[str]) -> QKDKey:
    """Parse the answer to GET /key or GET /key/{keyId}.

    Accepted besides the draft's form: extra members; a `keyId` that is not hexadecimal.

    Args:
        body: the answer, JSON.
        kms: name of the key provider, for the key.
        quirks: receives the names of the deviations met.

    Raises:
        Malformed: anything else.
    """
    document = json_object(body)
    _compare(document, {"keyId", "key"}, quirks)
    key_id = document.get("keyId")
    if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
        raise Malformed("keyId is missing or not 1 to 200 printable ASCII characters without a space")
    if not _HEXADECIMAL.fullmatch(key_id):
        quirks.add("keyId is not hexadecimal")
    secret = _hexadecimal(document, "key")
    key = QKDKey(key_id, secret, kms=kms)
    secret[:] = bytes(len(secret))
    return key


def parse_entropy(body: bytes | bytearray, *, quirks: set[str]) -> tuple[bytearray, int]:
    """Parse the answer to GET /entropy: random bytes, and the number of bits of entropy they have at least.

    Raises:
        Malformed: a member is missing or of another kind.
    """
    document = json_object(body)
    _compare(document, {"randomStr", "minentropy"}, quirks)
    bits = document.get("minentropy")
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise Malformed("minentropy is missing or not a number")
    return _hexadecimal(document, "randomStr"), bits


def _compare(document: Mapping[str, Any], known: set[str], quirks: set[str]) -> None:
    if not document.keys() <= known:
        quirks.add("extra members")


def _boolean(of: Mapping[str, Any], name: str) -> bool:
    value = of.get(name)
    if not isinstance(value, bool):
        raise Malformed(f"{name} is missing or neither true nor false")
    return value


def _string(of: Mapping[str, Any], name: str) -> str:
    value = of.get(name)
    if not isinstance(value, str):
        raise Malformed(f"{name} is missing or not a string")
    return value


def _hexadecimal(of: Mapping[str, Any], name: str) -> bytearray:
    value = of.get(name)
    if not isinstance(value, str) or not _HEXADECIMAL.fullmatch(value):
        raise Malformed(f"{name} is missing or not hexadecimal")
    return bytearray.fromhex(value)
