"""The only module that touches OpenSSL: settings, handshakes, errors in the standard library's classes, callbacks."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from OpenSSL import SSL

from qkd_tls import openssl
from qkd_tls.hybrid import EXPORTER_LABEL, KDF
from qkd_tls.openssl import (
    DEFAULT_CIPHER_SUITES,
    Credentials,
    TLSConnection,
    TLSContext,
    TLSSettings,
    VerificationFailed,
    openssl_version,
)
from qkd_tls.psk import PSK
from tests.support.memory import (
    HOST,
    HYBRID_GROUP,
    authority,
    compiled,
    credentials,
    der,
    only_alerts,
    pki,
    write_all,
)

pytestmark = pytest.mark.pure


def client_settings(**changes: Any) -> TLSSettings:
    defaults = {"trusted": (pki().ca,), "verify_mode": ssl.CERT_REQUIRED, "check_hostname": True}
    return TLSSettings(server_side=False, **{**defaults, **changes})


def server_settings(**changes: Any) -> TLSSettings:
    return TLSSettings(server_side=True, **{"credentials": pki().server, **changes})


def client(settings: TLSSettings | None = None, host: str | None = HOST, **named: Any) -> TLSConnection:
    return TLSConnection(compiled(settings or client_settings()), server_hostname=host, **named)


def server(settings: TLSSettings | None = None, **named: Any) -> TLSConnection:
    return TLSConnection(compiled(settings or server_settings()), **named)


def shake(one: TLSConnection, other: TLSConnection) -> tuple[TLSConnection, TLSConnection]:
    """A handshake; whoever fails raises, after the other has had its alert."""
    done = {one: False, other: False}
    while not all(done.values()):
        for here, there in ((one, other), (other, one)):
            try:
                done[here] = done[here] or here.handshake()
            finally:
                there.feed(here.take())
    return one, other


def connected(**named: Any) -> tuple[TLSConnection, TLSConnection]:
    return shake(client(**named), server())


def carry(here: TLSConnection, there: TLSConnection) -> None:
    there.feed(here.take())


def psk(kdf: KDF = KDF.SHA384, secret: bytes = b"s", identity: bytes = b"identity") -> PSK:
    return PSK(identity, bytearray(secret * kdf.psk_size), kdf, "key-1")


# --- settings


class TestSettings:
    def test_equal_settings_have_equal_fingerprints(self) -> None:
        assert TLSContext(client_settings()).fingerprint == TLSContext(client_settings()).fingerprint
        for other in (
            client_settings(trusted=()),
            client_settings(check_hostname=False),
            client_settings(groups=("X25519",)),
            client_settings(credentials=pki().client),
        ):
            assert TLSContext(other).fingerprint != TLSContext(client_settings()).fingerprint

    def test_a_fingerprint_does_not_tell_of_the_private_key(self) -> None:
        """Two readings of the same files are the same settings."""
        again = Credentials(pki().client.chain, pki().server.key)
        assert again == pki().client
        assert "PKey" not in repr(client_settings(credentials=again))

    def test_a_group_that_openssl_does_not_know(self) -> None:
        with pytest.raises(ssl.SSLError, match=r"OpenSSL .* does not know one of the groups X25519MLKEM769"):
            TLSContext(client_settings(groups=("X25519MLKEM769",)))
        connected()

    def test_a_cipher_suite_that_openssl_does_not_know(self) -> None:
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            TLSContext(client_settings(cipher_suites=("TLS_NONE_OF_THEM",)))

    @pytest.mark.parametrize("member", ["trusted", "crls"])
    def test_der_that_is_none(self, member: str) -> None:
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            TLSContext(client_settings(**{member: (b"not DER",)}))

    def test_a_chain_that_is_none(self) -> None:
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            TLSContext(server_settings(credentials=Credentials((b"not DER",), pki().server.key)))
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            TLSContext(
                server_settings(credentials=Credentials((*pki().server.chain, b"not DER"), pki().server.key))
            )

    def test_the_same_trust_anchor_twice(self) -> None:
        TLSContext(client_settings(trusted=(pki().ca, pki().ca)))

    def test_version(self) -> None:
        assert openssl_version().startswith("OpenSSL ")


class TestCredentials:
    @staticmethod
    def leaf() -> trustme.LeafCert:
        return authority().issue_cert(HOST)

    def test_the_key_of_another_certificate(self) -> None:
        leaf, other = self.leaf(), self.leaf()
        with pytest.raises(ssl.SSLError, match="the key may not be the certificate's"):
            Credentials.load([der(leaf.cert_chain_pems[0].bytes())], other.private_key_pem.bytes(), None)

    @pytest.mark.parametrize(
        "pem", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
    )
    def test_a_key_that_is_none(self, pem: bytes) -> None:
        with pytest.raises(ssl.SSLError, match="cannot read the private key"):
            Credentials.load(pki().server.chain, pem, None)

    def test_an_encrypted_key(self) -> None:
        leaf = self.leaf()
        key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
        pem = key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
        )
        chain = [der(leaf.cert_chain_pems[0].bytes())]
        assert Credentials.load(chain, pem, lambda *_: b"secret").chain == tuple(chain)
        for password in (None, lambda *_: b"wrong"):
            with pytest.raises(ssl.SSLError, match="wrong password, or not PEM"):
                Credentials.load(chain, pem, password)
        plain = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        assert Credentials.load(chain, plain, None)

    def test_an_intermediate_ca(self) -> None:
        root = trustme.CA()
        leaf = root.create_child_ca().issue_cert(HOST)
        chain = credentials(leaf)
        assert len(chain.chain) == 2
        settings = client_settings(trusted=(der(root.cert_pem.bytes()),))
        shake(client(settings), server(server_settings(credentials=chain)))


# --- handshakes


class TestHandshake:
    def test_what_both_sides_agree_on(self) -> None:
        one, other = connected()
        for side in (one, other):
            assert side.group == HYBRID_GROUP
            assert side.cipher == ("TLS_AES_256_GCM_SHA384", "TLSv1.3", 256)
            assert side.alpn is None
            assert not side.psk_accepted
        assert one.peer_certificate == pki().server.chain[0]
        assert other.peer_certificate is None

    @pytest.mark.parametrize(
        "group", ["X25519MLKEM768", "SecP256r1MLKEM768", "MLKEM768", "X25519", "secp256r1", "X448"]
    )
    def test_groups_have_one_spelling(self, group: str) -> None:
        groups = {"groups": (group,)}
        one, other = shake(client(client_settings(**groups)), server(server_settings(**groups)))
        assert (one.group, other.group) == (group, group)

    def test_exports_are_equal(self) -> None:
        one, other = connected()
        assert one.export(EXPORTER_LABEL, 48) == other.export(EXPORTER_LABEL, 48)
        assert len(one.export(EXPORTER_LABEL, 32, b"context")) == 32
        exports = {
            connection.export(label, 48, context)
            for connection in (one, other)
            for label, context in ((EXPORTER_LABEL, b""), (b"another", b""), (EXPORTER_LABEL, b"context"))
        }
        assert len(exports) == 3
        assert connected()[0].export(EXPORTER_LABEL, 48) not in exports

    def test_no_export_before_the_end(self) -> None:
        with pytest.raises(ssl.SSLError):
            client().export(EXPORTER_LABEL, 48)

    def test_nothing_is_resumed(self) -> None:
        """OpenSSL's servers send tickets all the same; see docs/protocol.md."""
        one, other = connected()
        carry(other, one)
        with pytest.raises(ssl.SSLWantReadError):
            one.read(10)
        assert not shake(client(), server())[0].psk_accepted

    def test_only_tls_1_3(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        old = context.wrap_bio(incoming, outgoing)
        with pytest.raises(ssl.SSLWantReadError):
            old.do_handshake()
        new = server()
        new.feed(outgoing.read())
        with pytest.raises(ssl.SSLError, match="unsupported protocol") as caught:
            new.handshake()
        assert caught.value.reason == "UNSUPPORTED_PROTOCOL"


class TestALPN:
    def test_selected(self) -> None:
        seen: list[tuple[bytes, ...]] = []

        def select(connection: TLSConnection, offered: tuple[bytes, ...]) -> bytes:
            assert connection is other
            seen.append(offered)
            return offered[1]

        other = server(select_alpn=select)
        one, _ = shake(client(alpn=("h2", "http/1.1")), other)
        assert seen == [(b"h2", b"http/1.1")]
        assert one.alpn == other.alpn == "http/1.1"

    def test_none_in_common(self) -> None:
        one, other = shake(client(alpn=("h2",)), server(select_alpn=lambda *_: None))
        assert (one.alpn, other.alpn) == (None, None)

    def test_no_choice(self) -> None:
        one, other = shake(client(alpn=("h2",)), server())
        assert (one.alpn, other.alpn) == (None, None)

    def test_a_server_may_not_select_what_was_not_offered(self) -> None:
        with pytest.raises(ssl.SSLError, match="bad extension"):
            shake(client(alpn=("h2",)), server(select_alpn=lambda *_: b"other"))


class TestHostNames:
    def test_the_wrong_name(self) -> None:
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            shake(client(host="other.example"), server())
        error = caught.value
        assert error.verify_code == VerificationFailed.HOSTNAME_MISMATCH
        assert error.verify_message == "Hostname mismatch, certificate is not valid for 'other.example'."
        assert "certificate verify failed: Hostname mismatch" in str(error)
        assert (error.library, error.reason) == ("SSL", "CERTIFICATE_VERIFY_FAILED")

    @pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
    def test_an_address(self, address: str) -> None:
        shake(client(host=address), server())

    @pytest.mark.parametrize("address", ["127.0.0.2", "::2"])
    def test_the_wrong_address(self, address: str) -> None:
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            shake(client(host=address), server())
        assert caught.value.verify_code == VerificationFailed.IP_ADDRESS_MISMATCH
        assert (
            caught.value.verify_message == f"IP address mismatch, certificate is not valid for '{address}'."
        )

    def test_not_checked(self) -> None:
        settings = client_settings(check_hostname=False)
        for host in ("other.example", "127.0.0.9", None):
            shake(client(settings, host), server())

    def test_too_long(self) -> None:
        with pytest.raises(ssl.SSLError):
            client(host="x" * 256)

    def test_not_ascii(self) -> None:
        with pytest.raises(UnicodeEncodeError):
            client(host="bücher.example")

    @pytest.mark.parametrize(("fallback", "accepted"), [(False, False), (True, True)])
    def test_the_common_name_counts_only_where_it_is_asked_for(self, fallback: bool, accepted: bool) -> None:
        leaf = authority().issue_cert("someone@mail.example", common_name="old.example")
        settings = client_settings(common_name_fallback=fallback)
        with contextlib.nullcontext() if accepted else pytest.raises(ssl.SSLCertVerificationError):
            shake(client(settings, "old.example"), server(server_settings(credentials=credentials(leaf))))

    @pytest.mark.parametrize(
        ("host", "accepted"), [("a.wild.example", True), ("wild.example", False), ("a.b.wild.example", False)]
    )
    def test_wildcards(self, host: str, accepted: bool) -> None:
        leaf = credentials(authority().issue_cert("*.wild.example"))
        with contextlib.nullcontext() if accepted else pytest.raises(ssl.SSLCertVerificationError):
            shake(client(host=host), server(server_settings(credentials=leaf)))


class TestVerification:
    def test_an_unknown_ca(self) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get") as caught:
            shake(client(client_settings(trusted=())), server())
        assert caught.value.verify_code not in list(VerificationFailed)

    def test_an_expired_certificate(self) -> None:
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        leaf = authority().issue_cert(HOST, not_after=yesterday)
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
            shake(client(), server(server_settings(credentials=credentials(leaf))))

    def test_the_client_tells_the_server(self) -> None:
        one, other = client(client_settings(trusted=())), server()
        with contextlib.suppress(ssl.SSLCertVerificationError):
            shake(one, other)
        carry(one, other)
        with pytest.raises(ssl.SSLError, match="unknown ca") as caught:
            other.handshake()
        assert caught.value.reason == "TLSV1_ALERT_UNKNOWN_CA"

    def test_no_check_at_all(self) -> None:
        shake(client(client_settings(trusted=(), verify_mode=ssl.CERT_NONE, check_hostname=False)), server())

    @pytest.mark.parametrize("mode", [ssl.CERT_OPTIONAL, ssl.CERT_REQUIRED])
    def test_mutual_tls(self, mode: ssl.VerifyMode) -> None:
        settings = server_settings(trusted=(pki().ca,), verify_mode=mode)
        _, other = shake(client(client_settings(credentials=pki().client)), server(settings))
        assert other.peer_certificate == pki().client.chain[0]

    def test_a_missing_client_certificate(self) -> None:
        shake(client(), server(server_settings(trusted=(pki().ca,), verify_mode=ssl.CERT_OPTIONAL)))
        with pytest.raises(ssl.SSLError, match="peer did not return a certificate") as caught:
            shake(client(), server(server_settings(trusted=(pki().ca,), verify_mode=ssl.CERT_REQUIRED)))
        assert caught.value.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"

    @staticmethod
    def revocation_list(*revoked: bytes) -> bytes:
        """A CRL of the CA of these tests."""
        ca = authority()
        now = datetime.datetime.now(datetime.UTC)
        issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(now - datetime.timedelta(hours=1))
            .next_update(now + datetime.timedelta(days=1))
        )
        for leaf in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(x509.load_der_x509_certificate(leaf).serial_number)
                .revocation_date(now - datetime.timedelta(hours=1))
                .build()
            )
        key: Any = load_pem_private_key(ca.private_key_pem.bytes(), None)
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)

    def test_revocation(self) -> None:
        flags = int(ssl.VERIFY_CRL_CHECK_LEAF)
        good = client_settings(crls=(self.revocation_list(),), verify_flags=flags)
        bad = client_settings(crls=(self.revocation_list(pki().server.chain[0]),), verify_flags=flags)
        shake(client(good), server())
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate revoked"):
            shake(client(bad), server())
        with pytest.raises(ssl.SSLCertVerificationError, match="unable to get certificate CRL"):
            shake(client(client_settings(verify_flags=flags)), server())


