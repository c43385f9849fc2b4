"""`qkd_tls.aio`: asyncio's functions over hybrid connections, and a loop that never waits for a KMS."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path as FilePath
from typing import Any

import pytest

from kms_client import KMSUnavailable, QKDKey, UnknownKey
from qkd_tls import (
    Path,
    Protection,
    QKDContext,
    QKDFallbackWarning,
    QKDKeyMismatch,
    QKDObject,
    QKDSocket,
    QKDUnavailable,
    aio,
)
from tests.support.sockets import TIMEOUT, Lab, Proxy, Server, connected, echo, tcp_pair, wait_until

# --- what the tests share


def run(main: Coroutine[Any, Any, Any], loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(TIMEOUT):
            return await main

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(limited())


class Manager:
    """A key manager in front of another one: remembers the keys it gave, and can be slow or fail."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.protocol, self.name, self.sae_id = inner.protocol, inner.name, inner.sae_id
        self.given: list[QKDKey] = []
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()
        self.answered = threading.Event()
        self.threads: set[int] = set()
        self.error: BaseException | None = None

    def status(self, peer_sae_id: str) -> Any:
        return self.inner.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        return self._answer(lambda: self.inner.get_keys(peer_sae_id, number, size))

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        return self._answer(lambda: self.inner.get_keys_by_id(peer_sae_id, key_ids))

    def close(self) -> None: ...

    def _answer(self, ask: Callable[[], list[QKDKey]]) -> list[QKDKey]:
        self.threads.add(threading.get_ident())
        self.asked.set()
        assert self.may_answer.wait(TIMEOUT)
        try:
            if self.error is not None:
                raise self.error
            keys = ask()
            self.given += keys
            return keys
        finally:
            self.answered.set()

    async def wiped(self) -> None:
        """Wait until every key that was given is used or wiped."""
        await waiting_for(lambda: bool(self.given) and all(key.used for key in self.given))


