"""The control messages that two peers exchange over a bootstrap channel: parse and build, pure functions.

A frame is `uint16 length` and then that many bytes of UTF-8 JSON, one object. The same rules hold for both
directions: a message that breaks them can be neither built nor received.
"""

from __future__ import annotations

import base64
import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

__all__ = [
    "MAX_FRAME_SIZE",
    "Accept",
    "Discover",
    "FrameReader",
    "Identity",
    "KEMOffer",
    "MalformedMessage",
    "Message",
    "Offer",
    "Reject",
    "RejectCode",
    "UnsupportedVersion",
    "are_names",
    "encode",
]

MAX_FRAME_SIZE: Final = 0xFFFF
"""Bytes of JSON that one frame can hold."""

_VERSION: Final = 1
_LENGTH_SIZE: Final = 2
_MAX_SAE_ID_SIZE: Final = 255
_MAX_LIFETIME: Final = 1 << 31
_MAX_DETAIL_LENGTH: Final = 500
_NAME: Final = re.compile(r"[!-~]{1,200}")


class MalformedMessage(ValueError):
    """A control message that breaks the protocol; the text says which rule."""


class UnsupportedVersion(MalformedMessage):
    """A control message of another version of the protocol, to be answered with `unsupported_version`."""


class RejectCode(enum.StrEnum):
    """The reasons for a server to reject an offer."""

    KMS_UNAVAILABLE = "kms_unavailable"
    UNKNOWN_KEY = "unknown_key"
    UNKNOWN_SAE = "unknown_sae"
    UNSUPPORTED_KMS = "unsupported_kms"
    UNSUPPORTED_KEM = "unsupported_kem"
    KEM_REQUIRED = "kem_required"
    UNSUPPORTED_VERSION = "unsupported_version"
    BUSY = "busy"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Discover:
    """Client to server: ask for the server's identity."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Server to client, to a `Discover`.

    Raises:
        MalformedMessage: a member breaks the rules.
    """

    sae_id: str
    """The server's SAE ID, 1 to 255 bytes in UTF-8."""
    kms: tuple[str, ...]
    """Interfaces of its KMS, for example `etsi-014`; at least one."""
    kems: tuple[str, ...]
    """Explicit KEMs it accepts."""
    max_keys: int
    """The most key IDs that an offer may hold."""

    def __post_init__(self) -> None:
        """Check every member."""
        _check_sae_id(self.sae_id)
        _check_names(self.kms, "kms", at_least=1)
        _check_names(self.kems, "kems", at_least=0)
        _check_number(self.max_keys, "max_keys", MAX_FRAME_SIZE)


@dataclass(frozen=True, slots=True)
class KEMOffer:
    """An explicit KEM and the client's encapsulation key for it.

    Raises:
        MalformedMessage: the name is not 1 to 200 printable ASCII characters, or the key is empty.
    """

    name: str
    ek: bytes

    def __post_init__(self) -> None:
        """Check name and key."""
        _check_name(self.name, "kem.name")
        _check_not_empty(self.ek, "kem.ek")


@dataclass(frozen=True, slots=True)
class Offer:
    """Client to server: use this QKD key.

    Raises:
        MalformedMessage: a member breaks the rules.
    """

    kms: str
    """The interface that the client got the keys by."""
    sae_id: str
    """The client's SAE ID, 1 to 255 bytes in UTF-8."""
    key_ids: tuple[str, ...]
    """At least one key ID, all different: the first is for this connection, the others for later ones."""
    kem: KEMOffer | None = None
    pipelined: bool = False
    """True if the next ClientHello follows at once; not with a KEM, whose answer the client must wait for."""

    def __post_init__(self) -> None:
        """Check every member."""
        _check_name(self.kms, "kms")
        _check_sae_id(self.sae_id)
        _check_names(self.key_ids, "key_ids", at_least=1)
        if self.pipelined and self.kem is not None:
            raise MalformedMessage("an offer with a kem cannot be pipelined")


@dataclass(frozen=True, slots=True)
class Accept:
    """Server to client: go on with the hybrid handshake.

    Raises:
        MalformedMessage: a member breaks the rules.
    """

    sae_id: str
    """The server's SAE ID, 1 to 255 bytes in UTF-8."""
    lifetime: int
    """Seconds that the association lasts, 1 to 2^31."""
    key_ids: tuple[str, ...]
    """The key IDs that the server now holds, in the order offered."""
    kem_ciphertext: bytes | None = None
    """The ciphertext for the encapsulation key, if a KEM was offered."""

    def __post_init__(self) -> None:
        """Check every member."""
        _check_sae_id(self.sae_id)
        _check_number(self.lifetime, "lifetime", _MAX_LIFETIME)
        _check_names(self.key_ids, "key_ids", at_least=1)
        if self.kem_ciphertext is not None:
            _check_not_empty(self.kem_ciphertext, "kem.ct")


