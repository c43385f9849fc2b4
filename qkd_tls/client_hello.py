"""The offers of a ClientHello (RFC 8446 section 4.1.2), read before OpenSSL sees it: pure functions.

For any bytes, the outcome is a `ClientHello`, a wait for more, or a `ClientHelloError`. Extensions that
qkd-tls has no use for are skipped: OpenSSL parses the whole message again and has the last word.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from qkd_tls.records import FULL_RECORD, RECORD_HEADER_SIZE, RecordBuffer, handshake_records

__all__ = ["ClientHello", "ClientHelloError", "ClientHelloReader", "group_names", "parse_client_hello"]

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_START: Final = RECORD_HEADER_SIZE + 4  # with the header of a handshake message, if it begins there
_MAX_MESSAGE_SIZE: Final = 0xFFFF
_MAX_ENTRIES: Final = 256
"""The most extensions, groups, protocols and identities that are read; usual are less than 20."""

# Alerts, RFC 8446 section 6.
_UNEXPECTED_MESSAGE: Final = 10
_RECORD_OVERFLOW: Final = 22
_ILLEGAL_PARAMETER: Final = 47
_DECODE_ERROR: Final = 50
_PROTOCOL_VERSION: Final = 70

# Extension types, RFC 8446 section 4.2.
_SERVER_NAME: Final = 0
_SUPPORTED_GROUPS: Final = 10
_ALPN: Final = 16
_PRE_SHARED_KEY: Final = 41
_SUPPORTED_VERSIONS: Final = 43

# IANA "TLS Supported Groups".
_GROUP_NAMES: Final = {
    23: "secp256r1",
    24: "secp384r1",
    25: "secp521r1",
    29: "X25519",
    30: "X448",
    256: "ffdhe2048",
    257: "ffdhe3072",
    258: "ffdhe4096",
    259: "ffdhe6144",
    260: "ffdhe8192",
    512: "MLKEM512",
    513: "MLKEM768",
    514: "MLKEM1024",
    4587: "SecP256r1MLKEM768",
    4588: "X25519MLKEM768",
    4589: "SecP384r1MLKEM1024",
}


# No space and no control character: a NUL would read differently elsewhere.
_PRINTABLE: Final = re.compile(rb"[\x21-\x7e]+")


_SESSION_ID: Final = 4 + 2 + 32  # behind the header, legacy_version and random
_TICKET_AGE_SIZE: Final = 4
_SMALLEST_BINDER: Final = 32
_EXTENSION_HEADER: Final = struct.Struct(">HH")
_ONLY_HOST_NAME: Final = struct.Struct(">HBH")
"""The beginning of a server_name extension that is one host name: two lengths, and the name's type between them."""


class ClientHelloError(ValueError):
    """Bytes that are not a ClientHello as defined in RFC 8446; the text says what is wrong."""

    def __init__(self, text: str, alert: int = _DECODE_ERROR) -> None:
        super().__init__(text)
        self.alert: Final = alert
        """The alert for the client (RFC 8446 section 6.2)."""


@dataclass(slots=True)
class ClientHello:
    """A client's offers, each list in the client's order; an absent extension is an empty tuple."""

    server_name: str | None
    """The host name in the SNI extension (RFC 6066 section 3), as sent."""
    psk_identities: tuple[bytes, ...]
    """Identities of the offered PSKs, both external and resumption PSKs (RFC 8446 section 4.2.11)."""
    alpn: tuple[bytes, ...]
    """Application protocols (RFC 7301)."""
    groups: tuple[int, ...]
    """Supported key exchange groups (section 4.2.7)."""
    versions: tuple[int, ...]
    """Supported TLS versions (section 4.2.1); without the extension, the legacy version alone."""
    message: bytes = field(repr=False)
    """The whole handshake message."""

    @property
    def cipher_suites(self) -> tuple[int, ...]:
        """Offered cipher suites (section 4.1.2)."""
        start = _SESSION_ID + 1 + self.message[_SESSION_ID]
        size = int.from_bytes(self.message[start : start + 2], "big")
        return struct.unpack_from(f">{size // 2}H", self.message, start + 2)