async def waiting_for(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not true():
            await asyncio.sleep(0.005)


class Echo:
    """A server that sends back what comes, and what it saw."""

    def __init__(self, context: QKDContext, **options: Any) -> None:
        self.context, self.options = context, options
        self.seen: list[Any] = []
        self.errors: list[BaseException] = []

    async def __aenter__(self) -> Echo:
        self.server = await aio.start_server(self.serve, "127.0.0.1", 0, ssl=self.context, **self.options)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.append(writer.get_extra_info("ssl_object"))
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError as error:
            self.errors.append(error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def connect(self, context: QKDContext, **options: Any) -> Any:
        options.setdefault("server_hostname", "localhost")
        return await aio.open_connection("127.0.0.1", self.port, ssl=context, **options)


async def talk(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes = b"ping", close: bool = True
) -> QKDObject:
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    tls: QKDObject = writer.get_extra_info("ssl_object")
    if close:
        await closed(writer)
    return tls


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def heartbeat() -> AsyncIterator[list[float]]:
    """How long the loop was away, each time."""
    gaps: list[float] = []

    async def beat() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    task = asyncio.create_task(beat())
    try:
        yield gaps
    finally:
        task.cancel()


# --- streams


class TestStreams:
    def test_bootstrap_associated_and_announced(self, local: Lab) -> None:
        async def main() -> None:
            client = local.client(announced_keys=1)
            async with Echo(local.server()) as server:
                for path, announced in (
                    (Path.BOOTSTRAP, False),
                    (Path.ASSOCIATED, True),
                    (Path.ASSOCIATED, False),
                ):
                    reader, writer = await server.connect(client)
                    tls = await talk(reader, writer)
                    assert isinstance(tls, QKDObject)
                    assert tls.qkd is not None
                    assert tls.qkd.protection is Protection.HYBRID
                    assert tls.qkd.path is path
                    assert tls.qkd.announced is announced
                    assert server.seen[-1].qkd.key_id == tls.qkd.key_id
                    assert writer.get_extra_info("peercert") == tls.getpeercert()
                    assert writer.get_extra_info("cipher") == tls.cipher()
                    assert writer.get_extra_info("sslcontext") is client

        run(main())

    def test_real_kmes(self, lab: Lab) -> None:
        async def main() -> None:
            async with Echo(lab.server()) as server:
                client = lab.client()
                for path in (Path.BOOTSTRAP, Path.ASSOCIATED):
                    tls = await talk(*await server.connect(client))
                    assert tls.qkd is not None
                    assert tls.qkd.path is path

        run(main())

    def test_mutual_tls_and_alpn(self, local: Lab) -> None:
        async def main() -> None:
            client, server_context = local.client(), local.server(mutual=True)
            local.client_identity.load_into(client)
            client.set_alpn_protocols(["h2", "http/1.1"])
            server_context.set_alpn_protocols(["http/1.1"])
            async with Echo(server_context) as server:
                for _ in range(2):
                    tls = await talk(*await server.connect(client))
                    assert tls.selected_alpn_protocol() == "http/1.1"
                    assert server.seen[-1].selected_alpn_protocol() == "http/1.1"
                    assert server.seen[-1].getpeercert(True) == local.client_identity.der

        run(main())

    def test_much_data(self, local: Lab) -> None:
        """With back-pressure: the server stops reading while nobody takes what it sends back."""

        async def main() -> None:
            async with Echo(local.server()) as server:
                reader, writer = await server.connect(local.client())
                data = os.urandom(1 << 20) * 32

                async def send() -> None:
                    for start in range(0, len(data), 1 << 20):
                        writer.write(data[start : start + (1 << 20)])
                        await writer.drain()

                sending = asyncio.create_task(send())
                await asyncio.sleep(0.1)
                assert not sending.done(), "all is buffered somewhere"
                assert await reader.readexactly(len(data)) == data
                await sending
                await closed(writer)

        run(main())

    @pytest.mark.parametrize("speaks_first", ["server", "client"])
    def test_data_at_once(self, local: Lab, speaks_first: str) -> None:
        """What comes with the last flight of the handshake reaches the application's protocol, and so does the end."""

        async def main() -> None:
            received: list[bytes] = []
            done = asyncio.Event()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                if speaks_first == "server":
                    writer.write(b"welcome")
                else:
                    received.append(await reader.read())
                await closed(writer)
                done.set()

            server = await aio.start_server(serve, "127.0.0.1", 0, ssl=local.server())
            client = local.client()
            for _ in range(3):
                done.clear()
                reader, writer = await aio.open_connection(
                    "localhost", server.sockets[0].getsockname()[1], ssl=client, family=socket.AF_INET
                )
                if speaks_first == "server":
                    received.append(await reader.read())
                else:
                    writer.write(b"welcome")
                await closed(writer)
                await done.wait()
            server.close()
            assert received == [b"welcome"] * 3

        run(main())

    def test_limit(self, local: Lab) -> None:
        async def main() -> None:
            async with Echo(local.server()) as server:
                reader, writer = await server.connect(local.client(), limit=10)
                writer.write(b"x" * 100)
                with pytest.raises(ValueError, match="limit"):
                    await reader.readline()
                await closed(writer)

        run(main())

    def test_upgrade_of_plain_streams(self, local: Lab) -> None:
        """STARTTLS on both sides."""

        async def main() -> None:
            server_context, client_context = local.server(), local.client()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                assert await reader.readline() == b"STARTTLS\n"
                writer.write(b"go ahead\n")
                await aio.upgrade_streams(writer, server_context)
                writer.write(await reader.readline())
                await closed(writer)

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            for path in (Path.BOOTSTRAP, Path.ASSOCIATED):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                writer.write(b"STARTTLS\n")
                assert await reader.readline() == b"go ahead\n"
                await aio.upgrade_streams(writer, client_context, server_hostname="localhost")
                writer.write(b"over TLS\n")
                assert await reader.readline() == b"over TLS\n"
                info = writer.get_extra_info("ssl_object").qkd
                assert info.path is path
                await closed(writer)
            server.close()

        run(main())

    def test_many_at_once(self, local: Lab) -> None:
        async def main() -> None:
            client = local.client()
            async with Echo(local.server()) as server:

                async def one(number: int) -> str:
                    reader, writer = await server.connect(client)
                    tls = await talk(reader, writer, b"%d" % number)
                    assert tls.qkd is not None
                    return str(tls.qkd.key_id)

                key_ids = await asyncio.gather(*(one(number) for number in range(100)))
                assert len(set(key_ids)) == 100

        run(main())


# --- policies and failures


class TestFailures:
    def test_prefer_falls_back_and_warns(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.error = KMSUnavailable("it burns", kms="KME A", peer="SAE-B")
            client = local.client(key_manager=manager, policy="prefer")
            async with Echo(local.server(policy="prefer")) as server:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    tls = await talk(*await server.connect(client))
                assert tls.qkd is not None
                assert tls.qkd.protection is Protection.PQ_ONLY
                assert "it burns" in str(tls.qkd.fallback)
                assert [one.category for one in caught] == [QKDFallbackWarning] * 2

        run(main())

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_require_refuses_and_both_sides_learn_why(
        self, local: Lab, side: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            managers = {name: Manager(local.manager(name)) for name in ("client", "server")}
            managers[side].error = UnknownKey("no such key", kms="KME", peer="SAE", key_ids=["x"])
            async with Echo(local.server(key_manager=managers["server"])) as server:
                with pytest.raises(
                    QKDUnavailable, match="no such key" if side == "client" else "unknown_key"
                ):
                    await server.connect(local.client(key_manager=managers["client"]))
                await waiting_for(lambda: "the handshake with" in caplog.text)
            assert "unknown_key" in caplog.text or "closed the bootstrap" in caplog.text

        caplog.set_level(logging.WARNING, "qkd_tls")
        run(main())

    def test_alert_reaches_the_peer(self, local: Lab) -> None:
        """Whoever refuses, the other side's error names it, although asyncio drops what a failed handshake says."""

        async def main() -> None:
            refusing = local.server()
            refusing.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_ACCESS_DENIED
            async with Echo(refusing) as server:
                with pytest.raises(ssl.SSLError, match="access denied"):
                    await server.connect(local.client())
            async with Echo(local.server()) as server:
                # A stock client gets an alert of its own.
                with pytest.raises(ssl.SSLError, match="no application protocol"):
                    await asyncio.open_connection(
                        "127.0.0.1", server.port, ssl=local.stock_client(), server_hostname="localhost"
                    )
            # Only a client that sends nothing more is sure to read it: data that the server does not read any more
            # resets the connection, as with the standard library's TLS.
            async with Echo(local.server(mutual=True, policy="off")) as server:
                reader, writer = await server.connect(local.client(policy="off"))
                with pytest.raises(ssl.SSLError, match="certificate required"):
                    await reader.read()
                writer.close()

        run(main())

    def test_alert_of_a_client(self, local: Lab, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            async with Echo(local.server()) as server:
                with pytest.raises(ssl.SSLCertVerificationError, match=r"elsewhere\.example"):
                    await server.connect(local.client(), server_hostname="elsewhere.example")
                await waiting_for(lambda: "the handshake with" in caplog.text)
            assert "certificate" in caplog.text

        caplog.set_level(logging.DEBUG, "qkd_tls")
        run(main())

    @pytest.mark.parametrize("error", [ZeroDivisionError("oops"), SystemExit(3), asyncio.CancelledError()])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_key_manager_that_fails_unexpectedly(
        self, local: Lab, side: str, error: BaseException, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            managers = {name: Manager(local.manager(name)) for name in ("client", "server")}
            managers[side].error = error
            async with Echo(local.server(key_manager=managers["server"])) as server:
                with pytest.raises(QKDUnavailable) as caught:
                    await server.connect(local.client(key_manager=managers["client"]))
            if side == "client":
                assert f"failed with {type(error).__name__}" in str(caught.value)
                assert "see the traceback in the log" in str(caught.value)

        run(main())
        failed = [record for record in caplog.records if "failed" in record.message and record.exc_info]
        assert [record.exc_info[1] for record in failed if record.exc_info] == [error]

    def test_keys_that_differ(self, local: Lab) -> None:
        class Wrong(Manager):
            def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
                return [QKDKey(key_id, bytes(32)) for key_id in key_ids]

        async def main() -> None:
            async with Echo(local.server(key_manager=Wrong(local.manager("server")))) as server:
                with pytest.raises(QKDKeyMismatch):
                    await server.connect(local.client())

        run(main())

    @pytest.mark.parametrize("when", ["at the start", "when keys come"])
    def test_observer_that_raises(self, local: Lab, when: str) -> None:
        """A fault of the program's own ends the handshake at once, too."""

        async def main() -> None:
            manager = Manager(local.manager("client"))
            client = local.client(key_manager=manager)

            def observe(step: Any) -> None:
                if bool(manager.given) == (when == "when keys come"):
                    raise ZeroDivisionError("observer")

            async with Echo(local.server()) as server:
                # asyncio reports it, too.
                asyncio.get_running_loop().set_exception_handler(lambda *_: None)
                client.observer = observe
                with pytest.raises(ZeroDivisionError, match="observer"):
                    await server.connect(client)

        run(main())

    def test_warning_made_an_error(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.error = KMSUnavailable("it burns", kms="KME A", peer="SAE-B")
            client = local.client(key_manager=manager, policy="prefer")
            server_context = local.server(policy="off")
            async with Echo(server_context) as server:
                with pytest.raises(QKDFallbackWarning):
                    await server.connect(client)

        run(main())

    def test_not_tls(self, local: Lab, caplog: pytest.LogCaptureFixture) -> None:
        """A server is not impressed by who does not speak TLS, nor by who goes at once."""

        async def main() -> None:
            async with Echo(local.server()) as server:
                for data in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x16\x03\x01\x10"):
                    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                    writer.write(data)
                    writer.write_eof()
                    with contextlib.suppress(ConnectionResetError):
                        await reader.read()
                    await closed(writer)
                await talk(*await server.connect(local.client()))

        caplog.set_level(logging.DEBUG, "qkd_tls")
        run(main())
        assert sum("the handshake with" in record.message for record in caplog.records) == 3

    def test_context_for_the_other_side(self, local: Lab) -> None:
        async def main() -> None:
            async with Echo(local.server()) as server:
                with pytest.raises(ssl.SSLError, match="PROTOCOL_TLS_SERVER"):
                    await server.connect(local.server())
                with pytest.raises(ValueError, match="positive number"):
                    await server.connect(local.client(), ssl_handshake_timeout=-1)
                with pytest.raises(ValueError, match="server_hostname"):
                    await aio.create_connection(asyncio.Protocol, sock=socket.socket(), ssl=local.client())
            problems: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, about: problems.append(about))
            for context, options in ((local.client(), {}), (local.server(), {"ssl_handshake_timeout": -1})):
                async with Echo(context, **options) as server:
                    with pytest.raises((ConnectionError, ssl.SSLEOFError)):
                        await server.connect(local.client())
            gc.collect()
            assert any(isinstance(about.get("exception"), ValueError) for about in problems)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            run(main())

    def test_protocol_factory_that_raises(self, local: Lab) -> None:
        def factory() -> asyncio.Protocol:
            raise LookupError("no protocol")

        async def main() -> None:
            async with Echo(local.server()) as server:
                with pytest.raises(LookupError, match="no protocol"):
                    await aio.create_connection(
                        factory, "127.0.0.1", server.port, ssl=local.client(), server_hostname="localhost"
                    )
            problems: list[Any] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, about: problems.append(about))
            listening = await aio.create_server(factory, "127.0.0.1", 0, ssl=local.server())
            reader, writer = await aio.open_connection(
                *listening.sockets[0].getsockname(), ssl=local.client(), server_hostname="localhost"
            )
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            listening.close()
            await asyncio.sleep(0)
            gc.collect()
            assert [str(about["exception"]) for about in problems] == ["no protocol"]

        run(main())


# --- a slow KMS


class TestSlowKMS:
    def test_the_loop_keeps_turning(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.may_answer.clear()
            async with Echo(local.server()) as server, heartbeat() as gaps:
                connecting = [
                    asyncio.create_task(server.connect(local.client(key_manager=manager))) for _ in range(20)
                ]
                await waiting_for(manager.asked.is_set)
                await asyncio.sleep(0.3)
                assert not any(task.done() for task in connecting)
                assert len(gaps) > 5
                manager.may_answer.set()
                for streams in await asyncio.gather(*connecting):
                    await talk(*streams)
            assert threading.get_ident() not in manager.threads
            assert max(gaps) < 1.0

        run(main())

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_timeout_and_late_keys(self, local: Lab, side: str) -> None:
        """The handshake is over by then: keys that come late are wiped."""

        async def main() -> None:
            managers = {name: Manager(local.manager(name)) for name in ("client", "server")}
            managers[side].may_answer.clear()
            options = {"ssl_handshake_timeout": 0.2}
            server_options = options if side == "server" else {}
            async with Echo(local.server(key_manager=managers["server"]), **server_options) as server:
                with pytest.raises((ConnectionError, ssl.SSLError, QKDUnavailable)) as caught:
                    await server.connect(
                        local.client(key_manager=managers["client"]), **(options if side == "client" else {})
                    )
                if side == "client":
                    assert "taking longer than 0.2 seconds" in str(caught.value)
                assert not managers[side].given
                managers[side].may_answer.set()
                await managers["client"].wiped()
                await managers[side].wiped()

        run(main())

    def test_cancelled(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.may_answer.clear()
            async with Echo(local.server()) as server:
                connecting = asyncio.create_task(server.connect(local.client(key_manager=manager)))
                await waiting_for(manager.asked.is_set)
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
                manager.may_answer.set()
                await manager.wiped()

        run(main())

    def test_cancelled_while_the_peer_is_slow(self, local: Lab) -> None:
        """The keys are on offer then: they are wiped at once, not when the garbage collector comes."""

        async def main() -> None:
            managers = {name: Manager(local.manager(name)) for name in ("client", "server")}
            managers["server"].may_answer.clear()
            async with Echo(local.server(key_manager=managers["server"])) as server:
                connecting = asyncio.create_task(
                    server.connect(local.client(key_manager=managers["client"], announced_keys=2))
                )
                await waiting_for(managers["server"].asked.is_set)
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
                assert len(managers["client"].given) == 3
                assert all(key.used for key in managers["client"].given)
                managers["server"].may_answer.set()

        gc.disable()
        try:
            run(main())
        finally:
            gc.enable()

    def test_client_gone_meanwhile(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("server"))
            manager.may_answer.clear()
            async with Echo(local.server(key_manager=manager)) as server:
                connecting = asyncio.create_task(server.connect(local.client()))
                await waiting_for(manager.asked.is_set)
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await connecting
                await asyncio.sleep(0.05)
                manager.may_answer.set()
                await manager.wiped()
                await talk(*await server.connect(local.client()))

        run(main())

    def test_loop_closed_meanwhile(self, local: Lab) -> None:
        manager = Manager(local.manager("client"))
        manager.may_answer.clear()

        async def main() -> None:
            async with Echo(local.server()) as server:
                connecting = asyncio.create_task(server.connect(local.client(key_manager=manager)))
                await waiting_for(manager.asked.is_set)
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await connecting

        run(main())
        manager.may_answer.set()
        run(manager.wiped())

    def test_transport_aborted_meanwhile(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.may_answer.clear()
            async with Echo(local.server()) as server:
                loop = asyncio.get_running_loop()
                raw, protocol = await loop.create_connection(asyncio.Protocol, "127.0.0.1", server.port)
                upgrading = asyncio.create_task(
                    aio.start_tls(
                        raw, protocol, local.client(key_manager=manager), server_hostname="localhost"
                    )
                )
                await waiting_for(manager.asked.is_set)
                raw.abort()
                with pytest.raises(ConnectionAbortedError, match="closed during the handshake"):
                    await upgrading
                manager.may_answer.set()
                await manager.wiped()

        run(main())


# --- protocols


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.events.append("made")

    def data_received(self, data: bytes) -> None:
        self.events.append(bytes(data))

    def eof_received(self) -> None:
        self.events.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")
        self.lost.set_result(None)


class Buffered(asyncio.BufferedProtocol):
    def __init__(self, size: int) -> None:
        self.buffer, self.received = bytearray(size), bytearray()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(None)


class TestProtocols:
    @pytest.mark.parametrize("buffered", [True, False])
    def test_server_that_speaks_and_goes_at_once(self, local: Lab, buffered: bool) -> None:
        """Data and end may come before the application's protocol is connected: it sees them in order."""

        class Greeter(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                transport.write(b"welcome")
                transport.close()

        async def main() -> None:
            listening = await aio.create_server(Greeter, "127.0.0.1", 0, ssl=local.server())
            client = local.client()
            with Proxy(listening.sockets[0].getsockname()) as proxy:
                for _ in range(3):
                    transport, protocol = await aio.create_connection(
                        lambda: Buffered(3) if buffered else Recorder(),
                        *proxy.address,
                        ssl=client,
                        server_hostname="localhost",
                    )
                    await protocol.lost
                    if isinstance(protocol, Recorder):
                        assert protocol.events == ["made", b"welcome", "eof", "lost"]
                    else:
                        assert protocol.received == b"welcome"
                    assert transport.is_closing()
            listening.close()

        run(main())

    def test_gate(self) -> None:
        """What comes before the application's protocol is connected, and a buffer that cannot be."""

        async def main() -> None:
            class Transport:
                def set_protocol(self, protocol: Any) -> None: ...

            protocol = Recorder()
            gate = aio._Gate()
            for _ in range(2):
                gate.data_received(b"early")
            gate.eof_received()
            gate.connection_lost(None)
            gate.open(Transport(), protocol)  # type: ignore[arg-type]
            assert protocol.events == ["made", b"earlyearly", "eof", "lost"]
            gate = aio._Gate()
            gate.data_received(b"early")
            buffered = Buffered(3)
            buffered.connection_made(None)  # type: ignore[arg-type]
            gate.open(Transport(), buffered)  # type: ignore[arg-type]
            assert buffered.received == b"early"
            with pytest.raises(RuntimeError, match="empty buffer"):
                gate.open(Transport(), Buffered(0))  # type: ignore[arg-type]

        run(main())

    def test_close_and_abort(self, local: Lab) -> None:
        async def main() -> None:
            protocols: list[Recorder] = []

            def factory() -> Recorder:
                protocols.append(Recorder())
                return protocols[-1]

            listening = await aio.create_server(factory, "127.0.0.1", 0, ssl=local.server())
            client = local.client()
            for end in ("close", "abort"):
                transport, protocol = await aio.create_connection(
                    Recorder,
                    *listening.sockets[0].getsockname(),
                    ssl=client,
                    server_hostname="localhost",
                )
                transport.write(b"last words")
                if end == "abort":
                    await waiting_for(lambda: protocols and b"last words" in protocols[-1].events)
                getattr(transport, end)()
                await protocol.lost
                await waiting_for(lambda: protocols[-1].lost.done())
                assert b"last words" in protocols[-1].events
            listening.close()

        run(main())

    def test_server_closed_with_connections_open(self, local: Lab) -> None:
        async def main() -> None:
            server = await Echo(local.server()).__aenter__()
            reader, writer = await server.connect(local.client())
            await talk(reader, writer, close=False)
            server.server.close()
            await talk(reader, writer)
            with pytest.raises(ConnectionRefusedError):
                await server.connect(local.client())

        run(main())

    def test_own_socket(self, local: Lab) -> None:
        async def main() -> None:
            async with Echo(local.server()) as server:
                sock = socket.create_connection(("127.0.0.1", server.port))
                transport, _ = await aio.create_connection(
                    Recorder, sock=sock, ssl=local.client(), server_hostname="localhost"
                )
                transport.close()

        run(main())

    def test_inner_connections_are_not_adopted(self, local: Lab) -> None:
        """Callbacks run in the context of the handshake for ever: a connection made there is its own."""

        async def main() -> None:
            inner: list[Any] = []

            class Wraps(asyncio.Protocol):
                def connection_made(self, transport: Any) -> None:
                    made = local.client().wrap_bio(
                        ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost"
                    )
                    inner.append((made._ask, made._farewell))

                def data_received(self, data: bytes) -> None:
                    self.connection_made(None)

            async with Echo(local.server()) as server:
                transport, _ = await aio.create_connection(
                    Wraps, "127.0.0.1", server.port, ssl=local.client(), server_hostname="localhost"
                )
                transport.write(b"x")
                await waiting_for(lambda: len(inner) == 2)
                transport.close()
            assert inner == [(None, None)] * 2

        run(main())


# --- sockets


class TestWrapSocket:
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_hybrid_and_associated(self, local: Lab, side: str) -> None:
        async def main() -> None:
            client, server = local.client(), local.server()
            loop = asyncio.get_running_loop()
            if side == "server":
                listening = socket.create_server(("127.0.0.1", 0))
                listening.setblocking(False)

                def dial() -> QKDSocket:
                    raw = socket.create_connection(listening.getsockname(), timeout=TIMEOUT)
                    return client.wrap_socket(raw, server_hostname="localhost")

                for path in (Path.BOOTSTRAP, Path.ASSOCIATED):
                    dialling = loop.run_in_executor(None, dial)
                    raw, _ = await loop.sock_accept(listening)
                    tls = await aio.wrap_socket(raw, server, server_side=True)
                    with await dialling as near, tls:
                        assert tls.qkd is not None
                        assert near.qkd is not None
                        assert tls.qkd.path is near.qkd.path is path
                listening.close()
                return
            with Server(server, echo) as echoing:
                for path in (Path.BOOTSTRAP, Path.ASSOCIATED):
                    with await aio.wrap_socket(echoing.tcp(), client, server_hostname="localhost") as tls:
                        assert type(tls) is QKDSocket
                        assert tls.gettimeout() == 0.0
                        assert tls.qkd is not None
                        assert tls.qkd.path is path
                        assert tls.send(b"hello") == 5
                        readable = asyncio.Event()
                        loop.add_reader(tls, readable.set)
                        while True:
                            await readable.wait()
                            readable.clear()
                            try:
                                assert tls.recv(100) == b"hello"
                                break
                            except ssl.SSLWantReadError:
                                continue
                        loop.remove_reader(tls)

        run(main())

    def test_kms_that_fails(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.error = KMSUnavailable("it burns", kms="KME A", peer="SAE-B")
            with Server(local.server()) as server:
                raw = server.tcp()
                with pytest.raises(QKDUnavailable, match="it burns"):
                    await aio.wrap_socket(raw, local.client(key_manager=manager), server_hostname="localhost")
                assert raw.fileno() == -1

        run(main())

    def test_observer_that_raises(self, local: Lab) -> None:
        """When keys have come, say: the handshake ends with it."""

        async def main() -> None:
            manager = Manager(local.manager("client"))
            client = local.client(key_manager=manager)

            def observe(step: Any) -> None:
                if manager.given:
                    raise ZeroDivisionError("observer")

            client.observer = observe
            with Server(local.server()) as server:
                with pytest.raises(ZeroDivisionError, match="observer"):
                    await aio.wrap_socket(server.tcp(), client, server_hostname="localhost")
                await manager.wiped()

        run(main())

    def test_slow_kms_and_timeout(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.may_answer.clear()
            with Server(local.server()) as server:
                async with heartbeat() as gaps:
                    with pytest.raises(TimeoutError, match=r"timed out after 0\.3 seconds"):
                        await aio.wrap_socket(
                            server.tcp(),
                            local.client(key_manager=manager),
                            server_hostname="localhost",
                            handshake_timeout=0.3,
                        )
                assert len(gaps) > 5
                manager.may_answer.set()
                await manager.wiped()

        run(main())

    def test_cancelled(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            manager.may_answer.clear()
            with Server(local.server()) as server:
                raw = server.tcp()
                wrapping = asyncio.create_task(
                    aio.wrap_socket(raw, local.client(key_manager=manager), server_hostname="localhost")
                )
                await waiting_for(manager.asked.is_set)
                wrapping.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await wrapping
                manager.may_answer.set()
                await manager.wiped()

        run(main())

    def test_silent_peer(self, local: Lab) -> None:
        async def main() -> None:
            with tcp_pair() as (near, _), pytest.raises(TimeoutError, match="timed out"):
                await aio.wrap_socket(
                    near, local.client(), server_hostname="localhost", handshake_timeout=0.05
                )

        run(main())


# --- the loop


class TestEventLoop:
    def test_asyncios_own_functions(self, local: Lab) -> None:
        """A program that knows nothing of qkd_tls but its context: the KMS is asked in other threads."""

        async def main() -> None:
            managers = {name: Manager(local.manager(name)) for name in ("client", "server")}
            server_context = local.server(key_manager=managers["server"])
            client_context = local.client(key_manager=managers["client"])

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(await reader.readline())
                await closed(writer)

            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context)
            for path in (Path.BOOTSTRAP, Path.ASSOCIATED):
                reader, writer = await asyncio.open_connection(
                    *server.sockets[0].getsockname(), ssl=client_context, server_hostname="localhost"
                )
                writer.write(b"line\n")
                assert await reader.readline() == b"line\n"
                assert writer.get_extra_info("ssl_object").qkd.path is path
                await closed(writer)
            server.close()
            for manager in managers.values():
                assert threading.get_ident() not in manager.threads

        run(main(), aio.EventLoop)

    def test_start_tls(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("client"))
            async with Echo(local.server()) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                await writer.start_tls(local.client(key_manager=manager), server_hostname="localhost")
                tls = await talk(reader, writer)
                assert tls.qkd is not None
            assert threading.get_ident() not in manager.threads

        run(main(), aio.EventLoop)

    def test_unix_sockets(self, local: Lab, tmp_path: FilePath) -> None:
        async def main() -> None:
            managers = {name: Manager(local.manager(name)) for name in ("client", "server")}
            path = str(tmp_path / "socket")

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(await reader.readline())
                await closed(writer)

            server = await asyncio.start_unix_server(
                serve, path, ssl=local.server(key_manager=managers["server"])
            )
            client = local.client(key_manager=managers["client"])
            for expected in (Path.BOOTSTRAP, Path.ASSOCIATED):
                reader, writer = await asyncio.open_unix_connection(
                    path, ssl=client, server_hostname="localhost"
                )
                writer.write(b"line\n")
                assert await reader.readline() == b"line\n"
                assert writer.get_extra_info("ssl_object").qkd.path is expected
                await closed(writer)
            with pytest.raises(ValueError, match="server_hostname"):
                await asyncio.open_unix_connection(path, ssl=client)
            server.close()
            for manager in managers.values():
                assert threading.get_ident() not in manager.threads

        run(main(), aio.EventLoop)

    def test_accepted_sockets(self, local: Lab) -> None:
        async def main() -> None:
            manager = Manager(local.manager("server"))
            loop = asyncio.get_running_loop()
            with socket.create_server(("127.0.0.1", 0)) as listening:
                listening.setblocking(False)
                connecting = asyncio.create_task(
                    aio.open_connection(
                        *listening.getsockname(), ssl=local.client(), server_hostname="localhost"
                    )
                )
                raw, _ = await loop.sock_accept(listening)
                transport, protocol = await loop.connect_accepted_socket(
                    Recorder, raw, ssl=local.server(key_manager=manager)
                )
                _, writer = await connecting
                await closed(writer)
                await protocol.lost
                assert protocol.events == ["made", "eof", "lost"]
                assert transport.is_closing()
            assert threading.get_ident() not in manager.threads

        run(main(), aio.EventLoop)

    def test_plain_and_stock_connections(self, local: Lab, tmp_path: FilePath) -> None:
        """Everything that has no QKDContext is asyncio's own."""

        async def main() -> None:
            loop = asyncio.get_running_loop()

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(await reader.readline())
                await closed(writer)

            async def check(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"line\n")
                assert await reader.readline() == b"line\n"
                await closed(writer)

            client, server = local.stock_client(), local.stock_server()
            tcp = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server)
            await check(
                *await asyncio.open_connection(
                    *tcp.sockets[0].getsockname(), ssl=client, server_hostname="localhost"
                )
            )
            reader, writer = await asyncio.open_connection(*tcp.sockets[0].getsockname())
            await writer.start_tls(client, server_hostname="localhost")
            await check(reader, writer)
            path = str(tmp_path / "socket")
            unix = await asyncio.start_unix_server(serve, path)
            await check(*await asyncio.open_unix_connection(path))
            for each in (tcp, unix):
                each.close()
            with tcp_pair() as (near, far):
                far.setblocking(False)
                transport, _ = await loop.connect_accepted_socket(Recorder, far.dup())
                transport.close()
                near.close()

        run(main(), aio.EventLoop)


# --- processes


def _connect_in_child(context: QKDContext, address: Any, result: Any) -> None:
    async def main() -> str:
        reader, writer = await aio.open_connection(*address, ssl=context, server_hostname="localhost")
        tls = await talk(reader, writer, b"from the child")
        assert tls.qkd is not None
        return str(tls.qkd.protection)

    result.put(asyncio.run(main()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use(lab: Lab) -> None:
    """Threads do not survive a fork: the child gets new ones."""
    with Server(lab.server()) as server:
        client = lab.client()

        async def main() -> None:
            await talk(*await aio.open_connection(*server.address, ssl=client, server_hostname="localhost"))

        run(main())
        assert aio._threads is not None
        fork = multiprocessing.get_context("fork")
        result = fork.Queue()
        child = fork.Process(target=_connect_in_child, args=(client, server.address, result))
        child.start()
        try:
            assert result.get(timeout=TIMEOUT) == "hybrid"
        finally:
            child.join(TIMEOUT)
            if child.is_alive():
                child.kill()
        assert child.exitcode == 0


def test_nothing_is_kept(local: Lab) -> None:
    """Connections that are over leave nothing behind."""

    def count() -> int:
        gc.collect()
        return sum(isinstance(one, QKDObject | aio._Handshake) for one in gc.get_objects())

    async def main() -> None:
        async with Echo(local.server()) as server:
            client = local.client()
            for _ in range(5):
                await talk(*await server.connect(client))
            server.seen.clear()

    run(main())
    before = count()
    run(main())
    # A thread of the pool holds its last call for a moment longer.
    wait_until(lambda: count() <= before, "the connections are freed")


def test_sync_peer_of_an_async_one(local: Lab) -> None:
    """Wire compatible, of course: a blocking client at an asyncio server."""

    async def main() -> None:
        async with Echo(local.server()) as server:

            def client() -> bytes:
                raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT)
                with local.client().wrap_socket(raw, server_hostname="localhost") as sock:
                    sock.sendall(b"hello")
                    return sock.recv(100)

            assert await asyncio.to_thread(client) == b"hello"

    run(main())
    with connected(local.client(), local.server()) as (near, _):
        assert near.qkd is not None
