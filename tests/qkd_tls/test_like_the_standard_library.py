"""What a program sees where something is wrong: as with the standard library's classes.

CPython's own tests, see tests/cpython, ask the same and more where the interpreter has them.
"""

from __future__ import annotations

import _ssl
import contextlib
import errno
import socket
import ssl
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qkd_tls
from qkd_tls import QKDContext, QKDSocket
from tests.support.sockets import TIMEOUT, Authority, Lab, Server, connect, connected, talk, tcp_pair

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class TestNotConnected:
    @pytest.fixture
    def sock(self, local: Lab) -> Any:
        with local.client().wrap_socket(socket.socket(), server_hostname="localhost") as sock:
            yield sock

    @pytest.mark.parametrize(
        "call",
        [
            lambda sock: sock.recv(1),
            lambda sock: sock.send(b"x"),
            lambda sock: sock.recvfrom(1),
            lambda sock: sock.recvfrom_into(bytearray(1)),
            lambda sock: sock.sendto(b"x", ("127.0.0.1", 9)),
            lambda sock: sock.getpeercert(),
        ],
    )
    def test_errors_of_the_socket(self, sock: QKDSocket, call: Any) -> None:
        with pytest.raises(OSError, match="not connected") as caught:
            call(sock)
        assert caught.value.errno == errno.ENOTCONN

    def test_read_and_write(self, sock: QKDSocket) -> None:
        with pytest.raises(ValueError, match="Read on closed or unwrapped"):
            sock.read(1)
        with pytest.raises(ValueError, match="Write on closed or unwrapped"):
            sock.write(b"x")

    def test_after_the_end_too(self, local: Lab) -> None:
        with connected(local.client(), local.server()) as (client, _):
            client.close()
            with pytest.raises(ValueError, match="Read on closed or unwrapped"):
                client.read(1)
            with pytest.raises(ValueError, match="Write on closed or unwrapped"):
                client.write(b"x")


@pytest.mark.parametrize("server_side", [False, True])
def test_data_of_a_peer_that_is_gone_before_tls(local: Lab, server_side: bool) -> None:
    """It came through no TLS, and is not shown to the program (CVE-2023-40217)."""
    context = local.server() if server_side else local.client()
    with tcp_pair() as (near, far):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        far.sendall(b"plaintext")
        far.close()
        with pytest.raises(ssl.SSLError, match="before TLS handshake with data") as caught:
            context.wrap_socket(
                near, server_side=server_side, server_hostname=None if server_side else "localhost"
            )
    assert caught.value.library is None
    assert "before TLS handshake" in caught.value.reason


def test_read_into_a_buffer_of_any_size(local: Lab) -> None:
    with connected(local.client(), local.server()) as (client, server):
        server.sendall(b"data")
        buffer = bytearray(4)
        assert client.read(-1, buffer) == 4
        assert buffer == b"data"


def test_only_a_server_asks_for_a_certificate_later(local: Lab) -> None:
    with (
        connected(local.client(), local.server()) as (client, _),
        pytest.raises(ssl.SSLError, match="not server") as caught,
    ):
        client.verify_client_post_handshake()
    assert caught.value.reason == "NOT_SERVER"


class TestServerWithoutACertificate:
    @pytest.fixture
    def bare(self, local: Lab) -> QKDContext:
        return QKDContext(ssl.PROTOCOL_TLS_SERVER, key_manager=local.manager("server"))

    def test_says_so_when_a_client_comes(self, local: Lab, bare: QKDContext) -> None:
        with Server(bare) as server:
            with pytest.raises(ssl.SSLError) as caught:
                server.connect(local.client())
            assert caught.value.reason == "SSLV3_ALERT_HANDSHAKE_FAILURE"
            error = server.seen().error
        assert isinstance(error, ssl.SSLError)
        assert "call load_cert_chain()" in str(error)

    def test_may_load_it_after_wrapping_the_listening_socket(self, local: Lab, bare: QKDContext) -> None:
        with (
            bare.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True) as listening,
            ThreadPoolExecutor() as pool,
        ):
            local.server_identity.load_into(bare)
            connecting = pool.submit(connect, listening.getsockname(), local.client())
            accepted, _ = listening.accept()
            with accepted, connecting.result(TIMEOUT) as client:
                client.sendall(b"hello")
                assert accepted.recv(100) == b"hello"


@pytest.mark.parametrize(
    ("value", "error"),
    [(ssl.OP_NO_TLSv1_3, ValueError), (-1, OverflowError), (2**100, OverflowError), ("abc", TypeError)],
)
def test_options_that_cannot_be(local: Lab, value: Any, error: type[Exception]) -> None:
    context = local.client()
    before = context.options
    with pytest.raises(error):
        context.options = value
    assert context.options == before


