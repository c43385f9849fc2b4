"""Reads what a ClientHello offers (RFC 8446 section 4.1.2) before OpenSSL sees it: pure functions.

Whatever the bytes, the outcome is a `ClientHello`, a wait for more, or a `ClientHelloError`. Extensions that
qkd-tls has no use for are skipped: OpenSSL parses the whole message again and has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = ["ClientHello", "ClientHelloError", "group_names", "parse_client_hello", "read_handshake_message"]

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_HEADER_SIZE: Final = 5
_MAX_RECORD_SIZE: Final = 1 << 14
_MAX_MESSAGE_SIZE: Final = 0xFFFF
# The stream is read from its start each time more of it has come: many tiny records would take long.
_MAX_RECORDS: Final = 256

# Extension types, RFC 8446 section 4.2.
_SERVER_NAME: Final = 0
_SUPPORTED_GROUPS: Final = 10
_ALPN: Final = 16
_PRE_SHARED_KEY: Final = 41
_SUPPORTED_VERSIONS: Final = 43
_PSK_KEY_EXCHANGE_MODES: Final = 45
_KEY_SHARE: Final = 51

# IANA "TLS Supported Groups".
_GROUP_NAMES: Final = {
    23: "secp256r1",
    24: "secp384r1",
    25: "secp521r1",
    29: "x25519",
    30: "x448",
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


class ClientHelloError(ValueError):
    """The bytes are not a ClientHello as RFC 8446 has it; the text says where."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client offers, each list in the client's order; an absent extension is an empty tuple."""

    server_name: str | None
    """The host name in the SNI extension (RFC 6066 section 3), as sent."""
    alpn: tuple[bytes, ...]
    """Application protocols (RFC 7301)."""
    psk_identities: tuple[bytes, ...]
    """Identities of the PSKs offered, of external and of resumption PSKs alike (RFC 8446 section 4.2.11)."""
    groups: tuple[int, ...]
    """Key exchange groups supported (section 4.2.7)."""
    key_share_groups: tuple[int, ...]
    """Those of them with a key share in this message (section 4.2.8)."""
    versions: tuple[int, ...]
    """TLS versions supported (section 4.2.1); without the extension, the legacy version alone."""
    psk_modes: tuple[int, ...]
    """PSK key exchange modes: 0 is `psk_ke`, 1 is `psk_dhe_ke` (section 4.2.9)."""


def read_handshake_message(records: bytes | bytearray) -> tuple[bytes, int] | None:
    """Reassemble the ClientHello at the start of a TLS byte stream (RFC 8446 section 5.1).

    Args:
        records: the stream from its first byte, as far as it has come.

    Returns:
        The handshake message with its four-byte header, and how many bytes of the stream its records took;
        None if more bytes are needed.

    Raises:
        ClientHelloError: the stream cannot become a ClientHello, whatever follows; raised as soon as the
            bytes show it, so that a peer which speaks another protocol is not waited for.
    """
    message = bytearray()
    size = None  # of the whole message, once its header is there
    announced = 0  # bytes of handshake messages that the records seen so far hold or will hold
    taken = 0
    for _ in range(_MAX_RECORDS):
        header = records[taken : taken + _RECORD_HEADER_SIZE]
        if header and header[0] != _HANDSHAKE:
            raise ClientHelloError(f"not TLS: a record of type {header[0]} where a handshake record must be")
        if len(header) > 1 and header[1] != 3:
            raise ClientHelloError(f"not TLS: a record of major version {header[1]}")
        if len(header) < _RECORD_HEADER_SIZE:
            return None
        length = int.from_bytes(header[3:], "big")
        if not 1 <= length <= _MAX_RECORD_SIZE:
            raise ClientHelloError(f"a handshake record of {length} bytes")
        taken += _RECORD_HEADER_SIZE
        message += records[taken : taken + length]
        announced += length
        taken += length
        if message and message[0] != _CLIENT_HELLO:
            raise ClientHelloError(f"a handshake message of type {message[0]} where a ClientHello must be")
        if len(message) >= 4:
            size = 4 + int.from_bytes(message[1:4], "big")
            if size > _MAX_MESSAGE_SIZE:
                raise ClientHelloError(f"a ClientHello of {size} bytes; the limit is {_MAX_MESSAGE_SIZE}")
            if announced > size:
                raise ClientHelloError("a record that goes on after the ClientHello")
        if taken > len(records):
            return None
        if announced == size:
            return bytes(message), taken
    raise ClientHelloError(f"a ClientHello in more than {_MAX_RECORDS} records")


def parse_client_hello(message: bytes) -> ClientHello:
    """Read one ClientHello.

    Args:
        message: the whole handshake message: type, three-byte length, body.

    Raises:
        ClientHelloError: it is truncated, has bytes left over, an extension twice, `pre_shared_key` not last,
            or a list that its definition does not allow.
    """
    outer = _Reader(message)
    if outer.number(1, "handshake type") != _CLIENT_HELLO:
        raise ClientHelloError("not a ClientHello")
    body = _Reader(outer.vector(3, "ClientHello"))
    outer.end("ClientHello")

    legacy_version = body.number(2, "legacy_version")
    body.take(32, "random")
    if len(body.vector(1, "legacy_session_id")) > 32:
        raise ClientHelloError("legacy_session_id longer than 32 bytes")
    body.numbers(2, 2, "cipher_suites")
    body.numbers(1, 1, "legacy_compression_methods")
    extensions = _extensions(body)

    return ClientHello(
        server_name=_server_name(extensions.get(_SERVER_NAME)),
        alpn=_alpn(extensions.get(_ALPN)),
        psk_identities=_psk_identities(extensions.get(_PRE_SHARED_KEY)),
        groups=_number_list(extensions.get(_SUPPORTED_GROUPS), 2, 2, "supported_groups"),
        key_share_groups=_key_share_groups(extensions.get(_KEY_SHARE)),
        versions=_number_list(extensions.get(_SUPPORTED_VERSIONS), 1, 2, "supported_versions")
        or (legacy_version,),
        psk_modes=_number_list(extensions.get(_PSK_KEY_EXCHANGE_MODES), 1, 1, "psk_key_exchange_modes"),
    )


