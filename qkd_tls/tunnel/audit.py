"""The audit log: one line of JSON for each connection, to a file or to stderr. Never a key."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

__all__ = ["AuditLog"]


class AuditLog:
    """A log in a file, on stderr, or off. Raises OSError if the file cannot be opened."""

    def __init__(self, target: Path | Literal["stderr", "off"]) -> None:
        self._target = target
        self._fd: int | None = None
        if isinstance(target, Path):
            self._fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; raise OSError if it cannot be written."""
        if self._target == "off":
            return
        line = json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) + "\n"
        if self._fd is None:
            sys.stderr.write(line)
            sys.stderr.flush()
        else:
            # One write, so that lines of two processes never mix.
            os.write(self._fd, line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
