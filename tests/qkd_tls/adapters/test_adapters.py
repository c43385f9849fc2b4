"""HTTP libraries over a `QKDContext`: requests through its adapter, the others with the context as it is."""

from __future__ import annotations

import http.client
import socket
import socketserver
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
import urllib3

import qkd_tls
from kms_client import Etsi014Client, KeyManager
from kms_client.emulator import RunningPair, run_pair
from qkd_tls import HandshakePath, Protection, QKDContext, QKDInfo, QKDSocket, QKDUnavailable
from qkd_tls.adapters.requests import QKDAdapter, qkd_info
from tests.support.ports import free_port


class Handler(BaseHTTPRequestHandler):
    """Answers with the key ID of the connection; keeps it open unless the path is /close."""

    timeout = 20
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        body = str(self.connection.qkd.key_id).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.path == "/close":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that refuse the server, or end without a word, are part of these tests."""


@dataclass
class Setup:
    pair: RunningPair
    port: int
    manager: KeyManager

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def context(self, **qkd: Any) -> QKDContext:
        options: dict[str, Any] = {
            "cafile": self.pair.pki.app_ca,
            "key_manager": self.manager,
            "peer_sae_id": "SAE-B",
        }
        return qkd_tls.create_default_context(**(options | qkd))

    @contextmanager
    def session(self, **qkd: Any) -> Iterator[requests.Session]:
        with requests.Session() as session:
            session.mount("https://", QKDAdapter(self.context(**qkd)))
            yield session


@pytest.fixture(scope="module")
def setup() -> Iterator[Setup]:
    with run_pair() as pair, closing(pair.client("a")) as client, closing(pair.client("b")) as manager:
        context = qkd_tls.create_default_context(
            ssl.Purpose.CLIENT_AUTH, key_manager=manager, policy="prefer"
        )
        context.load_cert_chain(pair.pki.server_cert, pair.pki.server_key)
        context.set_alpn_protocols(["http/1.1"])
        with Server(("127.0.0.1", 0), Handler) as server:
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield Setup(pair, server.server_port, client)
            server.shutdown()
            thread.join()


def test_a_response_says_what_protected_its_connection(setup: Setup) -> None:
    with setup.session() as session:
        response = session.get(f"{setup.url}/", timeout=10)
        info = qkd_info(response)
    assert info.protection is Protection.HYBRID
    assert info.path is HandshakePath.BOOTSTRAP
    assert response.text == info.key_id
    assert info.alpn == "http/1.1"


def test_a_pooled_connection_keeps_its_key(setup: Setup) -> None:
    with setup.session() as session:
        first, second = (session.get(f"{setup.url}/", timeout=10) for _ in range(2))
    assert qkd_info(first) is qkd_info(second)
    assert second.text == qkd_info(second).key_id


def test_each_new_connection_has_a_key_of_its_own(setup: Setup) -> None:
    # A response that ends its connection is the case where http.client lets go of the socket early.
    with setup.session() as session:
        responses = [session.get(f"{setup.url}/close", timeout=10) for _ in range(4)]
    infos = [qkd_info(response) for response in responses]
    assert [info.path for info in infos] == [HandshakePath.BOOTSTRAP] + 3 * [HandshakePath.ASSOCIATED]
    assert [info.key_id for info in infos] == [response.text for response in responses]
    assert len({info.key_id for info in infos}) == 4


def test_one_session_in_many_threads(setup: Setup) -> None:
    def get(_: int) -> tuple[str, QKDInfo]:
        response = session.get(f"{setup.url}/close", timeout=20)
        return response.text, qkd_info(response)

    with setup.session(announced_keys=8) as session, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(get, range(40)))
    assert all(text == info.key_id for text, info in answers)
    assert len({text for text, _ in answers}) == 40


def test_nothing_is_loaded_into_the_context(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    context = setup.context()
    before = context.cert_store_stats()
    with requests.Session() as session:
        session.mount("https://", QKDAdapter(context))
        session.get(f"{setup.url}/", timeout=10)
    assert context.cert_store_stats() == before
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_ca_bundles_of_the_environment_do_not_count(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/nowhere/ca.pem")
    with setup.session() as session:
        assert session.get(f"{setup.url}/", timeout=10).ok


@pytest.mark.parametrize(
    "option",
    [{"verify": False}, {"verify": "/etc/ca.pem"}, {"cert": "me.pem"}, {"cert": ("me.pem", "me.key")}],
)
@pytest.mark.parametrize("where", ["request", "session"])
def test_tls_settings_belong_to_the_context(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any], where: str
) -> None:
    # With these set, `requests` overrides what the session says.
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    with setup.session() as session:
        if where == "session":
            for name, value in option.items():
                setattr(session, name, value)
            option = {}
        with pytest.raises(ValueError, match="configure the context instead"):
            session.get(f"{setup.url}/", **option)


def test_the_system_does_not_vouch_for_the_server(setup: Setup) -> None:
    with setup.session(cafile=setup.pair.pki.kms_ca) as session:
        with pytest.raises(requests.exceptions.SSLError, match="certificate verify failed") as caught:
            session.get(f"{setup.url}/", timeout=10)
        assert not isinstance(caught.value.__cause__, qkd_tls.QKDError)


def test_a_wrong_host_name_is_refused(setup: Setup) -> None:
    with setup.session() as session:
        adapter = session.get_adapter(setup.url)
        assert isinstance(adapter, QKDAdapter)
        pool = adapter.poolmanager.connection_from_host(
            "127.0.0.1", setup.port, "https", pool_kwargs={"server_hostname": "other.example"}
        )
        with pytest.raises(urllib3.exceptions.MaxRetryError, match=r"certificate verify failed.*ostname"):
            pool.request("GET", "/", retries=0)


def test_without_a_key_the_error_is_ours(setup: Setup) -> None:
    kme = f"https://127.0.0.1:{free_port()}"
    pki = setup.pair.pki
    manager = Etsi014Client(kme, sae_id="SAE-A", cert=pki.sae_a_cert, key=pki.sae_a_key, ca=pki.kms_ca)
    with (
        closing(manager),
        setup.session(key_manager=manager) as session,
        pytest.raises(requests.exceptions.SSLError, match=kme) as caught,
    ):
        session.get(f"{setup.url}/", timeout=10)
    assert isinstance(caught.value.__cause__, QKDUnavailable)
    assert caught.value.__cause__.kms == kme
    assert caught.value.request is not None


def test_an_ordinary_response_has_no_qkd_info() -> None:
    with pytest.raises(ValueError, match="did not come over"):
        qkd_info(requests.Response())


class Proxy(socketserver.StreamRequestHandler):
    """CONNECT and nothing else."""

    def handle(self) -> None:
        host, _, port = self.rfile.readline().split()[1].decode().rpartition(":")
        while self.rfile.readline().strip():
            pass
        with socket.create_connection((host, int(port))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=self._copy, args=(upstream, self.connection))
            back.start()
            self._copy(self.connection, upstream)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            target.sendall(data)
        # It may be closed already.
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def test_through_a_proxy(setup: Setup) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        try:
            with setup.session() as session:
                session.trust_env = False
                proxies = {"https": f"http://127.0.0.1:{proxy.server_address[1]}"}
                response = session.get(f"{setup.url}/close", proxies=proxies, timeout=10)
                assert qkd_info(response).key_id == response.text
        finally:
            proxy.shutdown()
            thread.join()


# --- libraries that take an ssl.SSLContext by themselves


def test_urllib3_takes_the_context_as_it_is(setup: Setup) -> None:
    context = setup.context()
    with urllib3.PoolManager(ssl_context=context) as pool:
        texts = [pool.request("GET", f"{setup.url}/close", timeout=10).data for _ in range(2)]
    assert len(set(texts)) == 2
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_urllib3_may_set_what_it_sets_on_each_connection(setup: Setup) -> None:
    # It writes verify_mode and check_hostname, and loads the CA file, for each connection again.
    context = setup.context(cafile=setup.pair.pki.kms_ca)
    with urllib3.PoolManager(
        ssl_context=context,
        cert_reqs="CERT_REQUIRED",
        ca_certs=str(setup.pair.pki.app_ca),
        assert_hostname="localhost",
    ) as pool:
        texts = [pool.request("GET", f"{setup.url}/close", timeout=10).data for _ in range(3)]
    assert len(set(texts)) == 3
    assert context.check_hostname is False  # urllib3 has checked the name


def test_urllib_request_takes_the_context_as_it_is(setup: Setup) -> None:
    with urllib.request.urlopen(f"{setup.url}/", timeout=10, context=setup.context()) as response:
        assert response.status == 200


def test_http_client_takes_the_context_as_it_is(setup: Setup) -> None:
    connection = http.client.HTTPSConnection("localhost", setup.port, timeout=10, context=setup.context())
    try:
        connection.request("GET", "/")
        assert isinstance(connection.sock, QKDSocket)
        assert connection.sock.qkd is not None
        assert connection.getresponse().read().decode() == connection.sock.qkd.key_id
    finally:
        connection.close()
