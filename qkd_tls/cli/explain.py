"""The command `qkd-tls explain`: a picture of what protected a connection."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from qkd_tls.cli import peer, picture
from qkd_tls.cli.failure import CommandError, ExitCode
from qkd_tls.cli.handshake import Watch
from qkd_tls.cli.report import ConnectionReport
from qkd_tls.cli.settings import add_qkd_options, address, open_context
from qkd_tls.cli.terminal import Terminal, add_output_options

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "draw what protected a connection: secrets, certificates, KMEs, and what an attacker would need"
DESCRIPTION = (
    "Draws what protects a connection that it makes now, or one that the output of `qkd-tls connect --json` or a line "
    "of an audit log tells of."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("target", metavar="HOST:PORT", type=address, nargs="?", help="connect to this server")
    source.add_argument("--from-json", metavar="FILE", help="one JSON object; - for standard input")
    parser.add_argument("--svg", metavar="FILE", help="write the picture as SVG too")
    peer.add_connection_options(parser)
    add_qkd_options(parser)
    add_output_options(parser)


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    report = _connected(arguments, terminal) if arguments.target else _read(arguments.from_json)
    terminal.result("\n".join(picture.draw(report)))
    terminal.record(
        {"command": "explain", **report.as_dict(), "attacker_needs": picture.attacker_needs(report)}
    )
    if arguments.svg:
        Path(arguments.svg).write_text(picture.draw_svg(report), encoding="utf-8")
        terminal.note(f"{arguments.svg}: written")
    return ExitCode.OK


def _connected(arguments: Namespace, terminal: Terminal) -> ConnectionReport:
    watch = Watch()
    with open_context(arguments, watched=watch.manager) as context:
        context.observer = watch.step
        context.set_alpn_protocols(arguments.alpn)
        with peer.connect(context, watch, terminal, arguments.target, arguments) as (_, report):
            terminal.note()
            return report


def _read(name: str) -> ConnectionReport:
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        record = json.loads(data.decode())
    except UnicodeDecodeError:
        raise CommandError(f"{name} is not text in UTF-8", hint="give one JSON object") from None
    except ValueError as error:
        raise CommandError(
            f"{name} is not one JSON object: {error}",
            hint="of a file with one object a line take one: tail -n 1 FILE",
        ) from None
    return ConnectionReport.from_dict(record)
