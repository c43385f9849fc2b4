"""urllib3, httpx, anyio, aiohttp and redis with the real libraries, as clients of hybrid servers."""

from __future__ import annotations

import asyncio
import contextlib
import socketserver
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import httpcore
import httpx
import pytest
import redis
import redis.asyncio
import urllib3
from anyio.streams.tls import TLSAttribute, TLSListener

from kms_client import KMSUnavailable
from qkd_tls import QKDUnavailable, aio
from qkd_tls.adapters.aiohttp import QKDConnector, QKDResponse
from qkd_tls.adapters.anyio import wrap_stream
from qkd_tls.adapters.httpx import QKDAsyncTransport
from qkd_tls.adapters.httpx import qkd_info as httpx_info
from qkd_tls.adapters.redis import AsyncQKDConnection, QKDConnection
from qkd_tls.adapters.redis import qkd_info as redis_info
from qkd_tls.adapters.urllib3 import qkd_info as urllib3_info
from qkd_tls.adapters.urllib3 import with_qkd_info
from tests.support.patience import PATIENCE, eventually_in_loop
from tests.support.slow_kms import RedisHandler, SlowManager, a_loop_that_turns, serving
from tests.support.sockets import Lab

CLOSE = {"Connection": "close"}


class TestUrllib3:
    def test_says_what_protected_a_response(self, local: Lab) -> None:
        with (
            serving(local.server()) as port,
            with_qkd_info(urllib3.PoolManager(ssl_context=local.client())) as manager,
        ):
            response = manager.request("GET", f"https://localhost:{port}/")
            assert urllib3_info(response).key_id == response.data.decode()
            assert urllib3_info(response).protection == "hybrid"

    def test_other_pools_do_not_know(self, local: Lab) -> None:
        with serving(local.server()) as port, urllib3.PoolManager(ssl_context=local.client()) as manager:
            response = manager.request("GET", f"https://localhost:{port}/")
            with pytest.raises(ValueError, match="not by with_qkd_info"):
                urllib3_info(response)


