"""Certificates and keys of every kind, from every place, on real connections."""

from __future__ import annotations

import datetime
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import mldsa
from cryptography.x509.oid import NameOID

from qkd_tls import HandshakePath, QKDContext, create_default_context
from tests.support.requirements import debian
from tests.support.sockets import (
    KEY_KINDS,
    Authority,
    Identity,
    Lab,
    Server,
    connected,
    now,
    talk,
    write_identity,
)


def client_trusting(local: Lab, **trust: Any) -> QKDContext:
    """A client that trusts this and nothing else."""
    return create_default_context(key_manager=local.manager("client"), peer_sae_id="SAE-B", **trust)


def bare_client(local: Lab) -> QKDContext:
    """A client that trusts nobody yet."""
    return QKDContext(ssl.PROTOCOL_TLS_CLIENT, key_manager=local.manager("client"), peer_sae_id="SAE-B")


def server_with(local: Lab, identity: Identity) -> QKDContext:
    context = local.server()
    identity.load_into(context)
    return context


def works(client: QKDContext, server: QKDContext) -> None:
    """A bootstrap, which uses the certificate, and an association, which does not."""
    with Server(server) as listening:
        for path in (HandshakePath.BOOTSTRAP, HandshakePath.ASSOCIATED):
            with listening.connect(client) as sock:
                talk(sock)
                assert sock.qkd is not None
                assert sock.qkd.path is path


def refused(client: QKDContext, server: QKDContext, text: str) -> None:
    with Server(server) as listening, pytest.raises(ssl.SSLCertVerificationError, match=text):
        listening.connect(client)


class TestKinds:
    @pytest.mark.parametrize("kind", KEY_KINDS)
    def test_of_servers_and_clients(self, local: Lab, tmp_path: Path, kind: str) -> None:
        """The CA, the server and the client all have a key of this kind."""
        ca = Authority(tmp_path, "CA", kind)
        client = client_trusting(local, cafile=str(ca.file))
        ca.issue("client", ["client.example"], kind=kind).load_into(client)
        server = local.server()
        server.load_verify_locations(ca.file)
        server.verify_mode = ssl.CERT_REQUIRED
        ca.issue("server", kind=kind).load_into(server)
        works(client, server)

    def test_real_mutual_tls_to_the_kmes_too(self, lab: Lab) -> None:
        """The one test here with keys from KMEs: an ML-DSA certificate does not disturb their interface."""
        context, server = lab.client(), lab.server()
        lab.ca.issue("post-quantum", kind="ML-DSA-65").load_into(server)
        works(context, server)

    def test_chain(self, local: Lab, tmp_path: Path) -> None:
        """An intermediate CA in the server's file; the client knows the root only."""
        root = Authority(tmp_path, "Root")
        intermediate = Authority(tmp_path, "Intermediate", issuer=root)
        leaf = intermediate.issue("leaf")
        chain = tmp_path / "chain.pem"
        chain.write_text(leaf.pem + intermediate.pem)
        server = local.server()
        server.load_cert_chain(chain, leaf.key_file)
        works(client_trusting(local, cafile=str(root.file)), server)
        # Without it the client cannot get from the leaf to the root.
        server.load_cert_chain(leaf.cert_file, leaf.key_file)
        refused(
            client_trusting(local, cafile=str(root.file)), server, "unable to get local issuer certificate"
        )