def group_names(groups: Iterable[int]) -> str:
    """Key exchange groups by name, comma-separated, for messages; "none" for no group."""
    return ", ".join(_GROUP_NAMES.get(group, f"0x{group:04x}") for group in groups) or "none"


class _Reader:
    """The presentation language of RFC 8446 section 3, read from front to back."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, size: int, what: str) -> bytes:
        taken = self._data[self._position : self._position + size]
        if len(taken) != size:
            raise ClientHelloError(f"{what} is truncated")
        self._position += size
        return taken

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "big")

    def vector(self, length_size: int, what: str) -> bytes:
        """The bytes of a vector that its length, in `length_size` bytes, precedes."""
        return self.take(self.number(length_size, what), what)

    def numbers(self, length_size: int, size: int, what: str) -> tuple[int, ...]:
        """A vector of at least one number of `size` bytes."""
        data = self.vector(length_size, what)
        if not data or len(data) % size:
            raise ClientHelloError(f"{what} has {len(data)} bytes")
        return tuple(int.from_bytes(data[i : i + size], "big") for i in range(0, len(data), size))

    def end(self, what: str) -> None:
        if self:
            raise ClientHelloError(f"bytes after the end of {what}")


def _extensions(body: _Reader) -> dict[int, bytes]:
    """The extensions by type; none where TLS 1.2 and before leave the whole block out."""
    extensions: dict[int, bytes] = {}
    if not body:
        return extensions
    block = _Reader(body.vector(2, "extensions"))
    body.end("ClientHello")
    while block:
        # The binders of pre_shared_key cover all that precedes them (section 4.2.11).
        if _PRE_SHARED_KEY in extensions:
            raise ClientHelloError("pre_shared_key is not the last extension")
        kind = block.number(2, "extension type")
        if kind in extensions:
            raise ClientHelloError(f"extension {kind} appears twice")
        extensions[kind] = block.vector(2, f"extension {kind}")
    return extensions


def _only_vector(extension: bytes, length_size: int, what: str) -> _Reader:
    """A reader of the one non-empty vector that fills an extension."""
    outer = _Reader(extension)
    inner = _Reader(outer.vector(length_size, what))
    outer.end(what)
    return inner


def _number_list(extension: bytes | None, length_size: int, size: int, what: str) -> tuple[int, ...]:
    if extension is None:
        return ()
    reader = _Reader(extension)
    numbers = reader.numbers(length_size, size, what)
    reader.end(what)
    return numbers


def _server_name(extension: bytes | None) -> str | None:
    """The host name (RFC 6066 section 3): at most one, in ASCII; names of other types are skipped."""
    if extension is None:
        return None
    names = _only_vector(extension, 2, "server_name")
    host_name: str | None = None
    if not names:
        raise ClientHelloError("server_name is empty")
    while names:
        kind = names.number(1, "server_name")
        name = names.vector(2, "server_name")
        if kind != 0:
            continue
        if host_name is not None:
            raise ClientHelloError("server_name holds two host names")
        # Printable and no space: a NUL or a control character would read differently elsewhere.
        if not name or not all(0x21 <= byte <= 0x7E for byte in name):
            raise ClientHelloError("server_name is not a host name in ASCII")
        host_name = name.decode("ascii")
    return host_name


def _alpn(extension: bytes | None) -> tuple[bytes, ...]:
    """The protocol names (RFC 7301 section 3.1)."""
    if extension is None:
        return ()
    names = _only_vector(extension, 2, "ALPN")
    protocols: list[bytes] = []
    while names:
        protocols.append(names.vector(1, "ALPN"))
    if not protocols or b"" in protocols:
        raise ClientHelloError("ALPN has an empty list or an empty name")
    return tuple(protocols)


def _key_share_groups(extension: bytes | None) -> tuple[int, ...]:
    """The groups with a share; the list may be empty, to ask for a HelloRetryRequest (section 4.2.8)."""
    if extension is None:
        return ()
    shares = _only_vector(extension, 2, "key_share")
    groups: list[int] = []
    while shares:
        groups.append(shares.number(2, "key_share"))
        if not shares.vector(2, "key_share"):
            raise ClientHelloError("key_share has an empty share")
    return tuple(groups)


def _psk_identities(extension: bytes | None) -> tuple[bytes, ...]:
    """The identities, each with its binder (section 4.2.11)."""
    if extension is None:
        return ()
    outer = _Reader(extension)
    entries = _Reader(outer.vector(2, "PSK identities"))
    binders = _Reader(outer.vector(2, "PSK binders"))
    outer.end("pre_shared_key")
    identities: list[bytes] = []
    while entries:
        identities.append(entries.vector(2, "PSK identity"))
        entries.take(4, "obfuscated_ticket_age")
    if not identities or b"" in identities:
        raise ClientHelloError("pre_shared_key has an empty list or an empty identity")
    number_of_binders = 0
    while binders:
        if len(binders.vector(1, "PSK binder")) < 32:
            raise ClientHelloError("a PSK binder shorter than 32 bytes")
        number_of_binders += 1
    if number_of_binders != len(identities):
        raise ClientHelloError(f"{len(identities)} PSK identities but {number_of_binders} binders")
    return tuple(identities)
