"""The JSON of ETSI GS QKD 014 V1.1.1 (clause 6), built and parsed; no I/O.

Strict about what matters (IDs, sizes, encodings), tolerant of the deviations seen in running KMEs. Each
tolerance that was needed is recorded by name in a set of quirks.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kms_client.keys import QKDKey
from kms_client.manager import KMSStatus

__all__ = [
    "Malformed",
    "build_key_ids_request",
    "build_key_request",
    "error_text",
    "json_object",
    "parse_key_container",
    "parse_status",
]

_UUID = r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
_MAX_ID_LENGTH = 255
_MAX_TEXT_LENGTH = 200

# A key of 128 bits or more, in hexadecimal digits of one case. A random base64 text of that length is made of
# these digits only once in 2^63, so that the text alone decides and both ends of a link decide alike. A
# size that was asked for could not decide: the slave's call has none, and a hexadecimal key of 256 bits
# also reads as a base64 key of 384 bits.
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2}){16,}|(?:[0-9A-F]{2}){16,}")

# In error messages: long runs that might be keys, and which of them may be shown all the same.
_LONG_RUN = re.compile(r"[A-Za-z0-9+/=_-]{16,}")
_HARMLESS_RUN = re.compile(rf"[A-Z]?[a-z_]+|additional_slave_SAE_IDs|max_SAE_ID_count|{_UUID}")

_STATUS = {
    "source_KME_ID",
    "target_KME_ID",
    "master_SAE_ID",
    "slave_SAE_ID",
    "key_size",
    "stored_key_count",
    "max_key_count",
    "max_key_per_request",
    "max_key_size",
    "min_key_size",
    "max_SAE_ID_count",
}
_KEY_CONTAINER = {"keys", "Keys", "key_container_extension"}
_KEY = {"key_ID", "key_id", "key_ID_extension", "key", "key_extension"}


class Malformed(Exception):
    """An answer that breaks the standard; the text says how.

    Its traceback leads to frames that hold keys: catch it, keep the text, and raise something else outside
    the `except` block.
    """


def build_key_request(number: int, size: int | None) -> bytes:
    """Build the body of Get key (clause 6.2): `number` keys of `size` bits; None for the KME's own size."""
    request = {"number": number} if size is None else {"number": number, "size": size}
    return json.dumps(request).encode()


def build_key_ids_request(key_ids: Sequence[str], master_sae_id: str | None = None) -> bytes:
    """Build the body of Get key with key IDs (clause 6.3); one vendor wants the master's SAE ID per entry."""
    extra = {} if master_sae_id is None else {"master_SAE_ID": master_sae_id}
    return json.dumps({"key_IDs": [{"key_ID": key_id, **extra} for key_id in key_ids]}).encode()


def parse_status(body: bytes | bytearray, *, quirks: set[str]) -> KMSStatus:
    """Parse the answer to Get status (clause 6.1).

    Accepted besides the standard's form: extra members; null or missing strings, which become "", and
    `max_SAE_ID_count`, which becomes 0.

    Args:
        body: the answer, JSON.
        quirks: receives the names of the deviations met.

    Raises:
        Malformed: a number is missing or of another type.
    """
    status = json_object(body)
    _compare(status, _STATUS | {"status_extension"}, quirks)
    if not status.keys() >= _STATUS:
        quirks.add("missing members")
    return KMSStatus(
        source_kme_id=_string(status, "source_KME_ID"),
        target_kme_id=_string(status, "target_KME_ID"),
        master_sae_id=_string(status, "master_SAE_ID"),
        slave_sae_id=_string(status, "slave_SAE_ID"),
        key_size=_integer(status, "key_size"),
        stored_key_count=_integer(status, "stored_key_count"),
        max_key_count=_integer(status, "max_key_count"),
        max_key_per_request=_integer(status, "max_key_per_request"),
        max_key_size=_integer(status, "max_key_size"),
        min_key_size=_integer(status, "min_key_size"),
        max_sae_id_count=_integer(status, "max_SAE_ID_count", default=0),
        status_extension=_extension(status.get("status_extension"), quirks),
    )


