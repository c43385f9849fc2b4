"""Tables of a TOML file, read strictly.

Every mistake is a `ConfigError` that names file, table and key. Unknown keys are mistakes: a misspelt limit
must not be ignored. Secrets are never in the file itself, which names the files that hold them.
"""

from __future__ import annotations

import difflib
import math
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["REQUIRED", "ConfigError", "Table", "read_file"]

REQUIRED: Final[Any] = object()
"""The default of a required key."""
_LONGEST: Final = 1e9
"""Seconds; about 31 years."""


class ConfigError(ValueError):
    """A configuration that cannot be used.

    Attributes: ``file``; ``table`` (as it stands in the file, "" for the top); ``key`` ("" if the table
    itself is meant); ``problem`` (the mistake and the correct form).
    """

    def __init__(self, file: Path, table: str, key: str, problem: str) -> None:
        self.file, self.table, self.key, self.problem = file, table, key, problem
        where = [str(file)]
        if table:
            where.append(table)
        if key:
            where.append(key)
        super().__init__(": ".join([*where, problem]))


class Table:
    """One table of a file. Each `take_` method reads a key once; `finish` refuses the unread ones."""

    def __init__(self, file: Path, name: str, content: Mapping[str, Any]) -> None:
        self.file, self.name = file, name
        self._content = dict(content)
        self._taken: dict[str, None] = {}

    def error(self, key: str, problem: str) -> ConfigError:
        """Return an error about one key of this table; "" for the table."""
        return ConfigError(self.file, self.name, key, problem)

    def finish(self) -> None:
        """Refuse unknown keys."""
        for key in self._content:
            if key not in self._taken:
                close = difflib.get_close_matches(key, self._taken, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(self._taken)}"
                raise self.error(key, f"is not known here; {hint}")

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, in their order in the file."""
        return iter(self._content)

    # --- values

    def _take(self, key: str, kind: Any, kind_name: str, default: Any) -> Any:
        self._taken[key] = None
        if key not in self._content:
            if default is REQUIRED:
                raise self.error(key, "is missing")
            return default
        value = self._content[key]
        # TOML's true is no number, though Python's is.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            hint = "; a key with a dot in it is written in quotes" if isinstance(value, dict) else ""
            raise self.error(key, f"must be {kind_name}, not {value!r}{hint}")
        return value

    def take_text(self, key: str, default: Any = REQUIRED) -> Any:
        """Return a non-empty string."""
        value = self._take(key, str, "a string", default)
        if value == "":
            raise self.error(key, "must not be empty")
        return value

    def take_bool(self, key: str, default: bool) -> bool:
        """Return true or false."""
        return bool(self._take(key, bool, "true or false", default))

    def take_int(self, key: str, default: int, least: int = 0, most: int = 1_000_000) -> int:
        """Return a whole number from `least` to `most`."""
        value: int = self._take(key, int, "a whole number", default)
        if not least <= value <= most:
            raise self.error(key, f"must be {least} to {most}, not {value}")
        return value

    def take_seconds(self, key: str, default: Any = REQUIRED, *, zero: bool = False) -> Any:
        """Return a positive number of seconds, or 0 if `zero` allows it."""
        value = self._take(key, (int, float), "a number of seconds", default)
        if value is None:
            return None
        seconds = float(value)
        if not math.isfinite(seconds) or seconds > _LONGEST or seconds < 0 or (seconds == 0 and not zero):
            raise self.error(
                key, f"must be {'0 or ' if zero else ''}a positive number of seconds, not {value}"
            )
        return seconds

    def take_list(self, key: str, default: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Return a list of non-empty strings."""
        value = self._take(key, list, "a list of strings", None)
        if value is None:
            return default
        if not value or not all(isinstance(entry, str) and entry for entry in value):
            raise self.error(key, "must be a list of one or more non-empty strings")
        return tuple(value)

    def take_names(self, key: str, default: Any = REQUIRED) -> Any:
        """Return one name, or a list of different ones, as a tuple."""
        if isinstance(self._content.get(key), str):
            return (self.take_text(key),)
        value = self._take(key, list, "a name or a list of names", default)
        if value is None:
            return None
        names: tuple[str, ...] = self.take_list(key, ()) or ()
        if len(set(names)) < len(names):
            raise self.error(key, "has a name twice")
        return names

    def take_choice(self, key: str, choices: tuple[str, ...], default: Any = REQUIRED) -> Any:
        """Return one of a few words."""
        value = self.take_text(key, default)
        if value is not default and value not in choices:
            raise self.error(key, f"must be {' or '.join(choices)}, not {value!r}")
        return value

    # --- files

    def path(self, text: str) -> Path:
        """Return a path relative to the folder of the file."""
        return self.file.parent / text

    def take_file(self, key: str, default: Any = REQUIRED) -> Any:
        """Return the path of a file that can be read."""
        text = self.take_text(key, default)
        if text is None:
            return None
        if "-----BEGIN" in text:
            raise self.error(key, "must be the path of a file, not the content: keep it in a file of its own")
        path = self.path(text)
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise self.error(key, f"cannot read {path}: {error.strerror}") from None
        return path

    def take_secret_file(self, key: str, default: Any = REQUIRED) -> Any:
        """Return the path of a file that only its owner (and group) may read."""
        if not isinstance(self._content.get(key, ""), str):
            # Not shown: it may be the secret itself, such as a password of digits.
            raise self.error(key, "must be a string, the path of a file")
        path = self.take_file(key, default)
        if path is not None:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise self.error(
                    key,
                    f"everybody on this machine may read or change {path} (mode {mode:04o}): chmod 600 it",
                )
        return path

    def take_secret(self, key: str) -> str:
        """Return a string, or the one line of a secret file `{ file = "PATH" }`. It is in no message."""
        value = self._content[key]
        if isinstance(value, dict):
            table = self.take_table(key)
            path = table.take_secret_file("file")
            table.finish()
            # Any bytes are latin-1, so there is no error that would hold them.
            return str(path.read_bytes().decode("latin-1").rstrip("\r\n"))
        self._taken[key] = None
        if not isinstance(value, str):
            raise self.error(key, 'must be a string, or { file = "PATH" } of a file that holds it')
        return value

    # --- tables

    def take_table(self, key: str) -> Table:
        """Return a table in this one; an empty one if it is missing."""
        content = self._take(key, dict, "a table", {})
        return Table(self.file, f"[{self._dotted(key)}]", content)

    def take_tables(self, key: str) -> dict[str, Table]:
        """Return the tables `[key.NAME]`, by name."""
        tables = self._take(key, dict, f"tables [{key}.NAME]", {})
        for name, content in tables.items():
            if not isinstance(content, dict):
                raise self.error(key, f"must hold tables [{key}.NAME], and {name!r} is none")
        return {
            name: Table(self.file, f"[{self._dotted(key)}.{name}]", content)
            for name, content in tables.items()
        }

    def take_array(self, key: str) -> Iterator[Table]:
        """Yield the tables `[[key]]`, in order, each labelled with its own `name` or else its number."""
        tables = self._take(key, list, f"tables [[{key}]]", [])
        for number, content in enumerate(tables, 1):
            if not isinstance(content, dict):
                raise self.error(key, f"must be tables [[{key}]]")
            name = content.get("name")
            label = repr(name) if isinstance(name, str) and name else f"number {number}"
            yield Table(self.file, f"[[{self._dotted(key)}]] {label}", content)

    def _dotted(self, key: str) -> str:
        return f"{self.name.strip('[]')}.{key}" if self.name else key


def read_file(path: Path) -> Table:
    """Return the file's top table. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(path, "", "", "is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, "", "", f"is not TOML: {error}") from None
    return Table(path, "", content)