class TestFiles:
    @pytest.mark.parametrize(
        "password",
        [
            pytest.param("pass phrase", id="str"),
            pytest.param(b"pass phrase", id="bytes"),
            pytest.param(bytearray(b"pass phrase"), id="bytearray"),
            pytest.param(lambda: "pass phrase", id="callable that gives str"),
            pytest.param(lambda: b"pass phrase", id="callable that gives bytes"),
        ],
    )
    def test_encrypted_key(self, local: Lab, tmp_path: Path, password: Any) -> None:
        ca = Authority(tmp_path)
        identity = ca.issue("encrypted", password=b"pass phrase")
        assert b"ENCRYPTED" in identity.key_file.read_bytes()
        server = local.server()
        server.load_cert_chain(identity.cert_file, identity.key_file, password)
        works(client_trusting(local, cafile=str(ca.file)), server)

    @pytest.mark.parametrize("password", ["wrong", b"", lambda: "wrong", None])
    def test_wrong_password(self, local: Lab, tmp_path: Path, password: Any) -> None:
        identity = Authority(tmp_path).issue("encrypted", password=b"pass phrase")
        with pytest.raises(ssl.SSLError, match="wrong password") as caught:
            local.server().load_cert_chain(identity.cert_file, identity.key_file, password)
        assert type(caught.value) is ssl.SSLError
        assert "pass phrase" not in str(caught.value)

    def test_error_of_the_password_callable_is_the_callers(self, local: Lab, tmp_path: Path) -> None:
        identity = Authority(tmp_path).issue("encrypted", password=b"pass phrase")

        def ask() -> str:
            raise LookupError("no pass phrase today")

        with pytest.raises(LookupError, match="no pass phrase today"):
            local.server().load_cert_chain(identity.cert_file, identity.key_file, ask)

    def test_certificate_and_key_in_one_file(self, local: Lab, tmp_path: Path) -> None:
        ca = Authority(tmp_path)
        identity = ca.issue("both")
        both = tmp_path / "both-in-one.pem"
        both.write_bytes(identity.key_file.read_bytes() + identity.cert_file.read_bytes())
        server = local.server()
        server.load_cert_chain(str(both))
        works(client_trusting(local, cafile=str(ca.file)), server)

    def test_key_of_another_certificate(self, local: Lab, tmp_path: Path) -> None:
        ca = Authority(tmp_path)
        one, other = ca.issue("one"), ca.issue("other")
        with pytest.raises(ssl.SSLError, match="key values mismatch"):
            local.server().load_cert_chain(one.cert_file, other.key_file)

    def test_key_of_another_kind(self, local: Lab, tmp_path: Path) -> None:
        ca = Authority(tmp_path)
        one, other = ca.issue("one"), ca.issue("other", kind="Ed25519")
        with pytest.raises(ssl.SSLError, match="the key may not be the certificate's"):
            local.server().load_cert_chain(one.cert_file, other.key_file)

    def test_missing_files(self, local: Lab, tmp_path: Path) -> None:
        identity = Authority(tmp_path).issue("here")
        nowhere = tmp_path / "nowhere.pem"
        context = local.server()
        with pytest.raises(FileNotFoundError):
            context.load_cert_chain(nowhere)
        with pytest.raises(FileNotFoundError):
            context.load_cert_chain(identity.cert_file, nowhere)
        with pytest.raises(FileNotFoundError):
            context.load_verify_locations(nowhere)

    def test_not_pem(self, local: Lab, tmp_path: Path) -> None:
        identity = Authority(tmp_path).issue("here")
        junk = tmp_path / "junk.pem"
        junk.write_bytes(b"\0junk\xff")
        context = local.server()
        with pytest.raises(ssl.SSLError, match="no certificate"):
            context.load_cert_chain(junk, identity.key_file)
        with pytest.raises(ssl.SSLError, match="cannot read the private key"):
            context.load_cert_chain(identity.cert_file, junk)
        with pytest.raises(ssl.SSLError):
            context.load_verify_locations(junk)

    def test_a_refused_certificate_leaves_the_earlier_one(self, local: Lab, tmp_path: Path) -> None:
        server = local.server()
        other = Authority(tmp_path, "Other").issue("other")
        with pytest.raises(ssl.SSLError):
            server.load_cert_chain(other.cert_file, local.server_identity.key_file)
        works(local.client(), server)

    def test_reload_while_serving(self, local: Lab, tmp_path: Path) -> None:
        """The new certificate is for new bootstraps; associations and open connections go on."""
        renewed = local.ca.issue("renewed")
        server_context, client = local.server(), local.client()
        with Server(server_context) as server, server.connect(client) as before:
            renewed.load_into(server_context)
            talk(before)
            with server.connect(client) as associated:
                talk(associated)
                assert associated.qkd is not None
                assert associated.qkd.path is HandshakePath.ASSOCIATED
                assert associated.getpeercert(binary_form=True) == local.server_identity.der
            with server.connect(local.client()) as after:
                talk(after)
                assert after.getpeercert(binary_form=True) == renewed.der


