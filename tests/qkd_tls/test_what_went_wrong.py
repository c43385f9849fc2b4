"""What has gone wrong in other TLS wrappers, over the blocking socket, the object over memory, and asyncio alike.

Each class is one line of that list. What a backend has no meaning for is skipped with the reason.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import OpenSSL.SSL
import pytest

from qkd_tls import Protection, QKDContext, QKDSocket, aio
from qkd_tls.endpoint import Endpoint, NotThroughTheStandardLibrary
from qkd_tls.sslobject import QKDObject
from tests.support.sockets import TIMEOUT, Lab, Proxy, connected, tcp_pair

# --- the three backends


class End:
    """One end of a connection, by whatever means."""

    tls: Any

    def sendall(self, data: Any) -> None:
        raise NotImplementedError

    def recv(self, size: int, timeout: float = TIMEOUT) -> bytes:
        """At least one byte, none at the end."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self.recv(size - len(data))
            if not chunk:
                break
            data += chunk
        return bytes(data)


class Link:
    """Both ends of one connection, and what the server sends held back on request."""

    client: End
    server: End

    def hold(self) -> None:
        raise NotImplementedError

    def held(self, at_least: int) -> bytearray:
        raise NotImplementedError

    def release(self, size: int) -> None:
        raise NotImplementedError

    def cut(self) -> None:
        """End the server's stream, whose bytes are held."""
        raise NotImplementedError


class ProxiedLink(Link):
    def __init__(self, proxy: Proxy, client: End, server: End) -> None:
        self.proxy, self.client, self.server = proxy, client, server

    def hold(self) -> None:
        self.proxy.hold("server")

    def held(self, at_least: int) -> bytearray:
        return self.proxy.held("server", at_least)

    def release(self, size: int) -> None:
        self.proxy.release("server", size)

    def cut(self) -> None:
        self.proxy.end("server")


class SocketEnd(End):
    def __init__(self, tls: QKDSocket) -> None:
        self.tls = tls

    def sendall(self, data: Any) -> None:
        self.tls.sendall(data)

    def recv(self, size: int, timeout: float = TIMEOUT) -> bytes:
        self.tls.settimeout(timeout)
        received: bytes = self.tls.recv(size)
        return received

    def close(self) -> None:
        self.tls.close()


@contextmanager
def over_sockets(client: QKDContext, server: QKDContext, **wrap: Any) -> Iterator[Link]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Proxy(listening.getsockname()) as proxy,
        ThreadPoolExecutor(1) as threads,
    ):

        def accept() -> QKDSocket:
            raw, _ = listening.accept()
            raw.settimeout(TIMEOUT)
            try:
                return server.wrap_socket(raw, server_side=True, **wrap)
            finally:
                raw.close()

        accepting = threads.submit(accept)
        try:
            near = proxy.connect(client, **wrap)
        except BaseException:
            with contextlib.suppress(OSError):
                accepting.result(TIMEOUT).close()
            raise
        with near, accepting.result(TIMEOUT) as far:
            yield ProxiedLink(proxy, SocketEnd(near), SocketEnd(far))


