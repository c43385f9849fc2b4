"""Addresses of a configuration file: HOST:PORT, unix:PATH, systemd:NAME."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["TCP", "Activated", "Address", "Unix", "parse", "shown"]

_TCP = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]/\s]*)):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class TCP:
    """A TCP address; the host is a name or a number, "" for all addresses of this machine (to listen only)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if only this machine is meant."""
        if self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


@dataclass(frozen=True)
class Unix:
    """A Unix stream socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class Activated:
    """The sockets of this name that systemd has opened (`FileDescriptorName=`)."""

    name: str

    def __str__(self) -> str:
        return f"systemd:{self.name}"


Address: TypeAlias = TCP | Unix | Activated


def parse(text: str, folder: Path) -> Address:
    """Parse an address; Unix paths are relative to `folder`. Raises ValueError."""
    if text.startswith("unix:"):
        path = folder / text.removeprefix("unix:")
        # sun_path has 108 bytes on Linux, a final zero included.
        if path == folder or len(bytes(path)) > 107:
            raise ValueError(f"{text!r} must be unix:PATH with a path of 1 to 107 bytes")
        return Unix(path)
    if text.startswith("systemd:"):
        name = text.removeprefix("systemd:")
        if not name:
            raise ValueError("systemd: must be followed by the name of the socket (FileDescriptorName=)")
        return Activated(name)
    match = _TCP.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{text!r} must be HOST:PORT, [IPv6]:PORT or unix:PATH")
    return TCP(match["v6"] or match["host"] or "", int(match["port"]))


def shown(sock: socket.socket, address: Any) -> str:
    """Return the peer's address for people and logs."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{address}" if address else "unix:"
    return str(TCP(address[0], address[1]))
