"""Where a request to a KME goes, and what is in it: nothing leaves over a connection that was not checked."""

from __future__ import annotations

import gc
import inspect
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kms_client import (
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSTimeout,
    KMSUnavailable,
    SecureSite,
    https,
)
from kms_client.credentials import client_context
from kms_client.emulator import DemoPKI, write_demo_pki
from kms_client.emulator.kme import server_context
from kms_client.https import HTTPSClient
from tests.support.kme_server import ScriptedKME, http
from tests.support.patience import PATIENCE, eventually

KEPT = http(200, b"{}").replace(b"Connection: close", b"Connection: keep-alive")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


def context_of(pki: DemoPKI) -> ssl.SSLContext:
    return client_context(
        cert=pki.sae_a_cert, key=pki.sae_a_key, ca=pki.kms_ca, pkcs12=None, key_password=None, kms="KME"
    )


def new_client(pki: DemoPKI, url: str, **settings: Any) -> HTTPSClient:
    limits = {"connect_timeout": PATIENCE, "read_timeout": PATIENCE}
    return HTTPSClient(url, **{"ssl_context": context_of(pki), **limits, **settings})


@contextmanager
def kme(pki: DemoPKI, *answers: Any) -> Iterator[ScriptedKME]:
    server = ScriptedKME(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), list(answers))
    try:
        yield server
    finally:
        server.close()


@contextmanager
def recorder(context: ssl.SSLContext | None = None) -> Iterator[tuple[int, bytearray]]:
    """A server that keeps what it gets, within TLS if it has a context; then it answers."""
    received = bytearray()

    def serve() -> None:
        while True:
            try:
                raw, _ = listening.accept()
            except OSError:
                return
            raw.settimeout(PATIENCE)
            try:
                with raw, context.wrap_socket(raw, server_side=True) if context else raw as sock:
                    data = sock.recv(1 << 16)
                    received.extend(data)
                    sock.sendall(http(200, b"{}"))
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1], received
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


class TestNothingElsewhere:
    """The mechanism: no HTTP library makes a connection, or is given a request."""

    def test_no_http_library_is_loaded(self) -> None:
        program = "import sys, kms_client, kms_client.cli; print({'requests', 'urllib3'} & {*map(str, sys.modules)})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"

    def overridden() -> Iterator[tuple[type, str]]:  # type: ignore[misc]
        """The methods of the module that a library calls by their names."""
        for kind in vars(https).values():
            if inspect.isclass(kind) and kind.__module__ == https.__name__:
                for base in kind.__mro__[1:]:
                    names = (
                        vars(base) if base is not object and not base.__module__.startswith("kms_") else ()
                    )
                    yield from ((kind, name) for name in vars(kind) if name in names and name[:2] != "__")

    @pytest.mark.parametrize(("kind", "name"), [*overridden()])
    def test_without_a_method_that_a_library_calls(
        self, pki: DemoPKI, foreign: DemoPKI, monkeypatch: pytest.MonkeyPatch, kind: type, name: str
    ) -> None:
        """Even then nothing goes to a server of another CA."""
        monkeypatch.delattr(kind, name)
        other = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        other.load_cert_chain(foreign.kme_a_cert, foreign.kme_a_key)
        with recorder(other) as (port, received):
            client = new_client(pki, f"https://127.0.0.1:{port}")
            with pytest.raises(KMSAuthenticationError):
                client.request("GET", "/secret", None, 100)
        assert not received

    def test_there_is_such_a_method(self) -> None:
        assert {name for _, name in TestNothingElsewhere.overridden()} >= {"readinto"}

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda sock, **_: sock,
            lambda sock, **_: ssl.create_default_context().wrap_socket(
                sock, server_hostname="kme", do_handshake_on_connect=False
            ),
            lambda sock, **_: socket.socket(fileno=sock.detach()),
        ],
        ids=["the socket as it is", "TLS without a handshake", "another plain socket"],
    )
    def test_a_context_that_makes_no_tls(self, pki: DemoPKI, wrap: Callable[..., Any]) -> None:
        context: Any = context_of(pki)
        context.__class__ = type("Context", (ssl.SSLContext,), {"wrap_socket": staticmethod(wrap)})
        with recorder() as (port, received):
            client = new_client(pki, f"https://127.0.0.1:{port}", ssl_context=context)
            with pytest.raises(KMSAuthenticationError, match="no request was sent") as caught:
                client.request("GET", "/secret", None, 100)
            assert "wrap_socket" in caught.value.hint
        assert not received

    def test_outside_the_secure_site(self, pki: DemoPKI) -> None:
        site = SecureSite(this_host=False, ml_kem_outside=False)
        with recorder() as (port, received):
            client = new_client(pki, f"https://127.0.0.1:{port}", site=site)
            with pytest.raises(KMSError, match="outside the secure site"):
                client.request("GET", "/secret", None, 100)
        assert not received


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("foreign"))


