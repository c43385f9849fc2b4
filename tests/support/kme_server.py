"""What the tests of kms_client share: a server that answers as told, and a search for leaked keys."""

from __future__ import annotations

import base64
import contextlib
import datetime
import ipaddress
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kms_client import Etsi014Client
from kms_client.emulator import DemoPKI
from kms_client.emulator.kme import server_context
from tests.support.patience import PATIENCE

Answer = bytes | Callable[[ssl.SSLSocket], None]


class ScriptedKME:
    """An HTTPS server with mutual TLS on a free port that sends given bytes and closes the connection.

    Attributes:
        requests: what was received: (request line, body), in order.
        headers: the header fields of each of them, names in lower case.
        answers: what is sent, in turn, the last for ever.
    """

    def __init__(
        self, context: ssl.SSLContext, answers: list[Answer], unix_socket: Path | None = None
    ) -> None:
        self.requests: list[tuple[str, bytes]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = self.ended = 0
        self.answers = answers
        self._context = context
        if unix_socket is None:
            self._listening = socket.create_server(("127.0.0.1", 0))
        else:
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(os.fspath(unix_socket))
            self._listening.listen()
        self.port: int = self._listening.getsockname()[1] if unix_socket is None else 0
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
            raw.settimeout(PATIENCE)
            with (
                raw,
                contextlib.suppress(OSError),
                self._context.wrap_socket(raw, server_side=True) as sock,
            ):
                self._answer(sock)
            self.ended += 1

    def _answer(self, sock: ssl.SSLSocket) -> None:
        with sock.makefile("rb") as file:
            line = file.readline().decode().strip()
            headers: dict[str, str] = {}
            while header := file.readline().decode().strip():
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            body = file.read(int(headers.get("content-length", "0")))
        if not line:
            return
        self.headers.append(headers)
        self.requests.append((line, body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer(sock)
        else:
            sock.sendall(answer)


@contextmanager
def scripted(
    pki: DemoPKI,
    *answers: Answer,
    context: ssl.SSLContext | None = None,
    unix_socket: Path | None = None,
    **settings: Any,
) -> Iterator[tuple[Etsi014Client, ScriptedKME]]:
    """A client of SAE-A and the server it talks to, which gives the answers in turn, the last for ever."""
    context = context or server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
    server = ScriptedKME(context, list(answers), unix_socket)
    if unix_socket is not None:
        settings = {"unix_socket": unix_socket, **settings}
    try:
        client = client_of(pki, f"https://127.0.0.1:{server.port}", **settings)
        yield client, server
        client.close()
    finally:
        server.close()


def client_of(pki: DemoPKI, url: str, **settings: Any) -> Etsi014Client:
    defaults = {"sae_id": pki.sae_a, "cert": pki.sae_a_cert, "key": pki.sae_a_key, "ca": pki.kms_ca}
    given = {**defaults, **settings}
    if "pkcs12" in given:
        del given["cert"], given["key"]
    if "ssl_context" in given:
        del given["cert"], given["key"], given["ca"]
    return Etsi014Client(url, **given)


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


def issue(
    pki: DemoPKI, stem: Path, common_name: str, *hosts: str, days: tuple[int, int] = (-1, 30)
) -> tuple[Path, Path]:
    """A certificate of the KMS's CA with these SANs (none: no such extension), valid from and until so many days on."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca = x509.load_pem_x509_certificate(pki.kms_ca.read_bytes())
    ca_key = serialization.load_pem_private_key(pki.kms_ca.with_suffix(".key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days[0]))
        .not_valid_after(now + datetime.timedelta(days[1]))
    )
    if hosts:
        names = [
            x509.IPAddress(ipaddress.ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    cert_path, key_path = stem.with_suffix(".pem"), stem.with_suffix(".key")
    cert_path.write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_path, key_path
