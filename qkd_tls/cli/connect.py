"""The command `qkd-tls connect`: a connection by hand, like `openssl s_client`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from qkd_tls.cli import peer
from qkd_tls.cli.failure import ExitCode
from qkd_tls.cli.handshake import Watch
from qkd_tls.cli.settings import add_qkd_options, address, open_context, seconds
from qkd_tls.cli.terminal import Terminal, add_output_options

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "connect to a server, show the handshake step by step, then send standard input"
DESCRIPTION = (
    "Shows each step of the handshake, when the KME is asked and how long it takes, and what protects the connection, "
    "on standard error. Then standard input goes to the server, and what it sends to standard output. The end of "
    "standard input closes this direction; the command ends when the server closes the other one."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("target", metavar="HOST:PORT", type=address, help="the server")
    peer.add_connection_options(parser)
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--twice", action="store_true", help="connect a second time, which shows an associated connection"
    )
    group.add_argument(
        "--idle", metavar="SECONDS", type=seconds, help="end when nothing has come or gone for so long"
    )
    add_qkd_options(parser)
    add_output_options(parser, data_on_stdout=True)


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    watch, reports = Watch(), []
    with open_context(arguments, watched=watch.manager) as context:
        context.observer = watch.step
        context.set_alpn_protocols(arguments.alpn)
        if arguments.twice:
            with peer.connect(context, watch, terminal, arguments.target, arguments) as (_, report):
                reports.append(report)
            terminal.note()
        with peer.connect(context, watch, terminal, arguments.target, arguments) as (sock, report):
            reports.append(report)
            terminal.note()
            terminal.record({"command": "connect", "connections": [report.as_dict() for report in reports]})
            peer.relay(sock, arguments.idle)
    return ExitCode.OK