class ObjectEnd(End):
    def __init__(self, link: ObjectLink, context: QKDContext, **wrap: Any) -> None:
        self.link = link
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, **wrap)

    def sendall(self, data: Any) -> None:
        assert self.tls.write(data) == memoryview(data).nbytes

    def recv(self, size: int, timeout: float = TIMEOUT) -> bytes:
        while True:
            try:
                received: bytes = self.tls.read(size)
            except ssl.SSLWantReadError:
                if not self.link.pump():
                    raise
            else:
                return received

    def close(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()


class ObjectLink(Link):
    def __init__(self, client: QKDContext, server: QKDContext) -> None:
        self._held: bytearray | None = None
        self.client: ObjectEnd = ObjectEnd(self, client, server_hostname="localhost")
        self.server: ObjectEnd = ObjectEnd(self, server, server_side=True)

    def shake_hands(self) -> None:
        unfinished = [self.client, self.server]
        while unfinished:
            for end in list(unfinished):
                try:
                    end.tls.do_handshake()
                    unfinished.remove(end)
                except ssl.SSLWantReadError:
                    pass
                finally:
                    moved = self.pump()
            assert moved or not unfinished, "both wait for each other"

    def pump(self) -> bool:
        """Carry what there is to the other side."""
        up, down = self.client.outgoing.read(), self.server.outgoing.read()
        self.server.incoming.write(up)
        if self._held is None:
            self.client.incoming.write(down)
            return bool(up or down)
        self._held += down
        return bool(up)

    def hold(self) -> None:
        self._held = bytearray()

    def held(self, at_least: int) -> bytearray:
        self.pump()
        assert self._held is not None
        assert len(self._held) >= at_least
        return self._held

    def release(self, size: int) -> None:
        assert self._held is not None
        self.client.incoming.write(self._held[:size])
        del self._held[:size]

    def cut(self) -> None:
        self.client.incoming.write_eof()


@contextmanager
def over_memory(client: QKDContext, server: QKDContext) -> Iterator[Link]:
    link = ObjectLink(client, server)
    link.shake_hands()
    yield link


class StreamEnd(End):
    def __init__(
        self,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.run, self.reader, self.writer = run, reader, writer
        self.tls = writer.get_extra_info("ssl_object")

    def sendall(self, data: Any) -> None:
        async def send() -> None:
            self.writer.write(data)
            await self.writer.drain()

        self.run(send())

    def recv(self, size: int, timeout: float = TIMEOUT) -> bytes:
        received: bytes = self.run(asyncio.wait_for(self.reader.read(size), timeout))
        return received

    def close(self) -> None:
        async def close() -> None:
            self.writer.close()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()

        self.run(close())


@contextmanager
def over_asyncio(client: QKDContext, server: QKDContext) -> Iterator[Link]:
    accepted: queue.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = queue.Queue()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(TIMEOUT)

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put((reader, writer))

    listening = run(aio.start_server(on_connect, "127.0.0.1", 0, ssl=server))
    try:
        with Proxy(listening.sockets[0].getsockname()) as proxy:
            host, port = proxy.address
            near = StreamEnd(
                run, *run(aio.open_connection(host, port, ssl=client, server_hostname="localhost"))
            )
            far = StreamEnd(run, *accepted.get(timeout=TIMEOUT))
            yield ProxiedLink(proxy, near, far)
            for end in (near, far):
                end.close()
    finally:

        async def stop() -> None:
            listening.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        run(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT)
        loop.close()


Connect = Callable[..., contextlib.AbstractContextManager[Link]]

BACKENDS: dict[str, Connect] = {"socket": over_sockets, "object": over_memory, "asyncio": over_asyncio}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(backend: str) -> Connect:
    return BACKENDS[backend]


@pytest.fixture
def link(connect: Connect, local: Lab) -> Iterator[Link]:
    with connect(local.client(), local.server()) as link:
        assert link.client.tls.qkd.protection is Protection.HYBRID
        assert link.server.tls.qkd.protection is Protection.HYBRID
        yield link


def only(backend: str, meant: str, reason: str) -> None:
    if backend not in meant.split():
        pytest.skip(f"{backend}: {reason}")


def both_ways(link: Link, data: bytes = b"still well") -> None:
    for sender, receiver in ((link.client, link.server), (link.server, link.client)):
        sender.sendall(data)
        assert receiver.receive(len(data)) == data


# --- the lines


class TestMultiByteViews:
    """`sendall` of a multi-byte `memoryview` loses data."""

    def test_all_of_it_arrives(self, link: Link) -> None:
        numbers = array.array("Q", range(2_000))
        link.client.sendall(memoryview(numbers))
        assert link.server.receive(16_000) == numbers.tobytes()
        both_ways(link)


class TestTricklingRecords:
    """A record that trickles in must not recurse nor outlive the timeout."""

    def test_byte_by_byte(self, link: Link) -> None:
        link.hold()
        link.server.sendall(b"x" * 1000)
        size = len(link.held(1000))
        for _ in range(size - 1):
            link.release(1)
        with pytest.raises((TimeoutError, ssl.SSLWantReadError)):
            link.client.recv(1000, timeout=0.1)
        link.release(1)
        assert link.client.receive(1000) == b"x" * 1000


def by_default(_: QKDContext) -> None:
    """As create_default_context makes it."""


def name_turned_on_again(context: QKDContext) -> None:
    context.check_hostname = False
    context.check_hostname = True


def everything_off_and_the_name_on(context: QKDContext) -> None:
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Turns the check of the certificate on, too.
    context.check_hostname = True


def certificate_first(context: QKDContext) -> None:
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True


def optional(context: QKDContext) -> None:
    context.verify_mode = ssl.CERT_OPTIONAL


class TestHostNames:
    """A wrong host name must fail, whichever way verification was asked for."""

    @pytest.mark.parametrize(
        "ask",
        [by_default, name_turned_on_again, everything_off_and_the_name_on, certificate_first, optional],
    )
    def test_wrong_name(
        self,
        connect: Connect,
        local: Lab,
        ask: Callable[[QKDContext], None],
    ) -> None:
        client, server = local.client(), local.server()
        local.ca.issue("elsewhere", ["elsewhere.example"]).load_into(server)
        ask(client)
        with (
            pytest.raises(ssl.SSLCertVerificationError, match="certificate is not valid for 'localhost'"),
            connect(client, server),
        ):
            pass


class TestErrorClasses:
    """No raw pyOpenSSL error reaches a caller; not being able to go on and being too late have classes of their own."""

    def test_damaged_record(self, link: Link, backend: str) -> None:
        link.hold()
        link.server.sendall(b"data")
        kept = link.held(26)
        kept[-1] ^= 1
        link.release(len(kept))
        with pytest.raises(ssl.SSLError) as caught:
            link.client.recv(4)
        assert not isinstance(caught.value, OpenSSL.SSL.Error)
        assert "BAD_RECORD_MAC" in (caught.value.reason or "")
        assert caught.value.library == "SSL"

    def test_nothing_to_read(self, link: Link, backend: str) -> None:
        with pytest.raises(ssl.SSLWantReadError if backend == "object" else TimeoutError):
            link.client.recv(1, timeout=0.05)
        both_ways(link)

    def test_timeout_zero(self, link: Link, backend: str) -> None:
        only(backend, "socket", "has no timeouts of its own; asyncio's are tasks that are cancelled")
        sock = link.client.tls
        sock.settimeout(0)
        with pytest.raises(ssl.SSLWantReadError) as want_read:
            sock.recv(1)
        assert want_read.value.errno == ssl.SSL_ERROR_WANT_READ
        with pytest.raises(ssl.SSLWantWriteError) as want_write:
            sock.sendall(bytes(1 << 26))
        assert want_write.value.errno == ssl.SSL_ERROR_WANT_WRITE

    def test_damaged_handshake(self, connect: Connect, local: Lab, backend: str) -> None:
        only(backend, "object", "test_socket.py damages handshakes at many offsets; asyncio drives an object")
        for offset in range(0, 1500, 29):
            link = ObjectLink(local.client(), local.server())
            with pytest.raises(ssl.SSLWantReadError):
                link.client.tls.do_handshake()
            hello = bytearray(link.client.outgoing.read())
            hello[min(offset, len(hello) - 1)] ^= 0xFF
            link.server.incoming.write(hello)
            link.server.incoming.write_eof()
            with pytest.raises(ssl.SSLError) as caught:
                link.server.tls.do_handshake()
            assert not isinstance(caught.value, OpenSSL.SSL.Error)


class TestWants:
    """Reading can want a write and writing can want a read, in any phase."""

    def test_both_directions_full(self, link: Link, backend: str) -> None:
        data = os.urandom(1 << 20) * 2
        if backend == "object":
            # Memory is never full: one after the other will do.
            both_ways(link, data)
            return
        with ThreadPoolExecutor(4) as threads:
            sending = [threads.submit(end.sendall, data) for end in (link.client, link.server)]
            receiving = [threads.submit(end.receive, len(data)) for end in (link.client, link.server)]
            for done in sending:
                done.result(TIMEOUT)
            for received in receiving:
                assert received.result(TIMEOUT) == data

    def test_handshake_that_cannot_be_sent(self, local: Lab, backend: str) -> None:
        """The transport is full before the ClientHello."""
        only(backend, "socket asyncio", "memory is never full")
        context = local.client()
        with tcp_pair() as (near, far):
            near.setblocking(False)
            stuffed = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    stuffed += near.send(bytes(1 << 16))

            def serve() -> None:
                left = stuffed
                while left:
                    left -= len(far.recv(min(left, 1 << 20)))
                with local.server().wrap_socket(far, server_side=True) as sock:
                    sock.sendall(sock.recv(100))

            if backend == "socket":
                tls = context.wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False)
                with pytest.raises(ssl.SSLWantWriteError):
                    tls.do_handshake()
                tls.settimeout(TIMEOUT)
                thread = threading.Thread(target=serve)
                thread.start()
                tls.do_handshake()
            else:
                thread = threading.Thread(target=serve)

                async def shake_hands() -> QKDSocket:
                    asyncio.get_running_loop().call_later(0.05, thread.start)
                    return await aio.wrap_socket(near, context, server_hostname="localhost")

                tls = asyncio.run(shake_hands())
                tls.settimeout(TIMEOUT)
            with tls:
                tls.sendall(b"through")
                assert tls.recv(100) == b"through"
            thread.join(TIMEOUT)


class TestArguments:
    """`server_side`, `suppress_ragged_eofs`, `do_handshake_on_connect` mean what the standard library says."""

    def test_server_side(self, link: Link) -> None:
        assert link.client.tls.server_side is False
        assert link.server.tls.server_side is True
        assert link.client.tls.server_hostname == "localhost"
        assert link.server.tls.server_hostname is None

    def test_side_that_the_context_is_not_for(self, local: Lab, backend: str) -> None:
        def wrap(context: QKDContext, **side: Any) -> None:
            if backend == "socket":
                with tcp_pair() as (near, _):
                    context.wrap_socket(near, **side)
            elif backend == "object":
                context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), **side)
            else:

                async def upgrade() -> None:
                    with tcp_pair() as (near, _):
                        await aio.wrap_socket(near, context, **side)

                asyncio.run(upgrade())

        with pytest.raises(ssl.SSLError, match="Cannot create a server socket with a PROTOCOL_TLS_CLIENT"):
            wrap(local.client(), server_side=True)
        with pytest.raises(ssl.SSLError, match="Cannot create a client socket with a PROTOCOL_TLS_SERVER"):
            wrap(local.server(), server_hostname="localhost")
        with pytest.raises(ValueError, match="check_hostname requires server_hostname"):
            wrap(local.client())

    def test_do_handshake_on_connect(self, connect: Connect, local: Lab, backend: str) -> None:
        only(
            backend,
            "socket",
            "no such argument: an object waits for do_handshake, asyncio always shakes hands",
        )
        with over_sockets(local.client(), local.server(), do_handshake_on_connect=False) as link:
            for end in (link.client, link.server):
                assert end.tls.qkd is None
            with ThreadPoolExecutor(1) as threads:
                receiving = threads.submit(link.server.receive, 5)
                # Writing shakes hands first.
                link.client.sendall(b"hello")
                assert receiving.result(TIMEOUT) == b"hello"
            assert link.client.tls.qkd.key_id == link.server.tls.qkd.key_id


