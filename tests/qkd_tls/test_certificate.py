"""`certificate_dict` against CPython's own decoder, over certificates of many kinds."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509 import (
    DirectoryName,
    DNSName,
    IPAddress,
    NameAttribute,
    OtherName,
    RegisteredID,
    RelativeDistinguishedName,
    RFC822Name,
    UniformResourceIdentifier,
)
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID, ObjectIdentifier

from qkd_tls.certificate import certificate_dict, not_after

pytestmark = pytest.mark.pure

KEY = ec.generate_private_key(ec.SECP256R1())
PLAIN = x509.Name([NameAttribute(NameOID.COMMON_NAME, "plain.example")])
UTF8 = x509.Name(
    [
        NameAttribute(NameOID.COUNTRY_NAME, "CH"),
        NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "Zürich"),
        NameAttribute(NameOID.LOCALITY_NAME, "Genève"),
        NameAttribute(NameOID.ORGANIZATION_NAME, "量子鍵"),
        NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "a=b, c+d"),
        NameAttribute(NameOID.EMAIL_ADDRESS, "a@b.example"),
        NameAttribute(NameOID.DOMAIN_COMPONENT, "example"),
        NameAttribute(NameOID.SERIAL_NUMBER, "0042"),
        NameAttribute(NameOID.USER_ID, "someone"),
        NameAttribute(NameOID.JURISDICTION_COUNTRY_NAME, "CH"),
        NameAttribute(ObjectIdentifier("1.2.3.4.5.6"), "private"),
    ]
)
MULTI_VALUED = x509.Name(
    [
        RelativeDistinguishedName(
            [
                NameAttribute(NameOID.COMMON_NAME, "both"),
                NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "at once"),
                NameAttribute(NameOID.GIVEN_NAME, "X"),
            ]
        ),
        RelativeDistinguishedName([NameAttribute(NameOID.ORGANIZATION_NAME, "alone")]),
    ]
)
BIT_STRING = x509.Name(
    [NameAttribute(NameOID.X500_UNIQUE_IDENTIFIER, b"\x01abb", x509.name._ASN1Type.BitString)]
)
ALTERNATIVES = [
    DNSName("a.example"),
    DNSName("*.b.example"),
    IPAddress(ipaddress.ip_address("192.0.2.1")),
    IPAddress(ipaddress.ip_address("2001:db8::abcd")),
    IPAddress(ipaddress.ip_address("::")),
    IPAddress(ipaddress.ip_address("::ffff:192.0.2.1")),
    RFC822Name("someone@a.example"),
    UniformResourceIdentifier("https://a.example/path?q#f"),
    UniformResourceIdentifier("spiffe://a.example/workload"),
    DirectoryName(UTF8),
    DirectoryName(MULTI_VALUED),
    RegisteredID(ObjectIdentifier("1.2.3.4")),
    RegisteredID(NameOID.COMMON_NAME),
    OtherName(ObjectIdentifier("1.2.3.4"), b"\x0c\x01x"),
]
ACCESS = [
    (AuthorityInformationAccessOID.OCSP, "http://ocsp.a.example/"),
    (AuthorityInformationAccessOID.CA_ISSUERS, "http://ca.a.example/1.der"),
    (AuthorityInformationAccessOID.OCSP, "http://ocsp.b.example:8080/x"),
    (AuthorityInformationAccessOID.CA_ISSUERS, "ldap://ca.a.example/"),
]


def issue(
    *,
    key: CertificateIssuerPrivateKeyTypes = KEY,
    subject: x509.Name = PLAIN,
    issuer: x509.Name = PLAIN,
    serial_number: int = 1,
    not_before: datetime = datetime(2026, 1, 5, 9, 4, 3, tzinfo=UTC),
    not_after: datetime = datetime(2036, 12, 31, 23, 59, 59, tzinfo=UTC),
    extensions: Sequence[x509.ExtensionType] = (),
) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial_number)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    digest = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None
    return builder.sign(key, digest).public_bytes(serialization.Encoding.DER)


def access(entries: Sequence[tuple[ObjectIdentifier, str]]) -> x509.AuthorityInformationAccess:
    return x509.AuthorityInformationAccess(
        [x509.AccessDescription(method, UniformResourceIdentifier(uri)) for method, uri in entries]
    )


def points(*points: Sequence[x509.GeneralName] | None) -> x509.CRLDistributionPoints:
    return x509.CRLDistributionPoints(
        [
            x509.DistributionPoint(names, None, None, None if names else [DirectoryName(PLAIN)])
            for names in points
        ]
    )


CERTIFICATES = {
    "ECDSA": issue(),
    "RSA": issue(key=rsa.generate_private_key(65537, 2048)),
    "Ed25519": issue(key=ed25519.Ed25519PrivateKey.generate()),
    "ML-DSA-65": issue(key=MLDSA65PrivateKey.generate()),
    "UTF-8 names": issue(subject=UTF8, issuer=UTF8),
    "multi-valued RDN": issue(subject=MULTI_VALUED, issuer=UTF8),
    "BIT STRING in a name": issue(subject=BIT_STRING),
    "empty subject": issue(subject=x509.Name([]), extensions=[x509.SubjectAlternativeName(ALTERNATIVES[:1])]),
    "odd number of digits": issue(serial_number=0xABC),
    "even number of digits": issue(serial_number=0x80AB),
    "long serial number": issue(serial_number=2**158 - 5),
    "before 1970": issue(not_before=datetime(1950, 2, 28, tzinfo=UTC)),
    "after 2050": issue(not_after=datetime(2099, 6, 9, 1, 2, 3, tzinfo=UTC)),
    "no expiry": issue(not_after=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    "all alternative names": issue(extensions=[x509.SubjectAlternativeName(ALTERNATIVES)]),
    "access": issue(extensions=[access(ACCESS)]),
    "OCSP only": issue(extensions=[access(ACCESS[:1])]),
    "issuers only": issue(extensions=[access(ACCESS[1:2])]),
    "access by other means": issue(
        extensions=[access([(ObjectIdentifier("1.3.6.1.5.5.7.48.3"), "http://a.example/")])]
    ),
    "access by directory name": issue(
        extensions=[
            x509.AuthorityInformationAccess(
                [x509.AccessDescription(AuthorityInformationAccessOID.OCSP, DirectoryName(PLAIN))]
            )
        ]
    ),
    "CRLs": issue(
        extensions=[
            points(
                [UniformResourceIdentifier("http://crl.a.example/1.crl")],
                [DirectoryName(PLAIN), UniformResourceIdentifier("http://crl.b.example/2.crl")],
                None,
            )
        ]
    ),
    "CRLs without URI": issue(extensions=[points(None)]),
    "everything": issue(
        key=rsa.generate_private_key(65537, 2048),
        subject=UTF8,
        issuer=MULTI_VALUED,
        extensions=[
            x509.BasicConstraints(ca=True, path_length=0),
            x509.SubjectAlternativeName(ALTERNATIVES),
            access(ACCESS),
            points([UniformResourceIdentifier("http://crl.a.example/1.crl")]),
        ],
    ),
} | {
    f"alternative name {number}": issue(extensions=[x509.SubjectAlternativeName([name])])
    for number, name in enumerate(ALTERNATIVES)
}


@pytest.mark.parametrize("der", CERTIFICATES.values(), ids=CERTIFICATES.keys())
def test_is_what_the_standard_library_returns(der: bytes, tmp_path: Path) -> None:
    pem = tmp_path / "certificate.pem"
    pem.write_text(ssl.DER_cert_to_PEM_cert(der))
    expected = cast(Any, ssl)._ssl._test_decode_cert(str(pem))

    result = certificate_dict(der)

    assert result == expected
    assert list(result) == list(expected)


@pytest.mark.parametrize("der", CERTIFICATES.values(), ids=CERTIFICATES.keys())
def test_expiry_is_that_of_the_dictionary(der: bytes) -> None:
    assert not_after(der) == ssl.cert_time_to_seconds(certificate_dict(der)["notAfter"])


@pytest.mark.parametrize("der", [b"", b"\x30\x00", CERTIFICATES["ECDSA"][:-1], CERTIFICATES["ECDSA"] + b"\0"])
def test_what_is_no_certificate(der: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (the text is that of cryptography)
        certificate_dict(der)
    with pytest.raises(ValueError):  # noqa: PT011
        not_after(der)
