"""The transport's bytes, split into TLS records (RFC 8446 5.1).

Two TLS connections follow one another on one transport. Each is given one record at a time, so that it never swallows
bytes that belong to the next.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FULL_RECORD", "RecordBuffer", "alert"]

FULL_RECORD: Final = 1 << 14
"""The most bytes of content in a record (RFC 8446 5.1)."""

_HEADER_SIZE: Final = 5
# Content plus 256 bytes for the encryption (RFC 8446 5.2).
_LARGEST_FRAGMENT: Final = FULL_RECORD + 256
_CONTENT_TYPES: Final = range(20, 24)


class RecordBuffer:
    """A buffer of bytes from the transport, cut at record boundaries."""

    def __init__(self) -> None:
        # Immutable: a flight mostly comes in one piece, and then is never copied.
        self.data = b""
        """All bytes not yet taken."""

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self.data = self.data + data if self.data else bytes(data)

    @property
    def missing(self) -> int:
        """The bytes that the first record's header still lacks or, behind it, its content: at least 1.

        A reader that takes no more than these leaves what follows the record where it is.
        """
        data = self.data
        if len(data) < _HEADER_SIZE:
            return _HEADER_SIZE - len(data)
        return max(1, _HEADER_SIZE + int.from_bytes(data[3:5], "big") - len(data))

    def next_record(self) -> bytes | None:
        """Remove and return one whole record with its header; None if more bytes are needed.

        Bytes that cannot be a record are returned at once and whole, for OpenSSL to reject.
        """
        data = self.data
        if not data:
            return None
        if data[0] not in _CONTENT_TYPES or (len(data) > 1 and data[1] != 3):
            return self.take_all()
        if len(data) < _HEADER_SIZE:
            return None
        length = int.from_bytes(data[3:5], "big")
        if length > _LARGEST_FRAGMENT:
            return self.take_all()
        if len(data) < _HEADER_SIZE + length:
            return None
        return self.take(_HEADER_SIZE + length)

    def take_all(self) -> bytes:
        """Remove and return everything."""
        taken, self.data = self.data, b""
        return taken

    def take(self, size: int) -> bytes:
        """Remove and return the first bytes."""
        taken, self.data = self.data[:size], self.data[size:]
        return taken


def alert(description: int) -> bytes:
    """Return a fatal alert in clear, as a server sends it before any key exists (RFC 8446 6)."""
    return bytes([21, 3, 3, 0, 2, 2, description])
