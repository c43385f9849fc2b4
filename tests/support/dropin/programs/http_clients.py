"""HTTP clients, against a site that can also fall silent, end and be cut."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import os
import socket
import ssl
import urllib.request
import xmlrpc.client
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from unittest import mock

import aiohttp
import httpx
import requests
import truststore
import urllib3

from qkd_tls.adapters.requests import QKDAdapter, qkd_info
from tests.support.dropin.harness import (
    DIGEST,
    HALF,
    LIMIT,
    PATIENCE,
    PAYLOAD,
    Program,
    digest,
    drain,
    end_cleanly,
    truncate,
)
from tests.support.dropin.programs.http_servers import run_in_thread

__all__ = ["PROGRAMS"]


class Site(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/hello":
            self.answer(b"hello")
        elif self.path == "/payload":
            self.answer(PAYLOAD)
        else:
            self.break_off(HALF)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(digest(body).encode())

    def break_off(self, half: bytes, kind: str = "application/octet-stream") -> None:
        """Begin an answer that the end of the stream ends; then do what the path says."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(half)
        self.wfile.flush()
        {"/silent": drain, "/end": end_cleanly, "/cut": truncate}[self.path](self.connection)


class HTTPClient(Program):
    site: type[Site] = Site

    def start(self) -> None:
        self.port = self.peer(self.serve)
        self.url = f"https://localhost:{self.port}"

    def serve(self, raw: socket.socket) -> None:
        with self.ends.accept(raw) as tls:
            self.site(tls, raw, None)  # type: ignore[arg-type]

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        """GET, or POST of a body."""
        raise NotImplementedError

    def connects(self) -> object:
        return self.fetch("/hello") == b"hello"

    def up(self) -> object:
        return self.fetch("/digest", PAYLOAD) == DIGEST.encode()

    def down(self) -> object:
        return digest(self.fetch("/payload")) == DIGEST

    def timeout(self) -> object:
        return self.fetch("/silent", timeout=LIMIT)

    def eof(self) -> object:
        return self.fetch("/end")

    def truncation(self) -> object:
        return self.fetch("/cut")


class HTTPClientModule(HTTPClient):
    name = "http.client"
    how = "HTTPSConnection(host, port, context=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        connection = http.client.HTTPSConnection(
            "localhost", self.port, context=self.ends.client, timeout=timeout
        )
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body)
            self.ends.note(connection.sock)
            return connection.getresponse().read()


class HTTPClientBesideTruststore(HTTPClientModule):
    name = "http.client, after truststore.inject_into_ssl()"
    distribution = "truststore"

    def start(self) -> None:
        super().start()
        # What it leaves changed in requests.
        self.stack.enter_context(mock.patch.dict(vars(requests.adapters)))
        truststore.inject_into_ssl()
        self.stack.callback(truststore.extract_from_ssl)


class URLLib(HTTPClient):
    name = "urllib.request"
    how = "urlopen(url, context=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        # Without this, what the environment says about proxies would count.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.ends.client)
        )
        with opener.open(self.url + path, body, timeout) as response:
            return bytes(response.read())


class XMLSite(Site):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        (argument,), method = xmlrpc.client.loads(body)
        results: dict[str, Any] = {
            "hello": lambda: "hello",
            "digest": lambda: digest(argument.data),  # type: ignore[union-attr]
            "payload": lambda: xmlrpc.client.Binary(PAYLOAD),
        }
        if method in results:
            answer = xmlrpc.client.dumps((results[method](),), methodresponse=True)
            self.answer(answer.encode(), "text/xml")
        else:
            self.path = f"/{method}"
            self.break_off(b"<?xml version='1.0'?><methodResponse>", "text/xml")


class XMLRPCClient(HTTPClient):
    name = "xmlrpc.client"
    how = "ServerProxy(url, context=context)"
    site = XMLSite
    notes: ClassVar[Mapping[str, str]] = {
        "timeout": "It has no timeout of its own: `socket.setdefaulttimeout` sets it."
    }

    def call(self, method: str, argument: Any = "") -> Any:
        with xmlrpc.client.ServerProxy(self.url, context=self.ends.client) as proxy:
            return getattr(proxy, method)(argument)

    def connects(self) -> object:
        return self.call("hello") == "hello"

    def up(self) -> object:
        return self.call("digest", xmlrpc.client.Binary(PAYLOAD)) == DIGEST

    def down(self) -> object:
        return digest(self.call("payload").data) == DIGEST

    def timeout(self) -> object:
        with default_timeout(LIMIT):
            return self.call("silent")

    def eof(self) -> object:
        return self.call("end")

    def truncation(self) -> object:
        return self.call("cut")


@contextlib.contextmanager
def default_timeout(seconds: float) -> Iterator[None]:
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(None)


