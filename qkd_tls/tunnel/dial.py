"""Sockets to connect with, and to listen on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping
from typing import Any, Final

from qkd_tls.tunnel.address import TCP, Activated, Address, Unix

__all__ = ["connect", "listen", "set_options"]

_BACKLOG: Final = 1024
_RETRY: Final = 0.02
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3))


def set_options(sock: socket.socket) -> None:
    """Make a socket non-blocking, send small pieces at once, and fail if the peer vanishes."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds)


async def connect(address: TCP | Unix, timeout: float) -> socket.socket:
    """Connect a socket. Each address of a host is tried, all within `timeout` seconds. Raises OSError."""
    try:
        async with asyncio.timeout(timeout):
            return await (_connect_unix(address) if isinstance(address, Unix) else _connect_tcp(address))
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"no connection within {timeout:g} seconds") from None


async def _connect_tcp(address: TCP) -> socket.socket:
    loop = asyncio.get_running_loop()
    last = OSError(errno.EADDRNOTAVAIL, "the host has no address")
    for family, kind, protocol, _, target in await loop.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    ):
        sock = socket.socket(family, kind, protocol)
        try:
            set_options(sock)
            await loop.sock_connect(sock, target)
        except OSError as error:
            sock.close()
            # asyncio's own text is another one.
            last = OSError(error.errno, os.strerror(error.errno or 0))
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last


async def _connect_unix(address: Unix) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        set_options(sock)
        while True:
            try:
                sock.connect(str(address.path))
            except BlockingIOError:
                # The backlog is full. Unlike TCP, nothing tells when there is room.
                await asyncio.sleep(_RETRY)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def listen(
    address: Address, activated: Mapping[str, list[socket.socket]], *, socket_mode: int = 0o600
) -> list[socket.socket]:
    """Open listening sockets for an address. Raises OSError."""
    if isinstance(address, Activated):
        if address.name not in activated:
            known = ", ".join(activated) or "none"
            raise OSError(errno.ENOENT, f"systemd has opened no socket of that name (it has: {known})")
        return activated[address.name]
    if isinstance(address, Unix):
        return [_listen_unix(address, socket_mode)]
    return _listen_tcp(address)


def _listen_tcp(address: TCP) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        targets: list[Any] = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, target in dict.fromkeys(targets):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError:
                if len(targets) == 1:
                    raise
                # A machine without IPv6.
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(target)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen_unix(address: Unix, mode: int) -> socket.socket:
    path = str(address.path)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Between bind and chmod nobody else shall connect.
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        os.chmod(path, mode)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket that a killed process has left; raise OSError if a process listens on it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, f"{path} exists, and is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
            except BlockingIOError:
                pass
        raise OSError(errno.EADDRINUSE, f"somebody listens on {path} already")
