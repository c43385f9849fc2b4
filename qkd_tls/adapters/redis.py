"""`redis-py` over hybrid connections. It makes its contexts itself, so it takes a class of connections::

    client = redis.Redis.from_url("redis://server.example:6380/0", connection_class=QKDConnection, qkd_context=context)
    print(qkd_info(client))

With `redis.asyncio`, use `AsyncQKDConnection`: the event loop never waits for a KMS.
Redis itself does not speak qkd-tls: put a tunnel, or another server of this package, in front of it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis
import redis.asyncio

from qkd_tls import aio
from qkd_tls.adapters.refusal import checked
from qkd_tls.context import QKDContext
from qkd_tls.errors import QKDError
from qkd_tls.info import QKDInfo

__all__ = ["AsyncQKDConnection", "QKDConnection", "qkd_info"]


class QKDConnection(redis.SSLConnection):
    """A connection of a `QKDContext`, for pools and `from_url` of `redis`.

    Args:
        qkd_context: a client's context. All TLS settings are the context's.
        options: keyword arguments of `redis.Connection`.

    Whatever the version of `redis`, no command is sent over a connection that is not the context's:
    redis.ConnectionError.

    Raises ValueError if one of redis-py's own TLS settings (`ssl_...`) is given too.
    """

    def __init__(self, *, qkd_context: QKDContext, **options: Any) -> None:
        _refuse_tls_settings(options)
        self._qkd_context = qkd_context
        super().__init__(**options)

    def _connect(self) -> Any:
        sock: Any = super()._connect()  # type: ignore[no-untyped-call]
        try:
            checked(sock, self._qkd_context, "redis")
        except BaseException:
            sock.close()
            raise
        return sock

    def _wrap_socket_with_ssl(self, sock: Any) -> Any:
        return self._qkd_context.wrap_socket(sock, server_hostname=self.host)

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command, if the connection is the context's. All commands go through here, whoever connected."""
        if self._sock is None:
            self.connect()  # type: ignore[no-untyped-call]
        try:
            checked(self._sock, self._qkd_context, "redis")
        except QKDError as error:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise redis.ConnectionError(str(error)) from error
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]

    @property
    def qkd(self) -> QKDInfo | None:
        """The connection's protection; None before it is established."""
        return getattr(self._sock, "qkd", None)


class AsyncQKDConnection(redis.asyncio.Connection):
    """The same for `redis.asyncio`.

    `socket_connect_timeout` applies to TCP, and once more to TLS including the KMS.
    """

    def __init__(self, *, qkd_context: QKDContext, **options: Any) -> None:
        _refuse_tls_settings(options)
        self._qkd_context = qkd_context
        super().__init__(**options)

    async def _connect(self) -> None:
        await super()._connect()  # type: ignore[no-untyped-call]
        assert self._writer is not None
        try:
            async with asyncio.timeout(self.socket_connect_timeout):
                await aio.upgrade_streams(self._writer, self._qkd_context, server_hostname=self.host)
        except BaseException:
            self._writer.close()
            raise

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command, if the connection is the context's. All commands go through here, whoever connected."""
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        try:
            checked(self._ssl_object, self._qkd_context, "redis")
        except QKDError as error:
            await self.disconnect(nowait=True)
            raise redis.ConnectionError(str(error)) from error
        await super().send_packed_command(command, check_health)

    @property
    def _ssl_object(self) -> Any:
        return self._writer and self._writer.get_extra_info("ssl_object")

    @property
    def qkd(self) -> QKDInfo | None:
        """The connection's protection; None before it is established."""
        return getattr(self._ssl_object, "qkd", None)


def qkd_info(client: redis.Redis) -> QKDInfo:
    """Return what protects the connection of the client's next command; connect if there is none.

    For `redis.asyncio`, read `qkd` of a connection from the pool. Raises ValueError for other connections.
    """
    connection = client.connection_pool.get_connection()
    try:
        info = getattr(connection, "qkd", None)
    finally:
        client.connection_pool.release(connection)
    if not isinstance(info, QKDInfo):
        raise ValueError("the client's connections are not of class QKDConnection")
    return info


def _refuse_tls_settings(options: dict[str, Any]) -> None:
    if given := sorted(name for name in options if name.startswith("ssl_")):
        raise ValueError(
            f"{', '.join(given)} has no effect on a hybrid connection: configure the context instead"
        )
