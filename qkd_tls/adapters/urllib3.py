"""`urllib3` over hybrid connections. A pool takes the context; this module keeps each response's `QKDInfo`.

::

    pool = with_qkd_info(urllib3.PoolManager(ssl_context=context))
    response = pool.request("GET", "https://server.example/")
    print(qkd_info(response))
"""

from __future__ import annotations

from typing import Any, TypeVar

from urllib3 import BaseHTTPResponse, HTTPResponse, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPSConnection
from urllib3.util.ssltransport import SSLTransport

from qkd_tls.info import QKDInfo
from qkd_tls.socket import QKDSocket
from qkd_tls.sslobject import QKDObject

__all__ = ["qkd_info", "with_qkd_info"]

_Manager = TypeVar("_Manager", bound=PoolManager)


def with_qkd_info(manager: _Manager) -> _Manager:
    """Let the responses of a `PoolManager` or `ProxyManager` remember what protected them.

    Call it before the first request.

    If a proxy is itself reached over TLS, that connection is the standard library's; inside of it is the one that
    the context protects.
    """
    manager.pool_classes_by_scheme = {**manager.pool_classes_by_scheme, "https": _QKDConnectionPool}
    return manager


def qkd_info(response: BaseHTTPResponse) -> QKDInfo:
    """Return what protected this response's connection.

    Raises ValueError if the response did not come through `with_qkd_info` and over the connection of a
    `QKDContext`.
    """
    info = getattr(response, "qkd", None)
    if not isinstance(info, QKDInfo):
        raise ValueError(
            "the response did not come over a hybrid connection's context, or not by with_qkd_info()"
        )
    return info


class _QKDConnection(HTTPSConnection):
    """A connection that keeps its `QKDInfo`.

    `http.client` drops the socket at once if the server closes it after the response.
    """

    qkd: QKDInfo | None = None

    def connect(self) -> None:
        super().connect()
        # Within the TLS to a proxy, the connection is one over memory.
        tls = self.sock.sslobj if isinstance(self.sock, SSLTransport) else self.sock
        self.qkd = tls.qkd if isinstance(tls, QKDSocket | QKDObject) else None

    def getresponse(self, **options: Any) -> HTTPResponse:  # type: ignore[override]
        # urllib3-future, which niquests puts in the place of urllib3, gives options.
        response = super().getresponse(**options)
        response.qkd = self.qkd  # type: ignore[attr-defined]
        return response


class _QKDConnectionPool(HTTPSConnectionPool):
    ConnectionCls = _QKDConnection