# --- the external PSK


class TestPSK:
    @pytest.mark.parametrize("kdf", list(KDF))
    def test_accepted(self, kdf: KDF) -> None:
        suites = {"cipher_suites": DEFAULT_CIPHER_SUITES[kdf]}
        one, other = shake(client(client_settings(**suites), psk=psk(kdf)), server(psk=psk(kdf)))
        for side in (one, other):
            assert side.psk_accepted
            assert side.cipher_suite in kdf.cipher_suites
            assert side.group == HYBRID_GROUP
            # No certificate was sent.
            assert side.peer_certificate is None

    @pytest.mark.parametrize("theirs", [None, psk(identity=b"another")], ids=["none", "another"])
    def test_not_known_to_the_server(self, theirs: PSK | None) -> None:
        one, other = shake(client(psk=psk()), server(psk=theirs))
        assert not one.psk_accepted
        assert not other.psk_accepted
        assert one.peer_certificate == pki().server.chain[0]

    def test_the_wrong_secret(self) -> None:
        one, other = client(psk=psk()), server(psk=psk(secret=b"t"))
        with pytest.raises(ssl.SSLError, match="binder does not verify") as caught:
            shake(one, other)
        assert caught.value.reason == "BINDER_DOES_NOT_VERIFY"
        carry(other, one)
        with pytest.raises(ssl.SSLError) as caught:
            one.handshake()
        assert caught.value.reason == "TLSV1_ALERT_DECRYPT_ERROR"

    def test_after_a_hello_retry_request(self) -> None:
        late = client_settings(groups=("X25519", HYBRID_GROUP))
        one, other = shake(client(late, psk=psk()), server(psk=psk()))
        assert one.psk_accepted
        assert other.psk_accepted
        assert one.group == HYBRID_GROUP

    def test_under_mutual_tls(self) -> None:
        """TLS 1.3 has no CertificateRequest in a handshake with an external PSK."""
        settings = server_settings(trusted=(pki().ca,), verify_mode=ssl.CERT_REQUIRED)
        one, other = shake(client(psk=psk()), server(settings, psk=psk()))
        assert one.psk_accepted
        assert other.psk_accepted

    def test_the_connection_forgets_it(self) -> None:
        one, other = shake(client(psk=psk()), server(psk=psk()))
        assert one._psk is None
        assert other._psk is None

    def test_a_suite_that_does_not_go_with_it(self) -> None:
        """A secret of the wrong size for its hash is never used."""
        broken = PSK(b"identity", bytearray(1000), KDF.SHA384, "key-1")
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            shake(client(psk=broken), server())