def parse_key_container(body: bytes | bytearray, *, kms: str, quirks: set[str]) -> list[QKDKey]:
    """Return the keys of a key container (clause 6.2), all different, in the order given; perhaps none.

    Accepted besides the standard's form: `Keys`, `key_id`, keys in hexadecimal (128 bits or more) or URL-safe
    or unpadded base64, IDs that are not UUIDs, extra and null members.

    Args:
        body: the answer, JSON.
        kms: name of the KME, for the keys.
        quirks: receives the names of the deviations met.

    Raises:
        Malformed: anything else; keys parsed before are wiped.
    """
    container = json_object(body)
    _compare(container, _KEY_CONTAINER, quirks)
    entries = _member(container, "keys", "Keys", quirks)
    if not isinstance(entries, list):
        raise Malformed("the answer has no list of keys")
    keys: dict[str, QKDKey] = {}
    try:
        for entry in entries:
            if not isinstance(entry, dict):
                raise Malformed("an entry of the key container is not an object")
            _compare(entry, _KEY, quirks)
            key_id = _key_id(_member(entry, "key_ID", "key_id", quirks), quirks)
            if key_id in keys:
                raise Malformed(f"key ID {key_id} is in the answer twice")
            secret = _decode_key(entry.get("key"), key_id, quirks)
            keys[key_id] = QKDKey(key_id, secret, kms=kms)
            secret[:] = bytes(len(secret))
    except Malformed:
        for key in keys.values():
            key.wipe()
        raise
    return list(keys.values())


def error_text(body: bytes | bytearray, *, quirks: set[str]) -> str:
    """Return the text of an error body (clause 6.4, or a framework's own), safe to show; "" if it has none.

    Only a short printable `message`, `detail` or `error` is taken, never from a body that has keys in it, and
    anything in it that might be a key is left out.

    Args:
        body: of the answer, anything.
        quirks: receives the names of the deviations met.
    """
    if not body:
        quirks.add("empty error body")
        return ""
    try:
        document = json_object(body)
    except Malformed:
        quirks.add("error body is no JSON object")
        return ""
    name = next((n for n in ("message", "detail", "error") if isinstance(document.get(n), str)), None)
    if name != "message":
        quirks.add("error body without a message" if name is None else f"{name} for message")
    text = document[name].strip() if name is not None else ""
    if "keys" in document or "Keys" in document or "key" in document:
        return ""
    if len(text) > _MAX_TEXT_LENGTH or not text.isprintable():
        return ""
    return _LONG_RUN.sub(lambda run: run[0] if _HARMLESS_RUN.fullmatch(run[0]) else "[...]", text)


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return the JSON object in an answer.

    Raises:
        Malformed: it is not a JSON object.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    # Outside the except block: the errors of json hold the whole text.
    if not isinstance(document, dict):
        raise Malformed("the answer is not a JSON object")
    return document


def _compare(document: Mapping[str, Any], known: set[str], quirks: set[str]) -> None:
    """Note members that are unknown to the standard or have no value, without their names."""
    if not document.keys() <= known:
        quirks.add("extra members")
    if None in document.values():
        quirks.add("null members")


def _member(of: Mapping[str, Any], name: str, variant: str, quirks: set[str]) -> Any:
    value = of.get(name)
    if value is None and of.get(variant) is not None:
        quirks.add(f"{variant} for {name}")
        return of[variant]
    return value


def _key_id(value: object, quirks: set[str]) -> str:
    if not isinstance(value, str) or not value:
        raise Malformed("an entry of the key container has no key_ID")
    if len(value) > _MAX_ID_LENGTH or not value.isascii() or not value.isprintable():
        raise Malformed(f"a key ID is longer than {_MAX_ID_LENGTH} characters or not printable ASCII")
    if not re.fullmatch(_UUID, value):
        quirks.add("key ID is no UUID")
    return value


def _decode_key(value: object, key_id: str, quirks: set[str]) -> bytearray:
    if not isinstance(value, str) or not value:
        raise Malformed(f"key {key_id} has no key member")
    if _HEXADECIMAL.fullmatch(value):
        quirks.add("hexadecimal key")
        return bytearray.fromhex(value)
    text = value.rstrip("=")
    if "-" in text or "_" in text:
        quirks.add("URL-safe base64 key")
        text = text.replace("-", "+").replace("_", "/")
    padded = text + "=" * (-len(text) % 4)
    if len(padded) != len(value):
        quirks.add("unpadded base64 key")
    try:
        secret = bytearray(base64.b64decode(padded, validate=True))
    except ValueError:
        secret = bytearray()
    if not secret:
        raise Malformed(f"key {key_id} is not in base64")
    return secret


def _string(of: Mapping[str, Any], name: str) -> str:
    value = of.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"{name} is not a string")
    return value


def _integer(of: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = of.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed(f"{name} is missing or not a number")
    return value


def _extension(value: object, quirks: set[str]) -> Mapping[str, object]:
    if isinstance(value, dict):
        return value
    if value is not None:
        quirks.add("status_extension is no object")
    return {}
