"""`requests` over hybrid connections: `session.mount("https://", QKDAdapter(context))`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import requests
from requests.adapters import HTTPAdapter

from qkd_tls.adapters.urllib3 import with_qkd_info
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

    A request raises:
        ValueError: `verify` or `cert` was given to the request or the session.
        requests.exceptions.SSLError: as always; if a QKD key was the reason, its `__cause__` is the
            `QKDError`, and its text is that error's.

    Proxies work. The TLS to a proxy that is reached over HTTPS is the standard library's, with the system's CAs; inside
    of it is the connection that the context protects.
    """

    def __init__(self, context: QKDContext, **options: Any) -> None:
        self._context = context
        super().__init__(**options)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Give the context to the pool manager; called by `HTTPAdapter`."""
        super().init_poolmanager(*args, ssl_context=self._context, **options)
        with_qkd_info(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Give the context to a proxy's pool manager; called by `HTTPAdapter`."""
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **options)
        with_qkd_info(manager)
        return manager

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """Return the address and no TLS settings, which are the context's; called by `HTTPAdapter`."""
        host, _ = super().build_connection_pool_key_attributes(request, True, None)
        return host, {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Keep out the CA certificates that come with `requests`; called by `HTTPAdapter`."""

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