class TestClosing:
    """`shutdown(how)` honours `how`; `close()` sends close_notify; a truncation is no regular end."""

    def test_close_says_close_notify(self, link: Link, backend: str) -> None:
        link.server.sendall(b"bye")
        if backend == "socket":
            link.client.tls.suppress_ragged_eofs = False
        link.server.close()
        assert link.client.receive(10) == b"bye"
        assert link.client.recv(1) == b""

    def test_truncation(self, link: Link, backend: str) -> None:
        link.server.sendall(b"half a mess")
        assert link.client.receive(11) == b"half a mess"
        link.hold()
        link.cut()
        if backend == "asyncio":
            # As with the standard library: asyncio's TLS takes the end of the transport for the end of the stream.
            assert link.client.recv(1) == b""
            return
        if backend == "socket":
            assert link.client.recv(1) == b"", "suppress_ragged_eofs is the default"
            link.client.tls.suppress_ragged_eofs = False
        with pytest.raises(ssl.SSLEOFError, match="EOF occurred in violation of protocol"):
            link.client.recv(1)

    def test_shutdown(self, local: Lab, backend: str) -> None:
        only(backend, "socket", "has no shutdown(how)")
        with connected(local.client(), local.server(), suppress_ragged_eofs=False) as (client, server):
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            server.sendall(b"the other direction is open")
            assert SocketEnd(client).receive(27) == b"the other direction is open"

    def test_shutdown_wakes_a_reader(self, link: Link, backend: str) -> None:
        only(backend, "socket", "nobody blocks in it")
        started = threading.Event()

        def read() -> bytes:
            started.set()
            return link.client.recv(1)

        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(read)
            started.wait(TIMEOUT)
            link.client.tls.shutdown(socket.SHUT_RD)
            assert reading.result(TIMEOUT) == b""

    def test_unwrap(self, link: Link, backend: str) -> None:
        only(
            backend,
            "object",
            "test_socket.py has it for sockets; asyncio closes, and never goes on in the clear",
        )
        client, server = link.client.tls, link.server.tls
        with pytest.raises(ssl.SSLWantReadError):
            client.unwrap()
        assert link.server.recv(1) == b""
        server.unwrap()
        assert isinstance(link, ObjectLink)
        link.pump()
        client.unwrap()