@dataclass(frozen=True, slots=True)
class Reject:
    """Server to client: no hybrid handshake.

    Raises:
        MalformedMessage: a member breaks the rules.
    """

    code: RejectCode | str
    """The reason; a plain `str` is a code that this version does not know, and a rejection all the same."""
    detail: str
    """The reason in words; on the wire at most 500 printable characters."""
    alpn: str | None
    """The protocol that the server would have selected for the application, or None."""

    def __post_init__(self) -> None:
        """Check every member but `detail`, which is trimmed when it is sent or received."""
        _check_name(self.code, "code")
        if self.alpn is not None:
            _check_name(self.alpn, "alpn")


Message: TypeAlias = Discover | Identity | Offer | Accept | Reject


def are_names(texts: Sequence[str]) -> bool:
    """Return whether these can be the key IDs of an offer: valid names of the protocol, and all different."""
    return all(map(_NAME.fullmatch, texts)) and len(set(texts)) == len(texts)


def encode(message: Message) -> bytes:
    """Encode one frame: the length in two bytes, then the message as JSON.

    Raises:
        ValueError: the message needs more than 65,535 bytes.
    """
    match message:
        case Discover():
            kind, members = "discover", {}
        case Identity():
            kind = "identity"
            members = {
                "sae_id": message.sae_id,
                "kms": message.kms,
                "kems": message.kems,
                "max_keys": message.max_keys,
            }
        case Offer():
            kind = "offer"
            members = {"kms": message.kms, "sae_id": message.sae_id, "key_ids": message.key_ids}
            if message.kem is not None:
                members["kem"] = {"name": message.kem.name, "ek": _base64(message.kem.ek)}
            if message.pipelined:
                members["pipelined"] = True
        case Accept():
            kind = "accept"
            members = {
                "sae_id": message.sae_id,
                "lifetime": message.lifetime,
                "key_ids": message.key_ids,
            }
            if message.kem_ciphertext is not None:
                members["kem"] = {"ct": _base64(message.kem_ciphertext)}
        case _:
            kind = "reject"
            members = {
                "code": message.code,
                "detail": _for_people(message.detail),
                "alpn": message.alpn,
            }
    body = json.dumps(
        {"type": kind, "version": _VERSION, **members}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    if len(body) > MAX_FRAME_SIZE:
        raise ValueError(f"a control message of {len(body)} bytes; the limit is {MAX_FRAME_SIZE}")
    return len(body).to_bytes(_LENGTH_SIZE, "big") + body


class FrameReader:
    """A buffer that cuts a byte stream into control messages."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        """Start with nothing read."""
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes as they come from the channel."""
        self._buffer += data

    def next(self) -> Message | None:
        """Take and return the next message; None if more bytes are needed.

        The frame is taken off the stream even if an error is raised.

        Raises:
            UnsupportedVersion: the frame holds a message of another version of the protocol.
            MalformedMessage: it holds anything else that is not a message.
        """
        if len(self._buffer) < _LENGTH_SIZE:
            return None
        end = _LENGTH_SIZE + int.from_bytes(self._buffer[:_LENGTH_SIZE], "big")
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH_SIZE:end])
        del self._buffer[:end]
        return _parse(frame)

    @property
    def unread(self) -> bytes:
        """The bytes after the messages taken so far.

        A message ends with its TLS record, so that any bytes here are a violation once the exchange is over:
        next comes a ClientHello or, after a `Reject`, the application's first record.
        """
        return bytes(self._buffer)


def _parse(frame: bytes) -> Message:
    members = _json_object(frame)
    version = members.get("version")
    if type(version) is not int:
        raise MalformedMessage("the member version is missing or not an integer")
    if version != _VERSION:
        raise UnsupportedVersion("a control message of another version of the protocol; this is version 1")
    kind = members.get("type")
    parser = _PARSERS.get(kind) if isinstance(kind, str) else None
    if parser is None:
        raise MalformedMessage("the member type is missing or unknown")
    return parser(members)


