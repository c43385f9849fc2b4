"""A server and many clients in one program that gevent has patched, beside a silent peer and a silent KME.

`python -m tests.support.greenlets ORDER DESCRIPTION`, where ORDER is `first` or `late`: whether the program patches
before it imports this package or after. It prints what happened as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

__all__: list[str] = []

CLIENTS = 100


def _patch() -> None:
    from gevent import monkey  # type: ignore[import-untyped]

    monkey.patch_all()


def _main(description: dict[str, Any]) -> dict[str, Any]:
    import socket
    import ssl

    import gevent

    from kms_client import Etsi014Client, KeyPool
    from qkd_tls import create_default_context
    from tests.support.patience import PATIENCE

    silent = socket.create_server(("127.0.0.1", 0))
    listening = socket.create_server(("127.0.0.1", 0), backlog=2 * CLIENTS)
    address = listening.getsockname()

    def kme(side: str, **others: Any) -> Etsi014Client:
        return Etsi014Client(**{**description["kmes"][side], **others})

    server = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=kme("b"))
    server.load_cert_chain(description["certificate"], description["key"])

    def client(manager: Any) -> Any:
        return create_default_context(cafile=description["ca"], key_manager=manager, peer_sae_id="SAE-B")

    def echo(plain: socket.socket) -> None:
        with server.wrap_socket(plain, server_side=True) as tls:
            while data := tls.recv(100):
                tls.sendall(data)

    def serve() -> None:
        while True:
            gevent.spawn(echo, listening.accept()[0])

    def talk(context: Any) -> str:
        with (
            socket.create_connection(address, PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(b"hello")
            assert tls.recv(100) == b"hello"
            return str(tls.qkd.protection)

    gevent.spawn(serve)
    pool = KeyPool(kme("a"))
    contexts = [client(pool), client(kme("a"))]
    # Both KMEs and both peers of these never say a word.
    port = silent.getsockname()[1]
    silent_kme = kme(
        "a", url=f"https://127.0.0.1:{port}", connect_timeout=2 * PATIENCE, read_timeout=2 * PATIENCE
    )
    slow_kme = gevent.spawn(talk, client(silent_kme))
    stalled = socket.create_connection(address)
    stalled.sendall(b"\x16")
    gevent.sleep(0)
    greenlets = [gevent.spawn(talk, contexts[number % 2]) for number in range(CLIENTS)]
    gevent.joinall(greenlets, timeout=PATIENCE, raise_error=True)
    result = {
        "protections": [greenlet.value for greenlet in greenlets],
        "still waiting": not slow_kme.ready(),
        "kind": type(stalled).__module__,
    }
    slow_kme.kill()
    for sock in (stalled, silent, listening):
        sock.close()
    pool.close()
    return result


if __name__ == "__main__":
    _, order, text = sys.argv
    if order == "first":
        _patch()
    else:
        import qkd_tls  # noqa: F401 - before the program patches

        _patch()
    print(json.dumps(_main(json.loads(text))), flush=True)
