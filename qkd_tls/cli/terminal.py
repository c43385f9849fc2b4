"""The output of a command: lines for people on one stream, one JSON object on another."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from typing import Any, TextIO

__all__ = ["Terminal", "add_output_options", "printable"]


class Terminal:
    """The output of one command.

    `data_on_stdout` is for commands whose standard output is the peer's data: everything else, including
    JSON, then goes to standard error. With `as_json`, only the JSON is written. Safe for threads.
    """

    def __init__(self, *, as_json: bool, quiet: bool, data_on_stdout: bool = False) -> None:
        self.as_json, self._quiet, self._data_on_stdout = as_json, quiet, data_on_stdout
        self._lock = threading.Lock()

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Terminal:
        """Make the terminal that the options of `add_output_options` ask for."""
        return cls(
            as_json=getattr(arguments, "json", False),
            quiet=getattr(arguments, "quiet", False),
            data_on_stdout=getattr(arguments, "data_on_stdout", False),
        )

    def note(self, text: str = "") -> None:
        """Write a note to standard error; write nothing with --quiet or --json."""
        if not self._quiet and not self.as_json:
            self._write(text, sys.stderr)

    def result(self, text: str) -> None:
        """Write a result to standard output."""
        if not self.as_json:
            self._write(text, sys.stdout)

    def record(self, record: dict[str, Any]) -> None:
        """Write the result as one line of JSON, with --json only."""
        if self.as_json:
            self._write(json.dumps(record), sys.stderr if self._data_on_stdout else sys.stdout)

    def warning(self, text: str) -> None:
        """Write a warning for people; with --json the record says the same."""
        if not self.as_json:
            self._write(f"warning: {printable(text)}", sys.stderr)

    def failed(self, text: str) -> None:
        """Write an error for people, also with --quiet."""
        if not self.as_json:
            self._write(text, sys.stderr)

    def _write(self, text: str, stream: TextIO) -> None:
        with self._lock:
            stream.write(text + "\n")
            stream.flush()


def add_output_options(parser: argparse.ArgumentParser, *, data_on_stdout: bool = False) -> None:
    """Add --json and --quiet."""
    group = parser.add_argument_group("output")
    where = "standard error" if data_on_stdout else "standard output"
    group.add_argument("--json", action="store_true", help=f"say it as JSON, one object a line, on {where}")
    group.add_argument("-q", "--quiet", action="store_true", help="only results, warnings and errors")
    parser.set_defaults(data_on_stdout=data_on_stdout)


def printable(text: str) -> str:
    """Replace characters that end a line or command a terminal: peers and KMEs choose some of the text."""
    return "".join(character if character.isprintable() else "?" for character in text)
