"""The check of the adapters for clients: a connection that is not the context's carries nothing of the program.

Each adapter overrides some methods of its library, and a library may change their names. So no adapter relies on a
method being called: before the first byte, the connection itself is looked at.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from qkd_tls.context import QKDContext
from qkd_tls.errors import QKDError
from qkd_tls.info import QKDInfo
from qkd_tls.socket import QKDSocket
from qkd_tls.sslobject import QKDObject

__all__ = ["checked", "refusal", "refusal_of_plain_http"]

_HINT: Final = "Use a version of {library} that docs/dropin.md names: those were tried"


def checked(connection: object, context: QKDContext, library: str) -> QKDInfo:
    """Return what protects a connection.

    Args:
        connection: a socket, or an object over memory, after the handshake.
        context: the context that it has to be of.
        library: the distribution that made it.

    Raises:
        QKDError: it is not an established connection of this context.
    """
    ours = isinstance(connection, QKDSocket | QKDObject) and connection.context is context
    info = getattr(connection, "qkd", None) if ours else None
    if not isinstance(info, QKDInfo):
        raise refusal(library)
    return info


def refusal(library: str) -> QKDError:
    """Return the error for a connection that the library has made in another way than by the context."""
    return QKDError(
        f"{library} {version(library)} has made a connection that is not the QKDContext's: nothing was sent over it",
        hint=_HINT.format(library=library),
    )


def refusal_of_plain_http(url: Any) -> str:
    """Return the text of the error for a URL that is not `https://`."""
    scheme = str(url).partition(":")[0]
    return f"a {scheme}:// URL has no hybrid connection: nothing was sent. Use https://, or another client for this URL"
