"""Clients of brokers: nats-py against nats-server, pika and aio-pika against an AMQP peer of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import aio_pika
import nats
import pika  # type: ignore[import-untyped]
import pika.exceptions  # type: ignore[import-untyped]
import pika.frame  # type: ignore[import-untyped]
from pika import spec

from tests.support.dropin.fronts import Front
from tests.support.dropin.harness import (
    DIGEST,
    HALF,
    LIMIT,
    PATIENCE,
    PAYLOAD,
    BrokenOff,
    Program,
    digest,
    drain,
    end_cleanly,
    kind_of,
    truncate,
)
from tests.support.dropin.tunnelled import binary, service
from tests.support.patience import eventually_in_loop
from tests.support.ports import free_port

__all__ = ["PROGRAMS"]


# --- NATS


async def begin_nats(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answers: asyncio.StreamReader,
    questions: asyncio.StreamWriter,
) -> None:
    """Let the server's first line ask for TLS."""
    info = json.loads((await answers.readline()).removeprefix(b"INFO "))
    writer.write(b"INFO " + json.dumps({**info, "tls_required": True}).encode() + b"\r\n")
    await writer.drain()


class NATS(Program):
    name = "nats-py, TLS in front of nats-server"
    distribution = "nats-py"
    how = "await nats.connect(url, tls=context)"
    notes: ClassVar[Mapping[str, str]] = {
        "connects": "Both runs let its first line ask for TLS, speak TLS with their context, and pass on the rest."
    }

    def start(self) -> None:
        self.server = free_port()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "nats.conf"
        config.write_text(f"listen: 127.0.0.1:{self.server}\nmax_payload: 16MB\nmax_pending: 64MB\n")
        service(self, [binary("nats-server", "nats-server"), "-c", str(config)], self.server)
        self.front = Front(self, self.server, begin_nats)

    @contextlib.asynccontextmanager
    async def session(self, *, plain: bool = False) -> AsyncIterator[Any]:
        """A connection; a plain one goes past our TLS."""
        tls: dict[str, Any] = {} if plain else {"tls": self.ends.client, "tls_hostname": "localhost"}

        async def ignore(_: Exception) -> None:
            """What goes wrong is seen by who asks."""

        client = await nats.connect(
            f"nats://localhost:{self.server if plain else self.front.port}",
            allow_reconnect=False,
            error_cb=ignore,
            **tls,
        )
        try:
            yield client
        finally:
            await client.close()

    async def echoed(self, payload: bytes, *, up: bool) -> bool:
        """Whether a message arrives as it was sent, from our connection to a plain one or back."""
        async with self.session(plain=not up) as sender, self.session(plain=up) as receiver:
            subscription = await receiver.subscribe("payload")
            await receiver.flush()
            await sender.publish("payload", payload)
            message = await subscription.next_msg(PATIENCE)
            return digest(message.data) == digest(payload)

    async def silence(self) -> None:
        async with self.session() as client:
            self.front.do_instead_of_an_answer("silent")
            await client.flush(LIMIT)

    async def interrupted(self, how: Literal["end", "cut"]) -> str:
        async with self.session() as client:
            self.front.do_instead_of_an_answer(how)
            await client.publish("anything", b"")
            await eventually_in_loop(lambda: client.is_closed, "the client is closed")
            return kind_of(client.last_error)

    def connects(self) -> object:
        return self.run(self.echoed(b"hello", up=True))

    def up(self) -> object:
        return self.run(self.echoed(PAYLOAD, up=True))

    def down(self) -> object:
        return self.run(self.echoed(PAYLOAD, up=False))

    def timeout(self) -> object:
        return self.run(self.silence())

    def eof(self) -> object:
        return self.run(self.interrupted("end"))

    def truncation(self) -> object:
        return self.run(self.interrupted("cut"))


# --- AMQP

_FRAME: Final = 1 << 17
_PROPERTIES: Final = {"capabilities": {"publisher_confirms": True, "basic.nack": True}}


