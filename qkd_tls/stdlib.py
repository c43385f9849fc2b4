"""The standard library's classes that ours are made from, bound when this package is imported.

Programs put others into the modules `ssl` and `socket` (gevent, eventlet, `truststore.inject_into_ssl()`), before or
after: the originals are found through the classes of C below them, which nobody replaces.
"""

from __future__ import annotations

import _socket
import _ssl
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final

__all__ = ["BaseContext", "SSLContext", "SSLObject", "SSLSocket", "Socket"]

BaseContext: Final[Any] = _ssl._SSLContext
"""The class of C that `ssl.SSLContext` adds Python's enumerations to."""


def _original(base: Any, module: str, name: str, otherwise: Any = None) -> Any:
    """Return the first class of this name that was derived from `base`."""
    found = (k for k in base.__subclasses__() if (k.__module__, k.__qualname__) == (module, name))
    return next(found, otherwise)


if TYPE_CHECKING:
    SSLContext = ssl.SSLContext
    SSLObject = ssl.SSLObject
    SSLSocket = ssl.SSLSocket
    Socket = socket.socket
else:
    SSLContext = _original(BaseContext, "ssl", "SSLContext")
    SSLObject = _original(object, "ssl", "SSLObject")
    Socket = _original(_socket.socket, "socket", "socket")
    # gevent replaces the socket before `ssl` is imported, which then makes its class of gevent's.
    SSLSocket = _original(Socket, "ssl", "SSLSocket", otherwise=Socket)