class ClientHelloReader:
    """The reader of the ClientHello at the start of a TLS byte stream, in however many records (RFC 8446 5.1)."""

    def __init__(self) -> None:
        self._message = bytearray()
        self._only_record = b""

    def read(self, records: RecordBuffer) -> bytes | None:
        """Take the records of the ClientHello, and none behind it.

        Args:
            records: the stream, as far as it has come.

        Returns:
            The handshake message with its four-byte header; None if more bytes are needed.

        Raises:
            ClientHelloError: the stream cannot become a ClientHello, however it goes on; raised as soon as the
                bytes show it, so that a peer which speaks another protocol is not waited for.
        """
        while True:
            start = records.peek(_RECORD_START)
            if len(start) < RECORD_HEADER_SIZE:
                # Of what is not TLS, OpenSSL wants as much before it says what it is.
                return None
            size = self._size(start)
            record = records.next_record()
            if record is None:
                return None
            if not self._message and len(record) - RECORD_HEADER_SIZE == size:
                # The usual case: that spares 3 of a handshake's 650 microseconds.
                self._only_record = record
                return record[RECORD_HEADER_SIZE:]
            self._message += record[RECORD_HEADER_SIZE:]
            if len(self._message) == size:
                return bytes(self._message)

    def give_back(self, records: RecordBuffer) -> None:
        """Put what has been taken back, in as few records as can be."""
        records.put_back(self._only_record or handshake_records(bytes(self._message)))

    def _size(self, start: bytes) -> int | None:
        """Check the start of the next record; return the size of the whole message, once it is known."""
        if start[0] != _HANDSHAKE:
            raise ClientHelloError(
                f"not TLS: a record of type {start[0]} where a handshake record must be", _UNEXPECTED_MESSAGE
            )
        if start[1] != 3:
            raise ClientHelloError(f"not TLS: a record of major version {start[1]}", _PROTOCOL_VERSION)
        length = int.from_bytes(start[3:5], "big")
        if not length:
            raise ClientHelloError("a handshake record of 0 bytes", _UNEXPECTED_MESSAGE)
        if length > FULL_RECORD:
            raise ClientHelloError(f"a handshake record of {length} bytes", _RECORD_OVERFLOW)
        header = start[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + length]
        if self._message:
            header = bytes(self._message[:4]) + header
        if header and header[0] != _CLIENT_HELLO:
            raise ClientHelloError(
                f"a handshake message of type {header[0]} where a ClientHello must be", _UNEXPECTED_MESSAGE
            )
        if len(header) < 4:
            return None
        size = 4 + int.from_bytes(header[1:4], "big")
        if size > _MAX_MESSAGE_SIZE:
            raise ClientHelloError(
                f"a ClientHello of {size} bytes; the limit is {_MAX_MESSAGE_SIZE}", _ILLEGAL_PARAMETER
            )
        if len(self._message) + length > size:
            raise ClientHelloError("a record that goes on after the ClientHello", _UNEXPECTED_MESSAGE)
        return size


def parse_client_hello(message: bytes) -> ClientHello:
    """Read one ClientHello.

    Args:
        message: the whole handshake message: type, three-byte length, body.

    Raises:
        ClientHelloError: it is truncated, has bytes left over, an extension twice, `pre_shared_key` not last,
            or names or identities that their definition does not allow.
    """
    if not message:
        raise ClientHelloError("handshake type is truncated")
    if message[0] != _CLIENT_HELLO:
        raise ClientHelloError("not a ClientHello")
    size = 4 + int.from_bytes(message[1:4], "big")
    if len(message) != size:
        fault = "ClientHello is truncated" if len(message) < size else "bytes after the end of ClientHello"
        raise ClientHelloError(fault)
    try:
        extensions = _extensions(message, _skip_fixed_part(message))
    except (IndexError, struct.error):
        raise ClientHelloError("ClientHello is truncated") from None

    return ClientHello(
        _server_name(extensions.get(_SERVER_NAME)),
        _psk_identities(extensions.get(_PRE_SHARED_KEY)),
        _alpn(extensions.get(_ALPN)),
        _numbers(extensions.get(_SUPPORTED_GROUPS), 2, "supported_groups"),
        _numbers(extensions.get(_SUPPORTED_VERSIONS), 1, "supported_versions")
        or (message[4] << 8 | message[5],),
        message,
    )


