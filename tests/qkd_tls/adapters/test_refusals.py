"""What an adapter does with a library that does not call its methods: no byte of a request leaves.

Each method that a library calls by name is taken away in turn, so that the library's own is in its place, as if a
release had renamed it. The server at the other end records, and has a certificate that everybody here trusts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
import anyio
import httpx
import hypercorn.asyncio
import pytest
import redis
import redis.asyncio
import requests
import urllib3
import uvicorn
from anyio.streams.tls import TLSStream
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPSConnection

from qkd_tls import QKDContext, QKDError, adapters
from qkd_tls.adapters import aiohttp as for_aiohttp
from qkd_tls.adapters import anyio as for_anyio
from qkd_tls.adapters import gunicorn as for_gunicorn
from qkd_tls.adapters import httpx as for_httpx
from qkd_tls.adapters import hypercorn as for_hypercorn
from qkd_tls.adapters import redis as for_redis
from qkd_tls.adapters import requests as for_requests
from qkd_tls.adapters import urllib3 as for_urllib3
from qkd_tls.adapters.uvicorn import QKDProtocol
from tests.support.patience import PATIENCE
from tests.support.slow_kms import RedisHandler, serving
from tests.support.sockets import Lab

SECRET = "the-secret"
REFUSED = (
    OSError,
    NotImplementedError,
    RuntimeError,
    httpx.HTTPError,
    redis.RedisError,
    urllib3.exceptions.HTTPError,
)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"


@dataclass
class Recorder:
    """A server that keeps what it gets: within TLS, or without."""

    port: int
    received: bytearray
    connections: int = 0


@contextlib.contextmanager
def recording(context: ssl.SSLContext | None) -> Iterator[Recorder]:
    def serve() -> None:
        while True:
            try:
                raw, _ = listening.accept()
            except OSError:
                return
            recorder.connections += 1
            raw.settimeout(PATIENCE)
            open_connections.append(raw.dup())
            with (
                raw,
                contextlib.suppress(OSError),
                context.wrap_socket(raw, server_side=True) if context else raw as sock,
            ):
                recorder.received += sock.recv(1 << 16)
                sock.sendall(ANSWER)

    open_connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        recorder = Recorder(listening.getsockname()[1], bytearray())
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield recorder
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            # A client that gave up may have left its connection open.
            while thread.is_alive():
                for sock in list(open_connections):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                thread.join(0.01)
            for sock in open_connections:
                sock.close()


# --- a request by each client; `stock` is what a library that ignores our context would use


def by_requests(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    with requests.Session() as session:
        session.trust_env = False
        session.mount("https://", for_requests.QKDAdapter(lab.client()))
        session.get(f"https://localhost:{port}/{SECRET}", timeout=PATIENCE)


def by_urllib3(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    with for_urllib3.with_qkd_info(urllib3.PoolManager(ssl_context=lab.client())) as manager:
        if stock:
            manager.connection_pool_kw["ssl_context"] = stock
        manager.request("GET", f"https://localhost:{port}/{SECRET}", retries=False, timeout=PATIENCE)


def by_httpx(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    async def send() -> None:
        transport = for_httpx.QKDAsyncTransport(lab.client())
        if stock:
            transport._pool._ssl_context = stock
        async with httpx.AsyncClient(transport=transport, timeout=PATIENCE) as client:
            await client.get(f"https://localhost:{port}/{SECRET}")

    asyncio.run(send())


def by_aiohttp(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    async def send() -> None:
        async with aiohttp.ClientSession(
            connector=for_aiohttp.QKDConnector(lab.client()), response_class=for_aiohttp.QKDResponse
        ) as session:
            await session.get(f"https://localhost:{port}/{SECRET}", ssl=stock or True)

    asyncio.run(send())


def by_redis(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    pool = redis.ConnectionPool(
        connection_class=for_redis.QKDConnection,
        qkd_context=lab.client(),
        host="localhost",
        port=port,
        password=SECRET,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        redis.Redis(connection_pool=pool).ping()
    finally:
        pool.disconnect()


def by_redis_without_a_first_command(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    connection = for_redis.QKDConnection(
        qkd_context=lab.client(),
        host="localhost",
        port=port,
        redis_connect_func=lambda _: None,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        connection.send_command("AUTH", SECRET)  # type: ignore[no-untyped-call]
    finally:
        connection.disconnect()  # type: ignore[no-untyped-call]


def by_redis_asyncio(lab: Lab, port: int, stock: ssl.SSLContext | None) -> None:
    async def send() -> None:
        connection = for_redis.AsyncQKDConnection(
            qkd_context=lab.client(),
            host="localhost",
            port=port,
            password=SECRET,
            retry=AsyncRetry(NoBackoff(), 0),
        )
        try:
            await connection.send_command("PING")
        finally:
            await connection.disconnect(nowait=True)

    asyncio.run(send())


Client = Callable[[Lab, int, ssl.SSLContext | None], None]
CLIENTS: dict[Client, list[type]] = {
    by_requests: [for_requests.QKDAdapter, for_urllib3._QKDConnection],
    by_urllib3: [for_urllib3._QKDConnection],
    by_httpx: [for_httpx.QKDAsyncTransport, for_httpx._Backend, for_httpx._Stream, for_anyio._Stream],
    by_aiohttp: [for_aiohttp.QKDConnector, for_aiohttp.QKDResponse],
    by_redis: [for_redis.QKDConnection],
    by_redis_without_a_first_command: [for_redis.QKDConnection],
    by_redis_asyncio: [for_redis.AsyncQKDConnection],
}


def hooks(kind: type) -> list[str]:
    """The methods of a class that a library calls by their names: those that it has, too.

    Without a method that a library only declares there are no objects of the class.
    """
    theirs = {
        name
        for base in kind.__mro__[1:]
        if base is not object and not base.__module__.startswith(adapters.__name__)
        for name, value in vars(base).items()
        if not getattr(value, "__isabstractmethod__", False)
    }
    return [name for name in vars(kind) if name in theirs and not name.startswith("__")]


CASES = [
    pytest.param(client, kind, name, id=f"{client.__name__}-{kind.__name__}.{name}")
    for client, kinds in CLIENTS.items()
    for kind in kinds
    for name in ["", *hooks(kind)]
]


@pytest.fixture
def trusting(local: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The libraries' own TLS would trust the server: this stands for a certificate of a public CA."""
    monkeypatch.setenv("SSL_CERT_FILE", str(local.ca.file))
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(local.ca.file))
    stock = local.stock_client()
    stated = HTTPAdapter.build_connection_pool_key_attributes

    def as_of_2_32_0(self: Any, *args: Any, **options: Any) -> Any:
        host, _ = stated(self, *args, **options)
        return host, {"ssl_context": stock}

    monkeypatch.setattr(HTTPAdapter, "build_connection_pool_key_attributes", as_of_2_32_0)
    return local


