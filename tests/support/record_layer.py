"""The records of TLS 1.3 behind a handshake, sealed and opened with the secrets of a key log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rndl.tls13 import SUITES, TrafficKeys

__all__ = [
    "ALERT",
    "CLOSE_NOTIFY",
    "DATA",
    "HANDSHAKE",
    "KEY_UPDATE",
    "KEY_UPDATE_REQUESTED",
    "KeyLog",
    "Opener",
    "Sealer",
    "new_session_ticket",
    "split_records",
]

ALERT: Final = 21
HANDSHAKE: Final = 22
DATA: Final = 23

CLOSE_NOTIFY: Final = b"\x01\x00"
KEY_UPDATE: Final = b"\x18\x00\x00\x01\x00"
KEY_UPDATE_REQUESTED: Final = b"\x18\x00\x00\x01\x01"

# What both OpenSSLs choose, and ours by default.
_SUITE: Final = SUITES[0x1302]
_HEADER: Final = 5


def split_records(stream: bytes) -> tuple[list[bytes], bytes]:
    """The whole records with their headers, and the rest."""
    records = []
    while len(stream) >= _HEADER:
        size = _HEADER + int.from_bytes(stream[3:5], "big")
        if len(stream) < size:
            break
        records.append(stream[:size])
        stream = stream[size:]
    return records, stream


def new_session_ticket(ticket: bytes = b"ticket") -> bytes:
    """RFC 8446 4.6.1, for an hour."""
    body = (
        (3600).to_bytes(4, "big") + bytes(4) + b"\x01n" + len(ticket).to_bytes(2, "big") + ticket + bytes(2)
    )
    return b"\x04" + len(body).to_bytes(3, "big") + body


class KeyLog:
    """A file that a context writes secrets to, read one connection after another."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.touch()
        self._start = 0

    def next_connection(self) -> None:
        """Forget what was logged until now."""
        self._start = self.file.stat().st_size

    def secrets(self, side: str) -> list[bytes]:
        """The first application traffic secrets of the "client" or the "server", in order."""
        with self.file.open("rb") as log:
            log.seek(self._start)
            lines = [line.split() for line in log]
        name = f"{side.upper()}_TRAFFIC_SECRET_0".encode()
        return [bytes.fromhex(line[2].decode()) for line in lines if line[0] == name]


class Sealer:
    """Makes one direction's records."""

    def __init__(self, secret: bytes) -> None:
        self._keys = TrafficKeys(_SUITE, secret)

    def seal(self, content_type: int, content: bytes) -> bytes:
        record = self._keys.seal(content_type, content)
        if content_type == HANDSHAKE and content in (KEY_UPDATE, KEY_UPDATE_REQUESTED):
            self._keys = self._keys.updated()
        return record


class Opener:
    """Opens one direction's records, each with the one next sequence number.

    Raises CannotDecrypt for a record that came twice, is missing, or was protected with the nonce of another one.
    """

    def __init__(self, secret: bytes) -> None:
        self._keys = TrafficKeys(_SUITE, secret)
        self.rest = b""

    def open(self, stream: bytes) -> Iterator[tuple[int, bytes]]:
        """Content type and content of each record that is whole by now."""
        records, self.rest = split_records(self.rest + stream)
        for record in records:
            content_type, content = self._keys.open(record[:_HEADER], record[_HEADER:])
            if content_type == HANDSHAKE and content in (KEY_UPDATE, KEY_UPDATE_REQUESTED):
                self._keys = self._keys.updated()
            yield content_type, content
