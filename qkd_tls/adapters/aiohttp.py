"""`aiohttp`'s client over hybrid connections, whose event loop never waits for a KMS.

::

    async with aiohttp.ClientSession(connector=QKDConnector(context), response_class=QKDResponse) as session:
        async with session.get("https://server.example/") as response:
            print(response.qkd)

`aiohttp.TCPConnector(ssl=context)` works too, but then the loop waits for the KMS, unless it is a
`qkd_tls.aio.EventLoop`. The same holds for the server, `web.TCPSite(runner, ssl_context=context)`: run it in
that loop. There `request.transport.get_extra_info("ssl_object").qkd` says what protects a request.
"""

from __future__ import annotations

from typing import Any

import aiohttp

from qkd_tls import aio
from qkd_tls.adapters.refusal import checked, refusal_of_plain_http
from qkd_tls.context import QKDContext
from qkd_tls.errors import QKDError
from qkd_tls.info import QKDInfo

__all__ = ["QKDConnector", "QKDResponse"]


class QKDConnector(aiohttp.TCPConnector):
    """A connector that makes the connections of a `ClientSession` with a `QKDContext`.

    Args:
        context: a client's context. The `ssl` argument of a single request may name another `QKDContext`.
        options: keyword arguments of `aiohttp.TCPConnector`, without `ssl`.

    Nothing is sent over a connection that is not the context's: for other `ssl` arguments, and with any version of
    aiohttp. A proxy is reached without a QKD key.

    A request raises the same exceptions as with aiohttp: aiohttp.ClientSSLError has the `QKDError` as its
    cause. It raises aiohttp.InvalidUrlClientError for an `http://` URL.
    """

    def __init__(self, context: QKDContext, **options: Any) -> None:
        self._context = context
        super().__init__(ssl=context, **options)

    async def connect(self, req: Any, *args: Any, **options: Any) -> Any:
        """Return a connection for a request; called by `ClientSession`."""
        if req.url.scheme in ("http", "ws"):
            raise aiohttp.InvalidUrlClientError(req.url, refusal_of_plain_http(req.url))
        connection = await super().connect(req, *args, **options)
        self._check(connection, req)
        return connection

    async def _create_connection(self, req: Any, *args: Any, **options: Any) -> Any:
        # All connections are made by this, and all requests ask `connect` for one: either is enough.
        protocol = await super()._create_connection(req, *args, **options)
        self._check(protocol, req)
        return protocol

    def _check(self, connection: Any, req: Any) -> None:
        context = req.ssl if isinstance(req.ssl, QKDContext) else self._context
        transport = connection.transport
        try:
            checked(transport and transport.get_extra_info("ssl_object"), context, "aiohttp")
        except QKDError as error:
            connection.close()
            raise aiohttp.ClientConnectorSSLError(req.connection_key, error) from error

    # aiohttp has no public place to say how a connection is made: these two call create_connection and start_tls of
    # self._loop.

    async def _wrap_create_connection(self, *args: Any, **options: Any) -> Any:
        return await aiohttp.TCPConnector._wrap_create_connection(_Connector(self), *args, **options)  # type: ignore[arg-type]

    async def _start_tls_connection(self, *args: Any, **options: Any) -> Any:
        return await aiohttp.TCPConnector._start_tls_connection(_Connector(self), *args, **options)  # type: ignore[arg-type]


class QKDResponse(aiohttp.ClientResponse):
    """A response that keeps its connection's `QKDInfo`: aiohttp drops the connection with the last byte."""

    qkd: QKDInfo | None = None
    """The connection's protection; None if its context is not a `QKDContext`."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """Remember what protects the connection; called by aiohttp."""
        self.qkd = getattr(connection.transport.get_extra_info("ssl_object"), "qkd", None)
        return await super().start(connection)


class _Connector:
    """The connector with its loop replaced by a `_Loop`."""

    def __init__(self, connector: QKDConnector) -> None:
        self._connector = connector
        self._loop = _Loop(connector._loop)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connector, name)


class _Loop:
    """A loop whose functions for TLS are those of `qkd_tls.aio`."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def create_connection(self, factory: Any, *args: Any, ssl: Any = None, **options: Any) -> Any:
        if isinstance(ssl, QKDContext):
            return await aio.create_connection(factory, *args, ssl=ssl, **options)
        return await self._loop.create_connection(factory, *args, ssl=ssl, **options)

    async def start_tls(self, transport: Any, protocol: Any, sslcontext: Any, **options: Any) -> Any:
        start_tls = aio.start_tls if isinstance(sslcontext, QKDContext) else self._loop.start_tls
        return await start_tls(transport, protocol, sslcontext, **options)
