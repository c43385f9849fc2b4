"""Through a proxy that is reached over HTTP, and one that is reached over TLS: hybrid to the server behind it."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import urllib3
from urllib3.util.ssltransport import SSLTransport

from qkd_tls import QKDObject
from qkd_tls.adapters.httpx import QKDAsyncTransport
from qkd_tls.adapters.httpx import qkd_info as httpx_info
from qkd_tls.adapters.requests import QKDAdapter
from qkd_tls.adapters.requests import qkd_info as requests_info
from qkd_tls.adapters.urllib3 import qkd_info as urllib3_info
from qkd_tls.adapters.urllib3 import with_qkd_info
from tests.support.patience import PATIENCE
from tests.support.slow_kms import serving
from tests.support.sockets import Lab, Server, echo


class Proxy(socketserver.StreamRequestHandler):
    """CONNECT and nothing else; the server keeps the first lines of the requests."""

    timeout = PATIENCE

    def setup(self) -> None:
        server: Any = self.server
        if server.tls is not None:
            self.request = server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        server: Any = self.server
        line = self.rfile.readline()
        server.lines.append(line)
        _, where, _ = line.decode().split()
        host, _, port = where.rpartition(":")
        while self.rfile.readline().strip():
            pass
        with socket.create_connection(("127.0.0.1" if host == "localhost" else host, int(port))) as upstream:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            # In one thread: two must not use the standard library's TLS at a time.
            with contextlib.suppress(OSError):
                self._relay({self.request: upstream, upstream: self.request})

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    @staticmethod
    def _relay(peers: dict[Any, Any]) -> None:
        while True:
            decrypted = [sock for sock in peers if isinstance(sock, ssl.SSLSocket) and sock.pending()]
            for sock in decrypted or select.select([*peers], [], [])[0]:
                data = sock.recv(1 << 16)
                if not data:
                    return
                peers[sock].sendall(data)


class ProxyServer(socketserver.ThreadingTCPServer):
    """`tls` is the context of the proxy; None for HTTP."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.tls = tls
        self.lines: list[bytes] = []
        self.url = f"http{'s' if tls else ''}://localhost:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of these tests."""


@pytest.fixture(params=["http", "https"])
def proxy(
    request: pytest.FixtureRequest, local: Lab, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ProxyServer]:
    # `requests` and urllib3 trust the proxy by their own CAs.
    monkeypatch.setenv("SSL_CERT_FILE", str(local.ca.file))
    with ProxyServer(local.stock_server() if request.param == "https" else None) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_urllib3(local: Lab, proxy: ProxyServer) -> None:
    manager = urllib3.ProxyManager(
        proxy.url, ssl_context=local.client(), proxy_ssl_context=local.stock_client()
    )
    with serving(local.server()) as port, with_qkd_info(manager):
        for path in ("bootstrap", "associated"):
            response = manager.request("GET", f"https://localhost:{port}/", headers={"Connection": "close"})
            assert urllib3_info(response).key_id == response.data.decode()
            assert urllib3_info(response).protection == "hybrid"
            assert urllib3_info(response).path == path
        assert {line.split()[0] for line in proxy.lines} == {b"CONNECT"}


def test_requests(local: Lab, proxy: ProxyServer) -> None:
    with serving(local.server()) as port, requests.Session() as session:
        session.trust_env = False
        session.mount("https://", QKDAdapter(local.client()))
        for _ in range(2):
            response = session.get(
                f"https://localhost:{port}/", proxies={"https": proxy.url}, timeout=PATIENCE
            )
            assert requests_info(response).key_id == response.text
            assert requests_info(response).protection == "hybrid"
        assert [line.split()[0] for line in proxy.lines] == [b"CONNECT"]


def test_httpx(local: Lab, proxy: ProxyServer) -> None:
    async def fetch(port: int) -> None:
        to_proxy = httpx.Proxy(proxy.url, ssl_context=local.stock_client() if proxy.tls else None)
        transport = QKDAsyncTransport(local.client(), proxy=to_proxy)
        async with (
            httpx.AsyncClient(transport=transport, timeout=PATIENCE) as client,
            client.stream("GET", f"https://localhost:{port}/") as response,
        ):
            info = httpx_info(response)
            assert (await response.aread()).decode() == info.key_id

    with serving(local.server()) as port:
        asyncio.run(fetch(port))
    assert [line.split()[0] for line in proxy.lines] == [b"CONNECT"]