class TestPrivateKeys:
    def test_a_damaged_certificate(self, local: Lab, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged.pem"
        damaged.write_text("-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n")
        with pytest.raises(ssl.SSLError, match=r"PEM lib: a certificate in .* is damaged"):
            local.server().load_cert_chain(damaged)

    @pytest.mark.parametrize(
        ("password", "error", "text"),
        [
            (True, TypeError, "should be a string"),
            (b"a" * 102400, ValueError, "cannot be longer"),
            (lambda: b"a" * 102400, ValueError, "cannot be longer"),
            (lambda: 9, TypeError, "must return a string"),
        ],
    )
    def test_passwords_that_are_none(
        self, local: Lab, tmp_path: Path, password: Any, error: type[Exception], text: str
    ) -> None:
        identity = Authority(tmp_path).issue("encrypted", password=b"pass phrase")
        with pytest.raises(error, match=text):
            local.server().load_cert_chain(identity.cert_file, identity.key_file, password)


def test_key_log(local: Lab, tmp_path: Path) -> None:
    """The secrets of both handshakes of a first connection."""
    client = local.client()
    client.keylog_filename = str(tmp_path / "keys")
    with Server(local.server()) as server, server.connect(client) as sock:
        talk(sock)
    lines = (tmp_path / "keys").read_text().splitlines()
    assert sum(line.startswith("CLIENT_TRAFFIC_SECRET_0 ") for line in lines) == 2


NAMES = [
    "localhost",
    "127.0.0.1",
    "::1",
    "*.wild.example",
    "xn--bcher-kva.example",
    "my_host.example",
    "server.example",
]


class Names:
    """Contexts of both kinds, and a server with many names."""

    def __init__(self, directory: Path) -> None:
        ca = Authority(directory)
        identity = ca.issue("names", NAMES)
        self.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.server.load_cert_chain(identity.cert_file, identity.key_file)
        self.clients: dict[bool, list[ssl.SSLContext]] = {}
        for check in (True, False):
            self.clients[check] = [
                ssl.create_default_context(cafile=str(ca.file)),
                qkd_tls.create_default_context(cafile=str(ca.file), policy="off", groups=["X25519"]),
            ]
            for client in self.clients[check]:
                client.check_hostname = check

    def outcomes(self, name: Any, *, check: bool) -> list[object]:
        """Return what each context makes of a name: the name that it kept and the server saw, or the error."""
        return [self._outcome(client, name) for client in self.clients[check]]

    def _outcome(self, client: ssl.SSLContext, name: Any) -> object:
        seen: list[str | None] = []
        self.server.sni_callback = lambda _sock, name, _context: seen.append(name)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            one = client.wrap_bio(to_client, to_server, server_hostname=name)
            other = self.server.wrap_bio(to_server, to_client, server_side=True)
            for side in (one, other, one):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        except ssl.SSLCertVerificationError as error:
            return type(error), error.verify_code, error.verify_message
        except (OSError, ValueError, TypeError) as error:
            return type(error)
        return one.server_hostname, seen


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Names:
    return Names(tmp_path_factory.mktemp("names"))


LABELS = st.text("ab0-_*%[]:. éß\0", max_size=6) | st.sampled_from(
    ["localhost", "LOCALHOST", "a" * 63, "a" * 64]
)
HOSTS = st.one_of(
    st.lists(LABELS, max_size=3).map(".".join),
    st.sampled_from(NAMES).flatmap(
        lambda name: st.sampled_from(
            [name, name + ".", name + ":443", f"[{name}]", name + "%lo", name.upper()]
        )
    ),
    st.ip_addresses().map(str),
    st.sampled_from(
        ["127.1", "0:0:0:0:0:0:0:1", "a.wild.example", "a.b.wild.example", "bücher.example", "b" * 254]
    ),
)


@pytest.mark.filterwarnings("ignore::qkd_tls.ClassicalGroupWarning")
@settings(max_examples=100)
@example(name="localhost.", check=True)
@example(name="server.example:443", check=True)
@example(name="[::1]", check=True)
@example(name="::1%lo", check=True)
@given(
    name=HOSTS | HOSTS.map(lambda name: name.encode("ascii", "ignore")),
    check=st.booleans(),
)
def test_names_of_servers(names: Names, name: str | bytes, check: bool) -> None:
    stock, ours = names.outcomes(name, check=check)
    assert ours == stock


@pytest.mark.parametrize(
    "label", ["CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE", "NO CERTIFICATE"]
)
@pytest.mark.parametrize(
    "second", ["CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE", "NO CERTIFICATE"]
)
def test_labels_of_certificates(tmp_path: Path, label: str, second: str) -> None:
    """In a file of CAs, and in a chain: as many are found, or none."""
    ca = Authority(tmp_path)
    identity = ca.issue()
    file = tmp_path / "labels.pem"
    parts = [identity.cert_file.read_text(), ca.pem]
    file.write_text(
        "".join(
            part.replace(" CERTIFICATE-", f" {kind}-")
            for part, kind in zip(parts, (label, second), strict=True)
        )
    )
    found = []
    for kind in (ssl.SSLContext, lambda protocol: QKDContext(protocol, policy="off")):
        context: ssl.SSLContext = kind(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(file, identity.key_file)
            loaded: object = True
        except ssl.SSLError as error:
            loaded = type(error)
        with contextlib.suppress(ssl.SSLError):
            context.load_verify_locations(file)
        found.append((loaded, len(context.get_ca_certs())))
    assert found[0] == found[1]


def test_attributes_of_the_object_below(local: Lab) -> None:
    """A program that looks for one finds those that the standard library has, and no others."""
    with connected(local.client(), local.server()) as (client, _):
        below: Any = _ssl._SSLSocket  # type: ignore[attr-defined]
        for name in [*dir(below), "ech_status", "nonexistent"]:
            assert hasattr(client._sslobj, name) is hasattr(below, name), name
        for name in dir(ssl.SSLSocket):
            assert hasattr(client, name), name
        for name in ("get_verified_chain", "get_unverified_chain", "group", "client_sigalg"):
            assert hasattr(client, name) is hasattr(ssl.SSLSocket, name), name
