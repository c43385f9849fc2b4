"""asyncio's and anyio's streams, as client and as server, over one small protocol.

The client says in one line what it wants: `hello`, `up` (10 MB follow, and are answered with their SHA-256), `down`
(10 MB come) or a way to fall silent or end, which the server plays after `half`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls

from qkd_tls import aio
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


class StreamClient(Program):
    def start(self) -> None:
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        with self.ends.accept(raw) as tls, tls.makefile("rb") as file:
            match file.readline():
                case b"hello\n":
                    tls.sendall(b"hello\n")
                case b"up\n":
                    tls.sendall(digest(file.read(len(PAYLOAD))).encode() + b"\n")
                case b"down\n":
                    tls.sendall(PAYLOAD)
                    # uvloop loses what has not been read when the peer ends the stream.
                    drain(tls)
                case line:
                    tls.sendall(HALF)
                    file.close()
                    {b"silent\n": drain, b"end\n": end_cleanly, b"cut\n": truncate}[line](tls)
                    return
            file.close()
            end_cleanly(tls)

    def call(self, line: bytes, body: bytes, size: int, seconds: float = PATIENCE) -> bytes:
        """Say a line and send a body; returns the answer up to a size, or to the end."""
        return self.run(self.talk(line, body, size, seconds))

    async def talk(self, line: bytes, body: bytes, size: int, seconds: float) -> bytes:
        raise NotImplementedError

    def connects(self) -> object:
        return self.call(b"hello\n", b"", 6) == b"hello\n"

    def up(self) -> object:
        return self.call(b"up\n", PAYLOAD, 65) == f"{DIGEST}\n".encode()

    def down(self) -> object:
        return digest(self.call(b"down\n", b"", len(PAYLOAD))) == DIGEST

    def timeout(self) -> object:
        return self.call(b"silent\n", b"", 100, LIMIT)

    def eof(self) -> object:
        return self.call(b"end\n", b"", 100)

    def truncation(self) -> object:
        return self.call(b"cut\n", b"", 100)


class AsyncioClient(StreamClient):
    name = "asyncio streams, client"
    how = "await asyncio.open_connection(host, port, ssl=context)"

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("localhost", self.port, ssl=self.ends.client)

    async def talk(self, line: bytes, body: bytes, size: int, seconds: float) -> bytes:
        reader, writer = await self.open()
        try:
            self.ends.note(writer.get_extra_info("ssl_object"))
            writer.write(line + body)
            await writer.drain()
            async with asyncio.timeout(seconds):
                try:
                    return await reader.readexactly(size)
                except asyncio.IncompleteReadError as error:
                    return error.partial
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class OurClient(AsyncioClient):
    name = "asyncio streams through qkd_tls.aio, client"
    how = "await qkd_tls.aio.open_connection(host, port, ssl=context)"

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.ends.hybrid:
            return await aio.open_connection("localhost", self.port, ssl=self.ends.client)
        return await super().open()


class AnyIOClient(StreamClient):
    name = "anyio, client"
    distribution = "anyio"
    how = "await anyio.connect_tcp(host, port, ssl_context=context)"

    async def talk(self, line: bytes, body: bytes, size: int, seconds: float) -> bytes:
        stream = await anyio.connect_tcp("localhost", self.port, ssl_context=self.ends.client)
        try:
            self.ends.note(stream.extra(anyio.streams.tls.TLSAttribute.ssl_object))
            await stream.send(line + body)
            received = bytearray()
            with anyio.fail_after(seconds), contextlib.suppress(anyio.EndOfStream):
                while len(received) < size:
                    received += await stream.receive(1 << 16)
            return bytes(received)
        finally:
            await anyio.aclose_forcefully(stream)


class StreamServer(Program):
    role = "server"
    port: int

    def start(self) -> None:
        self.open()
        run_in_thread(self, self.serve)

    def open(self) -> None:
        self.observed = Notes()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]

    async def serve(self, ended: asyncio.Event) -> None:
        raise NotImplementedError

    def call(self, line: bytes, body: bytes, size: int) -> bytes:
        with self.ends.connect(self.port) as tls, tls.makefile("rb") as file:
            tls.sendall(line + body)
            return bytes(file.read(size))

    def connects(self) -> object:
        return self.call(b"hello\n", b"", 6) == b"hello\n"

    def up(self) -> object:
        return self.call(b"up\n", PAYLOAD, 65) == f"{DIGEST}\n".encode()

    def down(self) -> object:
        return digest(self.call(b"down\n", b"", len(PAYLOAD))) == DIGEST

    def half(self) -> Any:
        tls = self.ends.connect(self.port)
        tls.sendall(b"half\n" + HALF)
        return tls

    def timeout(self) -> object:
        with self.half():
            return self.observed.get()

    def eof(self) -> object:
        end_cleanly(self.half())
        return self.observed.get()

    def truncation(self) -> object:
        truncate(self.half())
        return self.observed.get()


class AsyncioServer(StreamServer):
    name = "asyncio streams, server"
    how = "await asyncio.start_server(handle, sock=sock, ssl=context)"

    async def listen(self) -> asyncio.Server:
        return await asyncio.start_server(self.handle, sock=self.listening, ssl=self.ends.server)

    async def serve(self, ended: asyncio.Event) -> None:
        async with await self.listen():
            await ended.wait()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            match await reader.readline():
                case b"hello\n":
                    writer.write(b"hello\n")
                case b"up\n":
                    writer.write(digest(await reader.readexactly(len(PAYLOAD))).encode() + b"\n")
                case b"down\n":
                    writer.write(PAYLOAD)
                case b"half\n":
                    await self.half_a_message(reader)
            with contextlib.suppress(OSError):
                await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def half_a_message(self, reader: asyncio.StreamReader) -> None:
        try:
            async with asyncio.timeout(LIMIT):
                self.observed.put((await reader.read()).decode())
        except OSError as error:
            self.observed.put(kind_of(error))


class OurServer(AsyncioServer):
    name = "asyncio streams through qkd_tls.aio, server"
    how = "await qkd_tls.aio.start_server(handle, sock=sock, ssl=context)"

    async def listen(self) -> asyncio.Server:
        if self.ends.hybrid:
            return await aio.start_server(self.handle, sock=self.listening, ssl=self.ends.server)
        return await super().listen()


class AnyIOServer(StreamServer):
    name = "anyio, server"
    distribution = "anyio"
    how = "TLSListener(listener, context)"

    async def serve(self, ended: asyncio.Event) -> None:
        self.port = self.listening.getsockname()[1]
        listener = await anyio.abc.SocketListener.from_socket(self.listening)
        tls = anyio.streams.tls.TLSListener(listener, self.ends.server)
        async with tls, anyio.create_task_group() as group:
            group.start_soon(tls.serve, self.handle)
            await ended.wait()
            group.cancel_scope.cancel()

    async def handle(self, stream: anyio.streams.tls.TLSStream) -> None:
        try:
            received = bytearray()
            while b"\n" not in received:
                received += await stream.receive()
            line, _, rest = received.partition(b"\n")
            match bytes(line):
                case b"hello":
                    await stream.send(b"hello\n")
                case b"up":
                    while len(rest) < len(PAYLOAD):
                        rest += await stream.receive(1 << 16)
                    await stream.send(digest(bytes(rest)).encode() + b"\n")
                case b"down":
                    await stream.send(PAYLOAD)
                case b"half":
                    await self.half_a_message(stream, rest)
        finally:
            await anyio.aclose_forcefully(stream)

    async def half_a_message(self, stream: anyio.streams.tls.TLSStream, received: bytearray) -> None:
        try:
            with anyio.fail_after(LIMIT):
                while True:
                    received += await stream.receive()
        except anyio.EndOfStream:
            self.observed.put(received.decode())
        except (OSError, ssl.SSLError, anyio.BrokenResourceError) as error:
            self.observed.put(kind_of(error))


PROGRAMS: list[type[Program]] = [
    AsyncioClient,
    AsyncioServer,
    OurClient,
    OurServer,
    AnyIOClient,
    AnyIOServer,
]