class TestCallbacks:
    """They serve the connection whose handshake this thread runs, and no other SSL object."""

    def test_outside_a_handshake(self) -> None:
        one = client(psk=psk())
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            openssl._current(one._raw)

    def test_another_connection_or_another_thread(self) -> None:
        """Asked in the middle of a handshake, from inside a callback."""
        stranger = client(psk=psk())
        found: list[TLSConnection | ssl.SSLError] = []

        def look(connection: TLSConnection) -> None:
            try:
                found.append(openssl._current(connection._raw))
            except ssl.SSLError as error:
                found.append(error)

        def select(connection: TLSConnection, _offered: tuple[bytes, ...]) -> None:
            look(connection)
            look(stranger)
            thread = threading.Thread(target=look, args=(connection,))
            thread.start()
            thread.join()

        _, other = shake(client(alpn=("h2",)), server(select_alpn=select))
        mine, strangers, in_a_thread = found
        assert mine is other
        assert isinstance(strangers, ssl.SSLError)
        assert isinstance(in_a_thread, ssl.SSLError)

    def test_a_handshake_behind_our_back_gets_no_key(self) -> None:
        """OpenSSL is called without saying whose handshake it is: it fails, and nothing is sent."""
        one = client(psk=psk())
        assert openssl._lib.SSL_do_handshake(one._raw) != 1
        with pytest.raises(ssl.SSLError, match="OpenSSL failed"):
            openssl._raise_kept()
        assert b"identity" not in one.take()
        openssl._lib.ERR_clear_error()

    def test_a_choice_of_alpn_that_fails_is_fatal(self) -> None:
        def broken(*_: object) -> bytes:
            raise ValueError("a bug")

        one, other = client(alpn=("h2",)), server(select_alpn=broken)
        one.handshake()
        carry(one, other)
        with pytest.raises(ValueError, match="a bug"):
            other.handshake()
        # The peer is told.
        carry(other, one)
        with pytest.raises(ssl.SSLError) as caught:
            one.handshake()
        assert caught.value.reason == "TLSV1_ALERT_NO_APPLICATION_PROTOCOL"


