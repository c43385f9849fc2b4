"""A client connection that is shown while it is made, and the relay of its bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Final

from qkd_tls.cli.handshake import Handshake, Watch
from qkd_tls.cli.report import ConnectionReport
from qkd_tls.cli.settings import alpn_names, seconds
from qkd_tls.cli.terminal import Terminal
from qkd_tls.context import QKDContext
from qkd_tls.socket import QKDSocket

__all__ = ["add_connection_options", "connect", "relay", "shown_address"]

_CHUNK: Final = 1 << 16
_STDIN: Final = 0


def add_connection_options(parser: ArgumentParser) -> None:
    """Add the options that `connect` reads."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server-name",
        metavar="NAME",
        help="name to ask for and to check in the certificate (default: HOST)",
    )
    group.add_argument(
        "--alpn",
        metavar="NAMES",
        type=alpn_names,
        default=[],
        help="application protocols to offer, with commas between, for instance h2,http/1.1",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=20.0,
        help="for TCP and for TLS, each (default 20)",
    )


@contextlib.contextmanager
def connect(
    context: QKDContext, watch: Watch, terminal: Terminal, target: tuple[str, int], arguments: Namespace
) -> Iterator[tuple[QKDSocket, ConnectionReport]]:
    """Connect as the arguments say; yield the socket and its report, and close it at the end of the block."""
    name = arguments.server_name or target[0]
    peer = shown_address(target)
    terminal.note(f"{peer}" + (f", as {name}" if name != target[0] else ""))
    handshake = Handshake(lambda line: terminal.note(str(line)))
    with watch.of(handshake), socket.create_connection(target, timeout=arguments.timeout) as plain:
        handshake.add("TCP", f"connected to {shown_address(plain.getpeername())}")
        sock = context.wrap_socket(plain, server_hostname=name)
    with sock:
        report = ConnectionReport.of(sock, peer, handshake, own_certificate=arguments.cert is not None)
        terminal.note()
        for line in report.lines():
            terminal.note(line)
        yield sock, report


def relay(sock: QKDSocket, idle: float | None) -> None:
    """Send standard input to the peer, and its data to standard output, until the peer closes.

    The end of standard input closes this direction only. Raises TimeoutError after `idle` seconds without a
    byte in either direction, and the error that ends the connection.
    """
    sock.settimeout(idle)
    failures: list[OSError] = []
    moved = [time.monotonic()]

    def send() -> None:
        try:
            # Not through Python's buffered file: its lock would be held at the program's end. Where standard input is
            # closed, that number may be another file's.
            while sys.stdin is not None and (data := os.read(_STDIN, _CHUNK)):
                sock.sendall(data)
                moved[0] = time.monotonic()
            _end_sending(sock)
        except OSError as error:
            failures.append(error)
            with contextlib.suppress(OSError):
                # Wakes the reader.
                sock.shutdown(socket.SHUT_RD)

    threading.Thread(target=send, name="standard input", daemon=True).start()
    while True:
        try:
            data = sock.recv(_CHUNK)
        except TimeoutError:
            if idle is not None and time.monotonic() - moved[0] < idle:
                continue
            raise TimeoutError(f"nothing came or went for {idle:g} seconds") from None
        if not data:
            break
        moved[0] = time.monotonic()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    if failures:
        raise failures[0]


def shown_address(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    # A socket for both families shows IPv4 addresses like this (RFC 4291 section 2.5.5.2).
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def _end_sending(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        # Both ends have closed already, which is no failure.
        if error.errno != errno.ENOTCONN:
            raise
