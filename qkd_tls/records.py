"""The transport's bytes, split into TLS records (RFC 8446 5.1).

Two TLS connections follow one another on one transport. Each is given one record at a time, so that it never swallows
bytes that belong to the next.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FULL_RECORD", "RECORD_HEADER_SIZE", "RecordBuffer", "alert", "handshake_records"]

FULL_RECORD: Final = 1 << 14
"""The most bytes of content in a record (RFC 8446 5.1)."""

RECORD_HEADER_SIZE: Final = 5

# Content plus 256 bytes for the encryption (RFC 8446 5.2).
_LARGEST_FRAGMENT: Final = FULL_RECORD + 256
_CONTENT_TYPES: Final = range(20, 24)


class RecordBuffer:
    """A buffer of bytes from the transport, cut at record boundaries.

    What it does is linear in the bytes, however small the pieces are that they come in, and the records.
    """

    def __init__(self) -> None:
        # It gives away bytes from its front without moving the others.
        self._data = bytearray()

    def __len__(self) -> int:
        """Return the number of bytes not yet taken."""
        return len(self._data)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        self._data += data

    def put_back(self, data: bytes) -> None:
        """Put bytes before all others."""
        self._data[:0] = data

    def peek(self, size: int) -> bytes:
        """Return at most `size` bytes, which stay."""
        return bytes(self._data[:size])

    @property
    def missing(self) -> int:
        """The bytes that the first record's header still lacks or, behind it, its content: at least 1.

        A reader that takes no more than these leaves what follows the record where it is.
        """
        data = self._data
        if len(data) < RECORD_HEADER_SIZE:
            return RECORD_HEADER_SIZE - len(data)
        return max(1, RECORD_HEADER_SIZE + int.from_bytes(data[3:5], "big") - len(data))

    def next_record(self) -> bytes | None:
        """Remove and return one whole record with its header; None if more bytes are needed.

        Bytes that cannot be a record are returned at once and whole, for OpenSSL to reject.
        """
        data = self._data
        if not data:
            return None
        if data[0] not in _CONTENT_TYPES or (len(data) > 1 and data[1] != 3):
            return self.take_all()
        if len(data) < RECORD_HEADER_SIZE:
            return None
        length = int.from_bytes(data[3:5], "big")
        if length > _LARGEST_FRAGMENT:
            return self.take_all()
        end = RECORD_HEADER_SIZE + length
        if len(data) < end:
            return None
        if len(data) == end:
            return self.take_all()
        record = bytes(data[:end])
        del data[:end]
        return record

    def take_all(self) -> bytes:
        """Remove and return everything."""
        taken = bytes(self._data)
        self._data.clear()
        return taken


def alert(description: int) -> bytes:
    """Return a fatal alert in clear, as a server sends it before any key exists (RFC 8446 6)."""
    return bytes([21, 3, 3, 0, 2, 2, description])


def handshake_records(message: bytes) -> bytes:
    """Return a handshake message in clear, in as few records as can be (RFC 8446 5.1)."""
    parts = (message[start : start + FULL_RECORD] for start in range(0, len(message), FULL_RECORD))
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)
