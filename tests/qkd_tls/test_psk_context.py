"""PSKContext over real sockets: who has the PSK gets through, who has not does not, and nobody needs a certificate."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from kms_client.emulator import DemoPKI, write_demo_pki
from qkd_tls import QKDContext, QKDSocket, QKDUnavailable
from qkd_tls.engine import ServerEngine
from qkd_tls.hybrid import KDF
from qkd_tls.openssl import TLSConnection, TLSContext, TLSSettings
from qkd_tls.psk import PSK
from qkd_tls.psk_context import PSKContext, PSKSocket
from qkd_tls.psk_export import export_psk
from tests.support.sockets import TIMEOUT

SECRET = bytes(range(100, 132))
CLIENT = PSKContext("système 1", SECRET)
SERVER = PSKContext("système 1", SECRET, server_side=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


class Pair:
    """What came of a handshake over TCP: a socket or an error at each end."""

    def __init__(
        self, client: Callable[[socket.socket], Any], server: Callable[[socket.socket], Any]
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            near = socket.create_connection(listening.getsockname(), TIMEOUT)
            far, _ = listening.accept()
        far.settimeout(TIMEOUT)
        thread = threading.Thread(target=self._run, args=("server", server, far))
        thread.start()
        self._run("client", client, near)
        thread.join()

    def _run(self, name: str, wrap: Callable[[socket.socket], Any], sock: socket.socket) -> None:
        try:
            setattr(self, name, wrap(sock))
        except OSError as error:
            setattr(self, name, error)
            sock.close()

    client: Any
    server: Any

    def close(self) -> None:
        for end in (self.client, self.server):
            if isinstance(end, socket.socket):
                end.close()


def test_who_has_the_psk_gets_through_without_certificates() -> None:
    pair = Pair(lambda sock: CLIENT.wrap_socket(sock, server_hostname="127.0.0.1"), SERVER.wrap_socket)
    try:
        for end in (pair.client, pair.server):
            assert isinstance(end, PSKSocket)
            assert end.qkd is not None
            assert (end.version(), end.cipher()) == ("TLSv1.3", ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256))
            assert (end.qkd.group, str(end.qkd.protection)) == ("X25519MLKEM768", "pq-only")
            assert end.getpeercert() is None
        data = bytes(range(256)) * 1000
        thread = threading.Thread(target=pair.client.sendall, args=(data,))
        thread.start()
        with pair.server.makefile("rb") as file:
            assert file.read(len(data)) == data
        thread.join()
        pair.server.sendall(b"answer")
        assert pair.client.recv(100) == b"answer"
        pair.server.close()
        assert pair.client.recv(100) == b""
    finally:
        pair.close()


def test_a_server_without_ml_kem_is_protected_by_the_psk_all_the_same() -> None:
    """No warning, for the PSK alone keeps an eavesdropper out."""
    context = TLSContext(
        TLSSettings(server_side=True, groups=("X25519",), cipher_suites=KDF.SHA384.cipher_suites)
    )

    def serve(sock: socket.socket) -> socket.socket:
        connection = TLSConnection(context, psk=PSK(b"x", bytearray(SECRET), KDF.SHA384, ""))
        while not connection.handshake():
            sock.sendall(connection.take())
            connection.feed(sock.recv(1 << 16))
        sock.sendall(connection.take())
        return sock

    pair = Pair(PSKContext("x", SECRET).wrap_socket, serve)
    try:
        assert (pair.client.qkd.group, str(pair.client.qkd.protection)) == ("X25519", "classical")
    finally:
        pair.close()


@pytest.mark.parametrize(
    ("client", "at_client", "at_server"),
    [
        (PSKContext("other", SECRET), "ALERT_HANDSHAKE_FAILURE", "NO_SUITABLE_SIGNATURE_ALGORITHM"),
        (PSKContext("système 1", SECRET[:-1] + b"x"), "ALERT_DECRYPT_ERROR", "BINDER_DOES_NOT_VERIFY"),
    ],
)
def test_who_has_another_psk_is_refused(client: PSKContext, at_client: str, at_server: str) -> None:
    pair = Pair(client.wrap_socket, SERVER.wrap_socket)
    assert isinstance(pair.client, ssl.SSLError)
    assert isinstance(pair.server, ssl.SSLError)
    assert at_client in str(pair.client)
    assert at_server in str(pair.server)


def test_a_client_without_psk_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    pair = Pair(context.wrap_socket, SERVER.wrap_socket)
    assert isinstance(pair.client, ssl.SSLError)
    assert isinstance(pair.server, ssl.SSLError)


def test_a_server_that_has_a_certificate_instead_is_refused(pki: DemoPKI) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.kme_a_cert, pki.kme_a_key)
    pair = Pair(CLIENT.wrap_socket, lambda sock: context.wrap_socket(sock, server_side=True))
    try:
        assert isinstance(pair.client, ssl.SSLError)
        assert pair.client.reason == "PSK_NOT_ACCEPTED"
    finally:
        pair.close()


def test_a_peer_that_goes_away_or_is_silent() -> None:
    pair = Pair(CLIENT.wrap_socket, lambda sock: sock.close())
    assert isinstance(pair.client, OSError)
    near, far = socket.socketpair()
    near.settimeout(0.05)
    with far, pytest.raises(TimeoutError):
        CLIENT.wrap_socket(near)
    near, far = socket.socketpair()
    near.settimeout(TIMEOUT)
    with far:
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ssl.SSLEOFError, match="closed the connection in the handshake"):
            CLIENT.wrap_socket(near)


@pytest.mark.parametrize(
    ("identity", "secret", "text"),
    [
        ("", SECRET, "identity must have 1 to 255 bytes, not 0"),
        ("é" * 128, SECRET, "not 256"),
        ("x", b"s" * 15, "secret must have 16 to 512 bytes, not 15"),
        ("x", b"s" * 513, "not 513"),
    ],
)
def test_what_is_no_psk(identity: str, secret: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PSKContext(identity, secret)


@pytest.mark.parametrize("size", [16, 512])
def test_the_longest_and_the_shortest(size: int) -> None:
    name, secret = "i" * 255, bytearray(b"s" * size)
    pair = Pair(PSKContext(name, secret).wrap_socket, PSKContext(name, secret, server_side=True).wrap_socket)
    try:
        assert pair.client.version() == pair.server.version() == "TLSv1.3"
    finally:
        pair.close()


def test_the_secret_is_in_no_repr() -> None:
    assert repr(CLIENT) == "<PSKContext 'système 1'>"
    assert repr(SERVER) == "<PSKContext 'système 1' server>"
    assert all("105" not in repr(value) for value in vars(CLIENT).values())


# --- what a PSK connection can do of what others can


def test_a_listening_socket_accepts_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as plain, SERVER.wrap_socket(plain) as listening:
        listening.settimeout(TIMEOUT)
        with socket.socket() as raw:
            raw.settimeout(TIMEOUT)
            with CLIENT.wrap_socket(raw, do_handshake_on_connect=False) as client:
                client.connect(listening.getsockname())
                accepted: list[QKDSocket] = []
                thread = threading.Thread(target=lambda: accepted.append(listening.accept()[0]))
                thread.start()
                client.sendall(b"shakes hands first")
                thread.join()
                with accepted[0] as server:
                    assert server.recv(100) == b"shakes hands first"


@pytest.mark.parametrize(("context", "server_side"), [(CLIENT, True), (SERVER, False)])
def test_a_context_has_one_side(context: PSKContext, server_side: bool) -> None:
    with socket.socket() as sock, pytest.raises(ValueError, match=f"server_side must be {not server_side}"):
        context.wrap_socket(sock, server_side=server_side)


def test_what_a_psk_connection_cannot_do() -> None:
    pair = Pair(CLIENT.wrap_socket, SERVER.wrap_socket)
    try:
        assert (CLIENT.key_manager, CLIENT.verify_mode) == (None, ssl.CERT_NONE)
        assert pair.client.context is CLIENT
        with pytest.raises(TypeError, match="keeps its PSKContext"):
            pair.client.context = QKDContext(policy="off")
        with pytest.raises(NotImplementedError, match="no certificates"):
            pair.server.verify_client_post_handshake()
        with pytest.raises(QKDUnavailable, match="has no association"):
            export_psk(pair.client)
        with pytest.raises(NotImplementedError, match="no sni_callback"):
            SERVER._choose_context(cast("ServerEngine", None), pair.server, None)
    finally:
        pair.close()
