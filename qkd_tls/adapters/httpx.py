"""`httpx` over hybrid connections.

`httpx.Client(verify=context)` and `httpx.AsyncClient(verify=context)` take the context as it is. With
`AsyncClient` the event loop then waits while a KMS is asked. With this transport it does not, under asyncio
and trio::

    httpx.AsyncClient(transport=QKDAsyncTransport(context))
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, NoReturn

import anyio
import httpcore
import httpx

from qkd_tls.adapters.anyio import wrap_stream
from qkd_tls.adapters.refusal import refusal, refusal_of_plain_http
from qkd_tls.context import QKDContext
from qkd_tls.info import QKDInfo

__all__ = ["QKDAsyncTransport", "qkd_info"]


class QKDAsyncTransport(httpx.AsyncHTTPTransport):
    """A transport that sends an `httpx.AsyncClient`'s requests over connections of a `QKDContext`.

    The loop never waits for a KMS. Nothing is sent over a connection that is not the context's, whatever the version of
    httpx and httpcore. For `http://` URLs give the client another transport: `httpx.AsyncClient(mounts={"https://":
    QKDAsyncTransport(context)})`. A proxy may be reached over HTTP or TLS, which is not hybrid.

    A client with a transport of its own ignores its other connection settings (`http2`, `limits`, `proxy`,
    proxies of the environment): pass them here.

    Args:
        context: a client's context.
        options: keyword arguments of `httpx.AsyncHTTPTransport`, without `verify` and `cert`.

    A request raises the same exceptions as with httpx: the `QKDError` behind an httpx.ConnectError is its
    `__cause__.__context__`. If a request is cancelled, or its time to connect is over, while a KMS is asked,
    it waits for the answer, so that the keys in it are wiped. It raises httpx.UnsupportedProtocol for an `http://` URL,
    and httpx.ConnectError for a connection that is not the context's.
    """

    def __init__(self, context: QKDContext, **options: Any) -> None:
        super().__init__(verify=context, **options)
        proxy = options.get("proxy")
        url = getattr(proxy, "url", proxy)
        # httpx cannot be given a backend; httpcore can.
        self._pool._network_backend = _Backend(context, httpx.URL(url).scheme if url is not None else None)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; called by `httpx.AsyncClient`."""
        if request.url.scheme != "https":
            raise httpx.UnsupportedProtocol(refusal_of_plain_http(request.url), request=request)
        return await super().handle_async_request(request)


def qkd_info(response: httpx.Response) -> QKDInfo:
    """Return what protected this response's connection, of a `Client` or an `AsyncClient`.

    Raises ValueError if the response did not come over the connection of a `QKDContext`.
    """
    stream = response.extensions.get("network_stream")
    info = getattr(stream and stream.get_extra_info("ssl_object"), "qkd", None)
    if not isinstance(info, QKDInfo):
        raise ValueError("the response did not come over a hybrid connection's context")
    return info


class _Backend(httpcore.AsyncNetworkBackend):
    """The backend of httpcore with another way to shake hands; `proxy` is the scheme of the proxy's URL."""

    def __init__(self, context: QKDContext, proxy: str | None) -> None:
        self._inner = httpcore.AnyIOBackend()
        self._context, self._proxy = context, proxy

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return _Stream(stream, self._context, self._proxy)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._inner.connect_unix_socket(path, timeout, socket_options)
        return _Stream(stream, self._context, self._proxy)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is not hybrid yet: for `start_tls`, and to ask a proxy for a tunnel.

    `proxy` is the scheme of the proxy at the other end; None if there is none.
    """

    def __init__(self, inner: httpcore.AsyncNetworkStream, context: QKDContext, proxy: str | None) -> None:
        self._inner = inner
        self._context, self._proxy = context, proxy

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._inner.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # httpcore ends a request with an empty write.
        tunnel = buffer.startswith(b"CONNECT ") or not buffer
        if self._proxy is None or (self._proxy.startswith("http") and not tunnel):
            await self._refuse()
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        if ssl_context is not self._context:
            if self._proxy != "https":
                await self._refuse()
            tls = await self._inner.start_tls(ssl_context, server_hostname, timeout)
            # As if over plain HTTP from here on: there is no second TLS to the proxy.
            return _Stream(tls, self._context, "http")
        plain = self._inner._stream  # type: ignore[attr-defined]
        try:
            with anyio.fail_after(timeout):
                hybrid = await wrap_stream(
                    plain, self._context, hostname=server_hostname, standard_compatible=False
                )
        except TimeoutError as error:
            await self.aclose()
            raise httpcore.ConnectTimeout(str(error)) from error
        except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
            await self.aclose()
            raise httpcore.ConnectError(str(error)) from error
        # httpcore's class for what anyio has made.
        return type(self._inner)(hybrid)  # type: ignore[call-arg]

    async def _refuse(self) -> NoReturn:
        await self.aclose()
        error = refusal("httpcore")
        raise httpcore.ConnectError(str(error)) from error
