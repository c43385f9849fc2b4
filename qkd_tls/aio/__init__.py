"""Hybrid connections for asyncio: its own functions by another name, and the loop never waits for a KMS.

asyncio's own TLS transport runs the connection, over a `QKDObject`. This package adds two things. During the
handshake the key manager is called in another thread, and the transport is woken up with the answer. And
handshakes take turns if many come together, with the loop's other work between them. A program or a library
that calls asyncio's functions itself gets the same by running in an `EventLoop`.
"""

from qkd_tls.aio.event_loop import EventLoop
from qkd_tls.aio.kms_threads import MAX_KMS_REQUESTS
from qkd_tls.aio.sockets import wrap_socket
from qkd_tls.aio.streams import open_connection, start_server, upgrade_streams
from qkd_tls.aio.transports import create_connection, create_server, start_tls

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
