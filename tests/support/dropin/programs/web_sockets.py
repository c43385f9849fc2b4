"""WebSockets: websockets, with threads and with asyncio, and websocket-client, against peers of a few lines.

The path says what is wanted: /hello, /up (a message, which is answered with its SHA-256), /down (a message), /half (the
server waits for the rest of a message), or a way to fall silent or end, which the server plays in a message.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any, Final

import websocket
import websockets.asyncio.client
import websockets.asyncio.server
import websockets.sync.client
import websockets.sync.server

from tests.support.dropin.harness import (
    DIGEST,
    HALF,
    LIMIT,
    PATIENCE,
    PAYLOAD,
    Notes,
    Program,
    digest,
    drain,
    end_cleanly,
    kind_of,
    truncate,
)
from tests.support.dropin.programs.http_servers import run_in_thread

__all__ = ["PROGRAMS"]


# --- RFC 6455, as much as a peer needs

_BINARY: Final = 2
_CLOSE: Final = 8


def frame(opcode: int, data: bytes, *, mask: bool = False) -> bytes:
    """A whole message. A mask of zeros leaves the data as they are."""
    head = struct.pack("!BBQ", 0x80 | opcode, 127 | mask << 7, len(data))
    return head + bytes(4 * mask) + data


def read_frame(file: Any) -> tuple[int, bytes]:
    first, second = file.read(2)
    size = second & 0x7F
    if size > 125:
        width = 2 if size == 126 else 8
        size = int.from_bytes(file.read(width), "big")
    mask = file.read(4) if second & 0x80 else bytes(4)
    data = file.read(size)
    # Byte by byte would take long.
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return first & 0xF, (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")


def read_head(file: Any) -> tuple[str, dict[str, str]]:
    """The first line of a request or a response, and its header."""
    first = file.readline().decode().strip()
    fields = {}
    while line := file.readline().decode().strip():
        name, _, value = line.partition(": ")
        fields[name.lower()] = value
    return first, fields


def accepted(key: str) -> str:
    secret = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
    return base64.b64encode(secret).decode()


# --- clients


class WebSocketClient(Program):
    def start(self) -> None:
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        with self.ends.accept(raw) as tls, tls.makefile("rb") as file:
            first, fields = read_head(file)
            tls.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accepted(fields["sec-websocket-key"]).encode() + b"\r\n\r\n"
            )
            match first.split()[1]:
                case "/hello":
                    tls.sendall(frame(_BINARY, b"hello"))
                case "/up":
                    tls.sendall(frame(_BINARY, digest(read_frame(file)[1]).encode()))
                case "/down":
                    tls.sendall(frame(_BINARY, PAYLOAD))
                case path:
                    tls.sendall(frame(_BINARY, bytes(100))[:10] + HALF)
                    file.close()
                    {"/silent": drain, "/end": end_cleanly, "/cut": truncate}[path](tls)
                    return
            # The client says goodbye; the server answers and ends the connection.
            tls.sendall(frame(*read_frame(file)))
            file.close()
            end_cleanly(tls)

    def url(self, path: str) -> str:
        return f"wss://localhost:{self.port}{path}"

    def call(self, path: str, body: bytes = b"", seconds: float = PATIENCE) -> Any:
        """Send a message, if it is not empty; returns what comes."""
        raise NotImplementedError

    def connects(self) -> object:
        return self.call("/hello") == b"hello"

    def up(self) -> object:
        return self.call("/up", PAYLOAD) == DIGEST.encode()

    def down(self) -> object:
        return digest(self.call("/down")) == DIGEST

    def timeout(self) -> object:
        return self.call("/silent", seconds=LIMIT)

    def eof(self) -> object:
        return self.call("/end")

    def truncation(self) -> object:
        return self.call("/cut")


class WebsocketsSyncClient(WebSocketClient):
    name = "websockets.sync, client"
    distribution = "websockets"
    how = "websockets.sync.client.connect(url, ssl=context)"

    def call(self, path: str, body: bytes = b"", seconds: float = PATIENCE) -> Any:
        with websockets.sync.client.connect(
            self.url(path),
            ssl=self.ends.client,
            max_size=None,
            compression=None,
            proxy=None,
            close_timeout=LIMIT,
        ) as connection:
            self.ends.note(connection.socket)
            if body:
                connection.send(body)
            return connection.recv(timeout=seconds)


class WebsocketsAsyncioClient(WebSocketClient):
    name = "websockets.asyncio, client"
    distribution = "websockets"
    how = "await websockets.asyncio.client.connect(url, ssl=context)"

    def call(self, path: str, body: bytes = b"", seconds: float = PATIENCE) -> Any:
        return self.run(self.talk(path, body, seconds))

    async def talk(self, path: str, body: bytes, seconds: float) -> Any:
        async with websockets.asyncio.client.connect(
            self.url(path),
            ssl=self.ends.client,
            max_size=None,
            compression=None,
            proxy=None,
            close_timeout=LIMIT,
        ) as connection:
            self.ends.note(connection.transport.get_extra_info("ssl_object"))
            if body:
                await connection.send(body)
            async with asyncio.timeout(seconds):
                return await connection.recv()


class WebSocketClientPackage(WebSocketClient):
    name = distribution = "websocket-client"
    how = 'websocket.create_connection(url, sslopt={"context": context})'

    def call(self, path: str, body: bytes = b"", seconds: float = PATIENCE) -> Any:
        connection = websocket.create_connection(
            self.url(path), sslopt={"context": self.ends.client}, timeout=seconds, http_no_proxy=["*"]
        )
        try:
            self.ends.note(connection.sock)
            if body:
                connection.send_binary(body)
            return connection.recv()
        finally:
            connection.close(timeout=LIMIT)


# --- servers


class WebSocketServer(Program):
    role = "server"
    port: int

    def start(self) -> None:
        self.observed = Notes()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.serve()

    def serve(self) -> None:
        """Start the server."""
        raise NotImplementedError

    @contextlib.contextmanager
    def session(self, path: str) -> Iterator[tuple[Any, Any]]:
        with self.ends.connect(self.port) as tls, tls.makefile("rb") as file:
            key = base64.b64encode(os.urandom(16)).decode()
            tls.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            first, fields = read_head(file)
            assert (first.split()[1], fields["sec-websocket-accept"]) == ("101", accepted(key))
            yield tls, file

    def call(self, path: str, body: bytes = b"") -> bytes:
        with self.session(path) as (tls, file):
            tls.sendall(frame(_BINARY, body, mask=True))
            _, answer = read_frame(file)
            tls.sendall(frame(_CLOSE, b"", mask=True))
            drain(tls)
            return answer

    def half(self, end: Any) -> object:
        with self.session("/half") as (tls, file):
            file.close()
            tls.sendall(frame(_BINARY, bytes(100), mask=True)[:14] + HALF)
            end(tls)
            return self.observed.get()

    def connects(self) -> object:
        return self.call("/hello") == b"hello"

    def up(self) -> object:
        return self.call("/up", PAYLOAD) == DIGEST.encode()

    def down(self) -> object:
        return digest(self.call("/down")) == DIGEST

    def timeout(self) -> object:
        # Nothing happens: the server's application gives up.
        return self.half(lambda tls: None)

    def eof(self) -> object:
        return self.half(end_cleanly)

    def truncation(self) -> object:
        return self.half(truncate)


def reply(path: str, message: Any) -> bytes:
    return {"/hello": b"hello", "/up": digest(message).encode(), "/down": PAYLOAD}[path]


class WebsocketsSyncServer(WebSocketServer):
    name = "websockets.sync, server"
    distribution = "websockets"
    how = "websockets.sync.server.serve(handle, host, port, ssl=context)"

    def serve(self) -> None:
        server = websockets.sync.server.serve(
            self.handle,
            sock=self.listening,
            ssl=self.ends.server,
            max_size=None,
            compression=None,
            close_timeout=LIMIT,
        )
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def stop() -> None:
            server.shutdown()
            thread.join()

        self.stack.callback(stop)

    def handle(self, connection: websockets.sync.server.ServerConnection) -> None:
        assert connection.request is not None
        if connection.request.path == "/half":
            try:
                self.observed.put(str(connection.recv(timeout=LIMIT)))
            except Exception as error:  # noqa: BLE001 - that is what is measured
                self.observed.put(kind_of(error))
        else:
            connection.send(reply(connection.request.path, connection.recv()))


class WebsocketsAsyncioServer(WebSocketServer):
    name = "websockets.asyncio, server"
    distribution = "websockets"
    how = "await websockets.asyncio.server.serve(handle, host, port, ssl=context)"

    def serve(self) -> None:
        run_in_thread(self, self.serve_in_loop)

    async def serve_in_loop(self, ended: asyncio.Event) -> None:
        async with websockets.asyncio.server.serve(
            self.handle,
            sock=self.listening,
            ssl=self.ends.server,
            max_size=None,
            compression=None,
            close_timeout=LIMIT,
        ):
            await ended.wait()

    async def handle(self, connection: websockets.asyncio.server.ServerConnection) -> None:
        assert connection.request is not None
        if connection.request.path == "/half":
            try:
                async with asyncio.timeout(LIMIT):
                    self.observed.put(str(await connection.recv()))
            except Exception as error:  # noqa: BLE001 - that is what is measured
                self.observed.put(kind_of(error))
        else:
            await connection.send(reply(connection.request.path, await connection.recv()))


PROGRAMS: list[type[Program]] = [
    WebsocketsSyncClient,
    WebsocketsSyncServer,
    WebsocketsAsyncioClient,
    WebsocketsAsyncioServer,
    WebSocketClientPackage,
]