@pytest.mark.parametrize("proxy", ["https"], indirect=True)
def test_a_server_behind_it_that_is_not_hybrid(local: Lab, proxy: ProxyServer) -> None:
    received: list[bytes] = []
    keep = Server(local.stock_server(), lambda sock: received.append(sock.recv(100)))
    with keep as server, requests.Session() as session:
        session.trust_env = False
        session.mount("https://", QKDAdapter(local.client()))
        url = f"https://localhost:{server.address[1]}/secret"
        with pytest.raises(requests.exceptions.SSLError):
            session.get(url, proxies={"https": proxy.url}, timeout=PATIENCE)
    assert received == []


def test_a_proxy_for_which_the_adapter_is_not_asked(
    local: Lab, proxy: ProxyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(QKDAdapter, "proxy_manager_for")
    with requests.Session() as session:
        session.trust_env = False
        session.mount("https://", QKDAdapter(local.client()))
        with pytest.raises(requests.exceptions.SSLError, match="not the QKDContext's: nothing was sent"):
            session.get("https://localhost/secret", proxies={"https": proxy.url}, timeout=PATIENCE)
    assert proxy.lines == []


class TestSSLTransport:
    """What urllib3 has around a `QKDObject`: everything that it and http.client call works."""

    @contextlib.contextmanager
    def transport(self, local: Lab, server: Server) -> Iterator[SSLTransport]:
        with server.tcp() as sock:
            transport = SSLTransport(sock, local.client(), server_hostname="localhost")
            assert isinstance(transport.sslobj, QKDObject)
            with transport:
                yield transport

    def test_reading_and_writing(self, local: Lab) -> None:
        data = bytes(range(256)) * 4096
        with Server(local.server(), echo) as server, self.transport(local, server) as transport:
            for size in (1, 16384, 100_000):
                transport.sendall(data[:size])
                received = bytearray()
                while len(received) < size:
                    received += transport.recv(1 << 16)  # type: ignore[arg-type]
                assert received == data[:size]
            assert transport.send(b"abc") == 3
            buffer = bytearray(10)
            assert transport.recv_into(buffer) == 3
            assert buffer[:3] == b"abc"
            assert transport.version() == "TLSv1.3"
            assert transport.cipher()
            assert transport.getpeercert()
            assert transport.getpeercert(binary_form=True)
            assert transport.selected_alpn_protocol() is None
            assert transport.compression() is None
            assert transport.shared_ciphers() is None

    @pytest.mark.parametrize("mode", ["rw", "rwb"])
    def test_files(self, local: Lab, mode: str) -> None:
        with Server(local.server(), echo) as server, self.transport(local, server) as transport:
            line: Any = "a line\n" if mode == "rw" else b"a line\n"
            with transport.makefile(mode) as file:
                file.write(line)
                file.flush()
                assert file.readline() == line
            with transport.makefile("rb", 0) as file:
                transport.sendall(b"raw")
                assert file.read(3) == b"raw"

    def test_unwrap(self, local: Lab) -> None:
        def end(sock: Any) -> None:
            assert sock.recv(10) == b"over"
            with sock.unwrap() as plain:
                after.append(plain.recv(10))

        after: list[bytes] = []
        with Server(local.server(), end) as server, self.transport(local, server) as transport:
            transport.sendall(b"over")
            transport.unwrap()
            transport.socket.sendall(b"plain")
        assert after == [b"plain"]

    def test_the_end(self, local: Lab) -> None:
        with Server(local.server(), lambda sock: None) as server, self.transport(local, server) as transport:
            assert not transport.recv(10)

    def test_a_truncated_stream(self, local: Lab) -> None:
        def cut(sock: Any) -> None:
            sock.recv(10)
            socket.socket(fileno=sock.detach()).close()

        with Server(local.server(), cut) as server, self.transport(local, server) as transport:
            transport.sendall(b"x")
            assert not transport.recv(10), "suppress_ragged_eofs is True"

        with (
            Server(local.server(), cut) as server,
            server.tcp() as sock,
            SSLTransport(sock, local.client(), "localhost", suppress_ragged_eofs=False) as transport,
        ):
            transport.sendall(b"x")
            with pytest.raises(ssl.SSLEOFError):
                transport.recv(10)
