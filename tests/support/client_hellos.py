"""ClientHellos put together from their parts (RFC 8446 sections 3.4 and 4.1.2), also such as no client sends."""

from __future__ import annotations

from collections.abc import Sequence

from qkd_tls.client_hello import ClientHelloReader
from qkd_tls.records import RecordBuffer

__all__ = ["extension", "hello", "psk", "read", "record", "records", "sni", "v8", "v16", "v24"]


def v8(*parts: bytes) -> bytes:
    return len(b"".join(parts)).to_bytes(1, "big") + b"".join(parts)


def v16(*parts: bytes) -> bytes:
    return len(b"".join(parts)).to_bytes(2, "big") + b"".join(parts)


def v24(*parts: bytes) -> bytes:
    return len(b"".join(parts)).to_bytes(3, "big") + b"".join(parts)


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + v16(data)


def hello(*extensions: bytes, tail: bytes | None = None) -> bytes:
    """A ClientHello with these extensions, or with `tail` instead of the extensions block."""
    start = b"\x03\x03" + bytes(32) + v8(bytes(32)) + v16(b"\x13\x02\x13\x01") + v8(b"\0")
    return b"\x01" + v24(start, v16(*extensions) if tail is None else tail)


def record(data: bytes) -> bytes:
    return b"\x16\x03\x01" + v16(data)


def records(message: bytes, size: int = 16384) -> bytes:
    return b"".join(record(message[i : i + size]) for i in range(0, len(message), size))


def sni(*names: tuple[int, bytes]) -> bytes:
    return extension(0, v16(*(bytes([kind]) + v16(name) for kind, name in names)))


def psk(identities: Sequence[bytes], binders: Sequence[bytes]) -> bytes:
    return extension(41, v16(*(v16(identity) + bytes(4) for identity in identities)) + v16(*map(v8, binders)))


def read(stream: bytes) -> tuple[bytes | None, int]:
    """Return the ClientHello at the start of the stream, if it is whole, and how many bytes are left."""
    buffer = RecordBuffer()
    buffer.feed(stream)
    return ClientHelloReader().read(buffer), len(buffer)
