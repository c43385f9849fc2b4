"""A client in a process of its own: many connections of one request each, half of them with Finished in one segment.

`python -m tests.support.dropin.many_requests DESCRIPTION`; it prints how many were answered.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
from typing import Any

from kms_client import Etsi014Client
from qkd_tls import QKDContext, create_default_context
from tests.support.patience import PATIENCE

__all__: list[str] = []

REQUESTS = {
    "HTTP": (b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"hello"),
    "WebSocket": (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"101 Switching Protocols",
    ),
}


def ask(context: QKDContext, port: int, request: bytes, answer: bytes, *, together: bool) -> bool:
    """Return whether the answer comes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(1 << 16))
        if not together:
            sock.sendall(outgoing.read())
        tls.write(request)
        sock.sendall(outgoing.read())
        received = b""
        while answer not in received:
            try:
                data = tls.read(1 << 16)
            except ssl.SSLWantReadError:
                ciphertext = sock.recv(1 << 16)
                if not ciphertext:
                    return False
                incoming.write(ciphertext)
                continue
            if not data:
                return False
            received += data
        return True


def _main(description: dict[str, Any]) -> int:
    context = create_default_context(
        cafile=description["ca"],
        key_manager=Etsi014Client(**description["kme"]),
        peer_sae_id=description["peer"],
    )
    request, answer = REQUESTS[description["kind"]]
    return sum(
        ask(context, description["port"], request, answer, together=bool(number % 2))
        for number in range(description["number"])
    )


if __name__ == "__main__":
    print(_main(json.loads(sys.argv[1])), flush=True)
