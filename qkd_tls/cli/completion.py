"""The command `qkd-tls completion`: prints a completion script for a shell."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.util import find_spec

from qkd_tls.cli.failure import CommandError, ExitCode
from qkd_tls.cli.terminal import Terminal

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "print a completion script for bash, zsh or tcsh"
DESCRIPTION = (
    "Prints a completion script, for instance: qkd-tls completion bash > ~/.local/share/bash-completion/completions/"
    "qkd-tls. Needs the Python package shtab (the extra 'cli')."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    if find_spec("shtab") is None:
        raise CommandError("completion scripts need shtab", hint="install it with: pip install shtab")
    import shtab

    for action in _actions(arguments.program):
        if action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    terminal.result(shtab.complete(arguments.program, arguments.shell).rstrip("\n"))
    return ExitCode.OK


def _actions(parser: ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)