class TestRequests:
    def test_what_is_sent(self, pki: DemoPKI) -> None:
        with kme(pki, KEPT, http(200, b"{}")) as server:
            client = new_client(
                pki, f"https://127.0.0.1:{server.port}/käme/%20a b/", headers={"X-Token": "1"}
            )
            client.request("GET", "/status?x=1", None, 100)
            client.request("POST", "/keys", b"{}", 100)
            client.close()
            common = {
                "host": f"127.0.0.1:{server.port}",
                "user-agent": "qkd-tls",
                "accept": "application/json",
                "accept-encoding": "identity",
                "x-token": "1",
            }
            assert server.requests == [
                ("GET /k%C3%A4me/%20a%20b/status?x=1 HTTP/1.1", b""),
                ("POST /k%C3%A4me/%20a%20b/keys HTTP/1.1", b"{}"),
            ]
            assert server.headers[0] == common
            assert server.headers[1] == {**common, "content-type": "application/json", "content-length": "2"}

    def test_fields_of_the_program_come_first(self, pki: DemoPKI) -> None:
        with kme(pki, http(200)) as server:
            client = new_client(
                pki, f"https://127.0.0.1:{server.port}", headers={"accept": "a/b", "USER-AGENT": "me"}
            )
            client.request("DELETE", "/", None, 100)
            assert server.headers[0]["accept"] == "a/b"
            assert server.headers[0]["user-agent"] == "me"
            assert server.headers[0]["content-length"] == "0"

    @pytest.mark.parametrize("path", ["", "status", "/a b", "/a\r\nX: y", "/ä"])
    def test_paths_that_are_not_encoded(self, pki: DemoPKI, path: str) -> None:
        with pytest.raises(ValueError, match="percent-encoded"):
            new_client(pki, "https://kme").request("GET", path, None, 100)

    @pytest.mark.parametrize(
        ("url", "host"),
        [
            ("https://kme.example", "kme.example"),
            ("https://KME_1.example:443/", "kme_1.example"),
            ("https://[::1]:8443", "[::1]:8443"),
            ("https://[fe80::1%25eth0]", "[fe80::1]"),
            ("https://käme.example:1", "xn--kme-qla.example:1"),
        ],
    )
    def test_hosts(self, pki: DemoPKI, url: str, host: str) -> None:
        assert new_client(pki, url)._link.authority == host

    @pytest.mark.parametrize("url", ["https://*", "https://a b", f"https://{'a' * 64}", "https://a..b"])
    def test_hosts_that_cannot_be(self, pki: DemoPKI, url: str) -> None:
        """The system's resolver takes "*" for this host, which is in every secure site."""
        with pytest.raises(KMSUnavailable, match="the URL cannot be used"):
            new_client(pki, url).request("GET", "/", None, 100)