def _too_many(what: str) -> ClientHelloError:
    return ClientHelloError(f"more than {_MAX_ENTRIES} {what}", _ILLEGAL_PARAMETER)


def group_names(groups: Iterable[int]) -> str:
    """Return key exchange groups by name, comma-separated, for messages; "none" for no group."""
    return ", ".join(_GROUP_NAMES.get(group, f"0x{group:04x}") for group in groups) or "none"


# Plain functions with a position, not a reader object: this runs on each handshake, and calls are what it costs.


def _vector(data: bytes, position: int, length_size: int, what: str) -> tuple[bytes, int]:
    """Return a vector's bytes, behind their length in `length_size` bytes (section 3.4), and its end."""
    start = position + length_size
    end = start + int.from_bytes(data[position:start], "big")
    if end > len(data) or start > len(data):
        raise ClientHelloError(f"{what} is truncated")
    return data[start:end], end


def _only_vector(extension: bytes, length_size: int, what: str) -> bytes:
    """Return the only, non-empty vector, which fills the extension."""
    content, end = _vector(extension, 0, length_size, what)
    if end != len(extension):
        raise ClientHelloError(f"bytes after the end of {what}")
    return content


def _skip_fixed_part(message: bytes) -> int:
    """Return the position of the extensions: behind versions, random, session ID, suites and compression."""
    session_id = message[_SESSION_ID]
    if session_id > 32:
        raise ClientHelloError("legacy_session_id longer than 32 bytes")
    position = _SESSION_ID + 1 + session_id
    cipher_suites = message[position] << 8 | message[position + 1]
    if not cipher_suites or cipher_suites % 2:
        raise ClientHelloError(f"cipher_suites has {cipher_suites} bytes")
    position += 2 + cipher_suites
    compression_methods = message[position]
    if not compression_methods:
        raise ClientHelloError("legacy_compression_methods has 0 bytes")
    return position + 1 + compression_methods


def _extensions(message: bytes, position: int) -> dict[int, bytes]:
    """Return the extensions by type; an empty dictionary if TLS 1.2 or before leaves the whole block out."""
    extensions: dict[int, bytes] = {}
    size = len(message)
    if position == size:
        return extensions
    block = position + 2
    end = block + int.from_bytes(message[position:block], "big")
    if end > size or block > size:
        raise ClientHelloError("extensions is truncated")
    if end < size:
        raise ClientHelloError("bytes after the end of ClientHello")
    position = block
    while position < size:
        kind, length = _EXTENSION_HEADER.unpack_from(message, position)
        if kind in extensions:
            raise ClientHelloError(f"extension {kind} appears twice", _ILLEGAL_PARAMETER)
        if len(extensions) == _MAX_ENTRIES:
            raise _too_many("extensions")
        start = position + 4
        position = start + length
        if position > size:
            raise ClientHelloError(f"extension {kind} is truncated")
        # The binders of pre_shared_key cover all that precedes them (section 4.2.11).
        if kind == _PRE_SHARED_KEY and position != size:
            raise ClientHelloError("pre_shared_key is not the last extension", _ILLEGAL_PARAMETER)
        extensions[kind] = message[start:position]
    return extensions


def _numbers(extension: bytes | None, length_size: int, what: str) -> tuple[int, ...]:
    """Return a vector of at least one 16-bit number."""
    if extension is None:
        return ()
    data = _only_vector(extension, length_size, what)
    if not data or len(data) % 2:
        raise ClientHelloError(f"{what} has {len(data)} bytes")
    if len(data) > 2 * _MAX_ENTRIES:
        raise _too_many(what)
    return struct.unpack(f">{len(data) // 2}H", data)