# --- errors


class TestErrors:
    def test_wants_to_read(self) -> None:
        one, _ = connected()
        with pytest.raises(ssl.SSLWantReadError) as caught:
            one.read(1)
        assert caught.value.errno == ssl.SSL_ERROR_WANT_READ

    def test_close_notify(self) -> None:
        one, other = connected()
        assert not one.shutdown()
        assert not other.close_notify_received
        carry(one, other)
        with pytest.raises(ssl.SSLZeroReturnError):
            other.read(1)
        assert other.close_notify_received
        assert other.shutdown()
        carry(other, one)
        with pytest.raises(ssl.SSLZeroReturnError):
            one.read(1)
        assert one.shutdown()

    def test_shutdown_in_the_middle_of_a_handshake(self) -> None:
        one = client()
        one.handshake()
        with pytest.raises(ssl.SSLError) as caught:
            one.shutdown()
        assert caught.value.reason == "SHUTDOWN_WHILE_IN_INIT"

    def test_writing_after_shutdown(self) -> None:
        one, _ = connected()
        one.shutdown()
        with pytest.raises(ssl.SSLError) as caught:
            one.write(b"late")
        assert caught.value.reason == "PROTOCOL_IS_SHUTDOWN"

    def test_a_damaged_record(self) -> None:
        one, other = connected()
        one.write(b"hello")
        flight = bytearray(one.take())
        flight[-1] ^= 1
        other.feed(bytes(flight))
        with pytest.raises(ssl.SSLError) as caught:
            other.read(10)
        assert (caught.value.library, caught.value.reason) == ("SSL", "DECRYPTION_FAILED_OR_BAD_RECORD_MAC")
        # The alert, encrypted.
        assert only_alerts(other.take())

    def test_the_error_queue_is_left_empty(self) -> None:
        """An error of one connection is not taken for one of the next in the same thread."""
        self.test_a_damaged_record()
        assert openssl._lib.ERR_peek_error() == 0
        connected()

    def test_errors_without_a_text(self) -> None:
        openssl._lib.ERR_clear_error()
        assert openssl._drain_error_queue() == ""
        with pytest.raises(ssl.SSLError, match="no reason given"):
            openssl._require(False)

    def test_one_that_pyopenssl_raises(self) -> None:
        assert openssl._reason(SSL.Error([("SSL", "", "one"), ("SSL", "", "two")])) == "one; two"
        assert openssl._reason(SSL.Error()) == ""
        assert openssl._reason(ValueError("text")) == ""


