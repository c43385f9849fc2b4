"""Other event loops than asyncio's own: uvloop, trio, tornado."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from importlib import metadata
from typing import Any

import tornado.httpclient
import tornado.httpserver
import tornado.web
import trio
import uvicorn
import uvloop

from tests.support.dropin.harness import LIMIT, PATIENCE, PAYLOAD, Program, digest, kind_of
from tests.support.dropin.programs.http_clients import AIOHTTPClient, HTTPClient
from tests.support.dropin.programs.http_servers import AIOHTTPServer, IdleTimeout, Uvicorn, run_in_thread
from tests.support.dropin.programs.streams import AsyncioClient, AsyncioServer, StreamClient, StreamServer

__all__ = ["PROGRAMS"]


# --- uvloop


class OnUvloop(Program):
    """Mixed into programs that run in asyncio's loop, too."""

    loop_factory = uvloop.Loop

    @classmethod
    def version(cls) -> str:
        return f"{super().version()}, uvloop {metadata.version('uvloop')}"


class UvicornOnUvloop(OnUvloop, Uvicorn):
    name = "uvicorn, uvloop"

    def start(self) -> None:
        # What it chooses by itself.
        assert uvicorn.Config("", loop="auto").get_loop_factory() is uvloop.new_event_loop
        super().start()


class AIOHTTPClientOnUvloop(OnUvloop, AIOHTTPClient):
    name = "aiohttp, client, uvloop"


class AIOHTTPServerOnUvloop(OnUvloop, AIOHTTPServer):
    name = "aiohttp, server, uvloop"


class AsyncioClientOnUvloop(OnUvloop, AsyncioClient):
    name = "asyncio streams, client, uvloop"


class AsyncioServerOnUvloop(OnUvloop, AsyncioServer):
    name = "asyncio streams, server, uvloop"


# --- trio


class TrioClient(StreamClient):
    name = "trio, client"
    distribution = "trio"
    how = "trio.SSLStream(stream, context, server_hostname=host)"

    def call(self, line: bytes, body: bytes, size: int, seconds: float = PATIENCE) -> bytes:
        return trio.run(self.talk, line, body, size, seconds)

    async def talk(self, line: bytes, body: bytes, size: int, seconds: float) -> bytes:
        tcp = await trio.open_tcp_stream("localhost", self.port)
        stream = trio.SSLStream(tcp, self.ends.client, server_hostname="localhost")
        try:
            await stream.send_all(line + body)
            self.ends.note(stream._ssl_object)
            received = bytearray()
            with trio.fail_after(seconds):
                while len(received) < size and (data := await stream.receive_some()):
                    received += data
            return bytes(received)
        finally:
            await trio.aclose_forcefully(stream)


class TrioServer(StreamServer):
    name = "trio, server"
    distribution = "trio"
    how = "trio.SSLListener(listener, context)"

    def start(self) -> None:
        self.open()
        running: queue.Queue[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = queue.Queue()

        async def main() -> None:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listening))
            with trio.CancelScope() as scope:
                running.put((trio.lowlevel.current_trio_token(), scope))
                await trio.serve_listeners(self.handle, [trio.SSLListener(listener, self.ends.server)])

        thread = threading.Thread(target=trio.run, args=(main,))
        thread.start()
        token, scope = running.get(timeout=PATIENCE)

        def stop() -> None:
            token.run_sync_soon(scope.cancel)
            thread.join()

        self.stack.callback(stop)

    async def handle(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            received = bytearray()
            while b"\n" not in received:
                received += await stream.receive_some()
            line, _, rest = received.partition(b"\n")
            match bytes(line):
                case b"hello":
                    await stream.send_all(b"hello\n")
                case b"up":
                    while len(rest) < len(PAYLOAD):
                        rest += await stream.receive_some()
                    await stream.send_all(digest(bytes(rest)).encode() + b"\n")
                case b"down":
                    await stream.send_all(PAYLOAD)
                case b"half":
                    await self.half_a_message(stream, rest)
        finally:
            await trio.aclose_forcefully(stream)

    async def half_a_message(self, stream: trio.SSLStream[trio.SocketStream], received: bytearray) -> None:
        try:
            with trio.fail_after(LIMIT):
                while data := await stream.receive_some():
                    received += data
            self.observed.put(received.decode())
        except (trio.TooSlowError, trio.BrokenResourceError) as error:
            self.observed.put(kind_of(error))


# --- tornado


class TornadoClient(HTTPClient):
    name = "tornado, client"
    distribution = "tornado"
    how = "await AsyncHTTPClient().fetch(url, ssl_options=context)"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        return self.run(self._fetch(path, body, timeout))

    async def _fetch(self, path: str, body: bytes | None, timeout: float) -> bytes:
        client = tornado.httpclient.AsyncHTTPClient(force_instance=True)
        with contextlib.closing(client):
            response = await client.fetch(
                self.url + path,
                method="GET" if body is None else "POST",
                body=body,
                ssl_options=self.ends.client,
                request_timeout=timeout,
            )
            return response.body


class TornadoServer(IdleTimeout):
    name = "tornado, server"
    distribution = "tornado"
    how = "HTTPServer(app, ssl_options=context)"

    def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        # tornado's sockets do not wait.
        listening.setblocking(False)

        async def serve(ended: asyncio.Event) -> None:
            ends = self.ends
            seen: asyncio.Queue[str] = asyncio.Queue()
            pages: dict[str, bytes] = {"/hello": b"hello", "/payload": PAYLOAD}

            @tornado.web.stream_request_body
            class Handler(tornado.web.RequestHandler):
                def prepare(self) -> None:
                    connection: Any = self.request.connection
                    ends.note(connection.stream.socket)
                    self.received = bytearray()

                def data_received(self, chunk: bytes) -> None:
                    self.received += chunk

                async def get(self) -> None:
                    path = self.request.path
                    self.write((await seen.get()).encode() if path == "/seen" else pages[path])

                def post(self) -> None:
                    self.write(digest(bytes(self.received)).encode())

                def on_connection_close(self) -> None:
                    seen.put_nowait(f"{self.received.decode()}, on_connection_close")
                    super().on_connection_close()

            server = tornado.httpserver.HTTPServer(
                tornado.web.Application([("/.*", Handler)], log_function=lambda _: None),
                ssl_options=self.ends.server,
                idle_connection_timeout=LIMIT,
            )
            server.add_socket(listening)
            await ended.wait()
            server.stop()
            await server.close_all_connections()

        run_in_thread(self, serve)


PROGRAMS: list[type[Program]] = [
    UvicornOnUvloop,
    AIOHTTPClientOnUvloop,
    AIOHTTPServerOnUvloop,
    AsyncioClientOnUvloop,
    AsyncioServerOnUvloop,
    TrioClient,
    TrioServer,
    TornadoClient,
    TornadoServer,
]
