"""`requests` over hybrid connections: `session.mount("https://", QKDAdapter(context))`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3 import PoolManager

from qkd_tls.adapters.refusal import refusal, refusal_of_plain_http
from qkd_tls.adapters.urllib3 import TLS_SETTINGS, hybrid_only, is_hybrid_only
from qkd_tls.context import QKDContext
from qkd_tls.errors import QKDError
from qkd_tls.info import QKDInfo

__all__ = ["QKDAdapter", "qkd_info"]

# `requests` gives the adapter what these say as if the program had said it.
_CA_BUNDLE_VARIABLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class QKDAdapter(HTTPAdapter):
    """An adapter that sends the requests of a session over connections of a `QKDContext`.

    All TLS settings are the context's: only the CAs that it has loaded are trusted (neither those that come
    with `requests` nor those that `REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` name), and its certificate is
    presented.

    Args:
        context: a client's context.
        options: keyword arguments of `requests.adapters.HTTPAdapter`.

    A proxy may be reached over HTTP or over TLS; the TLS to the proxy is that of `requests`, not hybrid.

    Whatever the version of `requests`, nothing is sent over a connection that is not the context's.

    Raises RuntimeError if this version of `requests` does not let an adapter make its connections.

    A request raises:
        ValueError: `verify` or `cert` was given to the request or the session.
        requests.exceptions.InvalidSchema: the URL is not `https://`.
        requests.exceptions.SSLError: as always; if a QKD key was the reason, its `__cause__` is the
            `QKDError`, and its text is that error's.
    """

    def __init__(self, context: QKDContext, **options: Any) -> None:
        self._context = context
        self._managers: list[PoolManager] = []
        super().__init__(**options)
        if getattr(self, "poolmanager", None) not in self._managers:
            raise RuntimeError(str(refusal("requests")))

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Have the pool manager make connections of the context; called by `HTTPAdapter`."""
        super().init_poolmanager(*args, ssl_context=self._context, **options)
        self._take(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Have a proxy's pool manager make connections of the context; called by `HTTPAdapter`."""
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **options)
        if manager not in self._managers:
            self._take(manager)
        return manager

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """Return the pool for a request; called by `HTTPAdapter`."""
        return self._checked(super().get_connection_with_tls_context(*args, **options))

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Keep out the CA certificates that come with `requests`; called by `HTTPAdapter`."""
        self._checked(conn)

    def _take(self, manager: PoolManager) -> None:
        self._managers.append(hybrid_only(manager, self._context, "requests", without=TLS_SETTINGS))

    def _checked(self, pool: Any) -> Any:
        if not is_hybrid_only(pool, self._context):
            error = refusal("requests")
            raise requests.exceptions.SSLError(error) from error
        return pool

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        """Send a request; called by `requests.Session`. The class lists the errors."""
        if not (request.url or "").lower().startswith("https://"):
            raise requests.exceptions.InvalidSchema(refusal_of_plain_http(request.url), request=request)
        if verify is not True and verify not in map(os.environ.get, _CA_BUNDLE_VARIABLES):
            raise ValueError(
                f"verify={verify!r} has no effect on a hybrid connection: configure the context instead, with its"
                " load_verify_locations()"
            )
        if cert:
            raise ValueError(
                f"cert={cert!r} has no effect on a hybrid connection: configure the context instead, with its"
                " load_cert_chain()"
            )
        try:
            return super().send(request, stream=stream, timeout=timeout, proxies=proxies)
        except requests.exceptions.SSLError as error:
            cause = next((link for link in _causes(error) if isinstance(link, QKDError)), None)
            if cause is None:
                raise
            raise requests.exceptions.SSLError(cause, request=request) from cause

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> requests.Response:
        """Note what protected the connection while it is at hand; called by `HTTPAdapter`."""
        response = super().build_response(req, resp)
        response.qkd = getattr(resp.connection, "qkd", None)  # type: ignore[attr-defined]
        return response


def qkd_info(response: requests.Response) -> QKDInfo:
    """Return what protected this response's connection.

    Raises ValueError if the response did not come over a `QKDAdapter` and TLS.
    """
    info = getattr(response, "qkd", None)
    if not isinstance(info, QKDInfo):
        raise ValueError(f"the response from {response.url} did not come over a hybrid connection's context")
    return info


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, which urllib3 and requests keep in `args` and in `reason`."""
    yield error
    for inner in (*error.args, getattr(error, "reason", None)):
        if isinstance(inner, BaseException):
            yield from _causes(inner)
