"""PEM and DER as programs and files give them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_tls.pem import Passphrase, read_chain, read_pem, split_der

pytestmark = pytest.mark.pure


def sequence(content: bytes) -> bytes:
    """A SEQUENCE in DER."""
    if len(content) < 0x80:
        return b"\x30" + bytes([len(content)]) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return b"\x30" + bytes([0x80 | len(size)]) + size + content


def pem(der: bytes, label: str = "CERTIFICATE") -> str:
    return ssl.DER_cert_to_PEM_cert(der).replace(" CERTIFICATE-", f" {label}-")


SEQUENCES = st.lists(
    st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x100, 70_000]).map(bytes).map(sequence), max_size=4
)


@given(SEQUENCES)
def test_concatenated_der_is_split_where_it_was_joined(parts: list[bytes]) -> None:
    assert list(split_der(b"".join(parts))) == parts


@pytest.mark.parametrize("data", [b"\x30", b"\x31\x00", b"junk", sequence(b"") + b"\x00"])
def test_what_is_no_sequence(data: bytes) -> None:
    with pytest.raises(ssl.SSLError, match="does not contain a certificate"):
        list(split_der(data))


@given(SEQUENCES.filter(bool))
def test_pem_text_has_certificates_and_crls_among_other_things(parts: list[bytes]) -> None:
    trusted = pem(parts[0] + b"OpenSSL's settings", "TRUSTED CERTIFICATE")
    others = pem(parts[0], "PRIVATE KEY")
    text = (
        "a comment\n" + others + "".join(map(pem, parts)) + trusted + pem(parts[-1], "X509 CRL") + "the end"
    )
    assert read_pem(text) == ([*parts, parts[0]], [parts[-1]])


def test_a_chain_is_read_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "chain.pem"
    file.write_text(pem(b"leaf") + pem(b"crl", "X509 CRL") + pem(b"CA"))
    assert read_chain(str(file)) == [b"leaf", b"CA"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no PEM", "no certificate in"),
        (pem(b"key", "PRIVATE KEY"), "no certificate in"),
        ("-----BEGIN CERTIFICATE-----\nAAAAA\n-----END CERTIFICATE-----\n", "is damaged"),
    ],
)
def test_what_is_no_chain(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "chain.pem"
    file.write_text(text)
    with pytest.raises(ssl.SSLError, match=rf"PEM lib: .*{problem}"):
        read_chain(str(file))


@pytest.mark.parametrize("password", ["päss", "päss".encode(), bytearray("päss".encode()), lambda: "päss"])
def test_a_password_is_given_as_bytes(password: object) -> None:
    assert Passphrase(password)(1024, False) == "päss".encode()  # type: ignore[arg-type]


def test_a_password_that_is_none() -> None:
    with pytest.raises(TypeError, match="should be a string"):
        Passphrase(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="longer than 1024 bytes"):
        Passphrase("x" * 1025)
    asked = Passphrase(lambda: 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="must return a string"):
        asked()
    assert isinstance(asked.error, TypeError)
