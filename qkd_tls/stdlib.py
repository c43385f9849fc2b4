"""The standard library's classes that ours are made from, bound when this package is imported.

Programs replace them in the modules `ssl` and `socket` (gevent, eventlet, `truststore.inject_into_ssl()`), before or
after: the originals are found through what nobody replaces, the C class behind a context.
"""

from __future__ import annotations

import _ssl
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final

__all__ = ["BaseContext", "SSLContext", "SSLObject", "SSLSocket", "Socket"]

BaseContext: Final[Any] = _ssl._SSLContext
"""The C class that `ssl.SSLContext` adds Python's enumerations to."""

if TYPE_CHECKING:
    SSLContext = ssl.SSLContext
    SSLObject = ssl.SSLObject
    SSLSocket = ssl.SSLSocket
    Socket = socket.socket
else:
    SSLContext = next(kind for kind in ssl.SSLContext.__mro__ if kind.__base__ is BaseContext)
    # The classes that a context makes its connections of; a subclass by somebody else has others.
    SSLSocket, SSLObject = SSLContext.sslsocket_class, SSLContext.sslobject_class
    Socket = SSLSocket.__base__