class TestFiles:
    """`makefile` in every mode; closing the socket before or after its files."""

    @pytest.mark.parametrize("mode", ["rb", "wb", "rwb", "r", "w"])
    @pytest.mark.parametrize("socket_first", [True, False])
    def test_modes(self, link: Link, backend: str, mode: str, socket_first: bool) -> None:
        only(backend, "socket", "has no makefile; asyncio's streams are its own")
        file = link.client.tls.makefile(mode)
        if socket_first:
            link.client.close()
        if "w" in mode:
            file.write(b"line\n" if "b" in mode else "line\n")
            file.flush()
            assert link.server.receive(5) == b"line\n"
        if "r" in mode:
            link.server.sendall(b"answer\n")
            assert file.readline() in (b"answer\n", "answer\n")
        file.close()
        if socket_first:
            assert link.server.recv(1) == b""
        else:
            both_ways(link)


class TestPartialWrites:
    """Partial writes never raise "bad write retry"."""

    def test_much_more_than_fits(self, link: Link, backend: str) -> None:
        data = os.urandom(1 << 20) * 6
        if backend == "object":
            link.client.sendall(data)
            assert link.server.receive(len(data)) == data
            return
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(link.client.sendall, data)
            assert link.server.receive(len(data)) == data
            sending.result(TIMEOUT)

    def test_other_data_after_a_want(self, link: Link, backend: str) -> None:
        only(
            backend,
            "socket",
            "a write never wants: memory is not full, and asyncio keeps what it cannot send",
        )
        sock = link.client.tls
        sock.setblocking(False)
        sent = 0
        with contextlib.suppress(ssl.SSLWantWriteError):
            while True:
                sent += sock.send(b"a" * 30_000)
        assert link.server.receive(sent) == b"a" * sent
        sock.settimeout(TIMEOUT)
        # What OpenSSL had begun is sent first.
        with ThreadPoolExecutor(1) as threads:
            sending = threads.submit(sock.sendall, b"a" * 40_000)
            assert link.server.receive(40_000) == b"a" * 40_000
            sending.result(TIMEOUT)


