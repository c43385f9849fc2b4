"""Clients of databases that take a context: asyncpg against PostgreSQL, PyMySQL against a peer of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, ClassVar, Final

import asyncpg  # type: ignore[import-untyped]
import pymysql  # type: ignore[import-untyped]

from tests.support.dropin.fronts import Front
from tests.support.dropin.harness import (
    DIGEST,
    HALF,
    PATIENCE,
    PAYLOAD,
    BrokenOff,
    Program,
    digest,
    drain,
    end_cleanly,
    truncate,
)
from tests.support.dropin.programs.databases import postgresql

__all__ = ["PROGRAMS"]


# --- PostgreSQL


async def begin_postgresql(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *_: asyncio.StreamReader | asyncio.StreamWriter,
) -> None:
    """Say yes to SSLRequest."""
    assert await reader.readexactly(8) == struct.pack("!II", 8, 80877103)
    writer.write(b"S")


class AsyncPG(Program):
    name = "asyncpg, TLS in front of PostgreSQL"
    distribution = "asyncpg"
    how = "await asyncpg.connect(host=host, ssl=context)"
    notes: ClassVar[Mapping[str, str]] = {
        "connects": "Both runs answer its SSLRequest, speak TLS with their context, and pass on what is within."
    }

    def start(self) -> None:
        self.front = Front(self, postgresql(self), begin_postgresql)

    @contextlib.asynccontextmanager
    async def session(self, timeout: float = PATIENCE) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(
            host="localhost",
            port=self.front.port,
            user="postgres",
            ssl=self.ends.client,
            command_timeout=timeout,
        )
        try:
            yield connection
        finally:
            connection.terminate()
            # Its transport is closed in the loop's next turns.
            await asyncio.sleep(0)

    async def hello(self) -> bool:
        async with self.session() as connection:
            await connection.execute("CREATE TABLE payload (data bytea)")
            return bool(await connection.fetchval("SELECT 1") == 1)

    async def insert(self) -> bool:
        async with self.session() as connection:
            await connection.execute("INSERT INTO payload VALUES ($1)", PAYLOAD)
            return bool(
                await connection.fetchval("SELECT encode(sha256(data), 'hex') FROM payload") == DIGEST
            )

    async def select(self) -> bool:
        async with self.session() as connection:
            return digest(await connection.fetchval("SELECT data FROM payload")) == DIGEST

    async def interrupted(self, how: BrokenOff, timeout: float = PATIENCE) -> Any:
        async with self.session(timeout) as connection:
            self.front.do_instead_of_an_answer(how)
            return await connection.fetchval("SELECT 1")

    def connects(self) -> object:
        return self.run(self.hello())

    def up(self) -> object:
        return self.run(self.insert())

    def down(self) -> object:
        return self.run(self.select())

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        return self.run(self.interrupted(how, timeout))


# --- MySQL

_CAPABILITIES: Final = 0x1 | 0x8 | 0x200 | 0x800 | 0x8000 | 0x80000
"""LONG_PASSWORD, CONNECT_WITH_DB, PROTOCOL_41, SSL, SECURE_CONNECTION, PLUGIN_AUTH."""

_BLOB: Final = 252
_LARGEST: Final = (1 << 24) - 1


def string(data: bytes) -> bytes:
    """A string behind its length."""
    return (bytes([len(data)]) if len(data) < 251 else b"\xfd" + len(data).to_bytes(3, "little")) + data


class MySQLPackets:
    """Packets over a connection; those that are sent are small enough for one."""

    def __init__(self, sock: Any, number: int = 0) -> None:
        self.sock = sock
        self.number = number

    def send(self, *packets: bytes) -> None:
        for packet in packets:
            self.sock.sendall(len(packet).to_bytes(3, "little") + bytes([self.number]) + packet)
            self.number += 1

    def receive(self) -> bytes:
        data, size = b"", _LARGEST
        # What does not fit into a packet goes on in the next one.
        while size == _LARGEST:
            head = self._exactly(4)
            self.number = head[3] + 1
            size = int.from_bytes(head[:3], "little")
            data += self._exactly(size)
        return data

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise ConnectionError
            data += more
        return bytes(data)


class PyMySQL(Program):
    name = distribution = "PyMySQL"
    how = "pymysql.connect(host=host, ssl=context)"

    def start(self) -> None:
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        """A server that knows one row."""
        plain = MySQLPackets(raw)
        salt = b"12345678"
        capabilities = struct.pack("<I", _CAPABILITIES)
        plain.send(
            b"\x0a8.0.0\0" + bytes(4) + salt + b"\0" + capabilities[:2] + b"\x2d\2\0" + capabilities[2:]
            + b"\x15" + bytes(10) + b"123456789012\0mysql_native_password\0"
        )  # fmt: skip
        assert len(plain.receive()) == 32  # SSLRequest
        with self.ends.accept(raw) as tls:
            packets = MySQLPackets(tls)
            packets.receive()
            ok, eof = b"\0\0\0\2\0\0\0", b"\xfe\0\0\2\0"
            packets.send(ok)
            row = b""
            while (command := packets.receive())[0] != 1:
                match command[1:].split(b" ", 1):
                    case [b"SELECT", b"silent" | b"end" | b"cut" as how]:
                        tls.sendall(b"\x64\0\0\1" + HALF)
                        {b"silent": drain, b"end": end_cleanly, b"cut": truncate}[how](tls)
                        return
                    case [b"SELECT", what]:
                        row = {b"1": b"1", b"digest": row, b"payload": PAYLOAD}[what]
                        name = b"".join(map(string, (b"def", b"", b"", b"", b"x", b"x")))
                        column = name + struct.pack("<BHIBHBxx", 12, 63, 1 << 24, _BLOB, 0, 0)
                        packets.send(b"\1", column, eof, string(row), eof)
                    case _:
                        row = digest(command[1:]).encode()
                        packets.send(ok)

    @contextlib.contextmanager
    def session(self, timeout: float = PATIENCE) -> Iterator[Any]:
        connection = pymysql.connect(
            host="localhost", port=self.port, user="root", ssl=self.ends.client, read_timeout=timeout
        )
        try:
            self.ends.note(connection._sock)
            with connection.cursor() as cursor:
                yield cursor
        finally:
            with contextlib.suppress(pymysql.err.Error):
                connection.close()

    def select(self, what: str, timeout: float = PATIENCE) -> Any:
        with self.session(timeout) as cursor:
            cursor.execute(f"SELECT {what}")
            return cursor.fetchone()[0]

    def connects(self) -> object:
        return self.select("1") == b"1"

    def up(self) -> object:
        with self.session() as cursor:
            insert = cursor.mogrify("INSERT INTO payload VALUES (%s)", (PAYLOAD,))
            cursor.execute(insert)
            cursor.execute("SELECT digest")
            sent = digest(insert.encode())
            return cursor.fetchone()[0] == sent.encode()

    def down(self) -> object:
        return digest(self.select("payload")) == DIGEST

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        return self.select(how, timeout)


PROGRAMS: list[type[Program]] = [AsyncPG, PyMySQL]
