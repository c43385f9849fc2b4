"""`qkd-tls get` against `qkd-tls serve --www` and an ordinary HTTPS server on a `QKDContext`."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kms_client.emulator import RunningPair
from qkd_tls import create_default_context
from tests.support.commands import Site, nobody, record, text


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://elsewhere.example/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = b"not here\n" if self.path == "/missing" else f"you asked for {self.path}\n".encode()
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(body) + (10 if self.path == "/short" else 0)))
        self.send_header("X-Test", "yes")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: the command's standard error is this process's while it runs."""


@pytest.fixture(scope="module")
def https(running_kmes: RunningPair) -> Iterator[str]:
    with https_server(running_kmes) as address:
        yield address


@contextmanager
def https_server(pair: RunningPair) -> Iterator[str]:
    manager = pair.client("b")
    context = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=manager)
    context.load_cert_chain(pair.pki.directory / "server.pem", pair.pki.directory / "server.key")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()
        thread.join()
    manager.close()


def test_body_and_what_protected_it(client_site: Site, https: str) -> None:
    result = client_site.run("get", f"{https}/here")
    assert result.returncode == 0, text(result)
    assert result.stdout == b"you asked for /here\n"
    said = text(result).splitlines()
    assert said[0].startswith("HTTP 200 OK, ")
    assert said[1] == "protection   hybrid: X25519 + ML-KEM-768 + QKD key"
    assert any(line.startswith("QKD key ") for line in said)


def test_headers(client_site: Site, https: str) -> None:
    head, _, body = client_site.run("get", f"{https}/", "-i").stdout.partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"HTTP/1.1 200 OK"
    assert b"X-Test: yes" in head.splitlines()
    assert body == b"you asked for /\n"


def test_file(client_site: Site, https: str, tmp_path: Path) -> None:
    result = client_site.run("get", f"{https}/", "-q", "-o", str(tmp_path / "body"))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert (tmp_path / "body").read_bytes() == b"you asked for /\n"


def test_repeated_on_new_connections(client_site: Site, https: str) -> None:
    result = client_site.run("get", f"{https}/", "--repeat", "3")
    assert result.stdout == b"you asked for /\n"
    said = text(result).splitlines()
    assert [line.split()[:4] for line in said] == [[str(number), "HTTP", "200", "OK"] for number in (1, 2, 3)]
    assert [line.split()[5] for line in said] == ["bootstrap", "associated", "associated"]


def test_json(client_site: Site, https: str) -> None:
    result = client_site.run("get", f"{https}/", "--repeat", "2", "--json", "--announced-keys", "1")
    assert result.stdout == b"you asked for /\n"
    said = record(result.stderr)
    assert said["command"] == "get"
    assert said["url"] == f"{https}/"
    assert [one["status"] for one in said["connections"]] == [200, 200]
    assert [one["bytes"] for one in said["connections"]] == [len(result.stdout)] * 2
    assert [one["qkd"]["path"] for one in said["connections"]] == ["bootstrap", "associated"]
    assert said["connections"][1]["qkd"]["announced"] is True


def test_any_status_is_a_result(client_site: Site, https: str) -> None:
    result = client_site.run("get", f"{https}/missing")
    assert (result.returncode, result.stdout) == (0, b"not here\n")
    assert text(result).startswith("HTTP 404 Not Found, ")


def test_redirects_are_not_followed(client_site: Site, https: str) -> None:
    result = client_site.run("get", f"{https}/redirect")
    assert (result.returncode, result.stdout) == (0, b"")
    assert "redirect     to http://elsewhere.example/, which is not followed\n" in text(result)


def test_environment_is_left_alone(client_site: Site, https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with nobody() as nowhere:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{nowhere}")
        monkeypatch.setenv("https_proxy", f"http://{nowhere}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
        assert client_site.run("get", f"{https}/").returncode == 0


def test_without_the_kme_prefer_warns(client_site: Site, www: str) -> None:
    with nobody() as nowhere:
        changes: dict[str, Any] = {"KME": f"https://{nowhere}"}
        result = client_site.run("get", f"https://{www}/", **changes)
    assert result.returncode == 3
    assert text(result).startswith("error: no QKD key: cannot connect: Connection refused (KMS https://")


@pytest.mark.parametrize(
    ("path", "changes", "code", "error"),
    [
        ("/short", {}, 1, "error: "),
        ("/", {"CA": "/no/such.pem"}, 2, "error: /no/such.pem: No such file or directory\n"),
    ],
)
def test_failures(
    client_site: Site, https: str, path: str, changes: dict[str, Any], code: int, error: str
) -> None:
    result = client_site.run("get", f"{https}{path}", "-q", **changes)
    assert result.returncode == code
    assert text(result).startswith(error)
    assert "\nhint: " in text(result)


def test_wrong_ca(client_site: Site, https: str, mallorys_ca: object) -> None:
    result = client_site.run("get", f"{https}/", CA=str(mallorys_ca.file))  # type: ignore[attr-defined]
    assert result.returncode == 4
    assert text(result) == (
        "error: the peer's certificate was refused: unable to get local issuer certificate\n"
        "hint: give the CA of the peer's certificate with --ca\n"
    )


def test_nobody_listens(client_site: Site) -> None:
    with nobody() as nowhere:
        result = client_site.run("get", f"https://{nowhere}/", "--json")
    assert result.returncode == 1
    assert record(result.stderr)["error"]["message"] == "Connection refused"


def test_output_that_cannot_be_written(client_site: Site, https: str) -> None:
    result = client_site.run("get", f"{https}/", "-q", "-o", "/no/such/directory/body")
    assert result.returncode == 2
    assert text(result).startswith("error: /no/such/directory/body: No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["http://localhost/"], "'http://localhost/' is not an https:// URL"),
        (["https:///path"], "'https:///path' is not an https:// URL"),
        (["https://localhost/", "--repeat", "0"], "'0' is not a number of requests"),
    ],
)
def test_usage(client_site: Site, arguments: list[str], error: str) -> None:
    result = client_site.run("get", *arguments)
    assert result.returncode == 2
    assert error in text(result)
