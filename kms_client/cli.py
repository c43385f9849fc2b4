"""The command `qkd-kme`: emulated KMEs, and the examination of real ones.

Without the extra `emulator` it has `doctor` only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from kms_client.doctor.command import add_parser as add_doctor

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the subcommand's exit code, or 1 with the reason on standard error."""
    parser = argparse.ArgumentParser(
        prog="qkd-kme", description="Emulated key management entities, and the examination of real ones."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    try:
        from kms_client.emulator.cli import add_parsers as add_emulator
    except ImportError as error:
        parser.epilog = f"Only doctor is there: {error}."
    else:
        add_emulator(commands)
    add_doctor(commands)
    arguments = parser.parse_args(argv)
    try:
        with ExitStack() as stack:
            return int(arguments.run(arguments, stack) or 0)
    except (OSError, ValueError) as error:
        print(f"qkd-kme: {error}", file=sys.stderr)
        return 1