class Requests(HTTPClient):
    name = distribution = "requests"
    how = 'session.mount("https://", QKDAdapter(context))'

    def session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        if self.ends.hybrid:
            session.mount("https://", QKDAdapter(self.ends.client))
        else:
            session.verify = str(self.ends.sites.ca.file)
        return session

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        with self.session() as session:
            response = session.request(
                "GET" if body is None else "POST", self.url + path, data=body, timeout=timeout
            )
            if self.ends.hybrid:
                self.ends.seen.append(str(qkd_info(response).protection))
            return response.content


class RequestsThroughProxy(Requests):
    name = "requests, through an HTTP proxy"
    scheme = "http"

    def start(self) -> None:
        super().start()
        self.tunnels: list[Any] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.proxy = f"{self.scheme}://localhost:{self.listening.getsockname()[1]}"
        run_in_thread(self, self.run_proxy)

    def tls(self) -> ssl.SSLContext | None:
        """The proxy's own."""
        return None

    async def run_proxy(self, ended: asyncio.Event) -> None:
        async with await asyncio.start_server(self.tunnel, sock=self.listening, ssl=self.tls()):
            await ended.wait()
            await asyncio.gather(*self.tunnels)

    async def tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Do what CONNECT asks for."""
        self.tunnels.append(asyncio.current_task())
        while await reader.readline() != b"\r\n":
            pass
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        answers, questions = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.gather(copy(reader, questions), copy(answers, writer))

    def session(self) -> requests.Session:
        session = super().session()
        session.proxies["https"] = self.proxy
        return session


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class RequestsThroughHTTPSProxy(RequestsThroughProxy):
    name = "requests, through an HTTPS proxy"
    scheme = "https"
    notes: ClassVar[Mapping[str, str]] = {
        "connects": "The TLS to the proxy is the standard library's, with the system's CAs; inside is that to the site."
    }

    def start(self) -> None:
        super().start()
        patch = mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(self.ends.sites.ca.file)})
        self.stack.enter_context(patch)

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.ends.sites.server.load_into(context)
        return context


class URLLib3(HTTPClient):
    name = distribution = "urllib3"
    how = "PoolManager(ssl_context=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        with urllib3.PoolManager(ssl_context=self.ends.client) as pool:
            method = "GET" if body is None else "POST"
            return pool.request(method, self.url + path, body=body, timeout=timeout, retries=False).data


class HTTPXSync(HTTPClient):
    name = "httpx, sync"
    distribution = "httpx"
    how = "httpx.Client(verify=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        with httpx.Client(verify=self.ends.client, timeout=timeout, trust_env=False) as client:
            return client.request("GET" if body is None else "POST", self.url + path, content=body).content


class HTTPXAsync(HTTPClient):
    name = "httpx, async"
    distribution = "httpx"
    how = "httpx.AsyncClient(verify=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        return self.run(self._fetch(path, body, timeout))

    async def _fetch(self, path: str, body: bytes | None, timeout: float) -> bytes:
        async with (
            httpx.AsyncClient(verify=self.ends.client, timeout=timeout, trust_env=False) as client,
            client.stream("GET" if body is None else "POST", self.url + path, content=body) as response,
        ):
            self.ends.note(response.extensions["network_stream"].get_extra_info("ssl_object"))
            return await response.aread()


class AIOHTTPClient(HTTPClient):
    name = "aiohttp, client"
    distribution = "aiohttp"
    how = "TCPConnector(ssl=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        return self.run(self._fetch(path, body, timeout))

    async def _fetch(self, path: str, body: bytes | None, timeout: float) -> bytes:
        sockets: list[Any] = []
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(ssl=self.ends.client),
                    timeout=aiohttp.ClientTimeout(sock_read=timeout),
                ) as session,
                session.request(
                    "GET" if body is None else "POST",
                    self.url + path,
                    data=io.BytesIO(body) if body else None,
                ) as response,
            ):
                if response.connection is not None:
                    assert response.connection.transport is not None
                    sockets.append(response.connection.transport.get_extra_info("socket"))
                    self.ends.note(response.connection.transport.get_extra_info("ssl_object"))
                return await response.read()
        finally:
            # After a time limit aiohttp leaves the end of TLS to the loop, with the standard library's context too.
            async with asyncio.timeout(PATIENCE):
                while any(sock.fileno() >= 0 for sock in sockets):
                    await asyncio.sleep(0.005)


PROGRAMS: list[type[Program]] = [
    HTTPClientModule,
    HTTPClientBesideTruststore,
    URLLib,
    XMLRPCClient,
    Requests,
    RequestsThroughProxy,
    RequestsThroughHTTPSProxy,
    URLLib3,
    HTTPXSync,
    HTTPXAsync,
    AIOHTTPClient,
]
