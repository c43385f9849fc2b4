"""TLS of a context in front of a real server, whose own TLS takes none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Literal

from tests.support.dropin.harness import Program
from tests.support.dropin.programs.http_servers import run_in_thread

__all__ = ["Begin", "Front"]

Begin = Callable[
    [asyncio.StreamReader, asyncio.StreamWriter, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]
]
"""Speaks the protocol up to where TLS begins: with the program (reader, writer) and its server (a second pair)."""


class Front:
    """Passes on what a program says within TLS. In place of an answer it can fall silent, end or cut the stream."""

    def __init__(self, program: Program, target: int, begin: Begin) -> None:
        self._ends = program.ends
        self._target = target
        self._begin = begin
        self._instead: Literal["silent", "end", "cut"] | None = None
        self._connections: list[asyncio.Task[None]] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        run_in_thread(program, self._serve)

    def do_instead_of_an_answer(self, what: Literal["silent", "end", "cut"]) -> None:
        """Do this when the program sends something next, once."""
        self._instead = what

    async def _serve(self, ended: asyncio.Event) -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._connections.append(asyncio.ensure_future(self._pass_on(reader, writer)))

        async with await asyncio.start_server(accept, sock=self._listening):
            await ended.wait()
            await asyncio.gather(*self._connections)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_connection("127.0.0.1", self._target)
        answering = None
        # A program that breaks off is a part of the play.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._begin(reader, writer, answers, questions)
            await writer.start_tls(self._ends.server)
            self._ends.note(writer.get_extra_info("ssl_object"))
            answering = asyncio.create_task(_copy(answers, writer))
            while data := await reader.read(1 << 16):
                match self._instead:
                    case None:
                        questions.write(data)
                        await questions.drain()
                        continue
                    case "end":
                        writer.close()
                    case "cut":
                        writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
                self._instead = None
                while await reader.read(1 << 16):
                    pass
                break
        for end in (questions, writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()
        if answering is not None:
            await answering


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()
