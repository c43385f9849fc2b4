"""What authenticates a message: tags, signatures, secrets; what they refuse, and what they never say."""

from __future__ import annotations

import datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms_client.emulator.link.authentication.authenticators import (
    Certificates,
    SharedSecret,
    Together,
    check_one_time_tag,
    forgery_bound,
    one_time_tag,
)
from kms_client.emulator.link.authentication.errors import AuthenticationFailed
from tests.support.link_session import NOW, PKI, certificate, new_key, secrets

pytestmark = pytest.mark.pure


def test_one_time_tag_is_poly1305() -> None:
    """RFC 8439, section 2.5.2."""
    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    message = b"Cryptographic Forum Research Group"
    tag = bytes.fromhex("a8061dc1305136c6c22b8baf0c0127a9")
    assert one_time_tag(key, message) == tag
    check_one_time_tag(key, message, tag)
    for wrong in (tag[:-1], tag + b"\0", bytes(16), bytes([tag[0] ^ 1]) + tag[1:]):
        with pytest.raises(AuthenticationFailed, match="one-time tag is wrong"):
            check_one_time_tag(key, message, wrong)


def test_forgery_bound() -> None:
    assert forgery_bound(1) == 8 / 2**106
    assert forgery_bound(16_000_000) == 8_000_000 / 2**106


class TestCertificates:
    @pytest.mark.parametrize("kind", ["P-256", "P-384", "ML-DSA-65"])
    def test_a_signature(self, kind: str) -> None:
        a, b = PKI(kind).both()
        proof = a.sign(b"text")
        b.verify(b"text", proof)
        with pytest.raises(AuthenticationFailed, match="not that of KME-A"):
            b.verify(b"another text", proof)
        with pytest.raises(AuthenticationFailed):
            b.verify(b"text", proof[:-1] + bytes([proof[-1] ^ 1]))

    def test_chain_through_an_issuing_ca(self) -> None:
        pki = PKI()
        issuing_key, key = new_key(), new_key()
        issuing = certificate(issuing_key, "Issuing CA", pki.ca_key, "CA", ca=True)
        leaf = certificate(key, "KME-A", issuing_key, "Issuing CA")
        whole = Certificates(key, [leaf, issuing], [pki.ca], "KME-B", clock=lambda: NOW)
        pki.of("KME-B", "KME-A").verify(b"text", whole.sign(b"text"))
        alone = Certificates(key, [leaf], [pki.ca], "KME-B", clock=lambda: NOW)
        with pytest.raises(AuthenticationFailed, match="the certificate of KME-A does not do"):
            pki.of("KME-B", "KME-A").verify(b"text", alone.sign(b"text"))

    def test_another_ca(self) -> None:
        with pytest.raises(AuthenticationFailed, match="the certificate of KME-A does not do"):
            PKI().of("KME-B", "KME-A").verify(b"text", PKI().of("KME-A", "KME-B").sign(b"text"))

    def test_another_kme_of_the_same_ca(self) -> None:
        pki = PKI()
        key = new_key()
        mallory = Certificates(
            key, [certificate(key, "KME-M", pki.ca_key, "CA")], [pki.ca], "KME-B", clock=lambda: NOW
        )
        with pytest.raises(AuthenticationFailed, match="for KME KME-A"):
            pki.of("KME-B", "KME-A").verify(b"text", mallory.sign(b"text"))

    def test_expired(self) -> None:
        pki = PKI()
        key = new_key()
        leaf = certificate(key, "KME-A", pki.ca_key, "CA", expires=-1)
        old = Certificates(key, [leaf], [pki.ca], "KME-B", clock=lambda: NOW - datetime.timedelta(days=9))
        with pytest.raises(AuthenticationFailed, match="does not do"):
            pki.of("KME-B", "KME-A").verify(b"text", old.sign(b"text"))

    def test_a_key_that_is_not_the_certificates(self) -> None:
        pki = PKI()
        with pytest.raises(ValueError, match="not that of the first certificate"):
            Certificates(new_key(), [pki.certs["KME-A"]], [pki.ca], "KME-B")
        with pytest.raises(ValueError, match="not that of the first certificate"):
            Certificates(new_key(), [], [pki.ca], "KME-B")

    def test_another_kind_of_key(self) -> None:
        pki = PKI()
        key = new_key("P-521")
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        leaf = certificate(key, "KME-A", pki.ca_key, "CA")
        with pytest.raises(ValueError, match=r"neither of ECDSA P-256 or P-384 nor of ML-DSA"):
            Certificates(key, [leaf], [pki.ca], "KME-B")

    @pytest.mark.parametrize("proof", [b"", b"\0\0\0\1", b"\0\0\0\1a" * 3, bytes(12), b"\xff" * 40])
    def test_garbage(self, proof: bytes) -> None:
        with pytest.raises(AuthenticationFailed):
            PKI().of("KME-B", "KME-A").verify(b"text", proof)


class TestSharedSecret:
    def test_a_proof(self) -> None:
        a, b = secrets()
        b.verify(b"text", a.sign(b"text"))
        for text, proof in ((b"other", a.sign(b"text")), (b"text", b""), (b"text", bytes(48))):
            with pytest.raises(AuthenticationFailed, match="do both sides have the same secret"):
                b.verify(text, proof)

    def test_of_another_name(self) -> None:
        with pytest.raises(AuthenticationFailed):
            SharedSecret(bytes(32), "one").verify(b"text", SharedSecret(bytes(32), "two").sign(b"text"))

    def test_too_short(self) -> None:
        with pytest.raises(ValueError, match="31 bytes"):
            SharedSecret(bytes(31))

    def test_it_is_not_shown(self) -> None:
        secret = b"a secret that nobody must ever see..."
        assert "secret that nobody" not in repr(SharedSecret(secret)) + str(vars(SharedSecret).keys())


@pytest.mark.parametrize("broken", [0, 1])
def test_both_of_two_must_hold(broken: int) -> None:
    a = [SharedSecret(bytes([number] * 32)) for number in (1, 2)]
    b = [SharedSecret(bytes([number] * 32)) for number in (1, 2)]
    Together(*a).verify(b"text", Together(*b).sign(b"text"))
    b[broken] = SharedSecret(bytes(32))
    with pytest.raises(AuthenticationFailed):
        Together(*a).verify(b"text", Together(*b).sign(b"text"))
    with pytest.raises(AuthenticationFailed, match="not the parts"):
        Together(*a).verify(b"text", Together(*a).sign(b"text") + b"\0\0\0\1a")
