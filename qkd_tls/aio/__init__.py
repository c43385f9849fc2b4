"""asyncio over hybrid connections: asyncio's own functions by another name, and the loop never waits for a KMS."""

from qkd_tls.aio.transports import (
    MAX_KMS_REQUESTS,
    EventLoop,
    create_connection,
    create_server,
    open_connection,
    start_server,
    start_tls,
    upgrade_streams,
    wrap_socket,
)

__all__ = [
    "MAX_KMS_REQUESTS",
    "EventLoop",
    "create_connection",
    "create_server",
    "open_connection",
    "start_server",
    "start_tls",
    "upgrade_streams",
    "wrap_socket",
]