class TestBindings:
    def test_what_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(openssl, "_lib", object())
        with pytest.raises(
            ImportError, match=r"SSL_CTX_set_psk_use_session_callback.*install those versions"
        ):
            openssl._check_bindings()

    def test_nothing_is_missing(self) -> None:
        openssl._check_bindings()


# --- data


class TestData:
    def test_read_write_pending(self) -> None:
        one, other = connected()
        assert one.write(b"hello") == 5
        carry(one, other)
        assert other.read(2) == b"he"
        assert other.pending == 3
        buffer = bytearray(10)
        assert other.read_into(buffer) == 3
        assert buffer[:3] == b"llo"
        assert other.pending == 0

    def test_much(self) -> None:
        one, other = connected()
        data = os.urandom(100_000)
        write_all(one, data)
        carry(one, other)
        received = b""
        while len(received) < len(data):
            received += other.read(1 << 17)
        assert received == data
        assert one.write_all(memoryview(data), 0) == len(data)
        assert one.write_all(memoryview(data), 99_990) == len(data)

    def test_take_and_feed_nothing(self) -> None:
        one = client()
        assert one.take() == b""
        one.feed(b"")
        assert not one.handshake()
        assert one.take() != b""
        assert one.take() == b""

    def test_behind_a_ticket(self) -> None:
        """In memory, a read goes on behind what is no data; no later bytes would wake anybody up."""
        one, other = client(), server()
        one.handshake()
        for here, there in ((one, other), (other, one)) * 2:
            carry(here, there)
            there.handshake()
        # The server's tickets have come with its last flight.
        other.write(b"hello")
        carry(other, one)
        assert one.read(10) == b"hello"