class TestConnections:
    def test_kept_for_the_next_request(self, pki: DemoPKI) -> None:
        def answer_twice(sock: ssl.SSLSocket) -> None:
            sock.sendall(KEPT)
            assert sock.recv(1 << 16).startswith(b"GET /second HTTP/1.1\r\n")
            sock.sendall(http(200, b"again"))

        with kme(pki, answer_twice) as server:
            client = new_client(pki, f"https://127.0.0.1:{server.port}")
            client.request("GET", "/first", None, 100)
            assert client.request("GET", "/second", None, 100).body == b"again"
            assert server.connections == 1
            assert not client._idle

    def test_not_kept_after_an_answer_that_is_too_large(self, pki: DemoPKI) -> None:
        with kme(pki, KEPT, http(200)) as server:
            client = new_client(pki, f"https://127.0.0.1:{server.port}")
            with pytest.raises(KMSProtocolError, match="larger than 1 bytes"):
                client.request("GET", "/", None, 1)
            assert not client._idle

    def test_a_client_that_is_forgotten_closes_its_connections(self, pki: DemoPKI) -> None:
        """No ResourceWarning, which would be an error here; and the KME sees the end."""
        ended = threading.Event()

        def answer(sock: ssl.SSLSocket) -> None:
            sock.sendall(KEPT)
            assert sock.recv(1) == b""
            ended.set()

        with kme(pki, answer) as server:
            client = new_client(pki, f"https://127.0.0.1:{server.port}")
            client.request("GET", "/", None, 100)
            del client
            gc.collect()
            assert ended.wait(PATIENCE)

    def test_a_forked_child_leaves_the_connection_to_its_parent(self, pki: DemoPKI) -> None:
        def answer_twice(sock: ssl.SSLSocket) -> None:
            sock.sendall(KEPT)
            sock.recv(1 << 16)
            sock.sendall(http(200, b"again"))

        with kme(pki, answer_twice) as server:
            client = new_client(pki, f"https://127.0.0.1:{server.port}")
            client.request("GET", "/first", None, 100)
            pid = os.fork()
            if pid == 0:
                # The child has closed its file descriptor, and said nothing.
                os._exit(len(client._idle))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert client.request("GET", "/second", None, 100).body == b"again"
            assert server.connections == 1

    def test_a_kme_that_answers_before_it_has_read_all(self, pki: DemoPKI) -> None:
        """It closes while the request is being sent; the answer is read nevertheless."""

        class Closed:
            def settimeout(self, _: float) -> None: ...

            def sendall(self, _: bytes) -> None:
                raise BrokenPipeError

        https._Connection(Closed()).send(b"x", 1)  # type: ignore[arg-type]

    def test_a_request_that_the_kme_does_not_read(self, pki: DemoPKI) -> None:
        done = threading.Event()
        context = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)

        def serve() -> None:
            with listening.accept()[0] as raw, context.wrap_socket(raw, server_side=True):
                done.wait(PATIENCE)

        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=serve)
            thread.start()
            client = new_client(pki, f"https://127.0.0.1:{listening.getsockname()[1]}", read_timeout=0.5)
            with pytest.raises(KMSTimeout, match="no complete answer"):
                client.request("POST", "/", bytes(1 << 26), 100)
            done.set()
            thread.join()

    def test_a_unix_socket_that_is_not_there(self, pki: DemoPKI, tmp_path: Path) -> None:
        client = new_client(pki, "https://kme", unix_socket=tmp_path / "none")
        with pytest.raises(KMSUnavailable, match="cannot connect: No such file"):
            client.request("GET", "/", None, 100)

    def test_a_restarted_kme(self, pki: DemoPKI) -> None:
        with kme(pki, KEPT) as server:
            client = new_client(pki, f"https://127.0.0.1:{server.port}")
            for number in (1, 2):
                client.request("GET", "/", None, 100)
                assert len(client._idle) == 1
                eventually(lambda number=number: server.ended == number)  # type: ignore[misc]
            client.close()
