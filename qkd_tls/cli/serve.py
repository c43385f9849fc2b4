"""The command `qkd-tls serve`: a server by hand, like `openssl s_server`."""

from __future__ import annotations

import argparse
import socket
import threading
from argparse import ArgumentParser, Namespace
from typing import Final

from qkd_tls.cli import peer, picture
from qkd_tls.cli.failure import ExitCode, explain_error
from qkd_tls.cli.handshake import Handshake, Watch
from qkd_tls.cli.report import ConnectionReport
from qkd_tls.cli.settings import add_qkd_options, address, alpn_names, open_context, seconds
from qkd_tls.cli.terminal import Terminal, add_output_options
from qkd_tls.context import QKDContext
from qkd_tls.socket import QKDSocket

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "accept connections, show each handshake step by step, and echo what comes"
DESCRIPTION = (
    "Accepts connections and shows for each one the steps of its handshake, when the KME is asked and how long it "
    "takes, and what protects it. Unless told otherwise it sends back what comes."
)
_CHUNK: Final = 1 << 16
_LONGEST_REQUEST: Final = 1 << 16  # bytes of an HTTP request's head


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "listen",
        metavar="[HOST:]PORT",
        type=_listening_address,
        help="where to listen; all addresses without HOST; port 0 for a free one",
    )
    mode = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    mode.add_argument(
        "--www",
        dest="handler",
        action="store_const",
        const=_web_page,
        default=_echo,
        help="answer HTTP requests with a page that says what protects the connection",
    )
    mode.add_argument(
        "--chat",
        action="store_true",
        help="one connection only: standard input goes to the client, what it sends to standard output",
    )
    group = parser.add_argument_group("connections")
    group.add_argument("--accept", metavar="N", type=_count, help="end after N connections")
    group.add_argument(
        "--alpn", metavar="NAMES", type=alpn_names, default=[], help="application protocols to accept"
    )
    group.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, default=20.0, help="for a handshake (default 20)"
    )
    group.add_argument(
        "--idle", metavar="SECONDS", type=seconds, help="end a connection on which nothing moves for so long"
    )
    add_qkd_options(parser, server_side=True)
    add_output_options(parser)


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    watch = Watch()
    with open_context(arguments, server_side=True, watched=watch.manager) as context:
        context.observer = watch.step
        context.set_alpn_protocols(arguments.alpn)
        with _listen(*arguments.listen) as listening:
            where = peer.shown_address(listening.getsockname())
            terminal.note(f"listening on {where}")
            terminal.record({"command": "serve", "listening": where})
            return _Server(context, watch, terminal, arguments).serve(listening)


class _Server:
    def __init__(self, context: QKDContext, watch: Watch, terminal: Terminal, arguments: Namespace) -> None:
        self._context, self._watch, self._terminal, self._arguments = context, watch, terminal, arguments
        self._code = ExitCode.OK
        """The exit code for the first connection that failed."""

    def serve(self, listening: socket.socket) -> ExitCode:
        """Serve until the last connection has ended, each in its own thread."""
        if self._arguments.chat:
            self._connection(1, *listening.accept())
            return self._code
        threads: list[threading.Thread] = []
        number = 0
        while self._arguments.accept is None or number < self._arguments.accept:
            number += 1
            accepted = listening.accept()
            thread = threading.Thread(target=self._connection, args=(number, *accepted), daemon=True)
            threads = [*(other for other in threads if other.is_alive()), thread]
            thread.start()
        for thread in threads:
            thread.join()
        return self._code

    def _connection(self, number: int, plain: socket.socket, client: tuple[str, int]) -> None:
        def show(text: object) -> None:
            self._terminal.note(f"[{number}] {text}")

        record = {"command": "serve", "connection": number, "peer": peer.shown_address(client)}
        handshake = Handshake(show)
        try:
            with plain, self._watch.of(handshake):
                handshake.add("TCP", f"accepted from {record['peer']}")
                plain.settimeout(self._arguments.timeout)
                sock = self._context.wrap_socket(plain, server_side=True)
            with sock:
                own = ConnectionReport.of(sock, str(record["peer"]), handshake, own_certificate=True)
                for line in own.lines():
                    show(line)
                self._terminal.record(record | own.as_dict())
                self._talk(sock, own)
                show("closed")
        except OSError as error:
            failure = explain_error(error)
            assert failure is not None, "every OSError is explained"
            self._terminal.failed("\n".join(f"[{number}] {line}" for line in str(failure).splitlines()))
            self._terminal.record(record | {"error": failure.as_dict()})
            self._code = self._code or failure.code

    def _talk(self, sock: QKDSocket, own: ConnectionReport) -> None:
        sock.settimeout(self._arguments.idle)
        if self._arguments.chat:
            peer.relay(sock, self._arguments.idle)
        else:
            self._arguments.handler(sock, own)


def _echo(sock: QKDSocket, _: ConnectionReport) -> None:
    while data := sock.recv(_CHUNK):
        sock.sendall(data)


def _web_page(sock: QKDSocket, own: ConnectionReport) -> None:
    """Answer one HTTP request, for any path, with the page."""
    request = b""
    while b"\r\n\r\n" not in request and len(request) < _LONGEST_REQUEST:
        data = sock.recv(_CHUNK)
        if not data:
            return
        request += data
    body = "\n".join([*own.lines(), "", *picture.draw(own), ""]).encode()
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    sock.sendall(head.encode() + body)


def _listen(host: str, port: int) -> socket.socket:
    if host:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _listening_address(text: str) -> tuple[str, int]:
    if text.isascii() and text.isdigit() and int(text) < 65536:
        return "", int(text)
    return address(text, lowest_port=0)


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of connections")