class TestAttached:
    """From memory to a socket."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]]:
        one, other = connected()
        carry(other, one)
        with pytest.raises(ssl.SSLWantReadError):
            one.read(1)
        left, right = socket.socketpair()
        with left, right:
            one.attach(left.fileno())
            other.attach(right.fileno())
            yield one, other, left, right

    def test_data(self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]) -> None:
        one, other, _, _ = pair
        assert one.attached
        one.write(b"hello")
        assert other.read(10) == b"hello"

    def test_wants(self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]) -> None:
        one, other, left, right = pair
        left.setblocking(False)
        right.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            other.read(1)
        data = bytes(1 << 16)

        def fill_the_socket() -> None:
            while True:
                one.write(data)

        with pytest.raises(ssl.SSLWantWriteError):
            fill_the_socket()
        with pytest.raises(ssl.SSLWantWriteError):
            one.write_all(memoryview(data), 0)

    def test_a_read_takes_one_record(
        self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]
    ) -> None:
        """What is behind it stays in the socket, where `select` sees it."""
        one, other, _, right = pair
        right.setblocking(False)
        data = os.urandom(3 << 14)
        write_all(one, data)
        buffer = bytearray(1 << 20)
        for number in range(3):
            assert other.read_into(buffer) == 1 << 14
            assert buffer[: 1 << 14] == data[number << 14 : (number + 1) << 14]
            assert other.pending == 0
            assert bool(select.select([right], [], [], 0)[0]) is (number < 2)

    def test_an_error_behind_a_full_record_waits_for_the_next_read(
        self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]
    ) -> None:
        one, other, left, _ = pair
        write_all(one, bytes(1 << 14))
        left.shutdown(socket.SHUT_WR)
        assert len(other.read(1 << 20)) == 1 << 14
        with pytest.raises(ssl.SSLEOFError):
            other.read(1)

    def test_a_full_transport_takes_a_part(
        self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]
    ) -> None:
        one, other, left, right = pair
        left.setblocking(False)
        right.setblocking(False)
        data = os.urandom(1 << 22)
        position = 0
        while not one.clogged:
            position = one.write_all(memoryview(data), position)
        assert 0 < position < len(data)
        received = bytearray()
        while position < len(data) or len(received) < len(data):
            with contextlib.suppress(ssl.SSLWantReadError):
                while True:
                    received += other.read(1 << 20)
            if position < len(data):
                position = one.write_all(memoryview(data), position)
        assert received == data

    def test_a_transport_that_ends_without_close_notify(
        self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]
    ) -> None:
        one, _, _, right = pair
        right.close()
        with pytest.raises(ssl.SSLEOFError):
            one.read(1)

    def test_a_transport_that_breaks(
        self, pair: tuple[TLSConnection, TLSConnection, socket.socket, socket.socket]
    ) -> None:
        one, _, _, right = pair
        right.close()
        with pytest.raises(BrokenPipeError) as caught:
            one.write(b"hello")
        assert caught.value.errno == errno.EPIPE

    def test_a_descriptor_that_is_none(self) -> None:
        one, _ = connected()
        one.attach(10**6)
        with pytest.raises(OSError, match="Bad file descriptor"):
            one.read(1)
