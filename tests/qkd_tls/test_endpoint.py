"""`Endpoint`: what sockets and objects share, where threads meet in it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kms_client import QKDKey
from qkd_tls import QKDContext, QKDFallbackWarning, QKDSocket
from qkd_tls.endpoint import Endpoint, NotThroughTheStandardLibrary
from tests.support.objects import shake_hands, sides
from tests.support.sockets import TIMEOUT, Lab, Server, connected, talk, tcp_pair


class Slow:
    """A key manager that waits to be told to answer, and remembers the keys that it gave."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.protocol, self.name, self.sae_id = inner.protocol, inner.name, inner.sae_id
        self.asked, self.may_answer = threading.Event(), threading.Event()
        self.given: list[QKDKey] = []

    def get_keys(self, *arguments: Any) -> list[QKDKey]:
        self.asked.set()
        assert self.may_answer.wait(TIMEOUT)
        self.given = self.inner.get_keys(*arguments)
        return self.given


class TestClosedDuringTheHandshake:
    """One thread shakes hands, another gives the socket up."""

    @pytest.mark.parametrize(
        "give_up", [QKDSocket.close, lambda sock: os.close(sock.detach())], ids=["close", "detach"]
    )
    def test_while_the_kms_is_asked(self, local: Lab, give_up: Callable[[QKDSocket], object]) -> None:
        manager = Slow(local.manager("client"))
        context = local.client(key_manager=manager, announced_keys=2)
        with Server(local.server()) as server, ThreadPoolExecutor(1) as threads:
            sock = server.connect(context, do_handshake_on_connect=False)
            shaking = threads.submit(sock.do_handshake)
            assert manager.asked.wait(TIMEOUT)
            give_up(sock)
            manager.may_answer.set()
            with pytest.raises(OSError, match="Bad file descriptor"):
                shaking.result(TIMEOUT)
            assert len(manager.given) == 3
            assert all(key.used for key in manager.given)
            assert [sock.qkd, sock.version(), sock.cipher()] == [None] * 3

    def test_in_the_very_last_step(self, local: Lab) -> None:
        """The file descriptor may be somebody else's by then: TLS must not be given it."""
        sockets: list[QKDSocket] = []
        context = local.client()

        def observe(step: Any) -> None:
            if step.after.name == "ESTABLISHED":
                sockets[0].close()

        context.observer = observe
        with Server(local.server()) as server:
            sockets.append(server.connect(context, do_handshake_on_connect=False))
            with pytest.raises(OSError, match="Bad file descriptor"):
                sockets[0].do_handshake()
            assert sockets[0]._tls is None
            with pytest.raises(OSError, match="Bad file descriptor"):
                sockets[0].recv(1)

    def test_between_the_last_step_and_taking_over(self, local: Lab) -> None:
        class Socket(QKDSocket):
            def _take_over(self, tls: Any) -> None:
                self.close()
                super()._take_over(tls)

        context = local.client()
        context.sslsocket_class = Socket
        with Server(local.server()) as server:
            sock = server.connect(context, do_handshake_on_connect=False)
            with pytest.raises(OSError, match="Bad file descriptor"):
                sock.do_handshake()
            assert sock._tls is None

    def test_before_it_waits(self, local: Lab) -> None:
        class Socket(QKDSocket):
            def _wait(self, *arguments: Any) -> None:
                self.close()
                super()._wait(*arguments)

        context = local.client()
        context.sslsocket_class = Socket
        # A server that never answers: there is something to wait for.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            sock = context.wrap_socket(
                socket.create_connection(silent.getsockname()),
                server_hostname="localhost",
                do_handshake_on_connect=False,
            )
            with pytest.raises(OSError, match="Bad file descriptor"):
                sock.do_handshake()

    def test_before_it_starts(self, local: Lab) -> None:
        with tcp_pair() as (near, _):
            sock = local.client().wrap_socket(
                near, server_hostname="localhost", do_handshake_on_connect=False
            )
            sock.close()
            for call in (sock.do_handshake, lambda: sock.recv(1), lambda: sock.sendall(b"x")):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    call()

    def test_a_sni_callback_that_closes(self, local: Lab) -> None:
        server_context = local.server()
        server_context.sni_callback = lambda connection, *_: connection.close()
        with Server(server_context) as server:
            with pytest.raises(OSError):  # noqa: PT011 - reset or end, as the transport has it
                server.connect(local.client())
            error = server.seen().error
        assert isinstance(error, OSError)
        assert "Bad file descriptor" in str(error)

    def test_again_and_again(self, local: Lab) -> None:
        """At whatever moment: the thread that shakes hands ends, with an error or a connection."""
        context = local.client()
        with Server(local.server()) as server, ThreadPoolExecutor(1) as threads:
            for number in range(60):
                sock = server.connect(context, do_handshake_on_connect=False)
                shaking = threads.submit(sock.do_handshake)
                threading.Event().wait(number * 0.0001)
                # Closing alone wakes nobody, as in the standard library.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
                with contextlib.suppress(OSError):
                    shaking.result(TIMEOUT)
                assert sock._tls is None
            with server.connect(local.client()) as well:
                talk(well)


