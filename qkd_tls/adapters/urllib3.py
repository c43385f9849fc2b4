"""`urllib3` over hybrid connections. A pool takes the context; this module keeps each response's `QKDInfo`.

::

    pool = with_qkd_info(urllib3.PoolManager(ssl_context=context))
    response = pool.request("GET", "https://server.example/")
    print(qkd_info(response))
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, NoReturn, TypeVar

from urllib3 import BaseHTTPResponse, HTTPResponse, PoolManager
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import LocationValueError

from qkd_tls.adapters.refusal import checked, refusal_of_plain_http
from qkd_tls.context import QKDContext
from qkd_tls.info import QKDInfo

__all__ = ["TLS_SETTINGS", "hybrid_only", "is_hybrid_only", "qkd_info", "with_qkd_info"]

_Manager = TypeVar("_Manager", bound=PoolManager)

TLS_SETTINGS: Final = frozenset(
    {
        "assert_fingerprint",
        "assert_hostname",
        "ca_cert_data",
        "ca_cert_dir",
        "ca_certs",
        "cert_file",
        "cert_reqs",
        "key_file",
        "key_password",
        "ssl_maximum_version",
        "ssl_minimum_version",
        "ssl_version",
    }
)
"""The settings of a connection that urllib3 would put into its context, or checks beside it."""


def with_qkd_info(manager: _Manager) -> _Manager:
    """Let the responses of a `PoolManager` or `ProxyManager` remember what protected them.

    Call it before the first request.

    From then on the manager sends over connections of its context only, and nothing to `http://` URLs. A proxy may be
    reached over HTTP or over TLS. The TLS to the proxy is that of `proxy_ssl_context`, or urllib3's own: not hybrid.

    Raises ValueError if the manager's `ssl_context` is not a `QKDContext`. A request then raises LocationValueError
    for an `http://` URL, and urllib3's SSLError (MaxRetryError with it as reason) for a connection that is not the
    context's.
    """
    context = manager.connection_pool_kw.get("ssl_context")
    if not isinstance(context, QKDContext):
        raise ValueError("the manager has no QKDContext: make it with ssl_context=context")
    return hybrid_only(manager, context, "urllib3")


def qkd_info(response: BaseHTTPResponse) -> QKDInfo:
    """Return what protected this response's connection.

    Raises ValueError if the response did not come through `with_qkd_info`.
    """
    info = getattr(response, "qkd", None)
    if not isinstance(info, QKDInfo):
        raise ValueError(
            "the response did not come over a hybrid connection's context, or not by with_qkd_info()"
        )
    return info


def hybrid_only(
    manager: _Manager, context: QKDContext, library: str, without: frozenset[str] = frozenset()
) -> _Manager:
    """Have a manager make connections that send nothing unless they are the context's.

    Args:
        manager: of any kind, also that of urllib3's SOCKS proxies.
        context: a client's context, whatever the manager or a request says.
        library: the distribution that calls it.
        without: settings of urllib3's that are ignored.
    """
    base: Any = manager.pool_classes_by_scheme["https"]
    attributes = {"context": context, "library": library, "without": without}
    connection = type("QKDConnection", (_QKDConnection, base.ConnectionCls), attributes)

    class QKDConnectionPool(base):  # type: ignore[misc]
        ConnectionCls = connection

        def __init__(self, *args: Any, **options: Any) -> None:
            # Not only for our connections: if urllib3 made its own, they would be the context's too.
            super().__init__(*args, **_settings(options, context, without))

    manager.pool_classes_by_scheme = {"http": _NoPool, "https": QKDConnectionPool}
    return manager


def is_hybrid_only(pool: Any, context: QKDContext) -> bool:
    """Return True if a pool makes connections that send nothing unless they are the context's."""
    kind = getattr(pool, "ConnectionCls", None)
    return isinstance(kind, type) and issubclass(kind, _QKDConnection) and kind.context is context


def _settings(given: dict[str, Any], context: QKDContext, without: frozenset[str]) -> dict[str, Any]:
    kept = {name: value for name, value in given.items() if name not in without}
    return {**kept, "ssl_context": context}


class _NoPool:
    def __init__(self, *_: Any, **__: Any) -> NoReturn:
        raise LocationValueError(refusal_of_plain_http("http:"))


class _QKDConnection(HTTPSConnection):
    """A connection that sends nothing unless it is the context's, and keeps its `QKDInfo`.

    `http.client` drops the socket at once if the server closes it after the response.
    """

    context: ClassVar[QKDContext]
    library: ClassVar[str]
    without: ClassVar[frozenset[str]]

    qkd: QKDInfo | None = None
    _connecting = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_settings(settings, self.context, self.without))

    def connect(self) -> None:
        self.qkd = None
        self._connecting = True
        try:
            super().connect()
        finally:
            self._connecting = False
        self._check()

    def send(self, data: Any) -> None:
        # All of a request goes through here, whoever connected. A proxy is asked for a tunnel while connecting.
        if self.sock is None and self.auto_open:
            self.connect()
        if self.sock is not None and not self._connecting:
            self._check()
        super().send(data)

    def _check(self) -> None:
        sock: Any = self.sock
        try:
            # To a proxy reached over TLS, urllib3 has an SSLTransport around the context's object.
            self.qkd = checked(getattr(sock, "sslobj", sock), self.context, self.library)
        except BaseException:
            self.close()
            raise

    def getresponse(self, **options: Any) -> HTTPResponse:  # type: ignore[override]
        # urllib3-future, which niquests puts in the place of urllib3, gives options.
        response = super().getresponse(**options)
        response.qkd = self.qkd  # type: ignore[attr-defined]
        return response
