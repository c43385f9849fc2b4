"""What the tests of kms_client share: a server that answers as told, and a search for leaked keys."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kms_client import Etsi014Client
from kms_client.emulator import DemoPKI
from kms_client.emulator.kme import server_context

Answer = bytes | Callable[[ssl.SSLSocket], None]


class ScriptedKME:
    """An HTTPS server with mutual TLS on a free port that sends given bytes and closes the connection.

    Attributes:
        requests: what was received: (request line, body), in order.
    """

    def __init__(self, context: ssl.SSLContext, answers: list[Answer]) -> None:
        self.requests: list[tuple[str, bytes]] = []
        self.connections = 0
        self._context = context
        self._answers = answers
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        # Closing alone does not wake accept().
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            raw.settimeout(5)
            with (
                raw,
                contextlib.suppress(OSError),
                self._context.wrap_socket(raw, server_side=True) as sock,
            ):
                self._answer(sock)

    def _answer(self, sock: ssl.SSLSocket) -> None:
        with sock.makefile("rb") as file:
            line = file.readline().decode().strip()
            length = 0
            while header := file.readline().strip():
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            self.requests.append((line, file.read(length)))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if callable(answer):
            answer(sock)
        else:
            sock.sendall(answer)


@contextmanager
def scripted(
    pki: DemoPKI, *answers: Answer, context: ssl.SSLContext | None = None, **settings: Any
) -> Iterator[tuple[Etsi014Client, ScriptedKME]]:
    """A client of SAE-A and the server it talks to, which gives the answers in turn, the last for ever."""
    server = ScriptedKME(context or server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), list(answers))
    try:
        client = client_of(pki, f"https://127.0.0.1:{server.port}", **settings)
        yield client, server
        client.close()
    finally:
        server.close()


def client_of(pki: DemoPKI, url: str, **settings: Any) -> Etsi014Client:
    defaults = {"sae_id": pki.sae_a, "cert": pki.sae_a_cert, "key": pki.sae_a_key, "ca": pki.kms_ca}
    return Etsi014Client(url, **{**defaults, **settings})


def http(status: int, body: bytes | str | dict[str, Any] = b"", *headers: str) -> bytes:
    """An HTTP answer with a right Content-Length."""
    if isinstance(body, dict):
        body = json.dumps(body)
    if isinstance(body, str):
        body = body.encode()
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def container(*keys: tuple[str, bytes]) -> dict[str, Any]:
    """A key container as the standard writes it."""
    return {"keys": [{"key_ID": key_id, "key": base64.b64encode(key).decode()} for key_id, key in keys]}


def spellings(secret: bytes) -> list[str]:
    """How a secret could be written in a log, a repr or a message."""
    encoded = base64.b64encode(secret).decode().rstrip("=")
    return [secret.hex(), secret.hex().upper(), encoded, base64.urlsafe_b64encode(secret).decode().rstrip("="),
            repr(secret)[2:-1], repr(bytearray(secret))[12:-2]]  # fmt: skip


def everything_in(error: BaseException) -> str:
    """All text that error reporters get at: the whole chain, attributes, and local variables of library frames."""
    texts: list[str] = []
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        link = pending.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        texts += [str(link), repr(link), repr(link.args), repr(getattr(link, "__dict__", {}))]
        traceback = link.__traceback__
        while traceback is not None:
            if "tests" not in traceback.tb_frame.f_code.co_filename:
                for value in traceback.tb_frame.f_locals.values():
                    texts.append(repr(value))
            traceback = traceback.tb_next
        pending += [link.__cause__, link.__context__]
    return "\n".join(texts)