class TestTurns:
    def test_second_handshake_waits_for_the_first(self, local: Lab) -> None:
        """Within its own timeout."""
        manager = Slow(local.manager("client"))
        with (
            Server(local.server()) as server,
            ThreadPoolExecutor(1) as threads,
            server.connect(local.client(key_manager=manager), do_handshake_on_connect=False) as sock,
        ):
            shaking = threads.submit(sock.do_handshake)
            assert manager.asked.wait(TIMEOUT)
            sock.settimeout(0)
            with pytest.raises(ssl.SSLWantReadError):
                sock.do_handshake()
            sock.settimeout(0.05)
            with pytest.raises(TimeoutError, match="handshake operation timed out"):
                sock.recv(1)
            sock.settimeout(TIMEOUT)
            manager.may_answer.set()
            shaking.result(TIMEOUT)
            talk(sock)


class TestEndpoint:
    def test_the_ways_of_ciphertext_are_up_to_its_kinds(self) -> None:
        bare: Any = Endpoint()
        calls: list[Callable[[], object]] = [
            lambda: bare._send_ciphertext(b""),
            lambda: bare._receive_ciphertext(1),
            lambda: bare._take_over(None),
        ]
        for call in calls:
            with pytest.raises(NotImplementedError):
                call()

    def test_nothing_of_the_standard_library_runs(self, local: Lab) -> None:
        with connected(local.client(), local.server()) as (client, _):
            below: Any = client._sslobj
            assert isinstance(below, NotThroughTheStandardLibrary)
            with pytest.raises(NotImplementedError, match="read is not implemented"):
                below.read()

    def test_before_the_handshake_and_after_the_end(self, local: Lab) -> None:
        client, server = sides(local.client(), local.server())
        for one in (client, server):
            assert one.tls.session_reused is None
            assert one.tls.shared_ciphers() is None
            assert one.tls.get_channel_binding() is None
            with pytest.raises(ValueError, match="handshake is not complete"):
                one.tls.verify_client_post_handshake()
        shake_hands(client, server)
        with connected(local.client(), local.server()) as (near, far):
            assert far.shared_ciphers()
            near.close()
            assert [near.cipher(), near.version(), near.get_channel_binding()] == [None] * 3
            assert near.pending() == 0
            with pytest.raises(ValueError, match="closed"):
                near.verify_client_post_handshake()

    def test_context_setter(self, local: Lab) -> None:
        with connected(local.client(), local.server()) as (client, _):
            other = QKDContext(policy="off")
            client.context = other
            assert client.context is other
            with pytest.raises(TypeError, match="must be a QKDContext"):
                client.context = local.stock_client()
            with pytest.raises(ValueError, match="ever resumed"):
                client.session = object()

    def test_a_warning_made_an_error_closes_the_socket(self, local: Lab) -> None:
        with Server(local.server(policy="off")) as server:
            raw = server.tcp()
            with pytest.raises(QKDFallbackWarning, match="does not speak qkd-tls/1"):
                local.client(policy="prefer").wrap_socket(raw, server_hostname="localhost")
            assert raw.fileno() == -1
