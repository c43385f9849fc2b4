"""Values that several tables have, and the blame of one key for an error."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from kms_client import Etsi014Client, KMSError, SkipClient
from qkd_tls import control
from qkd_tls.configuration.tables import Table

__all__ = ["PROTOCOLS", "blaming", "take_sae_id", "take_sae_ids"]

PROTOCOLS: Final = (Etsi014Client.protocol, SkipClient.protocol)
"""The names of the protocols that KMEs speak."""

_T = TypeVar("_T")
_IN_C: Final = re.compile(r" \(_ssl\.c:\d+\)$")


def blaming(table: Table, key: str, call: Callable[[], _T], *, path: Path | None = None) -> _T:
    """Return the result of `call`; blame one key of the file, which may name `path`, for an error in it.

    Raises ConfigError.
    """
    try:
        return call()
    except KMSError as error:
        # The argument of a client has another name in a file.
        problem = f"{error.message}. {error.hint.replace('key_password', 'key_password_file')}"
    except ssl.SSLError as error:
        problem = _IN_C.sub("", str(error.args[-1]))
    except (ValueError, OSError) as error:
        problem = str(error)
    # Out of the except block: what was caught may hold what was read.
    raise table.error(key, problem if path is None else f"cannot use {path}: {problem}")


def take_sae_id(table: Table, key: str, default: Any) -> Any:
    """Read an SAE ID. Raises ConfigError."""
    sae_id = table.take_text(key, default)
    if sae_id is not None:
        _check_sae_id(table, key, sae_id)
    return sae_id


def take_sae_ids(table: Table, key: str) -> tuple[str, ...] | None:
    """Read a list of SAE IDs. Raises ConfigError."""
    sae_ids = table.take_list(key, None)
    for sae_id in sae_ids or ():
        _check_sae_id(table, key, sae_id)
    return sae_ids


def _check_sae_id(table: Table, key: str, sae_id: str) -> None:
    if sae_id in (".", ".."):
        raise table.error(key, f"{sae_id!r} cannot be an SAE ID")
    blaming(table, key, lambda: control.Identity(sae_id, PROTOCOLS, (), 1))
