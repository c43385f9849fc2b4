"""The command `qkd-tls tunnel`: a forwarder for programs that cannot be given a context."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from qkd_tls.cli.failure import CommandError, ExitCode
from qkd_tls.cli.terminal import Terminal, add_output_options

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "forward connections of programs that are not Python, as a TOML file says"
DESCRIPTION = (
    "Forwards plain connections over hybrid ones, and hybrid ones to plain ones, as a TOML file says. SIGTERM ends it "
    "when the connections have ended, SIGHUP reads the file again."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--config", metavar="FILE", required=True, help="TOML file with the listeners")
    parser.add_argument("--check", action="store_true", help="only check the file and what it names")
    add_output_options(parser)


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    # Only who runs a tunnel waits for its modules.
    from qkd_tls import tunnel
    from qkd_tls.configuration import ConfigError

    file = Path(arguments.config)
    try:
        # A mistake in the file ends this command as mistakes end the others.
        tunnel.check(file)
    except ConfigError as error:
        raise CommandError(
            str(error), hint="correct it; --check tells whether the file is in order"
        ) from None
    if not arguments.check:
        return tunnel.run(file)
    terminal.note(f"{file}: in order")
    terminal.record({"command": "tunnel", "config": str(file), "in_order": True})
    return ExitCode.OK
