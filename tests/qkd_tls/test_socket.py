"""`QKDSocket` behaves as the standard library's `ssl.SSLSocket`, where other wrappers have gone wrong."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import OpenSSL.SSL
import pytest

from qkd_tls import Protection, QKDContext, QKDSocket
from tests.support.sockets import TIMEOUT, Lab, Proxy, Server, connected, echo, talk, tcp_pair


@pytest.fixture
def pair(local: Lab) -> Iterator[tuple[QKDSocket, QKDSocket]]:
    """Both ends of a hybrid connection."""
    with connected(local.client(), local.server()) as (client, server):
        assert client.qkd is not None
        assert client.qkd.protection is Protection.HYBRID
        yield client, server


class Background:
    """A call in a thread of its own; `result()` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:  # noqa: BLE001 - raised in result()
            self._error = error

    def result(self) -> Any:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._outcome


def receive(sock: QKDSocket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(1 << 16)
        if not chunk:
            break
        data += chunk
    return bytes(data)


# --- the interface


class TestInterface:
    NO_DATA = frozenset(
        [
            "bind",
            "close",
            "detach",
            "family",
            "fileno",
            "getpeername",
            "getsockname",
            "getsockopt",
            "get_inheritable",
            "ioctl",
            "listen",
            "proto",
            "set_inheritable",
            "setsockopt",
            "type",
        ]
    )
    """What is inherited from `socket.socket`: it moves no data."""

    MADE_OF_OVERRIDDEN = frozenset(["makefile"])
    """Inherited too; calls recv_into and send."""

    def test_no_method_of_a_plain_socket_shines_through(self) -> None:
        """A method that was forgotten would put plaintext on the wire."""
        plain = {name for name in dir(socket.socket) if not name.startswith("_")}
        assert plain - set(vars(QKDSocket)) - self.NO_DATA == self.MADE_OF_OVERRIDDEN

    def test_all_methods_of_an_ssl_socket_are_there(self) -> None:
        public = {name for name in vars(ssl.SSLSocket) if not name.startswith("_")}
        before = QKDSocket.__mro__[: QKDSocket.__mro__.index(ssl.SSLSocket)]
        assert public - {name for one in before for name in vars(one)} == set()
        assert not hasattr(QKDSocket, "__getattr__")

    def test_plaintext_methods_refuse(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        calls: list[Callable[[], object]] = [
            lambda: client.sendto(b"x", ("127.0.0.1", 9)),
            lambda: client.sendmsg([b"x"]),
            lambda: client.recvfrom(1),
            lambda: client.recvfrom_into(bytearray(1)),
            lambda: client.recvmsg(1),
            lambda: client.recvmsg_into([bytearray(1)]),
            lambda: client.sendmsg_afalg([b"x"]),
        ]
        for call in calls:
            with pytest.raises(
                (ValueError, NotImplementedError), match="not allowed on instances of QKDSocket"
            ):
                call()
        with pytest.raises(NotImplementedError, match="dup"):
            client.dup()
        talk_between(pair)

    def test_flags_are_refused(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        calls: list[Callable[[], object]] = [
            lambda: client.send(b"x", socket.MSG_OOB),
            lambda: client.sendall(b"x", socket.MSG_OOB),
            lambda: client.recv(1, socket.MSG_PEEK),
            lambda: client.recv_into(bytearray(1), 1, socket.MSG_PEEK),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="non-zero flags not allowed"):
                call()
        talk_between(pair)

    def test_no_public_constructor(self) -> None:
        with pytest.raises(TypeError, match=r"QKDContext\.wrap_socket"):
            QKDSocket()

    def test_what_the_connection_is(self, local: Lab, pair: tuple[QKDSocket, QKDSocket]) -> None:
        for sock, server_side in zip(pair, (False, True), strict=True):
            assert sock.server_side is server_side
            assert sock.server_hostname == (None if server_side else "localhost")
            assert sock.version() == "TLSv1.3"
            for nothing in ("compression", "selected_npn_protocol"):
                assert getattr(sock, nothing)() is None
            assert sock.session is None
            assert sock.session_reused is False
            assert isinstance(sock.context, QKDContext)
            assert isinstance(sock, socket.socket)
        assert pair[0].get_channel_binding() == pair[1].get_channel_binding()
        assert len(pair[0].get_channel_binding() or b"") == 32
        with pytest.raises(ValueError, match="tls-unique channel binding type not implemented"):
            pair[0].get_channel_binding("tls-unique")
        with pytest.raises(ssl.SSLError, match="extension not received"):
            pair[1].verify_client_post_handshake()

    def test_before_the_handshake(self, local: Lab) -> None:
        with tcp_pair() as (near, _):
            context = local.client()
            with context.wrap_socket(
                near, server_hostname="localhost", do_handshake_on_connect=False
            ) as client:
                assert client.qkd is None
                assert client.version() is None
                assert client.cipher() is None
                assert client.selected_alpn_protocol() is None
                assert client.get_channel_binding() is None
                assert client.pending() == 0
                with pytest.raises(ValueError, match="handshake not done yet"):
                    client.getpeercert()


def talk_between(pair: tuple[QKDSocket, QKDSocket], data: bytes = b"still well") -> None:
    for sender, receiver in (pair, pair[::-1]):
        sender.sendall(data)
        assert receive(receiver, len(data)) == data


class TestWrapping:
    def test_takes_the_socket_over(self, local: Lab) -> None:
        with tcp_pair() as (near, _):
            fileno = near.fileno()
            near.settimeout(7.5)
            with local.client().wrap_socket(
                near, server_hostname="localhost", do_handshake_on_connect=False
            ) as client:
                assert near.fileno() == -1
                assert client.fileno() == fileno
                assert client.gettimeout() == client.timeout == 7.5
                assert (client.family, client.type, client.proto) == (near.family, near.type, near.proto)

    def test_arguments_that_do_not_fit_leave_the_socket_alone(self, local: Lab) -> None:
        client, server = local.client(), local.server()
        calls: list[tuple[type[Exception], str, Callable[[socket.socket], object]]] = [
            (ValueError, "check_hostname requires server_hostname", client.wrap_socket),
            (
                ValueError,
                "server_hostname can only be specified in client mode",
                lambda sock: server.wrap_socket(sock, server_side=True, server_hostname="localhost"),
            ),
            (
                ssl.SSLError,
                "Cannot create a server socket with a PROTOCOL_TLS_CLIENT context",
                lambda sock: client.wrap_socket(sock, server_side=True),
            ),
            (
                ssl.SSLError,
                "Cannot create a client socket with a PROTOCOL_TLS_SERVER context",
                lambda sock: server.wrap_socket(sock, server_hostname="localhost"),
            ),
            (
                ValueError,
                "check_hostname requires server_hostname",
                lambda sock: client.wrap_socket(sock, server_hostname=""),
            ),
            (
                ValueError,
                "empty string or start with a leading dot",
                lambda sock: client.wrap_socket(sock, server_hostname=b".example"),
            ),
            (
                ValueError,
                "session must be None",
                lambda sock: client.wrap_socket(sock, server_hostname="localhost", session=object()),  # type: ignore[arg-type]
            ),
        ]
        with tcp_pair() as (near, far):
            for error, text, call in calls:
                with pytest.raises(error, match=text):
                    call(near)
            near.sendall(b"as before")
            assert far.recv(100) == b"as before"

    def test_datagram_sockets_are_refused(self, local: Lab) -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
            pytest.raises(NotImplementedError, match="only stream sockets"),
        ):
            local.client().wrap_socket(datagrams, server_hostname="localhost")

    def test_a_failed_handshake_closes_the_socket(self, local: Lab) -> None:
        with tcp_pair() as (near, far):
            far.sendall(b"this is not TLS at all")
            with pytest.raises(ssl.SSLError):
                local.client().wrap_socket(near, server_hostname="localhost")
            assert near.fileno() == -1
            with contextlib.suppress(ConnectionResetError):
                while far.recv(1 << 16):
                    pass

    def test_non_blocking_needs_do_handshake_on_connect_off(self, local: Lab) -> None:
        with tcp_pair() as (near, _):
            near.setblocking(False)
            with pytest.raises(ValueError, match="do_handshake_on_connect should not be specified"):
                local.client().wrap_socket(near, server_hostname="localhost")


# --- connecting and accepting


class TestConnect:
    def test_connect_shakes_hands(self, local: Lab) -> None:
        with (
            Server(local.server()) as server,
            local.client().wrap_socket(socket.socket(), server_hostname="localhost") as client,
        ):
            client.settimeout(TIMEOUT)
            client.connect(server.address)
            assert client.qkd is not None
            talk(client)
            with pytest.raises(ValueError, match="already-connected"):
                client.connect(server.address)

    def test_connect_without_handshake(self, local: Lab) -> None:
        context = local.client()
        with (
            Server(local.server()) as server,
            context.wrap_socket(
                socket.socket(), server_hostname="localhost", do_handshake_on_connect=False
            ) as client,
        ):
            client.connect(server.address)
            assert client.qkd is None
            client.do_handshake()
            assert client.qkd is not None
            talk(client)

    def test_connect_ex(self, local: Lab) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = closed.getsockname()
        with local.client().wrap_socket(socket.socket(), server_hostname="localhost") as client:
            assert client.connect_ex(address) == errno.ECONNREFUSED
        with (
            Server(local.server()) as server,
            local.client().wrap_socket(socket.socket(), server_hostname="localhost") as client,
        ):
            assert client.connect_ex(server.address) == 0
            talk(client)

    def test_connect_ex_raises_what_is_not_a_matter_of_connecting(self, local: Lab) -> None:
        with (
            local.client().wrap_socket(socket.socket(), server_hostname="localhost") as client,
            # An IPv4 socket, so this needs no name server.
            pytest.raises(socket.gaierror),
        ):
            client.connect_ex(("::1", 443))
        with (
            Server(local.server()) as server,
            local.client().wrap_socket(socket.socket(), server_hostname="elsewhere.example") as client,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            client.connect_ex(server.address)

    def test_non_blocking_connect(self, local: Lab) -> None:
        """As event loops do it: connect_ex, wait until writable, do_handshake."""
        context = local.client()
        with (
            Server(local.server()) as server,
            context.wrap_socket(
                socket.socket(), server_hostname="localhost", do_handshake_on_connect=False
            ) as client,
        ):
            client.setblocking(False)
            assert client.connect_ex(server.address) in (0, errno.EINPROGRESS)
            select.select([], [client], [], TIMEOUT)
            drive(client.do_handshake, client)
            client.settimeout(TIMEOUT)
            talk(client)

    def test_not_connected(self, local: Lab) -> None:
        with local.client().wrap_socket(socket.socket(), server_hostname="localhost") as client:
            for call in (client.do_handshake, lambda: client.send(b"x"), lambda: client.recv(1)):
                with pytest.raises(OSError, match="not connected") as caught:
                    call()
                assert caught.value.errno == errno.ENOTCONN

    def test_server_side_cannot_connect(self, local: Lab) -> None:
        with (
            local.server().wrap_socket(socket.socket(), server_side=True) as server,
            pytest.raises(ValueError, match="can't connect in server-side mode"),
        ):
            server.connect(("127.0.0.1", 9))


class TestAccept:
    @pytest.mark.parametrize("do_handshake_on_connect", [True, False])
    def test_listening_socket(self, local: Lab, do_handshake_on_connect: bool) -> None:
        """As http.server and its relatives use it."""
        listening = local.server().wrap_socket(
            socket.create_server(("127.0.0.1", 0)),
            server_side=True,
            do_handshake_on_connect=do_handshake_on_connect,
            suppress_ragged_eofs=False,
        )
        with listening:

            def connect() -> QKDSocket:
                raw = socket.create_connection(listening.getsockname())
                return local.client().wrap_socket(raw, server_hostname="localhost")

            connecting = Background(connect)
            accepted, address = listening.accept()
            with accepted:
                assert isinstance(accepted, QKDSocket)
                assert accepted.server_side
                assert accepted.suppress_ragged_eofs is False
                assert (accepted.qkd is not None) == do_handshake_on_connect
                if not do_handshake_on_connect:
                    accepted.do_handshake()
                with connecting.result() as client:
                    assert client.getsockname() == address
                    talk_between((client, accepted))

    def test_goes_on_after_a_bad_client(self, local: Lab) -> None:
        listening = local.server().wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        with listening:
            with socket.create_connection(listening.getsockname()) as bad:
                bad.sendall(b"GET / HTTP/1.1\r\n\r\n")
                with pytest.raises(ssl.SSLError, match="http request"):
                    listening.accept()
            raw = socket.create_connection(listening.getsockname())
            connecting = Background(lambda: local.client().wrap_socket(raw, server_hostname="localhost"))
            accepted, _ = listening.accept()
            with accepted, connecting.result() as client:
                talk_between((client, accepted))

    def test_timeout_of_the_listening_socket(self, local: Lab) -> None:
        listening = local.server().wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        with listening:
            listening.settimeout(0.05)
            with pytest.raises(TimeoutError):
                listening.accept()


# --- the handshake


class TestHandshake:
    @pytest.mark.parametrize("first", ["read", "write"])
    def test_the_first_read_or_write_shakes_hands(self, local: Lab, first: str) -> None:
        context = local.client()
        with (
            Server(local.server(), handler=lambda sock: sock.sendall(b"welcome")) as server,
            server.connect(context, do_handshake_on_connect=False) as client,
        ):
            assert client.qkd is None
            if first == "write":
                client.sendall(b"hello")
            assert receive(client, 7) == b"welcome"
            assert client.qkd is not None

    def test_server_side_too(self, local: Lab) -> None:
        with (
            Server(local.server(), do_handshake_on_connect=False) as server,
            server.connect(local.client()) as client,
        ):
            talk(client)

    def test_second_handshake_does_nothing(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        for sock in pair:
            sock.do_handshake()
        talk_between(pair)

    def test_non_blocking_driven_by_select(self, local: Lab) -> None:
        """Both ends in one thread, so neither may ever wait by itself."""
        with tcp_pair() as (near, far):
            for sock in (near, far):
                sock.setblocking(False)
            client = local.client().wrap_socket(
                near, server_hostname="localhost", do_handshake_on_connect=False
            )
            server = local.server().wrap_socket(far, server_side=True, do_handshake_on_connect=False)
            with client, server:
                unfinished = {client, server}
                deadline = time.monotonic() + TIMEOUT
                while unfinished:
                    assert time.monotonic() < deadline
                    for sock in list(unfinished):
                        try:
                            sock.do_handshake()
                        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                            pass
                        else:
                            unfinished.remove(sock)
                    select.select([client, server], [], [], 0.05)
                for one, other in ((client, server), (server, client)):
                    with pytest.raises(ssl.SSLWantReadError):
                        one.recv(10)
                    assert other.send(b"data") == 4
                    select.select([one], [], [], TIMEOUT)
                    assert one.recv(10) == b"data"

    def test_block_argument(self, local: Lab) -> None:
        """`do_handshake(True)` waits on a non-blocking socket too, and leaves it non-blocking."""
        with Server(local.server()) as server:
            raw = server.tcp()
            raw.setblocking(False)
            with local.client().wrap_socket(
                raw, server_hostname="localhost", do_handshake_on_connect=False
            ) as client:
                client.do_handshake(True)
                assert client.gettimeout() == 0.0
                client.setblocking(True)
                talk(client)

    def test_two_threads_start_at_once(self, local: Lab) -> None:
        """One reads and one writes on a connection whose handshake is still to be done."""
        for _ in range(10):
            with (
                Server(local.server()) as server,
                server.connect(local.client(), do_handshake_on_connect=False) as client,
            ):
                barrier = threading.Barrier(2)
                sock = client

                def read(sock: QKDSocket = sock, barrier: threading.Barrier = barrier) -> bytes:
                    barrier.wait(TIMEOUT)
                    return receive(sock, 5)

                reading = Background(read)
                barrier.wait(TIMEOUT)
                client.sendall(b"hello")
                assert reading.result() == b"hello"

    def test_timeout_ends_it(self, local: Lab) -> None:
        """However the bytes trickle in: there is one deadline."""
        with Server(local.server()) as server, Proxy(server.address) as proxy:
            proxy.hold("server")
            raw = socket.create_connection(proxy.address, timeout=0.3)
            start = time.monotonic()
            stop = threading.Event()

            def trickle() -> None:
                while not stop.wait(0.02):
                    proxy.release("server", 1)

            trickling = Background(trickle)
            # If each byte put the deadline off, the handshake would go through.
            with pytest.raises(TimeoutError, match="The handshake operation timed out"):
                local.client().wrap_socket(raw, server_hostname="localhost")
            assert time.monotonic() - start >= 0.3
            stop.set()
            trickling.result()

    def test_data_in_the_flight_of_finished(self, local: Lab) -> None:
        """What comes together with the client's Finished stays in the socket, and the end of the stream behind it."""
        context = local.client(policy="off")
        received: list[bytes] = []

        def handler(sock: QKDSocket) -> None:
            received.append(b"%d" % sock.pending())
            select.select([sock], [], [])
            received.append(sock.recv(3))
            received.append(receive(sock, 100))

        with (
            Server(local.server(policy="off"), handler, suppress_ragged_eofs=False) as server,
            Proxy(server.address) as proxy,
            proxy.connect(context, do_handshake_on_connect=False) as client,
        ):
            proxy.hold("client")
            shaking_hands = Background(client.do_handshake)
            proxy.release("client", len(proxy.held("client", 1000)))
            shaking_hands.result()
            client.sendall(b"early data")
            closing = Background(client.unwrap)
            # ChangeCipherSpec, Finished, the data, close_notify: all in one piece.
            proxy.release("client", 6 + (5 + 69) + (5 + 27) + (5 + 19))
            closing.result().close()
        assert received == [b"0", b"ear", b"ly data"]

    @pytest.mark.parametrize("cut", [1, 4, 5, 6, 31, 32, 35, 63])
    def test_flight_of_finished_cut_in_the_data_behind_it(self, local: Lab, cut: int) -> None:
        """Half a record is in memory when OpenSSL takes over the socket, where the other half will come."""

        def handler(sock: QKDSocket) -> None:
            # The server's side of the handshake is over: now the rest may come.
            proxy.release("client", 2 * (5 + 27) - cut)
            echo(sock)

        with (
            Server(local.server(policy="off"), handler) as server,
            Proxy(server.address) as proxy,
            proxy.connect(local.client(policy="off"), do_handshake_on_connect=False) as client,
        ):
            proxy.hold("client")
            shaking_hands = Background(client.do_handshake)
            proxy.release("client", len(proxy.held("client", 1000)))
            shaking_hands.result()
            for _ in range(2):
                client.sendall(b"early data")
            proxy.release("client", 6 + (5 + 69) + cut)
            assert receive(client, 20) == b"early data" * 2

    def test_error_is_raised_again_on_a_later_use(self, local: Lab) -> None:
        """A connection whose handshake has failed never carries data."""
        with Server(local.server()) as server:
            raw = server.tcp()
            with local.client().wrap_socket(
                raw, server_hostname="elsewhere.example", do_handshake_on_connect=False
            ) as client:
                for call in (client.do_handshake, lambda: client.send(b"secret"), lambda: client.recv(1)):
                    with pytest.raises(ssl.SSLCertVerificationError):
                        call()
                assert client.qkd is None


def drive(call: Callable[[], Any], sock: QKDSocket) -> Any:
    """Repeat a call on a non-blocking socket until it goes through."""
    while True:
        try:
            return call()
        except ssl.SSLWantReadError:
            assert select.select([sock], [], [], TIMEOUT)[0]
        except ssl.SSLWantWriteError:
            assert select.select([], [sock], [], TIMEOUT)[1]


# --- reading


class TestReading:
    def test_sizes(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        server.sendall(bytes(range(256)) * 100)
        assert client.recv(1) == b"\0"
        assert client.recv(0) == b""
        assert client.recv_into(bytearray(), 0) == 0
        assert client.recv_into(bytearray()) == 0
        assert len(client.recv()) <= 1024
        assert len(bytes(client.read())) <= 1024
        assert 1 <= len(client.recv(1 << 31)) <= 1 << 14
        with pytest.raises(ValueError, match="negative buffersize"):
            client.recv(-1)
        with pytest.raises(ValueError, match="negative buffersize"):
            client.recv_into(bytearray(1), -1)

    def test_into_buffers(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        server.sendall(b"abcdefghijklmnopqrstuvwx")
        buffer = bytearray(8)
        assert client.recv_into(buffer, 3) == 3
        assert buffer == b"abc\0\0\0\0\0"
        # 0 bytes means as many as there is room for, as in the standard library.
        assert client.recv_into(buffer, 0) == 8
        assert buffer == b"defghijk"
        assert client.read(2, buffer) == 2
        assert bytes(buffer) == b"lmfghijk"
        numbers = array.array("I", [0, 0])
        assert client.recv_into(numbers) == 8
        assert numbers.tobytes() == b"nopqrstu"
        view = memoryview(bytearray(10))
        assert client.recv_into(view[4:6]) == 2
        assert bytes(view) == b"\0\0\0\0vw\0\0\0\0"
        with pytest.raises((TypeError, BufferError, ValueError)):
            client.recv_into(b"read only")
        assert client.recv(10) == b"x"

    def test_pending(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        server.sendall(b"0123456789")
        assert client.recv(4) == b"0123"
        assert client.pending() == 6
        assert client.recv(10) == b"456789"
        assert client.pending() == 0

    def test_record_that_trickles_in(self, local: Lab) -> None:
        """One deadline for a read, however many bytes arrive meanwhile; and nothing is lost by it."""
        with (
            Server(local.server()) as server,
            Proxy(server.address) as proxy,
            proxy.connect(local.client()) as client,
        ):
            talk(client)
            proxy.hold("server")
            client.sendall(b"x" * 1000)
            proxy.held("server", 1000)
            client.settimeout(0.3)
            stop = threading.Event()

            def trickle() -> None:
                while not stop.wait(0.01):
                    proxy.release("server", 1)

            trickling = Background(trickle)
            start = time.monotonic()
            # If each byte put the deadline off, the whole record would come.
            with pytest.raises(TimeoutError, match="The read operation timed out"):
                client.recv(1000)
            assert time.monotonic() - start >= 0.3
            stop.set()
            trickling.result()
            client.settimeout(TIMEOUT)
            proxy.release("server", len(proxy.held("server", 1)))
            assert receive(client, 1000) == b"x" * 1000

    def test_timeout(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        client.settimeout(0.1)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="The read operation timed out"):
            client.recv(1)
        assert time.monotonic() - start >= 0.1
        server.sendall(b"later")
        assert client.recv(5) == b"later"

    def test_several_records_in_one_segment(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        for number in range(50):
            server.sendall(b"%02d" % number)
        assert receive(client, 100) == b"".join(b"%02d" % number for number in range(50))


# --- writing


class TestWriting:
    def test_multi_byte_memoryview(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """The length of such a view is not that of its bytes."""
        client, server = pair
        numbers = array.array("Q", range(20_000))
        sending = Background(lambda: client.sendall(memoryview(numbers)))
        assert receive(server, len(numbers) * 8) == numbers.tobytes()
        sending.result()
        assert client.send(memoryview(numbers)[:2]) == 16
        assert receive(server, 16) == numbers[:2].tobytes()

    @pytest.mark.parametrize(
        "data", [b"bytes", bytearray(b"bytearray"), memoryview(b"view"), array.array("B", b"a")]
    )
    def test_any_buffer(self, pair: tuple[QKDSocket, QKDSocket], data: Any) -> None:
        client, server = pair
        client.sendall(data)
        assert client.write(data) == client.send(data) == len(bytes(data))
        assert receive(server, 3 * len(bytes(data))) == bytes(data) * 3

    def test_nothing(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        assert client.send(b"") == 0
        client.sendall(b"")
        talk_between(pair)

    def test_text_is_refused(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        with pytest.raises(TypeError):
            pair[0].sendall("text")
        talk_between(pair)

    def test_megabytes(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        data = os.urandom(1 << 20) * 4
        sending = Background(lambda: client.sendall(data))
        assert receive(server, len(data)) == data
        sending.result()

    def test_partial_writes(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """Non-blocking: a write that has to be tried again may come in another buffer, and a longer one."""
        client, server = pair
        client.setblocking(False)
        data = os.urandom(1 << 20) * 8
        sent = 0
        wants = 0
        received = bytearray()
        server.settimeout(0.0)
        size = 20_000
        while sent < len(data):
            try:
                sent += client.send(bytearray(data[sent : sent + size]))
            except ssl.SSLWantWriteError:
                wants += 1
                size += 1
                with contextlib.suppress(ssl.SSLWantReadError):
                    while True:
                        received += server.recv(1 << 16)
        server.settimeout(TIMEOUT)
        received += receive(server, len(data) - len(received))
        assert bytes(received) == data
        assert wants

    def test_timeout(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """`sendall` has one timeout for everything, and closing afterwards does not wait."""
        client, _ = pair
        client.settimeout(0.2)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="The write operation timed out"):
            client.sendall(bytes(1 << 26))
        assert time.monotonic() - start >= 0.2
        # If closing waited for the peer to read, it would wait for ever.
        client.settimeout(None)
        Background(client.close).result()

    def test_sendfile(self, pair: tuple[QKDSocket, QKDSocket], tmp_path: Path) -> None:
        """Through TLS, not past it."""
        client, server = pair
        path = tmp_path / "file"
        path.write_bytes(os.urandom(300_000))
        with path.open("rb") as file:
            sending = Background(lambda: client.sendfile(file, offset=1000))
            assert receive(server, 299_000) == path.read_bytes()[1000:]
            assert sending.result() == 299_000


class TestThreads:
    def test_reading_while_writing(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """Both directions at once at both ends, four threads, much more than fits the buffers."""
        data = {sock: os.urandom(1 << 20) * 4 for sock in pair}
        client, server = pair
        size = len(data[client])
        calls = [
            Background(lambda: client.sendall(data[client])),
            Background(lambda: server.sendall(data[server])),
            Background(lambda: receive(client, size)),
            Background(lambda: receive(server, size)),
        ]
        results = [call.result() for call in calls]
        assert results[2:] == [data[server], data[client]]

    @pytest.mark.parametrize("timeout", [None, TIMEOUT])
    def test_two_writers(self, pair: tuple[QKDSocket, QKDSocket], timeout: float | None) -> None:
        """Their data may mix in between calls, but no byte is lost or doubled."""
        client, server = pair
        client.settimeout(timeout)
        size = 3_000_000
        writers = [
            Background(lambda letter=letter: client.sendall(letter * size))  # type: ignore[misc]
            for letter in (b"a", b"b", b"c")
        ]
        data = receive(server, 3 * size)
        for writer in writers:
            writer.result()
        assert {letter: data.count(letter) for letter in (b"a", b"b", b"c")} == {
            b"a": size,
            b"b": size,
            b"c": size,
        }

    def test_close_while_another_thread_sends(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """The sender gets an OSError, no crash."""
        client, server = pair
        client.settimeout(2)
        started = threading.Event()

        def send() -> None:
            with contextlib.suppress(OSError, ValueError):
                while True:
                    started.set()
                    client.sendall(bytes(1 << 16))

        sending = Background(send)
        started.wait(TIMEOUT)
        server.recv(1)
        client.close()
        sending.result()


# --- closing


class TestClosing:
    def test_close_says_close_notify(self, local: Lab) -> None:
        with connected(local.client(), local.server(), suppress_ragged_eofs=False) as (client, server):
            client.sendall(b"bye")
            client.close()
            assert receive(server, 10) == b"bye"
            assert server.recv(1) == b""
            assert server.recv(1) == b""

    def test_client_that_only_writes(self, local: Lab) -> None:
        """It closes with tickets unread, or not even arrived; the server gets everything all the same."""
        client, received = local.client(), []

        def handler(sock: QKDSocket) -> None:
            received.append(receive(sock, 100))

        with Server(local.server(), handler, suppress_ragged_eofs=False) as server:
            for _ in range(50):
                with server.connect(client) as sock:
                    sock.sendall(b"last words")
            for _ in range(50):
                assert server.seen().error is None
        assert received == [b"last words"] * 50

    @pytest.mark.parametrize("suppress", [True, False])
    def test_truncation(self, local: Lab, suppress: bool) -> None:
        """A stream that ends without close_notify may have been cut off by anybody."""
        with connected(local.client(), local.server(), suppress_ragged_eofs=suppress) as (client, server):
            server.sendall(b"half a mess")
            os.close(server.detach())
            assert receive(client, 11) == b"half a mess"
            # Programs ask again, and the answer stays the same.
            for _ in range(3):
                if suppress:
                    assert client.recv(1) == b""
                else:
                    with pytest.raises(ssl.SSLEOFError, match="EOF occurred in violation of protocol"):
                        client.recv(1)
            with pytest.raises(ssl.SSLEOFError):
                client.send(b"x")

    def test_reset(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        os.close(server.detach())
        with pytest.raises(ConnectionResetError):
            client.recv(1)

    def test_write_to_a_peer_that_is_gone(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        os.close(server.detach())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.sendall(bytes(1 << 24))

    def test_shutdown_write(self, local: Lab) -> None:
        """The other direction stays open."""
        with connected(local.client(), local.server(), suppress_ragged_eofs=False) as (client, server):
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            server.sendall(b"one more thing")
            assert receive(client, 14) == b"one more thing"
            with pytest.raises(OSError, match=r"shutdown|Broken pipe"):
                client.send(b"x")

    def test_shutdown_read_wakes_a_blocked_reader(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        started = threading.Event()

        def read() -> bytes:
            started.set()
            return client.recv(1)

        reading = Background(read)
        started.wait(TIMEOUT)
        client.shutdown(socket.SHUT_RD)
        assert reading.result() == b""

    def test_shutdown_both(self, local: Lab) -> None:
        with connected(local.client(), local.server(), suppress_ragged_eofs=False) as (client, server):
            client.shutdown(socket.SHUT_RDWR)
            assert server.recv(1) == b""

    def test_unwrap(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """TLS ends, TCP goes on: what ftplib does."""
        client, server = pair
        client.sendall(b"last words")
        unwrapping = Background(client.unwrap)
        assert receive(server, 10) == b"last words"
        assert server.unwrap() is server
        assert unwrapping.result() is client
        assert client.gettimeout() == TIMEOUT
        # In the clear, by each method.
        client.sendall(b"in the clear")
        assert server.recv(3) == b"in "
        buffer = bytearray(9)
        assert server.recv_into(buffer) == 9
        assert buffer == b"the clear"
        assert server.send(b"answer") == 6
        assert client.recv(6, socket.MSG_PEEK) == client.recv(6) == b"answer"
        for ended in (client.read, client.unwrap):
            with pytest.raises(ValueError, match=r"unwrapped|No SSL wrapper"):
                ended()
        assert (client.pending(), client.version(), client.cipher()) == (0, None, None)
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.settimeout(0.05)
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)

    def test_data_behind_close_notify_ends_unwrap(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        """As in the standard library: it is neither TLS's nor the plain socket's."""
        client, server = pair
        server.sendall(b"data")
        with pytest.raises(ssl.SSLError) as caught:
            client.unwrap()
        assert caught.value.reason == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"

    def test_detach(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        fileno = client.fileno()
        detached = client.detach()
        assert detached == fileno
        assert client.fileno() == -1
        with socket.socket(fileno=detached) as plain:
            assert plain.getpeername() == server.getsockname()
        with pytest.raises(OSError, match="closed"):
            client.recv(1)

    def test_after_close(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        client.close()
        client.close()
        assert client.fileno() == -1
        for call in (lambda: client.send(b"x"), lambda: client.recv(1), lambda: client.sendall(b"x")):
            with pytest.raises(OSError, match="Bad file descriptor") as caught:
                call()
            assert caught.value.errno == errno.EBADF

    def test_with_statement(self, local: Lab) -> None:
        with Server(local.server()) as server:
            with server.connect(local.client()) as client:
                talk(client)
            assert client.fileno() == -1


class TestMakefile:
    @pytest.mark.parametrize("mode", ["rb", "wb", "rwb", "r", "w"])
    @pytest.mark.parametrize("buffering", [None, 0, 10])
    def test_modes(self, pair: tuple[QKDSocket, QKDSocket], mode: str, buffering: int | None) -> None:
        client, server = pair
        if "b" not in mode and buffering == 0:
            with pytest.raises(ValueError, match="unbuffered streams must be binary"):
                client.makefile(mode, 0)  # type: ignore[call-overload]
            return
        with client.makefile(mode, buffering) as file:  # type: ignore[call-overload]
            if "w" in mode:
                file.write(b"from the file\n" if "b" in mode else "from the file\n")
                file.flush()
                assert receive(server, 14) == b"from the file\n"
            if "r" in mode:
                server.sendall("zwölf Boxkämpfer\n".encode())
                line = file.readline()
                assert (line if isinstance(line, str) else line.decode()) == "zwölf Boxkämpfer\n"
        talk_between(pair)

    def test_read_to_the_end(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, server = pair
        data = os.urandom(500_000)

        def send() -> None:
            server.sendall(data)
            server.close()

        sending = Background(send)
        with client.makefile("rb") as file:
            assert file.read() == data
        sending.result()

    def test_socket_closed_before_its_files(self, local: Lab) -> None:
        """The connection lives as long as its last file."""
        with connected(local.client(), local.server(), suppress_ragged_eofs=False) as (client, server):
            reading, writing = client.makefile("rb"), client.makefile("wb")
            client.close()
            server.sendall(b"are you there?\n")
            assert reading.readline() == b"are you there?\n"
            reading.close()
            writing.write(b"yes")
            writing.close()
            assert receive(server, 3) == b"yes"
            # Only now the close_notify.
            assert server.recv(1) == b""

    def test_files_closed_before_the_socket(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        client.makefile("rb").close()
        client.makefile("wb").close()
        talk_between(pair)

    def test_timeout_in_a_file(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        client.settimeout(0.05)
        with client.makefile("rb") as file, pytest.raises(TimeoutError):
            file.read(1)


class TestTimeouts:
    def test_values(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        for value in (None, 0.0, 2.5):
            client.settimeout(value)
            assert client.gettimeout() == client.timeout == value
            assert client.getblocking() is (value != 0.0)
        client.setblocking(True)
        assert client.gettimeout() is None
        client.setblocking(False)
        assert client.gettimeout() == 0.0
        with pytest.raises(ValueError, match="out of range"):
            client.settimeout(-1)

    def test_zero_never_waits(self, pair: tuple[QKDSocket, QKDSocket]) -> None:
        client, _ = pair
        client.settimeout(0.0)
        with pytest.raises(ssl.SSLWantReadError) as caught:
            client.recv(1)
        assert caught.value.errno == ssl.SSL_ERROR_WANT_READ
        with pytest.raises(ssl.SSLWantWriteError) as want_write:
            client.sendall(bytes(1 << 26))
        assert want_write.value.errno == ssl.SSL_ERROR_WANT_WRITE


# --- errors are the standard library's


class TestErrors:
    def test_tampered_record(self, local: Lab) -> None:
        with (
            Server(local.server()) as server,
            Proxy(server.address) as proxy,
            proxy.connect(local.client()) as client,
        ):
            talk(client)
            proxy.hold("server")
            client.sendall(b"ping")
            kept = proxy.held("server", 26)
            kept[-1] ^= 1
            proxy.release("server", len(kept))
            with pytest.raises(ssl.SSLError, match=r"bad record mac|decryption failed") as caught:
                client.recv(4)
            assert type(caught.value) is ssl.SSLError
            assert caught.value.library == "SSL"
            assert "BAD_RECORD_MAC" in (caught.value.reason or "")

    @pytest.mark.parametrize("offset", [0, 1, 3, 5, 50, 200, 800, 1400])
    @pytest.mark.parametrize("sender", ["client", "server"])
    def test_damaged_handshake(self, local: Lab, sender: str, offset: int) -> None:
        """Whatever is damaged in the first flight of either side: the standard library's classes, on both sides."""
        with Server(local.server()) as server, Proxy(server.address) as proxy:
            proxy.hold(sender)
            connecting = Background(lambda: proxy.connect(local.client()))
            kept = proxy.held(sender, 1410)
            kept[offset] ^= 0xFF
            proxy.release(sender, len(kept))
            # Where the damage makes the receiver wait for more, nothing more comes.
            proxy.end(sender)
            with pytest.raises(OSError) as caught:  # noqa: PT011 - any of its subclasses
                connecting.result()
            for error in (caught.value, server.seen().error):
                assert isinstance(error, ssl.SSLError | ConnectionError)
                assert not isinstance(error, OpenSSL.SSL.Error)