class TestClients:
    @pytest.mark.parametrize(("client", "kind", "name"), CASES)
    @pytest.mark.parametrize("ignored", [False, True], ids=["", "the context is ignored"])
    # A library does not close the connection in which a method was missing.
    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_method_is_not_called(
        self,
        trusting: Lab,
        monkeypatch: pytest.MonkeyPatch,
        client: Client,
        kind: type,
        name: str,
        ignored: bool,
    ) -> None:
        if name:
            monkeypatch.delattr(kind, name)
        stock = trusting.stock_client() if ignored else None
        for context in (trusting.stock_server(), None):
            with recording(context) as recorder, pytest.raises(REFUSED):
                client(trusting, recorder.port, stock)
            if context:
                assert not recorder.received
            else:
                # Not TLS: what comes first is a ClientHello.
                assert bytes(recorder.received[:1]) in (b"", b"\x16")
                assert SECRET.encode() not in recorder.received
        # What was left open is noticed here, not in another test.
        gc.collect()

    def test_the_recorder_would_tell(self, trusting: Lab) -> None:
        """As the libraries are, all of them would have reached it."""
        with recording(trusting.stock_server()) as recorder:
            url = f"https://localhost:{recorder.port}/{SECRET}"
            assert requests.get(url, timeout=PATIENCE).ok
            with urllib3.PoolManager() as manager:
                assert manager.request("GET", url).status == 200
            connection = redis.SSLConnection(host="localhost", port=recorder.port, password=SECRET)
            with pytest.raises(redis.RedisError):
                connection.connect()  # type: ignore[no-untyped-call]
            connection.disconnect()  # type: ignore[no-untyped-call]
        assert recorder.received.count(SECRET.encode()) == 3
        assert {name for kinds in CLIENTS.values() for kind in kinds for name in hooks(kind)} >= {
            "init_poolmanager", "cert_verify", "connect", "send", "_wrap_socket_with_ssl", "_connect", "start_tls",
            "_create_connection",
        }  # fmt: skip

    @pytest.mark.parametrize("client", [by_requests, by_urllib3])
    def test_the_pool_makes_other_connections(
        self, trusting: Lab, monkeypatch: pytest.MonkeyPatch, client: Client
    ) -> None:
        """`ConnectionCls` and `pool_classes_by_scheme` are names, too."""
        hybrid_only = for_urllib3.hybrid_only

        def without_connection_class(manager: Any, *args: Any, **options: Any) -> Any:
            hybrid_only(manager, *args, **options)
            del manager.pool_classes_by_scheme["https"].ConnectionCls
            return manager

        def without_pool_classes(manager: Any, *args: Any, **options: Any) -> Any:
            hybrid_only(manager, *args, **options)
            del manager.pool_classes_by_scheme
            manager.pool_classes_by_scheme = urllib3.poolmanager.pool_classes_by_scheme
            return manager

        for broken in (without_connection_class, without_pool_classes):
            monkeypatch.setattr(for_urllib3, "hybrid_only", broken)
            monkeypatch.setattr(for_requests, "hybrid_only", broken)
            with recording(trusting.stock_server()) as recorder, pytest.raises(REFUSED):
                client(trusting, recorder.port, None)
            assert not recorder.received

    @pytest.mark.parametrize("client", [by_requests, by_urllib3])
    @pytest.mark.parametrize("name", ["", "connect", "send"])
    def test_a_connection_takes_another_context(
        self, trusting: Lab, monkeypatch: pytest.MonkeyPatch, client: Client, name: str
    ) -> None:
        connect, stock = HTTPSConnection.connect, trusting.stock_client()

        def by_another_context(self: HTTPSConnection) -> None:
            self.ssl_context = stock
            connect(self)

        monkeypatch.setattr(HTTPSConnection, "connect", by_another_context)
        if name:
            monkeypatch.delattr(for_urllib3._QKDConnection, name)
        refused = pytest.raises(REFUSED, match="has made a connection that is not the QKDContext's")
        with recording(trusting.stock_server()) as recorder, refused:
            client(trusting, recorder.port, None)
        assert recorder.connections == 1
        assert not recorder.received

    def test_no_method_of_redis_is_called_but_for_sending(
        self, trusting: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(for_redis.QKDConnection, "_connect")
        monkeypatch.delattr(for_redis.QKDConnection, "_wrap_socket_with_ssl")
        for client in (by_redis, by_redis_without_a_first_command):
            refused = pytest.raises(redis.ConnectionError, match="not the QKDContext's")
            with recording(trusting.stock_server()) as recorder, refused:
                client(trusting, recorder.port, None)
            assert recorder.connections == 1
            assert not recorder.received

    def test_a_connection_of_urllib3_that_is_not_connected_yet(self, local: Lab) -> None:
        manager = for_urllib3.with_qkd_info(urllib3.PoolManager(ssl_context=local.client()))
        with serving(local.server()) as port, manager:
            connection: Any = manager.connection_from_url(f"https://localhost:{port}")._new_conn()
            connection.request("GET", "/")
            assert connection.getresponse().qkd.protection == "hybrid"
            connection.close()
            connection.auto_open = 0
            with pytest.raises(http.client.NotConnected):
                connection.request("GET", "/")

    def test_anyio(self, local: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        wrap = TLSStream.wrap

        async def with_another_context(stream: Any, **options: Any) -> Any:
            return await wrap(stream, **{**options, "ssl_context": local.stock_client()})

        monkeypatch.setattr(TLSStream, "wrap", with_another_context)

        async def send(port: int) -> None:
            plain = await anyio.connect_tcp("127.0.0.1", port)
            with pytest.raises(
                QKDError, match=r"anyio [\d.]+ has made a connection that is not the QKDContext's"
            ):
                await for_anyio.wrap_stream(plain, local.client(), hostname="localhost")

        with recording(local.stock_server()) as recorder:
            asyncio.run(send(recorder.port))
        assert not recorder.received

    def test_what_the_error_says(self, trusting: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(for_requests.QKDAdapter, "init_poolmanager")
        with pytest.raises(
            RuntimeError, match=r"requests [\d.]+ has made a connection that is not .* nothing was sent"
        ):
            for_requests.QKDAdapter(trusting.client())
        monkeypatch.delattr(for_redis.QKDConnection, "_wrap_socket_with_ssl")
        with (
            recording(trusting.stock_server()) as recorder,
            pytest.raises(redis.ConnectionError, match=r"docs/dropin\.md"),
        ):
            by_redis(trusting, recorder.port, None)


class TestPlainHTTP:
    """An `http://` URL, or a redirect to one, has no hybrid connection."""

    def test_requests(self, local: Lab) -> None:
        with recording(None) as recorder, requests.Session() as session:
            session.mount("http://", for_requests.QKDAdapter(local.client()))
            with pytest.raises(
                requests.exceptions.InvalidSchema, match="http:// URL has no hybrid connection"
            ):
                session.get(f"http://localhost:{recorder.port}/{SECRET}", timeout=PATIENCE)
        assert recorder.connections == 0

    def test_requests_whose_adapter_is_not_asked_to_send(
        self, local: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(for_requests.QKDAdapter, "send")
        with recording(None) as recorder, requests.Session() as session:
            session.mount("http://", for_requests.QKDAdapter(local.client()))
            with pytest.raises(requests.exceptions.InvalidURL, match="no hybrid connection"):
                session.get(f"http://localhost:{recorder.port}/{SECRET}", timeout=PATIENCE)
        assert recorder.connections == 0

    def test_urllib3(self, local: Lab) -> None:
        manager = for_urllib3.with_qkd_info(urllib3.PoolManager(ssl_context=local.client()))
        refused = pytest.raises(urllib3.exceptions.LocationValueError, match="no hybrid connection")
        with recording(None) as recorder, manager, refused:
            manager.request("GET", f"http://localhost:{recorder.port}/{SECRET}")
        assert recorder.connections == 0

    def test_urllib3_needs_a_context(self, local: Lab) -> None:
        for manager in (urllib3.PoolManager(), urllib3.PoolManager(ssl_context=local.stock_client())):
            with pytest.raises(ValueError, match="ssl_context=context"):
                for_urllib3.with_qkd_info(manager)

    def test_httpx(self, local: Lab) -> None:
        async def send(port: int) -> None:
            async with httpx.AsyncClient(transport=for_httpx.QKDAsyncTransport(local.client())) as client:
                with pytest.raises(httpx.UnsupportedProtocol, match="no hybrid connection"):
                    await client.get(f"http://localhost:{port}/{SECRET}")

        with recording(None) as recorder:
            asyncio.run(send(recorder.port))
        assert recorder.connections == 0

    def test_httpx_whose_transport_is_not_asked(self, local: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(for_httpx.QKDAsyncTransport, "handle_async_request")

        async def send(port: int, **options: Any) -> None:
            transport = for_httpx.QKDAsyncTransport(local.client(), **options)
            async with httpx.AsyncClient(transport=transport, timeout=PATIENCE) as client:
                with pytest.raises(httpx.ConnectError, match="not the QKDContext's"):
                    await client.get(f"http://localhost:{port}/{SECRET}")

        with recording(None) as recorder:
            asyncio.run(send(recorder.port))
            asyncio.run(send(recorder.port, proxy=f"http://localhost:{recorder.port}"))
        assert not recorder.received

    def test_aiohttp(self, local: Lab) -> None:
        async def send(port: int) -> None:
            async with aiohttp.ClientSession(connector=for_aiohttp.QKDConnector(local.client())) as session:
                with pytest.raises(aiohttp.InvalidUrlClientError, match="no hybrid connection"):
                    await session.get(f"http://localhost:{port}/{SECRET}")

        with recording(None) as recorder:
            asyncio.run(send(recorder.port))
        assert recorder.connections == 0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that no request gets to."""
    assert scope["type"] == "lifespan"
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


class TestServers:
    def config(self, context: QKDContext) -> for_hypercorn.QKDConfig:
        config = for_hypercorn.QKDConfig(context)
        config.bind = ["127.0.0.1:0"]
        return config

    @pytest.mark.parametrize("name", hooks(for_hypercorn.QKDConfig))
    def test_hypercorn(self, local: Lab, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """It serves with the context, or not at all."""
        monkeypatch.delattr(for_hypercorn.QKDConfig, name)
        wrapped: list[Any] = []
        start_server = asyncio.start_server

        async def noted(*args: Any, **options: Any) -> Any:
            wrapped.append(options.get("ssl"))
            return await start_server(*args, **options)

        monkeypatch.setattr(asyncio, "start_server", noted)
        context = local.server()

        async def over() -> None: ...

        async def serve() -> None:
            await hypercorn.asyncio.serve(app, self.config(context), shutdown_trigger=over)

        if name == "create_sockets":
            asyncio.run(serve())
            assert wrapped == [context]
        else:
            with pytest.raises(RuntimeError, match="nothing is served"):
                asyncio.run(serve())

    def test_uvicorn(self, local: Lab, caplog: pytest.LogCaptureFixture) -> None:
        """A protocol without a hybrid connection under it ends the connection."""

        async def main() -> None:
            config = uvicorn.Config(
                app, port=0, log_level="critical", lifespan="off",
                http=QKDProtocol,
            )  # fmt: skip
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            server.should_exit = True
            await serving

        asyncio.run(main())
        assert "uvicorn has not made it with a QKDContext" in caplog.text

    def test_gunicorn(self, local: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        hook = for_gunicorn.ssl_context_hook(local.server)

        def worker(**settings: Any) -> Any:
            return SimpleNamespace(cfg=SimpleNamespace(**settings))

        for_gunicorn.refuse_plain_http(worker(is_ssl=True, ssl_context=hook))
        with pytest.raises(RuntimeError, match="would serve plain HTTP: set certfile"):
            for_gunicorn.refuse_plain_http(worker(is_ssl=False, ssl_context=hook))
        with pytest.raises(RuntimeError, match="without a QKDContext"):
            for_gunicorn.refuse_plain_http(worker(is_ssl=True, ssl_context=lambda *_: None))
        monkeypatch.setattr("gunicorn.config.make_settings", dict)
        with pytest.raises(RuntimeError, match="no setting ssl_context"):
            for_gunicorn.ssl_context_hook(local.server)


def test_the_servers_of_redis_are_reached(local: Lab) -> None:
    """A connection that is given no first command is made, checked and used all the same."""
    with serving(local.server(), RedisHandler) as port:
        connection = for_redis.QKDConnection(
            qkd_context=local.client(),
            host="localhost",
            port=port,
            redis_connect_func=lambda c: c._parser.on_connect(c),
        )
        connection.send_command("PING")  # type: ignore[no-untyped-call]
        assert connection.read_response() == b"PONG"
        connection.disconnect()  # type: ignore[no-untyped-call]
