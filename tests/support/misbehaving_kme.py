"""A KME that misbehaves as told: a real HTTPS server before a real, emulated KME."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kms_client import SecureSite
from kms_client.credentials import client_context
from kms_client.doctor import Finding, Report, SAECredentials, Setting, Side, Verdict, examine
from kms_client.emulator import DemoPKI, RunningPair
from kms_client.emulator.kme import server_context
from tests.support.patience import PATIENCE


class Request(NamedTuple):
    """What was asked, and a way to ask the real KME."""

    method: str
    path: str
    body: bytes
    authenticated: bool
    forward: Callable[[], Answered]

    @property
    def call(self) -> str:
        return urlsplit(self.path).path.rpartition("/")[2]


class Answered(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"

    def json(self) -> Any:
        return json.loads(self.body)


Twist = Callable[[Request], Answered]


def answered(status: int, document: object) -> Answered:
    return Answered(status, json.dumps(document).encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, context: ssl.SSLContext, upstream: str, pki: DemoPKI, side: str, twist: Twist) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.upstream = urlsplit(upstream)
        self.pki = pki
        self.side = side
        self.twist = twist

    def context_of(self, certificate: dict[str, Any]) -> ssl.SSLContext:
        """To ask the real KME as the one who asks here; as the side's SAE if that is nobody."""
        names = [
            value for rdn in certificate.get("subject", ()) for kind, value in rdn if kind == "commonName"
        ]
        stem = self.pki.directory / (names[0].lower() if names else f"sae-{self.side}")
        return client_context(
            cert=stem.with_suffix(".pem"), key=stem.with_suffix(".key"), ca=self.pki.kms_ca,
            pkcs12=None, key_password=None, kms="")  # fmt: skip

    def handle_error(self, *_: object) -> None:
        """Handshakes that fail are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True
    timeout = PATIENCE

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        caller: dict[str, Any] = self.connection.getpeercert() or {}
        answer = self.server.twist(
            Request(self.command, self.path, body, bool(caller), lambda: self._forward(body, caller)))  # fmt: skip
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = handle_any

    def _forward(self, body: bytes, caller: dict[str, Any]) -> Answered:
        upstream, context = self.server.upstream, self.server.context_of(caller)
        connection = http.client.HTTPSConnection(
            upstream.hostname or "", upstream.port, context=context, timeout=PATIENCE)  # fmt: skip
        try:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return Answered(answer.status, answer.read(), answer.getheader("Content-Type") or "")
        finally:
            connection.close()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def twisted(
    pair: RunningPair, side: str, twist: Twist, context: ssl.SSLContext | None = None
) -> Iterator[str]:
    """The URL of a KME that answers as `twist` says, before the pair's KME of that side."""
    pki = pair.pki
    if context is None:
        stem = pki.directory / f"kme-{side}"
        context = server_context(stem.with_suffix(".pem"), stem.with_suffix(".key"), pki.kms_ca)
    server = _Server(context, pair.url_a if side == "a" else pair.url_b, pki, side, twist)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def credentials(pki: DemoPKI, side: str) -> SAECredentials:
    stem = pki.directory / f"sae-{side}"
    sae_id = pki.sae_a if side == "a" else pki.sae_b
    return SAECredentials(sae_id, pki.kms_ca, cert=stem.with_suffix(".pem"), key=stem.with_suffix(".key"))


def setting(pki: DemoPKI, url_a: str, url_b: str | None = None, **others: Any) -> Setting:
    """Side A, and B if it has a URL; without a pause for the key rate."""
    timeout = others.pop("timeout", 5.0)
    as_a = others.pop("credentials_a", None) or credentials(pki, "a")
    sides = [Side("A", url_a, as_a, pki.sae_b, timeout=timeout)]
    if url_b is not None:
        sides.append(Side("B", url_b, credentials(pki, "b"), pki.sae_a, timeout=timeout))
    defaults: dict[str, Any] = {"other": None, "site": SecureSite(), "take_keys": True, "seconds": 0.01}
    defaults["progress"] = lambda _: None
    return Setting(sides=sides, **{**defaults, **others})


def diagnose(pair: RunningPair, twist: Twist, *, both: bool = True, **others: Any) -> Report:
    """The report on a pair whose KMEs both behave as `twist` says."""
    context = others.pop("context", None)
    with ExitStack() as stack:
        url_a = stack.enter_context(twisted(pair, "a", twist, context))
        url_b = stack.enter_context(twisted(pair, "b", twist)) if both else None
        return examine(setting(pair.pki, url_a, url_b, **others))


def found(report: Report, check: str, side: str = "A") -> list[Finding]:
    return [finding for finding in report.findings if finding.check == check and finding.side == side]


def expect(report: Report, check: str, verdict: Verdict, text: str, side: str = "A") -> None:
    """One of the findings of a check has this verdict and text, and advice unless it is PASS."""
    findings = found(report, check, side)
    fitting = [f for f in findings if f.verdict is verdict and text in f.text]
    assert fitting, (check, verdict, text, findings)
    if verdict in (Verdict.WARN, Verdict.FAIL):
        assert fitting[0].advice