class TestTrust:
    @pytest.mark.parametrize(
        "cadata",
        [
            pytest.param(lambda ca, other: ca.pem, id="PEM"),
            pytest.param(lambda ca, other: ca.der, id="DER"),
            pytest.param(lambda ca, other: bytearray(ca.der), id="DER in a bytearray"),
            pytest.param(lambda ca, other: other.pem + "between them\n" + ca.pem, id="two in PEM"),
            pytest.param(lambda ca, other: other.der + ca.der, id="two in DER"),
        ],
    )
    def test_cadata(self, local: Lab, tmp_path: Path, cadata: Callable[[Authority, Authority], Any]) -> None:
        other = Authority(tmp_path, "Other")
        works(client_trusting(local, cadata=cadata(local.ca, other)), local.server())

    @pytest.mark.parametrize("cadata", ["", b"", "no certificate", b"\x30", b"\x30\x82\xff\xff", b"junk"])
    def test_cadata_that_is_none(self, local: Lab, cadata: Any) -> None:
        with pytest.raises((ssl.SSLError, ValueError)):
            bare_client(local).load_verify_locations(cadata=cadata)

    def test_capath(self, local: Lab, tmp_path: Path) -> None:
        """A directory with names as `openssl rehash` makes them."""
        if shutil.which("openssl") is None:
            raise debian("openssl").missing()
        command = ["openssl", "x509", "-noout", "-subject_hash", "-in", str(local.ca.file)]
        name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        directory = tmp_path / "certificates"
        directory.mkdir()
        shutil.copy(local.ca.file, directory / f"{name}.0")
        (directory / "README").write_text("not a certificate")
        works(client_trusting(local, capath=str(directory)), local.server())

    def test_nobody(self, local: Lab) -> None:
        refused(bare_client(local), local.server(), "self-signed certificate in certificate chain")

    def test_self_signed_leaf_trusted_directly(self, local: Lab, tmp_path: Path) -> None:
        """What small sites do: no CA at all."""
        key = KEY_KINDS["ECDSA P-256"]()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - datetime.timedelta(hours=1))
            .not_valid_after(now() + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        identity = write_identity(tmp_path / "self-signed", certificate, key)
        server = server_with(local, identity)
        works(client_trusting(local, cadata=identity.pem), server)
        refused(local.client(), server, "self-signed certificate")

    def test_repeated_loading_keeps_associations(self, local: Lab) -> None:
        """urllib3 loads the same file again for each connection."""
        client = local.client()
        with Server(local.server()) as server:
            for path in (HandshakePath.BOOTSTRAP, HandshakePath.ASSOCIATED, HandshakePath.ASSOCIATED):
                client.load_verify_locations(local.ca.file)
                client.verify_mode = ssl.CERT_REQUIRED
                client.check_hostname = True
                with server.connect(client) as sock:
                    assert sock.qkd is not None
                    assert sock.qkd.path is path

    def test_verification_turned_on_later(self, local: Lab, tmp_path: Path) -> None:
        """An association made without looking at the certificate does not serve once it is looked at."""
        client = bare_client(local)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        with Server(local.server()) as server:
            with server.connect(client) as sock:
                talk(sock)
            client.verify_mode = ssl.CERT_REQUIRED
            with pytest.raises(ssl.SSLCertVerificationError):
                server.connect(client)

    def test_common_name_instead_of_an_alternative_name(self, local: Lab, tmp_path: Path) -> None:
        """The standard library's switch, which is on by default."""
        identity = local.ca.issue("localhost", [])
        client = local.client()
        assert client.hostname_checks_common_name
        works(client, server_with(local, identity))
        client.hostname_checks_common_name = False
        refused(client, server_with(local, identity), "Hostname mismatch")

    @pytest.mark.parametrize(
        ("name", "host", "matches"),
        [
            ("*.site.example", "www.site.example", True),
            ("*.site.example", "www.sub.site.example", False),
            ("*.site.example", "site.example", False),
            ("w*.site.example", "www.site.example", False),
            ("*.example", "www.example", False),
        ],
    )
    def test_wildcards(self, local: Lab, name: str, host: str, matches: bool) -> None:
        client, server = local.client(), server_with(local, local.ca.issue("wildcard", [name]))
        if matches:
            with connected(client, server, host) as (sock, _):
                assert sock.qkd is not None
        else:
            with Server(server) as listening, pytest.raises(ssl.SSLCertVerificationError):
                listening.connect(client, host)


def revocation_list(ca: Authority, revoked: Identity, directory: Path) -> Path:
    file = directory / "revoked.pem"
    file.write_text(ca.revoke(revoked))
    return file


class TestRevocation:
    def test_revoked_server(self, local: Lab, tmp_path: Path) -> None:
        revoked = local.ca.issue("revoked")
        client = local.client()
        client.load_verify_locations(revocation_list(local.ca, revoked, tmp_path))
        # As in the standard library: lists are looked at only where the flags say so.
        works(client, server_with(local, revoked))
        client.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        refused(client, server_with(local, revoked), "certificate revoked")
        works(client, local.server())

    def test_revoked_client(self, local: Lab, tmp_path: Path) -> None:
        revoked = local.ca.issue("revoked", ["client.example"])
        client, server = local.client(), local.server(mutual=True)
        revoked.load_into(client)
        server.load_verify_locations(revocation_list(local.ca, revoked, tmp_path))
        server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        with Server(server) as listening:
            with pytest.raises(ssl.SSLError, match="certificate revoked"):
                listening.connect(client)
            error = listening.seen().error
            assert isinstance(error, ssl.SSLCertVerificationError)
            assert error.verify_code == 23

    def test_no_list(self, local: Lab) -> None:
        """Checking without a list fails, rather than letting everybody pass."""
        client = local.client()
        client.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        refused(client, local.server(), "unable to get certificate CRL")

    def test_list_in_the_file_of_the_ca(self, local: Lab, tmp_path: Path) -> None:
        revoked = local.ca.issue("revoked")
        file = tmp_path / "ca-and-list.pem"
        file.write_text(local.ca.pem + local.ca.revoke(revoked))
        client = client_trusting(local, cafile=str(file))
        client.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        refused(client, server_with(local, revoked), "certificate revoked")
        works(client, local.server())


def test_ml_dsa_certificate_is_one(local: Lab) -> None:
    """Makes sure that the test above tests what it says."""
    identity = local.ca.issue("post-quantum", kind="ML-DSA-65")
    key = serialization.load_pem_private_key(identity.key_file.read_bytes(), None)
    assert isinstance(key, mldsa.MLDSA65PrivateKey)
