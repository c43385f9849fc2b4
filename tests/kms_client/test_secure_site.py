"""Where keys may be fetched from: real connections to addresses inside and outside the secure site."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from kms_client import (
    KMSAuthenticationError,
    KMSError,
    KMSOutsideSecureSite,
    KMSTimeout,
    KMSUnavailable,
    SecureSite,
)
from kms_client.emulator import DemoPKI, run_pair, write_demo_pki
from kms_client.emulator.kme import server_context
from kms_client.secure_site import has_ml_kem
from qkd_tls import QKDContext
from tests.support.kme_server import client_of, container, everything_in, http, scripted

ID = "550e8400-e29b-41d4-a716-446655440000"
KEY = bytes(range(200, 232))
KEYS = http(200, container((ID, KEY)))
# On one machine every address is that of this host; so "outside" is this host where it does not count as inside.
NOWHERE = SecureSite(this_host=False)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "own", "allowed", "inside"),
        [
            ("127.0.0.1", "127.0.0.1", (), True),
            ("127.8.9.10", "127.0.0.1", (), True),
            ("::1", "::1", (), True),
            ("::ffff:127.0.0.1", "::ffff:127.0.0.1", (), True),
            ("10.1.2.3", "10.1.2.3", (), True),
            ("10.1.2.3", "10.1.2.4", (), False),
            ("fe80::1%eth0", "fe80::2%eth0", (), False),
            ("fe80::1%eth0", "fe80::1%eth0", (), True),
            ("192.168.0.1", "192.168.0.2", (), False),
            ("10.1.2.3", "10.1.2.4", ("10.1.0.0/16",), True),
            ("10.2.2.3", "10.1.2.4", ("10.1.0.0/16",), False),
            ("10.2.2.3", "10.1.2.4", ("10.1.0.0/16", "10.2.2.3"), True),
            ("::ffff:10.1.2.3", "::ffff:10.1.2.4", ("10.1.0.0/16",), True),
            ("2001:db8::5", "2001:db8::6", ("2001:db8::/64",), True),
            ("2001:db8:1::5", "2001:db8::6", ("2001:db8::/64", "0.0.0.0/0"), False),
            ("fe80::1%eth0", "fe80::2%eth0", ("fe80::/10",), True),
        ],
    )
    def test_inside_or_not(self, address: str, own: str, allowed: tuple[str, ...], inside: bool) -> None:
        assert SecureSite(allowed).contains(address, own) is inside

    def test_without_this_host(self) -> None:
        site = SecureSite(["127.0.0.2"], this_host=False)
        assert not site.contains("127.0.0.1", "127.0.0.1")
        assert site.contains("127.0.0.2", "127.0.0.1")
        assert not site.contains("10.1.2.3", "10.1.2.3")
        assert SecureSite().contains("10.1.2.3") is False

    @pytest.mark.parametrize("network", ["kme-a.example", "10.1.2.3/8", "10.1.0.0/33", "", "10.1"])
    def test_what_is_no_network(self, network: str) -> None:
        with pytest.raises(ValueError, match="is not a network of the secure site"):
            SecureSite([network])

    def test_one_string(self) -> None:
        with pytest.raises(TypeError, match="not one string"):
            SecureSite("10.0.0.0/8")

    def test_repr(self) -> None:
        text = repr(SecureSite(["10.0.0.0/8"], ml_kem_outside=False))
        assert text == "SecureSite(['10.0.0.0/8'], this_host=True, ml_kem_outside=False)"

    def test_an_address_of_this_host_that_is_not_loopback(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                pytest.skip("this machine has no route to anywhere, and so no address but loopback")
            own = probe.getsockname()[0]
        with (
            socket.create_server((own, 0)) as listening,
            socket.create_connection(listening.getsockname()) as sock,
        ):
            assert SecureSite().contains_peer(sock)
            assert NOWHERE.contains_peer(sock) is False
            assert SecureSite([own], this_host=False).contains_peer(sock)


class TestBeforeTLS:
    def test_outside_nothing_is_sent_not_even_a_client_hello(self, pki: DemoPKI) -> None:
        received: list[bytes] = []
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def serve() -> None:
                with listening.accept()[0] as sock:
                    sock.settimeout(10)
                    received.append(sock.recv(4096))

            thread = threading.Thread(target=serve)
            thread.start()
            url = f"https://localhost:{listening.getsockname()[1]}"
            client = client_of(pki, url, site=SecureSite(["127.0.0.2"], this_host=False))
            with pytest.raises(KMSOutsideSecureSite) as caught:
                client.get_keys("SAE-B")
            thread.join()
        assert received == [b""]
        error = caught.value
        assert (error.kms, error.peer, error.status, error.keys_may_be_lost) == (url, "SAE-B", None, False)
        assert str(error) == (
            "the KME is outside the secure site: connected to 127.0.0.1, and this client's TLS has no ML-KEM; no"
            f" request was sent (KMS {url}; peer SAE SAE-B). If this address is inside the secure site, name its"
            ' network: site=SecureSite(["127.0.0.1"]). If not, use a KME inside, or a link to this one that ML-KEM'
            " protects."
        )
        client.close()

    def test_every_call(self, pki: DemoPKI) -> None:
        with scripted(pki, KEYS, site=NOWHERE) as (client, server):
            for call in (
                lambda: client.status("SAE-B"),
                lambda: client.get_keys("SAE-B"),
                lambda: client.get_keys_by_id("SAE-B", [ID]),
            ):
                with pytest.raises(KMSOutsideSecureSite):
                    call()
            assert server.requests == []

    def test_a_named_network(self, pki: DemoPKI) -> None:
        with scripted(pki, KEYS, site=SecureSite(["127.0.0.0/24"], this_host=False)) as (client, _):
            assert client.get_keys("SAE-B")[0].key_id == ID

    def test_by_default_this_host(self, pki: DemoPKI) -> None:
        with scripted(pki, KEYS) as (client, _):
            assert client.get_keys("SAE-B")[0].key_id == ID


def link_context(pki: DemoPKI, **settings: object) -> QKDContext:
    context = QKDContext(ssl.PROTOCOL_TLS_CLIENT, policy="off", **settings)  # type: ignore[arg-type]
    context.load_verify_locations(pki.kms_ca)
    context.load_cert_chain(pki.sae_a_cert, pki.sae_a_key)
    return context


@pytest.fixture(scope="module")
def ml_kem_kme(pki: DemoPKI) -> ssl.SSLContext:
    """TLS of a KME that supports X25519MLKEM768, and X25519 too."""
    context = QKDContext(ssl.PROTOCOL_TLS_SERVER, policy="off", groups=["X25519MLKEM768", "X25519"])
    context.load_verify_locations(pki.kms_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(pki.kme_a_cert, pki.kme_a_key)
    return context


@pytest.mark.filterwarnings("ignore:the key exchange of this connection is X25519")
class TestMLKEMOutside:
    def test_a_link_with_ml_kem(self, pki: DemoPKI, ml_kem_kme: ssl.SSLContext) -> None:
        link = link_context(pki)
        with scripted(pki, KEYS, context=ml_kem_kme, ssl_context=link, site=NOWHERE) as (client, server):
            [key] = client.get_keys("SAE-B")
            with key.use() as secret:
                assert secret == KEY
            assert len(server.requests) == 1

    def test_a_link_without(self, pki: DemoPKI, ml_kem_kme: ssl.SSLContext) -> None:
        link = link_context(pki, groups=["X25519"])
        with scripted(pki, KEYS, context=ml_kem_kme, ssl_context=link, site=NOWHERE) as (client, server):
            with pytest.raises(
                KMSOutsideSecureSite, match=r"127\.0\.0\.1, and ML-KEM does not protect the link"
            ):
                client.get_keys("SAE-B")
            assert (server.connections, server.requests) == (1, [])

    def test_inside_the_link_needs_none(self, pki: DemoPKI, ml_kem_kme: ssl.SSLContext) -> None:
        link = link_context(pki, groups=["X25519"])
        with scripted(pki, KEYS, context=ml_kem_kme, ssl_context=link) as (client, _):
            assert client.get_keys("SAE-B")

    def test_a_kme_without_ml_kem(self, pki: DemoPKI) -> None:
        plain = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
        with scripted(pki, KEYS, context=plain, ssl_context=link_context(pki), site=NOWHERE) as (
            client,
            server,
        ):
            with pytest.raises(KMSError, match=r"X25519MLKEM768|TLS handshake|TLS failed"):
                client.get_keys("SAE-B")
            assert server.requests == []

    def test_not_even_then_where_the_operator_says_so(self, pki: DemoPKI, ml_kem_kme: ssl.SSLContext) -> None:
        site = SecureSite(this_host=False, ml_kem_outside=False)
        with scripted(pki, KEYS, context=ml_kem_kme, ssl_context=link_context(pki), site=site) as (
            client,
            server,
        ):
            with pytest.raises(KMSOutsideSecureSite, match="keys are fetched inside only"):
                client.get_keys("SAE-B")
            assert server.requests == []

    def test_sockets_that_do_not_say_what_protects_them(
        self, pki: DemoPKI, ml_kem_kme: ssl.SSLContext
    ) -> None:
        own = ssl.create_default_context(cafile=pki.kms_ca)
        own.load_cert_chain(pki.sae_a_cert, pki.sae_a_key)
        with scripted(pki, KEYS, context=ml_kem_kme, ssl_context=own, site=NOWHERE) as (client, server):
            with pytest.raises(KMSOutsideSecureSite, match="ML-KEM does not protect the link"):
                client.get_keys("SAE-B")
            assert server.requests == []
        with socket.socket() as sock:
            assert not has_ml_kem(sock)

    def test_the_kmes_certificate_is_checked_by_such_a_context_too(
        self, pki: DemoPKI, ml_kem_kme: ssl.SSLContext
    ) -> None:
        link = link_context(pki)
        with scripted(
            pki, KEYS, context=ml_kem_kme, ssl_context=link, site=NOWHERE, server_hostname="other.example"
        ) as (client, server):
            with pytest.raises(
                KMSAuthenticationError, match=r"certificate was refused: .*mismatch"
            ) as caught:
                client.get_keys("SAE-B")
            assert "server_hostname" in caught.value.hint
            assert server.requests == []


class TestUnixSockets:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "kme.sock"

    def test_keys(self, pki: DemoPKI, path: Path) -> None:
        with scripted(pki, KEYS, unix_socket=path) as (_, server):
            client = client_of(pki, "https://localhost/prefix", unix_socket=path)
            assert client.get_keys("SAE-B")[0].key_id == ID
            assert server.requests[0][0] == "POST /prefix/api/v1/keys/SAE-B/enc_keys HTTP/1.1"
            client.close()

    def test_a_real_kme_behind_it(self, path: Path) -> None:
        with run_pair() as pair, socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            thread = threading.Thread(target=forward_one, args=(listening, pair.url_a))
            thread.start()
            client = pair.client("a", unix_socket=path)
            [key] = client.get_keys("SAE-B")
            client.close()
            thread.join()
            slave = pair.client("b")
            [same] = slave.get_keys_by_id("SAE-A", [key.key_id])
            slave.close()
            with key.use() as one, same.use() as other:
                assert one == other

    def test_the_kmes_certificate_is_checked(self, pki: DemoPKI, path: Path) -> None:
        with scripted(pki, KEYS, unix_socket=path) as (_, server):
            client = client_of(pki, "https://kme.example", unix_socket=path)
            with pytest.raises(KMSAuthenticationError, match="mismatch"):
                client.get_keys("SAE-B")
            assert server.requests == []
            named = client_of(pki, "https://kme.example", unix_socket=path, server_hostname="localhost")
            assert named.get_keys("SAE-B")
            named.close()

    def test_nobody_there(self, pki: DemoPKI, path: Path) -> None:
        client = client_of(pki, "https://localhost", unix_socket=path)
        with pytest.raises(KMSUnavailable, match="cannot connect: No such file or directory"):
            client.get_keys("SAE-B")

    def test_nobody_answers(self, pki: DemoPKI, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(path))
            silent.listen()
            client = client_of(pki, "https://localhost", unix_socket=path, connect_timeout=0.3)
            with pytest.raises(KMSTimeout, match=r"no connection within 0\.3 seconds"):
                client.get_keys("SAE-B")

    def test_outside_where_this_host_is(self, pki: DemoPKI, path: Path) -> None:
        with scripted(pki, KEYS, unix_socket=path, site=NOWHERE) as (client, server):
            with pytest.raises(KMSOutsideSecureSite, match="connected to a Unix socket") as caught:
                client.get_keys("SAE-B")
            assert "this_host" in caught.value.hint
            assert everything_in(caught.value)
            assert server.requests == []


def forward_one(listening: socket.socket, url: str) -> None:
    """Pass one connection on to a KME."""
    host, _, port = url.removeprefix("https://").partition(":")
    with listening.accept()[0] as near, socket.create_connection((host, int(port))) as far:
        back = threading.Thread(target=pump, args=(far, near))
        back.start()
        pump(near, far)
        back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
