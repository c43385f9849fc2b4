"""A recording as a pcap file, with headers of Ethernet, IPv4 and TCP: no capture, so no privileges."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PORT", "write_pcap"]

PORT = 8443
_CLIENT, _SERVER = (
    (ipaddress.IPv4Address("192.0.2.1").packed, 50000),
    (ipaddress.IPv4Address("192.0.2.2").packed, PORT),
)
_SEGMENT = 1400  # bytes
_SYN, _ACK, _PSH = 0x02, 0x10, 0x08


def write_pcap(file: Path, pieces: Iterable[tuple[str, bytes]]) -> None:
    """One TCP connection from 192.0.2.1 to port 8443 of 192.0.2.2, without its end.

    `pieces` are sender ("client" or "server") and bytes, in the order they came.
    """
    packets: list[bytes] = []
    sent = {"client": 1000, "server": 2000}

    def packet(sender: str, flags: int, payload: bytes = b"") -> None:
        other = "server" if sender == "client" else "client"
        acknowledged = sent[other] if flags & _ACK else 0
        packets.append(_ethernet(sender, sent[sender], acknowledged, flags, payload))
        sent[sender] += len(payload) + bool(flags & _SYN)

    packet("client", _SYN)
    packet("server", _SYN | _ACK)
    packet("client", _ACK)
    for sender, data in pieces:
        for start in range(0, len(data), _SEGMENT):
            packet(sender, _PSH | _ACK, data[start : start + _SEGMENT])

    with file.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 16, 1))
        for number, one in enumerate(packets):
            out.write(struct.pack("<IIII", 1_700_000_000, number * 1000, len(one), len(one)) + one)


def _ethernet(sender: str, sequence: int, acknowledged: int, flags: int, payload: bytes) -> bytes:
    (source, source_port), (target, target_port) = (
        (_CLIENT, _SERVER) if sender == "client" else (_SERVER, _CLIENT)
    )
    tcp = struct.pack(
        ">HHIIBBHHH", source_port, target_port, sequence, acknowledged, 5 << 4, flags, 0xFFFF, 0, 0
    )
    pseudo = source + target + struct.pack(">BBH", 0, 6, len(tcp) + len(payload))
    tcp = tcp[:16] + _checksum(pseudo + tcp + payload) + tcp[18:]
    ip = (
        struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(payload), 0, 0x4000, 64, 6, 0) + source + target
    )
    ip = ip[:10] + _checksum(ip) + ip[12:]
    addresses = bytes.fromhex(
        "020000000002020000000001" if sender == "client" else "020000000001020000000002"
    )
    return addresses + b"\x08\x00" + ip + tcp + payload


def _checksum(data: bytes) -> bytes:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)