def _server_name(extension: bytes | None) -> str | None:
    """Return the host name (RFC 6066 section 3): at most one, in ASCII; skip names of other types."""
    if extension is None:
        return None
    size = len(extension)
    if extension[:5] == _ONLY_HOST_NAME.pack(size - 2 & 0xFFFF, 0, size - 5 & 0xFFFF):
        # The usual case, one host name, without loops.
        return _host_name(extension[5:])
    names = _only_vector(extension, 2, "server_name")
    if not names:
        raise ClientHelloError("server_name is empty")
    host_name: str | None = None
    position = 0
    while position < len(names):
        kind = names[position]
        name, position = _vector(names, position + 1, 2, "server_name")
        if kind != 0:
            continue
        if host_name is not None:
            raise ClientHelloError("server_name holds two host names", _ILLEGAL_PARAMETER)
        host_name = _host_name(name)
    return host_name


def _host_name(name: bytes) -> str:
    if not _PRINTABLE.fullmatch(name):
        raise ClientHelloError("server_name is not a host name in ASCII", _ILLEGAL_PARAMETER)
    return name.decode("ascii")


def _alpn(extension: bytes | None) -> tuple[bytes, ...]:
    """Return the protocol names (RFC 7301 section 3.1)."""
    if extension is None:
        return ()
    names = _only_vector(extension, 2, "ALPN")
    protocols: list[bytes] = []
    position = 0
    while position < len(names):
        name, position = _vector(names, position, 1, "ALPN")
        protocols.append(name)
        if len(protocols) > _MAX_ENTRIES:
            raise _too_many("ALPN protocols")
    if not protocols or b"" in protocols:
        raise ClientHelloError("ALPN has an empty list or an empty name")
    return tuple(protocols)


def _only_identity(extension: bytes) -> bytes:
    """Return the identity of the usual case, without loops: one identity with its binder; otherwise b""."""
    end = 4 + int.from_bytes(extension[2:4], "big")
    binders = end + _TICKET_AGE_SIZE
    rest = len(extension) - binders
    if (
        rest >= 3 + _SMALLEST_BINDER
        and extension[:2] == (binders - 2).to_bytes(2, "big")
        and extension[binders : binders + 2] == (rest - 2).to_bytes(2, "big")
        and extension[binders + 2] == rest - 3
    ):
        return extension[4:end]
    return b""


def _psk_identities(extension: bytes | None) -> tuple[bytes, ...]:
    """Return the identities, each of which has its binder (section 4.2.11)."""
    if extension is None:
        return ()
    identity = _only_identity(extension)
    if identity:
        return (identity,)
    entries, position = _vector(extension, 0, 2, "PSK identities")
    binders, end = _vector(extension, position, 2, "PSK binders")
    if end != len(extension):
        raise ClientHelloError("bytes after the end of pre_shared_key")
    identities: list[bytes] = []
    position = 0
    while position < len(entries):
        identity, position = _vector(entries, position, 2, "PSK identity")
        identities.append(identity)
        if len(identities) > _MAX_ENTRIES:
            raise _too_many("PSK identities")
        position += _TICKET_AGE_SIZE
        if position > len(entries):
            raise ClientHelloError("obfuscated_ticket_age is truncated")
    if not identities or b"" in identities:
        raise ClientHelloError("pre_shared_key has an empty list or an empty identity")
    number_of_binders = 0
    position = 0
    while position < len(binders):
        binder, position = _vector(binders, position, 1, "PSK binder")
        if len(binder) < _SMALLEST_BINDER:
            raise ClientHelloError("a PSK binder shorter than 32 bytes")
        number_of_binders += 1
    if number_of_binders != len(identities):
        raise ClientHelloError(
            f"{len(identities)} PSK identities but {number_of_binders} binders", _ILLEGAL_PARAMETER
        )
    return tuple(identities)