def _json_object(frame: bytes) -> dict[str, Any]:
    """Return the JSON object in a frame, without the liberties that Python's parser takes by default."""
    try:
        # Decoded here, for json.loads would also take UTF-16 and UTF-32.
        value = json.loads(
            frame.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except MalformedMessage:
        raise
    except (ValueError, RecursionError):
        # Without the cause: it would hold the whole frame.
        raise MalformedMessage("a frame that is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise MalformedMessage("a frame that is not a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise MalformedMessage("a member appears twice")
    return members


def _no_constant(_: str) -> NoReturn:
    raise MalformedMessage("NaN and Infinity are not JSON")


def _parse_discover(_: Mapping[str, Any]) -> Discover:
    return Discover()


def _parse_identity(members: Mapping[str, Any]) -> Identity:
    return Identity(
        sae_id=_string(members, "sae_id"),
        kms=_strings(members, "kms"),
        kems=_strings(members, "kems"),
        max_keys=_integer(members, "max_keys"),
    )


def _parse_offer(members: Mapping[str, Any]) -> Offer:
    kem = _object(members, "kem") if "kem" in members else None
    pipelined = members.get("pipelined", False)
    if not isinstance(pipelined, bool):
        raise MalformedMessage("the member pipelined is not a boolean")
    return Offer(
        kms=_string(members, "kms"),
        sae_id=_string(members, "sae_id"),
        key_ids=_strings(members, "key_ids"),
        kem=None if kem is None else KEMOffer(name=_string(kem, "name"), ek=_bytes(kem, "ek")),
        pipelined=pipelined,
    )


def _parse_accept(members: Mapping[str, Any]) -> Accept:
    return Accept(
        sae_id=_string(members, "sae_id"),
        lifetime=_integer(members, "lifetime"),
        key_ids=_strings(members, "key_ids"),
        kem_ciphertext=_bytes(_object(members, "kem"), "ct") if "kem" in members else None,
    )


def _parse_reject(members: Mapping[str, Any]) -> Reject:
    code = _string(members, "code")
    # Unlike elsewhere, JSON's null is a value here, so the member must be there.
    if "alpn" not in members:
        raise MalformedMessage("the member alpn is missing")
    return Reject(
        code=_REJECT_CODES.get(code, code),
        detail=_for_people(_string(members, "detail")),
        alpn=None if members["alpn"] is None else _string(members, "alpn"),
    )


_REJECT_CODES: Final[Mapping[str, RejectCode]] = {code.value: code for code in RejectCode}

_PARSERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Message]]] = {
    "discover": _parse_discover,
    "identity": _parse_identity,
    "offer": _parse_offer,
    "accept": _parse_accept,
    "reject": _parse_reject,
}


def _string(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise MalformedMessage(f"the member {name} is missing or not a string")
    return value


def _strings(members: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = members.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MalformedMessage(f"the member {name} is missing or not a list of strings")
    return tuple(value)


def _integer(members: Mapping[str, Any], name: str) -> int:
    value = members.get(name)
    # Not isinstance: in Python a bool is an int.
    if type(value) is not int:
        raise MalformedMessage(f"the member {name} is missing or not an integer")
    return value


def _object(members: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = members[name]
    if not isinstance(value, dict):
        raise MalformedMessage(f"the member {name} is not an object")
    return value


def _bytes(members: Mapping[str, Any], name: str) -> bytes:
    text = _string(members, name)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise MalformedMessage(f"the member {name} is not base64") from None
    # The decoder lets any bits pass after the last byte.
    if _base64(data) != text:
        raise MalformedMessage(f"the member {name} is not base64 in its one canonical form")
    return data


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _for_people(text: str) -> str:
    """Return at most 500 printable characters of `text`: a peer's words may end up on a terminal."""
    return "".join(filter(str.isprintable, text[:_MAX_DETAIL_LENGTH]))


def _check_name(text: str, what: str) -> None:
    if not _NAME.fullmatch(text):
        raise MalformedMessage(f"{what} must be 1 to 200 printable ASCII characters without a space")


def _check_names(texts: Sequence[str], what: str, *, at_least: int) -> None:
    if len(texts) < at_least:
        raise MalformedMessage(f"{what} is empty")
    for text in texts:
        _check_name(text, f"each of {what}")
    if len(set(texts)) != len(texts):
        raise MalformedMessage(f"{what} has an entry twice")


def _check_sae_id(sae_id: str) -> None:
    try:
        size = len(sae_id.encode())
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= _MAX_SAE_ID_SIZE or not sae_id.isprintable():
        raise MalformedMessage("an SAE ID must be 1 to 255 bytes of UTF-8 without control characters")


def _check_number(number: int, what: str, most: int) -> None:
    if not 1 <= number <= most:
        raise MalformedMessage(f"{what} is not between 1 and {most}")


def _check_not_empty(data: bytes, what: str) -> None:
    if not data:
        raise MalformedMessage(f"{what} is empty")
