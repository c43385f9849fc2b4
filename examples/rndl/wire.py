"""The bytes on the wire: records, handshake messages and their extensions, RFC 8446 sections 4 and 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rndl.tls13 import TrafficKeys

__all__ = [
    "ALERT",
    "ALPN",
    "APPLICATION_DATA",
    "CERTIFICATE",
    "CERTIFICATE_REQUEST",
    "CERTIFICATE_VERIFY",
    "CLIENT_HELLO",
    "ENCRYPTED_EXTENSIONS",
    "FINISHED",
    "HANDSHAKE",
    "HELLO_RETRY_REQUEST",
    "KEY_SHARE",
    "PRE_SHARED_KEY",
    "SERVER_HELLO",
    "SERVER_NAME",
    "X25519",
    "X25519MLKEM768",
    "Ended",
    "Hello",
    "Inbound",
    "OfferedPSK",
    "Reader",
    "Record",
    "client_hello",
    "handshake_message",
    "parse_client_hello",
    "parse_server_hello",
    "record_source",
    "vector",
]

# Content types of records.
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
# Types of handshake messages.
CLIENT_HELLO, SERVER_HELLO, NEW_SESSION_TICKET, ENCRYPTED_EXTENSIONS, CERTIFICATE = 1, 2, 4, 8, 11
CERTIFICATE_REQUEST, CERTIFICATE_VERIFY, FINISHED, KEY_UPDATE = 13, 15, 20, 24
# Extensions.
SERVER_NAME, SUPPORTED_GROUPS, SIGNATURE_ALGORITHMS, ALPN, PRE_SHARED_KEY = 0, 10, 13, 16, 41
SUPPORTED_VERSIONS, PSK_KEY_EXCHANGE_MODES, KEY_SHARE = 43, 45, 51
# Groups. X25519MLKEM768: draft-ietf-tls-ecdhe-mlkem.
X25519, X25519MLKEM768 = 0x001D, 0x11EC
# ecdsa_secp256r1_sha256, rsa_pss_rsae_sha256, ed25519.
_SIGNATURES = (0x0403, 0x0804, 0x0807)

HELLO_RETRY_REQUEST = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a ServerHello that is a HelloRetryRequest."""


class Ended(Exception):
    """The sender ended its stream: the text says how."""


def vector(size: int, data: bytes) -> bytes:
    """Return a vector: its length in `size` bytes, then the data."""
    return len(data).to_bytes(size, "big") + data


class Reader:
    """A reader of integers and vectors, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes."""
        if length > len(self._data) - self.position:
            raise ValueError("a message ends too early")
        self.position += length
        return self._data[self.position - length : self.position]

    def integer(self, size: int) -> int:
        """Return an integer of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """Return the vector that follows a length of `size` bytes."""
        return self.take(self.integer(size))

    @property
    def more(self) -> bool:
        """True if bytes are left."""
        return self.position < len(self._data)


# --- records and messages of one direction


class Record(NamedTuple):
    """A record as it is on the wire."""

    header: bytes
    body: bytes

    @property
    def content_type(self) -> int:
        """The outer content type."""
        return self.header[0]


def record_source(read: Callable[[int], bytes]) -> Iterator[Record]:
    """Yield the records of a stream; `read` gives so many bytes, or fewer at its end."""
    while len(header := read(5)) == 5:
        length = int.from_bytes(header[3:], "big")
        body = read(length)
        if len(body) < length:
            return
        yield Record(header, body)


class Inbound:
    """One side's stream: handshake messages, then application data, opened with `keys` once known."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records
        self._messages = b""
        self.keys: TrafficKeys | None = None

    def message(self) -> bytes:
        """Return the next handshake message, with its header.

        Raises:
            Ended: no message follows.
            CannotDecrypt: the keys are wrong.
        """
        while not (message := self._whole_message()):
            content_type, content = self._next()
            if content_type != HANDSHAKE:
                raise Ended(f"a record of type {content_type} in the midst of the handshake")
            self._messages += content
        return message

    def data(self) -> bytes:
        """Return the next piece of application data; skip tickets and act on KeyUpdates.

        Raises:
            Ended: no more data follows.
            CannotDecrypt: the keys are wrong.
        """
        while True:
            content_type, content = self._next()
            if content_type == APPLICATION_DATA:
                return content
            self._messages += content
            while message := self._whole_message():
                if message[0] == KEY_UPDATE:
                    assert self.keys is not None
                    self.keys = self.keys.updated()
                elif message[0] != NEW_SESSION_TICKET:
                    raise Ended(f"a handshake message of type {message[0]} after the handshake")

    def all_data(self) -> bytes:
        """Return all application data to the end of the stream."""
        received = b""
        try:
            while True:
                received += self.data()
        except Ended:
            return received

    def _whole_message(self) -> bytes:
        length = 4 + int.from_bytes(self._messages[1:4], "big")
        if len(self._messages) < length:
            return b""
        message, self._messages = self._messages[:length], self._messages[length:]
        return message

    def _next(self) -> tuple[int, bytes]:
        for record in self._records:
            content_type, content = record.content_type, record.body
            if content_type == CHANGE_CIPHER_SPEC:
                continue  # for middleboxes only, RFC 8446 appendix D.4
            if self.keys is not None:
                content_type, content = self.keys.open(record.header, record.body)
            if content_type == ALERT:
                raise Ended("close_notify" if content[1] == 0 else f"alert {content[1]}")
            return content_type, content
        raise Ended("the end of the stream")