class TestHTTPX:
    def test_the_context_is_enough_for_a_client_that_blocks(self, local: Lab) -> None:
        with (
            serving(local.server()) as port,
            httpx.Client(verify=local.client(), trust_env=False) as client,
            client.stream("GET", f"https://localhost:{port}/") as response,
        ):
            info = httpx_info(response)
            assert response.read().decode() == info.key_id

    def test_the_loop_turns_while_the_kms_is_asked(self, slow_client: Lab) -> None:
        async def fetch() -> None:
            async with (
                httpx.AsyncClient(
                    transport=QKDAsyncTransport(slow_client.client()), timeout=PATIENCE
                ) as client,
                a_loop_that_turns(),
            ):
                for path in ("bootstrap", "associated"):
                    async with client.stream("GET", f"https://localhost:{port}/", headers=CLOSE) as response:
                        info = httpx_info(response)
                        assert (await response.aread()).decode() == info.key_id
                        assert info.path == path

        with serving(slow_client.server()) as port:
            asyncio.run(fetch())

    def test_an_ordinary_response_has_no_info(self) -> None:
        with pytest.raises(ValueError, match="did not come over a hybrid"):
            httpx_info(httpx.Response(200))

    def test_errors_are_those_of_httpx(self, local: Lab) -> None:
        local.managers["client"].close()

        async def fetch() -> None:
            async with httpx.AsyncClient(transport=QKDAsyncTransport(local.client())) as client:
                with pytest.raises(httpx.ConnectError, match="no QKD key") as caught:
                    await client.get(f"https://localhost:{port}/")
                assert caught.value.__cause__ is not None
                assert isinstance(caught.value.__cause__.__context__, QKDUnavailable)

        with serving(local.server()) as port:
            asyncio.run(fetch())

    def test_a_connect_timeout_wipes_what_comes_late(self, slow_client: Lab) -> None:
        manager: Any = slow_client.managers["client"]
        manager.may_answer.clear()

        async def answer_too_late() -> None:
            await eventually_in_loop(manager.asked.is_set)
            await asyncio.sleep(1)
            manager.may_answer.set()

        async def fetch() -> None:
            answering = asyncio.create_task(answer_too_late())
            timeout = httpx.Timeout(PATIENCE, connect=1)
            transport = QKDAsyncTransport(slow_client.client())
            async with httpx.AsyncClient(transport=transport, timeout=timeout) as client:
                with pytest.raises(httpx.ConnectTimeout):
                    await client.get(f"https://localhost:{port}/")
            await answering

        with serving(slow_client.server()) as port:
            asyncio.run(fetch())
        assert [key.used for key in manager.given] == [True]

    def test_other_contexts_lead_to_a_proxy_and_no_further(self, local: Lab, tmp_path: Path) -> None:
        async def handshake() -> None:
            transport = QKDAsyncTransport(local.client(), proxy="https://localhost")
            backend: httpcore.AsyncNetworkBackend = transport._pool._network_backend
            stream = await backend.connect_tcp("127.0.0.1", port, timeout=PATIENCE)
            assert stream.get_extra_info("ssl_object") is None
            tls = await stream.start_tls(local.stock_client(), "localhost", PATIENCE)
            assert type(tls.get_extra_info("ssl_object")) is ssl.SSLObject
            await tls.write(b"CONNECT x")
            await tls.write(b"")
            assert await tls.read(10) == b""
            with pytest.raises(httpcore.ConnectError, match="not the QKDContext's"):
                await tls.start_tls(local.stock_client(), "localhost", PATIENCE)
            with pytest.raises(httpcore.ConnectError, match="not the QKDContext's"):
                await tls.write(b"GET / HTTP/1.1")
            await backend.sleep(0)
            with pytest.raises(httpcore.ConnectError):
                await backend.connect_unix_socket("/nowhere/at/all")
            path = str(tmp_path / "socket")
            async with await asyncio.start_unix_server(lambda _, writer: writer.close(), path):
                stream = await backend.connect_unix_socket(path)
                assert stream.get_extra_info("ssl_object") is None
                await stream.aclose()
            await transport.aclose()

        with one_tls_connection(local.stock_server()) as port:
            asyncio.run(handshake())