class AMQPClient(Program):
    def start(self) -> None:
        self.stored = b""
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        """A broker with one message. Of some queues it only tells the half."""
        with self.ends.accept(raw) as tls:

            def send(*frames: Any) -> None:
                tls.sendall(b"".join(frame.marshal() for frame in frames))

            def deliver(channel: int, method: Any) -> None:
                size = _FRAME - 8
                parts = [self.stored[i : i + size] for i in range(0, len(self.stored), size)]
                send(
                    pika.frame.Method(channel, method),
                    pika.frame.Header(channel, len(self.stored), spec.BasicProperties()),
                    *(pika.frame.Body(channel, part) for part in parts),
                )

            for frame in self.frames(tls):
                number, method = frame.channel_number, getattr(frame, "method", None)
                match method:
                    case spec.Connection.StartOk():
                        answer: Any = spec.Connection.Tune(10, _FRAME, 0)
                    case spec.Connection.Open():
                        answer = spec.Connection.OpenOk()
                    case spec.Channel.Open():
                        answer = spec.Channel.OpenOk()
                    case spec.Confirm.Select():
                        answer = spec.Confirm.SelectOk()
                    case spec.Basic.Get(queue="payload"):
                        deliver(number, spec.Basic.GetOk(1, False, "", "payload", 0))
                        continue
                    case spec.Basic.Get(queue=how) | spec.Basic.Consume(queue=how):
                        if isinstance(method, spec.Basic.Consume):
                            send(pika.frame.Method(number, spec.Basic.ConsumeOk("")))
                        tls.sendall(b"\1\0\1\0\0\0\x64" + HALF)
                        {"silent": drain, "end": end_cleanly, "cut": truncate}[how](tls)
                        return
                    case spec.Channel.Close():
                        answer = spec.Channel.CloseOk()
                    case spec.Connection.Close():
                        send(pika.frame.Method(0, spec.Connection.CloseOk()))
                        return
                    case None if len(self.stored) == self.expected:
                        answer = spec.Basic.Ack(1)
                    case _:
                        continue
                send(pika.frame.Method(number, answer))

    def frames(self, tls: Any) -> Iterator[Any]:
        """What a client says; bodies are put together in `stored`."""
        received = bytearray()
        while len(received) < 8:
            received += tls.recv(1 << 16)
        del received[:8]
        tls.sendall(pika.frame.Method(0, spec.Connection.Start(server_properties=_PROPERTIES)).marshal())
        self.expected = -1
        while data := tls.recv(1 << 18):
            received += data
            while True:
                size, frame = pika.frame.decode_frame(bytes(received[: _FRAME + 8]))
                if frame is None:
                    break
                del received[:size]
                if isinstance(frame, pika.frame.Header):
                    self.stored, self.expected = b"", frame.body_size
                elif isinstance(frame, pika.frame.Body):
                    self.stored += frame.fragment
                yield frame

    def put(self, message: bytes) -> None:
        raise NotImplementedError

    def get(self, queue: str, timeout: float = PATIENCE) -> Any:
        """A message of a queue."""
        raise NotImplementedError

    def connects(self) -> object:
        self.put(b"hello")
        return self.get("payload") == b"hello"

    def up(self) -> object:
        self.put(PAYLOAD)
        return digest(self.stored) == DIGEST

    def down(self) -> object:
        return digest(self.get("payload")) == DIGEST

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        return self.get(how, timeout)


class Pika(AMQPClient):
    name = distribution = "pika"
    how = "ConnectionParameters(host, port, ssl_options=SSLOptions(context, host))"
    notes: ClassVar[Mapping[str, str]] = {
        "timeout": "`inactivity_timeout` of `consume`: `None` is no message."
    }

    @contextlib.contextmanager
    def session(self) -> Iterator[tuple[Any, Any]]:
        connection = pika.BlockingConnection(
            pika.ConnectionParameters(
                "localhost", self.port, ssl_options=pika.SSLOptions(self.ends.client, "localhost")
            )
        )
        try:
            yield connection, connection.channel()
        finally:
            with contextlib.suppress(pika.exceptions.AMQPError, TimeoutError):
                connection.close()

    def put(self, message: bytes) -> None:
        with self.session() as (_, channel):
            channel.confirm_delivery()
            channel.basic_publish("", "payload", message)

    def get(self, queue: str, timeout: float = PATIENCE) -> Any:
        with self.session() as (connection, channel):
            if queue == "payload":
                return channel.basic_get(queue, auto_ack=True)[2]
            _, _, body = next(channel.consume(queue, auto_ack=True, inactivity_timeout=timeout))
            # It would wait for an answer to its goodbye.
            connection._impl._terminate_stream(TimeoutError())
            return body


class AioPika(AMQPClient):
    name = distribution = "aio-pika"
    how = "await aio_pika.connect(url, ssl_context=context)"

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Any]:
        connection = await aio_pika.connect(
            f"amqps://guest:guest@localhost:{self.port}/", ssl_context=self.ends.client
        )
        try:
            yield await connection.channel()
        finally:
            # It would wait for an answer to its goodbye.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LIMIT):
                    await connection.close()

    def put(self, message: bytes) -> None:
        async def run() -> None:
            async with self.session() as channel:
                await channel.default_exchange.publish(aio_pika.Message(message), "payload")

        self.run(run())

    def get(self, queue: str, timeout: float = PATIENCE) -> Any:
        async def run() -> Any:
            async with self.session() as channel:
                of = await channel.get_queue(queue, ensure=False)
                return (await of.get(no_ack=True, timeout=timeout)).body

        return self.run(run())


PROGRAMS: list[type[Program]] = [NATS, Pika, AioPika]
