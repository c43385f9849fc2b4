"""The program `qkd-tls`: its subcommands, and the way each of them ends."""

from __future__ import annotations

import os
import select
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, Final

from qkd_tls import __version__, demo
from qkd_tls.cli import completion, connect, explain, get, psk, serve, tunnel
from qkd_tls.cli.failure import ExitCode, explain_error
from qkd_tls.cli.terminal import Terminal

__all__ = ["main"]


_COMMANDS: Final[dict[str, Any]] = {
    "connect": connect,
    "serve": serve,
    "get": get,
    "tunnel": tunnel,
    "psk": psk,
    "explain": explain,
    "completion": completion,
}
_STDOUT: Final = 1
_EXIT_CODES: Final = (
    "exit codes: 0 done; 1 no connection, or TLS failed; 2 wrong options, configuration or files; 3 no QKD key; "
    "4 a certificate was refused; 130 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.program = parser
    terminal = Terminal.of(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: terminal.warning(str(message))
        try:
            return int(arguments.run(arguments, terminal))
        except BrokenPipeError as error:
            return ExitCode.CONNECTION if _stdout_is_closed() else _failed(error, arguments, terminal)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - what is not expected is raised again
            return _failed(error, arguments, terminal)


def _failed(error: BaseException, arguments: Namespace, terminal: Terminal) -> int:
    failure = explain_error(error)
    if failure is None:
        raise error
    terminal.failed(str(failure))
    terminal.record({"command": arguments.command, "error": failure.as_dict()})
    return failure.code


def _stdout_is_closed() -> bool:
    """Return whether the reader of standard output has gone, as with `| head`: no message can reach it."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # The interpreter flushes once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="qkd-tls",
        description="TLS 1.3 connections keyed by X25519, ML-KEM-768 and a QKD key.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"qkd-tls {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.SUMMARY, description=command.DESCRIPTION, epilog=_EXIT_CODES
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    commands.add_parser(
        "demo",
        help="run two KMEs, an HTTPS server and a client on this machine, and check what protects them",
        description="Runs two emulated KMEs, an HTTPS server and an HTTPS client as processes on this machine. Shows "
        "what protects each of ten connections, and what happens when a KME is off. Exit code 0 only if everything "
        "was as it should be. Needs the extra 'emulator'.",
    ).set_defaults(run=lambda arguments, terminal: demo.run())
    return parser