@contextlib.contextmanager
def one_tls_connection(context: ssl.SSLContext) -> Iterator[int]:
    """Reads a byte and closes."""

    class Once(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with context.wrap_socket(self.request, server_side=True) as tls:
                tls.recv(1)

    with socketserver.TCPServer(("127.0.0.1", 0), Once) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield server.server_address[1]
        thread.join()


class TestAnyIO:
    def test_both_ends(self, slow: Lab) -> None:
        async def talk() -> None:
            client, server = slow.client(), slow.server()
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
            port = listener.extra(anyio.abc.SocketAttribute.local_port)

            async def serve(stream: anyio.abc.SocketStream) -> None:
                async with await wrap_stream(stream, server, server_side=True) as tls:
                    await tls.send(await tls.receive())

            async with listener, anyio.create_task_group() as group, a_loop_that_turns():
                group.start_soon(listener.serve, serve)
                plain = await anyio.connect_tcp("127.0.0.1", port)
                async with await wrap_stream(plain, client, hostname="localhost") as tls:
                    await tls.send(b"hello")
                    assert await tls.receive() == b"hello"
                    connection: Any = tls.extra(TLSAttribute.ssl_object)
                    assert connection.qkd.protection == "hybrid"
                group.cancel_scope.cancel()

        asyncio.run(talk())

    def test_half_closed_plain_streams(self, local: Lab) -> None:
        """The stream under TLS can be ended for sending, as any other."""

        async def talk() -> None:
            async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
                port = listener.extra(anyio.abc.SocketAttribute.local_port)

                async def serve(stream: anyio.abc.SocketStream) -> None:
                    with pytest.raises(anyio.EndOfStream):
                        async with await wrap_stream(stream, local.server(), server_side=True) as tls:
                            await tls.receive()

                async with anyio.create_task_group() as group:
                    group.start_soon(listener.serve, serve)
                    plain = await anyio.connect_tcp("127.0.0.1", port)
                    tls = await wrap_stream(plain, local.client(), hostname="localhost")
                    await tls.unwrap()
                    await tls.transport_stream.send_eof()
                    await plain.aclose()
                    group.cancel_scope.cancel()

        asyncio.run(talk())

    def test_given_up_while_the_kms_is_asked(self, slow_client: Lab) -> None:
        manager: Any = slow_client.managers["client"]
        manager.may_answer.clear()

        async def give_up(scope: anyio.CancelScope) -> None:
            await eventually_in_loop(manager.asked.is_set)
            scope.cancel()
            manager.may_answer.set()

        async def connect() -> None:
            async with (
                await anyio.connect_tcp("127.0.0.1", port) as plain,
                anyio.create_task_group() as group,
            ):
                with anyio.CancelScope() as scope:
                    group.start_soon(give_up, scope)
                    await wrap_stream(plain, slow_client.client(), hostname="localhost")
                assert scope.cancelled_caught

        with serving(slow_client.server()) as port:
            asyncio.run(connect())
        assert [key.used for key in manager.given] == [True]

    def test_a_kms_that_fails(self, local: Lab) -> None:
        class Broken(SlowManager):
            def get_keys(self, *_: object, **__: object) -> Any:
                raise KMSUnavailable("the KME is off", kms="KME A")

        local.managers = {**local.managers, "client": Broken(local.managers["client"])}

        async def connect() -> None:
            async with await anyio.connect_tcp("127.0.0.1", port) as plain:
                with pytest.raises(QKDUnavailable, match="the KME is off"):
                    await wrap_stream(plain, local.client(), hostname="localhost")

        with serving(local.server()) as port:
            asyncio.run(connect())

    def test_the_context_is_enough_where_the_loop_may_wait(self, local: Lab) -> None:
        async def talk() -> None:
            plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
            port = plain.extra(anyio.abc.SocketAttribute.local_port)
            listener = TLSListener(plain, ssl_context=local.server())

            async def serve(stream: Any) -> None:
                async with stream:
                    await stream.send(b"hello")

            async with listener, anyio.create_task_group() as group:
                group.start_soon(listener.serve, serve)
                async with await anyio.connect_tcp(
                    "127.0.0.1", port, ssl_context=local.client(), tls_hostname="localhost"
                ) as tls:
                    assert await tls.receive() == b"hello"
                group.cancel_scope.cancel()

        asyncio.run(talk())


class TestAIOHTTP:
    async def fetch(self, url: str, connector: aiohttp.BaseConnector, **options: Any) -> None:
        async with (
            aiohttp.ClientSession(connector=connector, response_class=QKDResponse) as session,
            a_loop_that_turns(),
            session.get(url, **options) as response,
        ):
            assert isinstance(response, QKDResponse)
            assert response.qkd is not None
            assert await response.text() == response.qkd.key_id

    def test_in_any_event_loop(self, slow_client: Lab) -> None:
        async def main() -> None:
            await self.fetch(f"https://localhost:{port}/", QKDConnector(slow_client.client()))

        with serving(slow_client.server()) as port:
            asyncio.run(main())

    def test_in_an_event_loop_of_ours_its_own_connector(self, slow_client: Lab) -> None:
        async def main() -> None:
            connector = aiohttp.TCPConnector(ssl=slow_client.client())
            await self.fetch(f"https://localhost:{port}/", connector)

        with serving(slow_client.server()) as port, asyncio.Runner(loop_factory=aio.EventLoop) as runner:
            runner.run(main())

    def test_through_a_proxy(self, slow_client: Lab) -> None:
        async def main() -> None:
            async with a_proxy() as proxy:
                connector = QKDConnector(slow_client.client())
                await self.fetch(f"https://localhost:{port}/", connector, proxy=proxy)

        with serving(slow_client.server()) as port:
            asyncio.run(main())

    def test_another_context_for_one_request(self, local: Lab) -> None:
        async def main() -> None:
            async with aiohttp.ClientSession(
                connector=QKDConnector(local.client()), response_class=QKDResponse
            ) as session:
                with pytest.raises(aiohttp.ClientConnectorError):
                    await session.get(f"https://localhost:{port}/", ssl=local.stock_client())

        with serving(local.server()) as port:
            asyncio.run(main())

    def test_errors_are_those_of_aiohttp(self, local: Lab) -> None:
        local.managers["client"].close()

        async def main() -> None:
            async with aiohttp.ClientSession(connector=QKDConnector(local.client())) as session:
                with pytest.raises(aiohttp.ClientConnectorError) as caught:
                    await session.get(f"https://localhost:{port}/")
                assert isinstance(caught.value.__cause__, QKDUnavailable)

        with serving(local.server()) as port:
            asyncio.run(main())


@contextlib.asynccontextmanager
async def a_proxy() -> AsyncIterator[str]:
    """An HTTP proxy for CONNECT."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = (await reader.readline()).split()[1].decode().rpartition(":")
        while (await reader.readline()).strip():
            pass
        there, back = await asyncio.open_connection("127.0.0.1" if host == "localhost" else host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class TestRedis:
    """A real redis-server, behind a tunnel, is in tests/dropin."""

    def test_blocking(self, local: Lab) -> None:
        with serving(local.server(), RedisHandler) as port:
            client = redis.Redis.from_url(
                f"redis://localhost:{port}/",
                connection_class=QKDConnection,
                qkd_context=local.client(),
                protocol=2,
            )
            with client:
                assert client.ping()
                assert redis_info(client).protection == "hybrid"
            client.connection_pool.disconnect()

    def test_asyncio_in_any_event_loop(self, slow_client: Lab) -> None:
        async def talk() -> None:
            client = redis.asyncio.Redis.from_url(
                f"redis://localhost:{port}/",
                connection_class=AsyncQKDConnection,
                qkd_context=slow_client.client(),
                protocol=2,
            )
            async with client, a_loop_that_turns():
                assert await client.ping()
                connections: Any = client.connection_pool
                connection = await connections.get_connection()
                assert connection.qkd.protection == "hybrid"
                await connections.release(connection)

        with serving(slow_client.server(), RedisHandler) as port:
            asyncio.run(talk())

    def test_asyncio_a_server_that_cannot_be_trusted(self, local: Lab) -> None:
        async def talk() -> None:
            client = redis.asyncio.Redis(
                connection_pool=redis.asyncio.ConnectionPool(
                    connection_class=AsyncQKDConnection,
                    qkd_context=local.client(),
                    host="127.0.0.1",
                    port=port,
                    protocol=2,
                    retry=None,
                )
            )
            context = client.connection_pool.connection_kwargs["qkd_context"]
            context._trusted.clear()
            async with client:
                with pytest.raises(redis.ConnectionError, match="verify failed"):
                    await client.ping()

        with serving(local.server(), RedisHandler) as port:
            asyncio.run(talk())

    def test_what_has_no_effect_is_refused(self, local: Lab) -> None:
        for kind in (QKDConnection, AsyncQKDConnection):
            with pytest.raises(ValueError, match="ssl_ca_certs has no effect"):
                kind(qkd_context=local.client(), ssl_ca_certs="ca.pem")

    def test_other_clients_do_not_know(self) -> None:
        with socketserver.TCPServer(("127.0.0.1", 0), RedisHandler) as server:
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            client = redis.Redis(host="127.0.0.1", port=server.server_address[1], protocol=2)
            with pytest.raises(ValueError, match="not of class QKDConnection"):
                redis_info(client)
            client.close()
            client.connection_pool.disconnect()
            thread.join()