class TestOneContext:
    """A context serves many connections, from many threads, and is read and changed as programs do in between."""

    def test_threads_that_change_it(self, connect: Connect, local: Lab) -> None:
        client, server = local.client(), local.server()

        def use(number: int) -> None:
            for _ in range(3):
                client.check_hostname = True
                client.verify_mode = ssl.CERT_REQUIRED
                client.load_verify_locations(local.ca.file)
                server.set_alpn_protocols([f"a{number}", "a0", "a1", "a2"])
                client.set_alpn_protocols(["a0", "a1", "a2"])
                assert client.get_ca_certs()
                with connect(client, server) as link:
                    both_ways(link, b"%d" % number)
                    assert link.client.tls.selected_alpn_protocol() in ("a0", "a1", "a2")

        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(use, number) for number in range(3)]:
                done.result(3 * TIMEOUT)


class TestPeerCertificate:
    """`getpeercert()` in the standard library's full dictionary, and binary."""

    def test_both_forms(self, link: Link, local: Lab) -> None:
        decode = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]
        assert link.client.tls.getpeercert() == decode(str(local.server_identity.cert_file))
        assert link.client.tls.getpeercert(True) == local.server_identity.der
        assert link.client.tls.getpeercert(binary_form=True) == local.server_identity.der
        assert link.server.tls.getpeercert() is None

    def test_of_a_client_too(self, connect: Connect, local: Lab) -> None:
        client = local.client()
        local.client_identity.load_into(client)
        with connect(client, local.server(mutual=True)) as link:
            assert link.server.tls.getpeercert(True) == local.client_identity.der
            assert dict(link.server.tls.getpeercert()["subjectAltName"]) == {"DNS": "client.example"}


