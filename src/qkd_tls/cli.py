"""The command `qkd-tls`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qkd_tls import __version__, demo

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="qkd-tls", description="TLS 1.3 connections keyed by X25519, ML-KEM-768 and a QKD key."
    )
    parser.add_argument("--version", action="version", version=f"qkd-tls {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser(
        "demo",
        help="run two KMEs, an HTTPS server and a client on this machine, and check what protects them",
        description="Runs two emulated KMEs, an HTTPS server and an HTTPS client as processes on this machine. Shows "
        "what protects each of ten connections, and what happens when a KME is off. Exit code 0 only if everything "
        "was as it should be. Needs the extra 'emulator'.",
    ).set_defaults(run=lambda arguments: demo.run())
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))
