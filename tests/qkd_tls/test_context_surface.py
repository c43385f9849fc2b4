"""What programs set on a context takes effect on the OpenSSL that runs the connection, or raises and says why.

Certificates, passwords, trust and single revocation lists are in test_certificates_in_use.py.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import pickle
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kms_client import LocalKeyManager
from qkd_tls import (
    HandshakePath,
    Protection,
    QKDContext,
    QKDFallbackWarning,
    QKDObject,
    QKDSocket,
    create_default_context,
)
from tests.support.objects import Side, carry, shake_hands, sides
from tests.support.sockets import TIMEOUT, Authority, Lab, Server, connected, talk


def shaken(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[Side, Side]:
    pair = sides(client, server)
    shake_hands(*pair)
    return pair


class TestServerName:
    """`sni_callback` and `set_servername_callback`."""

    @pytest.fixture
    def other(self, local: Lab) -> QKDContext:
        """What "other.example" is served with: its own certificate, KMS and associations."""
        _, manager = self.managers = LocalKeyManager.pair("SAE-A", "SAE-C")
        context = local.server(key_manager=manager)
        local.ca.issue("other").load_into(context)
        return context

    def serve(self, local: Lab, other: QKDContext) -> tuple[QKDContext, list[Any]]:
        server, calls = local.server(), []

        def choose(connection: Any, name: str | None, context: ssl.SSLContext) -> None:
            calls.append((type(connection), name, context))
            if name == "other.example":
                connection.context = other

        server.sni_callback = choose
        return server, calls

    @pytest.mark.parametrize("over", ["socket", "object"])
    def test_context_chosen_by_name(self, local: Lab, other: QKDContext, over: str) -> None:
        server, calls = self.serve(local, other)
        clients = {
            "server.example": local.client(),
            "other.example": local.client(key_manager=self.managers[0], peer_sae_id="SAE-C"),
        }
        seen = []
        with Server(server) as listening:
            for path in (HandshakePath.BOOTSTRAP, HandshakePath.ASSOCIATED):
                for name, client in clients.items():
                    if over == "socket":
                        with listening.connect(client, name) as near:
                            seen.append((name, path, near.qkd, listening.seen_info(), near.getpeercert(True)))
                    else:
                        one, two = Side(client, server_hostname=name), Side(server, server_side=True)
                        shake_hands(one, two)
                        assert two.tls.context is (other if name == "other.example" else server)
                        seen.append((name, path, one.tls.qkd, two.tls.qkd, one.tls.getpeercert(True)))
                    assert calls[-1] == (QKDSocket if over == "socket" else QKDObject, name, server)
        # Once for each connection, also in a bootstrap.
        assert len(calls) == 4
        other_der = ssl.PEM_cert_to_DER_cert(local.ca.file.with_name("other.pem").read_text())
        for name, path, near_info, far_info, certificate in seen:
            assert near_info is not None
            assert far_info is not None
            assert near_info.path is far_info.path is path
            assert near_info.key_id == far_info.key_id
            expected = (
                ("SAE-C", other_der) if name == "other.example" else ("SAE-B", local.server_identity.der)
            )
            assert (far_info.server_sae_id, certificate) == expected

    def test_no_name(self, local: Lab, other: QKDContext) -> None:
        server, calls = self.serve(local, other)
        client = local.client()
        client.check_hostname = False
        shake_hands(Side(client), Side(server, server_side=True))
        assert [name for _, name, _ in calls] == [None]

    def test_function_with_the_older_name(self, local: Lab) -> None:
        server, names = local.server(), []
        server.set_servername_callback(lambda connection, name, context: names.append(name))
        shaken(local.client(), server)
        assert names == ["localhost"]
        server.set_servername_callback(None)
        shaken(local.client(), server)
        assert names == ["localhost"]
        with pytest.raises(TypeError, match="not a callable"):
            server.set_servername_callback("nonsense")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not a callable"):
            server.sni_callback = 5  # type: ignore[assignment]

    @pytest.mark.parametrize(
        ("answer", "alert"),
        [
            (ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME, "unrecognized name"),
            (ssl.ALERT_DESCRIPTION_ACCESS_DENIED, "access denied"),
            ("nonsense", "internal error"),
            (300, "internal error"),
            (-1, "internal error"),
        ],
    )
    def test_refusal(self, local: Lab, answer: Any, alert: str) -> None:
        server = local.server()
        server.sni_callback = lambda *_: answer
        client_side, server_side = sides(local.client(), server)
        with contextlib.suppress(ssl.SSLWantReadError):
            client_side.tls.do_handshake()
        carry(client_side, server_side)
        with pytest.raises(ssl.SSLError, match="the sni_callback refused the name 'localhost'") as caught:
            server_side.tls.do_handshake()
        assert caught.value.reason == "CALLBACK_FAILED"
        carry(server_side, client_side)
        with pytest.raises(ssl.SSLError, match=alert):
            client_side.tls.do_handshake()

    @pytest.mark.parametrize("error", [LookupError, TypeError])
    def test_callback_that_raises(self, local: Lab, error: type[Exception]) -> None:
        def choose(*_: Any) -> None:
            raise error("no such tenant")

        server = local.server()
        server.sni_callback = choose
        with Server(server) as listening:
            with pytest.raises(ssl.SSLError, match="handshake failure"):
                listening.connect(local.client())
            seen = listening.seen().error
        assert isinstance(seen, ssl.SSLError)
        assert type(seen.__cause__) is error

    def test_callback_that_chooses_a_plain_context(self, local: Lab) -> None:
        def choose(connection: Any, *_: Any) -> None:
            connection.context = local.stock_server()

        server = local.server()
        server.sni_callback = choose
        pair = sides(local.client(), server)
        with pytest.raises(ssl.SSLError, match="must be a QKDContext") as caught:
            shake_hands(*pair)
        assert isinstance(caught.value.__cause__, TypeError)

    def test_chosen_context_without_certificate(self, local: Lab) -> None:
        bare = QKDContext(ssl.PROTOCOL_TLS_SERVER, key_manager=local.manager("server"))
        server = local.server()

        def choose(connection: Any, *_: Any) -> None:
            connection.context = bare

        server.sni_callback = choose
        with pytest.raises(ssl.SSLError, match=r"call load_cert_chain\(\)"):
            shake_hands(*sides(local.client(), server))

    def test_callback_makes_up_for_a_missing_certificate(self, local: Lab, other: QKDContext) -> None:
        """The listening context needs none where the callback always chooses."""
        bare = QKDContext(ssl.PROTOCOL_TLS_SERVER, key_manager=local.manager("server"))

        def choose(connection: Any, *_: Any) -> None:
            connection.context = other

        bare.sni_callback = choose
        client = local.client(key_manager=self.managers[0], peer_sae_id="SAE-C")
        client_side, _ = shaken(client, bare)
        assert client_side.tls.qkd.server_sae_id == "SAE-C"

    def test_not_at_a_client(self, local: Lab) -> None:
        with pytest.raises(ValueError, match="sni_callback cannot be set on TLS_CLIENT context"):
            local.client().sni_callback = print

    def test_callback_may_look_at_the_connection(self, local: Lab) -> None:
        looked = []

        def look(connection: Any, *_: Any) -> None:
            looked.append((connection.version(), connection.cipher(), connection.pending(), connection.qkd))

        server = local.server()
        server.sni_callback = look
        shaken(local.client(), server)
        with connected(local.client(), server):
            pass
        assert looked == [(None, None, 0, None)] * 2


class TestKeyLog:
    LABELS = frozenset(
        [
            "SERVER_HANDSHAKE_TRAFFIC_SECRET",
            "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
            "EXPORTER_SECRET",
            "SERVER_TRAFFIC_SECRET_0",
            "CLIENT_TRAFFIC_SECRET_0",
        ]
    )

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_both_handshakes(self, local: Lab, tmp_path: Path, side: str) -> None:
        file = tmp_path / "keys"
        file.write_text("# as it was\n")
        contexts = {"client": local.client(), "server": local.server()}
        contexts[side].keylog_filename = str(file)
        client, server = sides(contexts["client"], contexts["server"])
        sent = bytearray()
        finished: set[int] = set()
        while len(finished) < 2:
            for one, other in ((client, server), (server, client)):
                with contextlib.suppress(ssl.SSLWantReadError):
                    one.tls.do_handshake()
                    finished.add(id(one))
                data = one.outgoing.read()
                other.incoming.write(data)
                if one is client:
                    sent += data
        header, *lines = file.read_text().splitlines()
        assert header == "# as it was", "the file is appended to"
        found = collections.defaultdict(set)
        for line in lines:
            label, random, secret = line.split()
            assert len(bytes.fromhex(secret)) in (32, 48)
            found[random].add(label)
        # The bootstrap and the hybrid handshake. The randoms are those of the ClientHellos on the wire, the second of
        # which is in clear too.
        assert list(map(set, found.values())) == [self.LABELS] * 2
        for random in found:
            assert bytes.fromhex(random) in sent

    def test_none_ends_it(self, local: Lab, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        client = local.client()
        client.keylog_filename = str(file)
        assert client.keylog_filename == str(file)
        shaken(client, local.server())
        size = file.stat().st_size
        client.keylog_filename = None  # type: ignore[assignment]
        shaken(client, local.server())
        assert file.stat().st_size == size

    def test_environment(self, local: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "keys"
        monkeypatch.setenv("SSLKEYLOGFILE", str(file))
        context = create_default_context(
            cafile=str(local.ca.file), key_manager=local.manager("client"), peer_sae_id="SAE-B"
        )
        monkeypatch.delenv("SSLKEYLOGFILE")
        assert context.keylog_filename == str(file)
        shaken(context, local.server())
        assert "CLIENT_TRAFFIC_SECRET_0" in file.read_text()

    def test_file_that_cannot_be(self, local: Lab, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="nowhere"):
            local.client().keylog_filename = str(tmp_path / "nowhere" / "keys")


class TestPostHandshakeAuthentication:
    def contexts(self, local: Lab) -> tuple[QKDContext, QKDContext]:
        client, server = local.client(), local.server()
        local.client_identity.load_into(client)
        client.post_handshake_auth = server.post_handshake_auth = True
        server.verify_mode = ssl.CERT_REQUIRED
        return client, server

    def test_over_memory(self, local: Lab) -> None:
        contexts = self.contexts(local)
        for path in (HandshakePath.BOOTSTRAP, HandshakePath.ASSOCIATED):
            client, server = shaken(*contexts)
            assert server.tls.qkd.path is path
            assert server.tls.getpeercert() is None
            server.tls.verify_client_post_handshake()
            server.tls.write(b"?")
            carry(server, client)
            assert client.tls.read() == b"?"
            client.tls.write(b"!")
            carry(client, server)
            assert server.tls.read() == b"!"
            assert server.tls.getpeercert(True) == local.client_identity.der
            assert dict(server.tls.getpeercert()["subjectAltName"]) == {"DNS": "client.example"}

    def test_over_sockets(self, local: Lab) -> None:
        client_context, server_context = self.contexts(local)
        certificates = []

        def handler(server: QKDSocket) -> None:
            server.verify_client_post_handshake()
            server.sendall(b"?")
            assert server.recv(1) == b"!"
            certificates.append(server.getpeercert(True))
            server.sendall(b".")

        with Server(server_context, handler) as server:
            for path in (HandshakePath.BOOTSTRAP, HandshakePath.ASSOCIATED):
                with server.connect(client_context) as client:
                    assert client.recv(1) == b"?"
                    client.sendall(b"!")
                    assert client.recv(1) == b"."
                seen = server.seen()
                assert seen.info is not None
                assert seen.info.path is path
                assert seen.certificate is None
        assert certificates == [local.client_identity.der] * 2

    def test_client_without_certificate(self, local: Lab) -> None:
        _, server_context = self.contexts(local)
        client_context = local.client()
        client_context.post_handshake_auth = True
        client, server = shaken(client_context, server_context)
        server.tls.verify_client_post_handshake()
        server.tls.write(b"?")
        carry(server, client)
        assert client.tls.read() == b"?"
        client.tls.write(b"!")
        carry(client, server)
        with pytest.raises(ssl.SSLError, match="peer did not return a certificate"):
            server.tls.read()

    def test_client_that_does_not_offer_it(self, local: Lab) -> None:
        _, server_context = self.contexts(local)
        _, server = shaken(local.client(), server_context)
        with pytest.raises(ssl.SSLError) as caught:
            server.tls.verify_client_post_handshake()
        assert caught.value.reason == "EXTENSION_NOT_RECEIVED"

    def test_client_cannot_ask(self, local: Lab) -> None:
        client, _ = shaken(*self.contexts(local))
        with pytest.raises(ssl.SSLError, match="not server"):
            client.tls.verify_client_post_handshake()


class TestRevocationOfChains:
    """`verify_flags` with revocation lists: of the leaf only, or of every CA on the way."""

    def test_revoked_intermediate(self, local: Lab, tmp_path: Path) -> None:
        root = Authority(tmp_path, "Root")
        intermediate = Authority(tmp_path, "Intermediate", issuer=root)
        leaf = intermediate.issue("leaf")
        chain = tmp_path / "chain.pem"
        chain.write_text(leaf.pem + intermediate.pem)
        server = local.server()
        server.load_cert_chain(chain, leaf.key_file)
        lists = tmp_path / "lists.pem"

        def client(flags: ssl.VerifyFlags, *revoked: Any) -> QKDContext:
            lists.write_text(root.revoke(*revoked) + intermediate.revoke())
            context = create_default_context(
                cafile=str(root.file), key_manager=local.manager("client"), peer_sae_id="SAE-B"
            )
            context.load_verify_locations(lists)
            context.verify_flags |= flags
            return context

        shaken(client(ssl.VERIFY_CRL_CHECK_CHAIN), server)
        shaken(client(ssl.VERIFY_CRL_CHECK_LEAF, intermediate), server)
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
            shaken(client(ssl.VERIFY_CRL_CHECK_CHAIN | ssl.VERIFY_CRL_CHECK_LEAF, intermediate), server)

    def test_strict(self, local: Lab) -> None:
        """X509_STRICT and PARTIAL_CHAIN act too: an intermediate may be trusted directly."""
        context = local.client()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        shaken(context, local.server())

    def test_partial_chain(self, local: Lab, tmp_path: Path) -> None:
        root = Authority(tmp_path, "Root")
        intermediate = Authority(tmp_path, "Intermediate", issuer=root)
        server = local.server()
        intermediate.issue("leaf").load_into(server)
        client = create_default_context(
            cafile=str(intermediate.file), key_manager=local.manager("client"), peer_sae_id="SAE-B"
        )
        client.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
        with pytest.raises(ssl.SSLCertVerificationError, match="unable to get issuer certificate"):
            shaken(client, server)
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        shaken(client, server)


class TestTrustReadBack:
    @pytest.mark.parametrize("how", ["cafile", "PEM", "DER", "several PEM", "several DER", "capath"])
    def test_ca_certificates(self, local: Lab, tmp_path: Path, how: str) -> None:
        one, two = local.ca, Authority(tmp_path, "Second")
        # The name that OpenSSL's c_rehash would give; any will do for reading a whole directory.
        hashed = tmp_path / "hashed"
        hashed.mkdir()
        (hashed / "0123abcd.0").write_text(one.pem)
        (hashed / "README").write_text("not a certificate")
        arguments: dict[str, dict[str, Any]] = {
            "cafile": {"cafile": one.file},
            "PEM": {"cadata": one.pem},
            "DER": {"cadata": one.der},
            "several PEM": {"cadata": one.pem + "and\n" + two.pem},
            "several DER": {"cadata": one.der + two.der},
            "capath": {"capath": str(hashed)},
        }
        context, stock = QKDContext(policy="off"), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for each in (context, stock):
            each.load_verify_locations(**arguments[how])
            each.load_verify_locations(**arguments[how])
        expected = [one.der, two.der] if "several" in how else [one.der]
        assert sorted(context.get_ca_certs(binary_form=True)) == sorted(expected)
        shown = context.get_ca_certs()
        assert ((("commonName", "Test CA"),),) in [certificate["subject"] for certificate in shown]
        counts = context.cert_store_stats()
        assert counts == {"x509": len(expected), "x509_ca": len(expected), "crl": 0}
        if how != "capath":
            # There the standard library looks only when it needs a certificate.
            assert stock.get_ca_certs() == shown
            assert stock.cert_store_stats() == counts
        # And it is what the connections trust.
        with pytest.warns(QKDFallbackWarning):
            shaken(context, local.server(policy="prefer"))

    def test_lists_are_counted(self, local: Lab, tmp_path: Path) -> None:
        file = tmp_path / "list.pem"
        file.write_text(local.ca.revoke())
        context = local.client()
        context.load_verify_locations(file)
        assert context.cert_store_stats() == {"x509": 1, "x509_ca": 1, "crl": 1}

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"", ValueError),
            ("", ValueError),
            (b"junk", ssl.SSLError),
            ("junk", ssl.SSLError),
            (5, TypeError),
        ],
    )
    def test_cadata_that_is_none(self, data: Any, error: type[Exception]) -> None:
        for context in (QKDContext(policy="off"), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)):
            with pytest.raises(error):
                context.load_verify_locations(cadata=data)
            assert context.get_ca_certs() == []

    def test_nothing(self) -> None:
        with pytest.raises(TypeError, match="cannot be all omitted"):
            QKDContext(policy="off").load_verify_locations()

    def test_system(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local: Lab) -> None:
        """The files that the environment names, as for the standard library."""
        directory = tmp_path / "certs"
        directory.mkdir()
        (directory / "0123abcd.0").write_text(local.ca.pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
        monkeypatch.setenv("SSL_CERT_DIR", str(directory))
        context = create_default_context(policy="off")
        assert context.get_ca_certs(True) == [local.ca.der]
        monkeypatch.setenv("SSL_CERT_FILE", str(local.ca.file))
        monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "missing"))
        context = create_default_context(policy="off")
        assert context.get_ca_certs(True) == [local.ca.der]


class TestStatistics:
    def test_counts(self, local: Lab) -> None:
        client, server = local.client(), local.server()
        for _ in range(3):
            shaken(client, server)
        side = Side(client, server_hostname="elsewhere.example")
        with pytest.raises(ssl.SSLError):
            shake_hands(side, Side(server, server_side=True))
        counts = client.session_stats()
        assert counts == dict.fromkeys(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).session_stats(), 0) | {
            "connect": 4,
            "connect_good": 3,
        }
        assert server.session_stats() == counts | {
            "connect": 0,
            "connect_good": 0,
            "accept": 4,
            "accept_good": 3,
        }

    def test_of_a_chosen_context(self, local: Lab) -> None:
        """Counted where the connection came in, as OpenSSL counts."""

        def counts(make: Callable[[], ssl.SSLContext], client: ssl.SSLContext) -> list[tuple[int, int]]:
            first, second = make(), make()

            def choose(connection: Any, *_: Any) -> None:
                connection.context = second

            first.sni_callback = choose
            shaken(client, first)
            return [
                (one.session_stats()["accept"], one.session_stats()["accept_good"]) for one in (first, second)
            ]

        assert counts(local.server, local.client()) == counts(local.stock_server, local.stock_client())


class TestVerification:
    def test_common_name(self, local: Lab) -> None:
        server = local.server()
        local.ca.issue("localhost", []).load_into(server)
        client = local.client()
        client.hostname_checks_common_name = False
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'localhost'"):
            shaken(client, server)
        client.hostname_checks_common_name = True
        shaken(client, server)

    def test_both_orders(self) -> None:
        for context in (QKDContext(policy="off"), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)):
            with pytest.raises(ValueError, match="Cannot set verify_mode to CERT_NONE when check_hostname"):
                context.verify_mode = ssl.CERT_NONE
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.check_hostname = True
            assert context.verify_mode is ssl.CERT_REQUIRED
            with pytest.raises(ValueError, match="invalid value for verify_mode"):
                context.verify_mode = 99  # type: ignore[assignment]

    def test_nothing_checked(self, local: Lab) -> None:
        client, server = local.client(), local.server()
        local.ca.issue("elsewhere", ["elsewhere.example"]).load_into(server)
        client.check_hostname = False
        shaken(client, server)
        client.verify_mode = ssl.CERT_NONE
        one, _ = shaken(client, server)
        assert one.tls.getpeercert() == {}
        assert one.tls.getpeercert(True)


class TestProtocolSettings:
    def test_refused_or_fixed(self, local: Lab) -> None:
        context = local.client()
        for value in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MINIMUM_SUPPORTED):
            context.minimum_version = value
        for value in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED):
            context.maximum_version = value
        with pytest.raises(ValueError, match="is not a valid TLSVersion"):
            context.minimum_version = 1234  # type: ignore[assignment]
        with pytest.raises(ValueError, match="lower maximum_version"):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError, match=r"[Nn]o cipher"):
            context.set_ciphers("nonsense")
        context.set_ciphers("HIGH")
        assert {cipher["name"] for cipher in context.get_ciphers()} >= {"TLS_AES_256_GCM_SHA384"}
        with pytest.raises(NotImplementedError, match=r"groups=\[...'prime256v1'...\]"):
            context.set_ecdh_curve("prime256v1")
        client, _ = shaken(context, local.server())
        assert client.tls.version() == "TLSv1.3"

    def test_groups_instead_of_a_curve(self, local: Lab) -> None:
        groups = ["SecP384r1MLKEM1024", "X25519MLKEM768"]
        client, server = shaken(local.client(groups=groups), local.server(groups=groups))
        assert client.tls.qkd.group == server.tls.qkd.group == "SecP384r1MLKEM1024"


class TestClasses:
    def test_of_sockets_and_objects(self, local: Lab) -> None:
        class Socket(QKDSocket):
            pass

        class Object(QKDObject):
            pass

        class Context(QKDContext):
            sslsocket_class = Socket
            sslobject_class = Object

        context = Context(key_manager=local.manager("client"), peer_sae_id="SAE-B")
        context.load_verify_locations(local.ca.file)
        with connected(context, local.server()) as (client, _):
            assert type(client) is Socket
            assert client.context is context
        client_side, _ = shaken(context, local.server())
        assert type(client_side.tls) is Object

    @pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_no_copies(self, local: Lab, duplicate: Callable[[Any], Any]) -> None:
        """As the standard library: none of these can be duplicated."""
        client, server = shaken(local.client(), local.server())
        with connected(local.client(), local.server()) as (sock, _):
            for one in (local.stock_client(), local.client(), client.tls, server.tls, sock):
                with pytest.raises(TypeError, match="cannot pickle"):
                    duplicate(one)

    def test_repr(self, local: Lab) -> None:
        client, server = shaken(local.client(announced_keys=3), local.server())
        for one in (client.tls, server.tls, client.tls.context, client.tls.qkd):
            assert len(repr(one)) < 1000
            assert "secret" not in repr(one).lower()


class TestReloading:
    def test_while_serving(self, local: Lab) -> None:
        """New bootstraps show the new certificate; an associated client sees the old one until it has to bootstrap."""
        renewed = local.ca.issue("renewed later")
        server, associated = local.server(), local.client()
        open_client, open_server = shaken(associated, server)
        renewed.load_into(server)
        open_server.tls.write(b"still open")
        carry(open_server, open_client)
        assert open_client.tls.read() == b"still open"
        later, _ = shaken(associated, server)
        assert later.tls.qkd.path is HandshakePath.ASSOCIATED
        assert later.tls.getpeercert(True) == local.server_identity.der
        fresh, _ = shaken(local.client(), server)
        assert fresh.tls.getpeercert(True) == renewed.der
        server.forget_associations()
        healed, _ = shaken(associated, server)
        assert healed.tls.qkd.path is HandshakePath.BOOTSTRAP
        assert healed.tls.getpeercert(True) == renewed.der

    def test_of_a_client(self, local: Lab) -> None:
        """Another client certificate is another identity: it makes an association of its own."""
        client, server = local.client(), local.server(mutual=True)
        local.client_identity.load_into(client)
        shaken(client, server)
        renewed = local.ca.issue("renewed client", ["client.example"])
        renewed.load_into(client)
        _, seen = shaken(client, server)
        assert seen.tls.qkd.path is HandshakePath.BOOTSTRAP
        assert seen.tls.getpeercert(True) == renewed.der

    def test_from_many_threads(self, local: Lab, tmp_path: Path) -> None:
        """Settings change while others connect: every connection gets one valid set of them."""
        client, server = local.client(), local.server()
        identities = [local.ca.issue(f"thread-{number}") for number in range(3)]
        stop = threading.Event()

        def change() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                identities[number % 3].load_into(server)
                server.set_alpn_protocols(["h2", "http/1.1"][: 1 + number % 2])
                client.load_verify_locations(local.ca.file)
                client.verify_flags ^= ssl.VERIFY_X509_STRICT
                client.cert_store_stats(), client.session_stats(), client.get_ca_certs(), client.get_ciphers()

        ders = {local.server_identity.der, *(identity.der for identity in identities)}

        def use() -> None:
            for number in range(15):
                if number % 3 == 0:
                    client.forget_associations()
                one, two = shaken(client, server)
                assert one.tls.qkd.protection is Protection.HYBRID
                assert one.tls.getpeercert(True) in ders
                two.tls.write(b"data")
                carry(two, one)
                assert one.tls.read() == b"data"

        with ThreadPoolExecutor(4) as threads:
            changing = threads.submit(change)
            try:
                for done in [threads.submit(use) for _ in range(3)]:
                    done.result(TIMEOUT)
            finally:
                stop.set()
            changing.result(TIMEOUT)


def test_key_logs_are_closed(local: Lab, tmp_path: Path) -> None:
    """One file is open for each compiled context, and no longer."""
    client = local.client()
    client.keylog_filename = str(tmp_path / "keys")
    with Server(local.server()) as server:
        for number in range(5):
            client.set_alpn_protocols([f"a{number}"])
            with server.connect(client) as sock:
                talk(sock)
    del sock, client
    gc.collect()
    open_files = [
        link
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink() and "keys" in str(link.readlink())
    ]
    assert open_files == []