class TestSizes:
    """`recv()` without a size, zero-length `recv_into`, reads over 2^31-1."""

    def test_reading(self, link: Link, backend: str) -> None:
        if backend == "asyncio":
            assert link.client.recv(0) == b""
            link.server.sendall(b"x" * 3000)
            # asyncio's streams have their own limit.
            assert link.client.recv(1 << 40)
            return
        tls = link.client.tls
        link.server.sendall(bytes(range(256)) * 200)
        assert link.client.recv(1) == b"\0"
        assert tls.read(0) == b""
        assert tls.read(0, bytearray()) == 0
        assert len(tls.read()) == 1024
        assert 1 <= len(tls.read(1 << 40)) <= 1 << 17
        buffer = bytearray(8)
        assert tls.read(1 << 40, buffer) == 8
        assert tls.read(3, memoryview(buffer)) == 3
        assert tls.read(0, buffer) == tls.read(-1, buffer) == 8
        with pytest.raises(ValueError, match="negative"):
            tls.read(-1)
        if backend == "socket":
            assert len(tls.recv()) == 1024
            assert tls.recv_into(bytearray(), 0) == tls.recv_into(bytearray()) == 0


class TestNoDelegation:
    """A method that was forgotten would put plaintext on the wire."""

    OURS: ClassVar[dict[str, tuple[type, type]]] = {
        "socket": (QKDSocket, ssl.SSLSocket),
        "object": (QKDObject, ssl.SSLObject),
        "asyncio": (QKDObject, ssl.SSLObject),
    }

    def test_every_method_is_ours(self, backend: str) -> None:
        ours, stock = self.OURS[backend]
        before = ours.__mro__[: ours.__mro__.index(stock)]
        assert Endpoint in before
        overridden = {name for one in before for name in vars(one)}
        public = {name for name in vars(stock) if not name.startswith("_")}
        # Names that newer Pythons add.
        public |= {"get_verified_chain", "get_unverified_chain", "sendmsg_afalg"} & set(dir(ours))
        assert public - overridden == set()
        assert not hasattr(ours, "__getattr__")

    def test_what_is_missed_fails(self, link: Link) -> None:
        """Nothing of the standard library's classes runs."""
        assert isinstance(link.client.tls._sslobj, NotThroughTheStandardLibrary)
        with pytest.raises(NotImplementedError, match="not the standard library's: write is not implemented"):
            link.client.tls._sslobj.write(b"plaintext")

    def test_methods_that_refuse(self, link: Link, backend: str) -> None:
        only(backend, "socket", "has no such methods")
        sock = link.client.tls
        calls: list[tuple[Any, ...]] = [
            (sock.sendto, b"x", ("127.0.0.1", 9)),
            (sock.sendmsg, [b"x"]),
            (sock.recvfrom, 1),
            (sock.recvmsg, 1),
        ]
        for method, *arguments in calls:
            with pytest.raises((ValueError, NotImplementedError), match="not allowed"):
                method(*arguments)
        flagged: list[tuple[Any, ...]] = [(sock.send, b"x"), (sock.sendall, b"x"), (sock.recv, 1)]
        for method, argument in flagged:
            with pytest.raises(ValueError, match="non-zero flags not allowed"):
                method(argument, 1)
        both_ways(link)


class TestThreads:
    """One SSL object, one thread at a time: lock around each call, release while waiting."""

    def test_reading_writing_and_asking(self, link: Link, backend: str) -> None:
        only(backend, "socket object", "its transports belong to one thread, the loop's, as all of asyncio's")
        data = os.urandom(1 << 20)
        stop = threading.Event()
        tls = link.client.tls

        def ask() -> None:
            while not stop.is_set():
                for question in (tls.pending, tls.cipher, tls.version, tls.get_channel_binding):
                    question()

        with ThreadPoolExecutor(4) as threads:
            try:
                asking = threads.submit(ask)
                if backend == "object":
                    # The caller's own memory is not ours to lock: each thread works on one direction.
                    link.server.sendall(data)
                    assert isinstance(link, ObjectLink)
                    link.pump()
                    receiving = threads.submit(link.client.receive, len(data))
                    for start in range(0, len(data), 1000):
                        tls.write(data[start : start + 1000])
                    assert receiving.result(TIMEOUT) == data
                    assert link.server.receive(len(data)) == data
                else:
                    calls = [threads.submit(end.sendall, data) for end in (link.client, link.server)]
                    receiving = threads.submit(link.client.receive, len(data))
                    assert link.server.receive(len(data)) == data
                    assert receiving.result(TIMEOUT) == data
                    for call in calls:
                        call.result(TIMEOUT)
            finally:
                stop.set()
            asking.result(TIMEOUT)
