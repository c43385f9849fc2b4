"""The PROXY protocol, version 2: tells a plain server who is at the other end of the tunnel. Pure functions.

Source: "The PROXY protocol, Versions 1 & 2", HAProxy, sections 2.2 to 2.2.8.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from typing import Final

__all__ = ["ProxyTLV", "encode_header", "encode_tlv", "ssl_tlv"]

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_VERSION_2_PROXY: Final = 0x21
_TCP_OVER_IPV4: Final = 0x11
_TCP_OVER_IPV6: Final = 0x21
_UNIX_STREAM: Final = 0x31
_UNIX_PATH: Final = 108

_CLIENT_SSL: Final = 0x01
_CLIENT_CERT_CONN: Final = 0x02
_CLIENT_CERT_SESS: Final = 0x04


class ProxyTLV:
    """Types of additional fields; from 0xE0 on for private use (section 2.2.7), here this project's own."""

    ALPN: Final = 0x01
    AUTHORITY: Final = 0x02
    UNIQUE_ID: Final = 0x05
    SSL: Final = 0x20
    SSL_VERSION: Final = 0x21
    SSL_CN: Final = 0x22
    SSL_CIPHER: Final = 0x23

    PROTECTION: Final = 0xE0
    """ASCII: hybrid, pq-only or classical."""
    KEY_ID: Final = 0xE1
    """ASCII: ID of the QKD key."""
    CLIENT_SAE_ID: Final = 0xE2
    """UTF-8."""
    SERVER_SAE_ID: Final = 0xE3
    """UTF-8."""
    CERTIFICATE_SHA256: Final = 0xE4
    """32 bytes: SHA-256 of the peer's certificate (DER)."""


def encode_tlv(kind: int, value: bytes) -> bytes:
    """Encode type, length in 2 bytes, and value. Raises ValueError for a value over 65,535 bytes."""
    if len(value) > 0xFFFF:
        raise ValueError("a TLV holds at most 65,535 bytes")
    return struct.pack("!BH", kind, len(value)) + value


def ssl_tlv(
    *, version: str, cipher: str, common_name: str | None, with_certificate: bool, now: bool
) -> bytes:
    """Encode the field about TLS (section 2.2.6).

    `with_certificate`: the peer has sent a certificate, and it was verified; `now`: on this very connection.
    """
    client = _CLIENT_SSL
    if with_certificate:
        client |= _CLIENT_CERT_SESS | (_CLIENT_CERT_CONN if now else 0)
    value = struct.pack("!BI", client, 0 if with_certificate else 1)
    value += encode_tlv(ProxyTLV.SSL_VERSION, version.encode())
    if common_name is not None:
        value += encode_tlv(ProxyTLV.SSL_CN, common_name.encode())
    value += encode_tlv(ProxyTLV.SSL_CIPHER, cipher.encode())
    return encode_tlv(ProxyTLV.SSL, value)


def encode_header(
    source: tuple[str, int] | str, destination: tuple[str, int] | str, tlvs: Iterable[bytes] = ()
) -> bytes:
    """Encode the header of a connection from `source` to `destination`.

    Each is host and port, or the path of a Unix socket.

    Raises ValueError if the two are of different kinds or the fields are longer than 65,535 bytes.
    """
    if isinstance(source, str) and isinstance(destination, str):
        family = _UNIX_STREAM
        addresses = b"".join(
            path.encode()[:_UNIX_PATH].ljust(_UNIX_PATH, b"\0") for path in (source, destination)
        )
    elif isinstance(source, tuple) and isinstance(destination, tuple):
        # Without the scope of a link-local address, for which there is no room.
        hosts = [ipaddress.ip_address(host.partition("%")[0]) for host, _ in (source, destination)]
        if hosts[0].version != hosts[1].version:
            raise ValueError("source and destination are of different IP versions")
        family = _TCP_OVER_IPV4 if hosts[0].version == 4 else _TCP_OVER_IPV6
        addresses = hosts[0].packed + hosts[1].packed + struct.pack("!HH", source[1], destination[1])
    else:
        raise ValueError("source and destination are of different kinds")
    body = addresses + b"".join(tlvs)
    if len(body) > 0xFFFF:
        raise ValueError("a header holds at most 65,535 bytes")
    return _SIGNATURE + struct.pack("!BBH", _VERSION_2_PROXY, family, len(body)) + body