def handshake_message(kind: int, content: bytes) -> bytes:
    """Return a handshake message with its header."""
    return bytes([kind]) + vector(3, content)


# --- hellos


class OfferedPSK(NamedTuple):
    """The PSK of a ClientHello; the list of binders begins at `binder_offset` in the message."""

    identity: bytes
    binder: bytes
    binder_offset: int


@dataclass
class Hello:
    """A ClientHello or ServerHello, with the fields used here."""

    random: bytes
    suites: Sequence[int]
    extensions: Mapping[int, bytes]
    key_shares: Mapping[int, bytes]
    psk: OfferedPSK | None = field(default=None)

    @property
    def alpn(self) -> list[str]:
        """The offered protocols."""
        reader = Reader(Reader(self.extensions.get(ALPN, b"\0\0")).vector(2))
        names = []
        while reader.more:
            names.append(reader.vector(1).decode())
        return names


def client_hello(
    *,
    random: bytes,
    server_name: str,
    alpn: Sequence[str],
    suites: Sequence[int],
    group: int,
    share: bytes,
    psk_identity: bytes | None = None,
    binder_length: int = 0,
) -> bytes:
    """Build a ClientHello with one group; a PSK's binder is zeros still, and ends the message."""
    extensions = [
        (SERVER_NAME, vector(2, b"\0" + vector(2, server_name.encode()))),
        (SUPPORTED_GROUPS, vector(2, group.to_bytes(2, "big"))),
        (SIGNATURE_ALGORITHMS, vector(2, _numbers(_SIGNATURES))),
        (ALPN, vector(2, b"".join(vector(1, name.encode()) for name in alpn))),
        (SUPPORTED_VERSIONS, vector(1, b"\x03\x04")),
        (KEY_SHARE, vector(2, group.to_bytes(2, "big") + vector(2, share))),
        (PSK_KEY_EXCHANGE_MODES, vector(1, b"\x01")),  # psk_dhe_ke
    ]
    if psk_identity is not None:
        identities = vector(2, vector(2, psk_identity) + bytes(4))
        extensions.append((PRE_SHARED_KEY, identities + vector(2, vector(1, bytes(binder_length)))))
    listed = b"".join(kind.to_bytes(2, "big") + vector(2, content) for kind, content in extensions)
    fixed = b"\x03\x03" + random + vector(1, b"") + vector(2, _numbers(suites)) + vector(1, b"\0")
    return handshake_message(CLIENT_HELLO, fixed + vector(2, listed))


def parse_client_hello(message: bytes) -> Hello:
    """Read a ClientHello with its header."""
    reader = Reader(message)
    reader.take(4 + 2)
    random = reader.take(32)
    reader.vector(1)
    suites = Reader(reader.vector(2))
    numbers = []
    while suites.more:
        numbers.append(suites.integer(2))
    reader.vector(1)
    extensions = parse_extensions(reader.vector(2))
    shares = Reader(Reader(extensions[KEY_SHARE]).vector(2))
    key_shares = {}
    while shares.more:
        group = shares.integer(2)
        key_shares[group] = shares.vector(2)
    hello = Hello(random, numbers, extensions, key_shares)
    if PRE_SHARED_KEY in extensions:
        offered = Reader(extensions[PRE_SHARED_KEY])
        identity = Reader(offered.vector(2)).vector(2)
        # The extension is the last one: the list of binders ends with the message.
        binder_offset = len(message) - (len(extensions[PRE_SHARED_KEY]) - offered.position)
        hello.psk = OfferedPSK(identity, Reader(offered.vector(2)).vector(1), binder_offset)
    return hello


def parse_server_hello(message: bytes) -> Hello:
    """Read a ServerHello with its header.

    Raises:
        ValueError: it is a HelloRetryRequest.
    """
    reader = Reader(message)
    reader.take(4 + 2)
    random = reader.take(32)
    if random == HELLO_RETRY_REQUEST:
        raise ValueError("a HelloRetryRequest, which is not supported here")
    reader.vector(1)
    suite = reader.integer(2)
    reader.take(1)
    extensions = parse_extensions(reader.vector(2))
    share = Reader(extensions[KEY_SHARE])
    return Hello(random, [suite], extensions, {share.integer(2): share.vector(2)})


def parse_extensions(data: bytes) -> dict[int, bytes]:
    """Return extensions by their numbers."""
    reader = Reader(data)
    found = {}
    while reader.more:
        kind = reader.integer(2)
        found[kind] = reader.vector(2)
    return found


def _numbers(values: Sequence[int]) -> bytes:
    return b"".join(value.to_bytes(2, "big") for value in values)
