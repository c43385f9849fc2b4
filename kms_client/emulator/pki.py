"""Certificates for experiments: one CA for the KMS, another for the application's TLS.

The private keys, those of the CAs included, are stored unencrypted in one directory: not for production.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = [
    "KME_ID_A",
    "KME_ID_B",
    "SAE_URI_PREFIX",
    "DemoPKI",
    "add_sae",
    "ensure_demo_pki",
    "write_demo_pki",
]

KME_ID_A = "KME-A"
KME_ID_B = "KME-B"
SAE_URI_PREFIX = "urn:sae:"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VALIDITY = datetime.timedelta(days=365)


@dataclass(frozen=True)
class DemoPKI:
    """Paths of the demo PKI's files, all PEM; `..._key` is the private key of `..._cert`."""

    directory: Path
    sae_a: str  # SAE ID
    sae_b: str

    # For the interfaces of the KMEs.
    @property
    def kms_ca(self) -> Path:
        """CA of the KMEs and SAEs."""
        return self.directory / "kms-ca.pem"

    @property
    def kme_a_cert(self) -> Path:
        """Certificate of side A's KME."""
        return self.directory / "kme-a.pem"

    @property
    def kme_a_key(self) -> Path:
        """Private key of side A's KME."""
        return self.directory / "kme-a.key"

    @property
    def kme_b_cert(self) -> Path:
        """Certificate of side B's KME."""
        return self.directory / "kme-b.pem"

    @property
    def kme_b_key(self) -> Path:
        """Private key of side B's KME."""
        return self.directory / "kme-b.key"

    @property
    def sae_a_cert(self) -> Path:
        """Certificate of side A's SAE."""
        return self.directory / "sae-a.pem"

    @property
    def sae_a_key(self) -> Path:
        """Private key of side A's SAE."""
        return self.directory / "sae-a.key"

    @property
    def sae_b_cert(self) -> Path:
        """Certificate of side B's SAE."""
        return self.directory / "sae-b.pem"

    @property
    def sae_b_key(self) -> Path:
        """Private key of side B's SAE."""
        return self.directory / "sae-b.key"

    # For TLS between applications.
    @property
    def app_ca(self) -> Path:
        """CA of the application's server and client."""
        return self.directory / "app-ca.pem"

    @property
    def server_cert(self) -> Path:
        """Certificate of the application's server."""
        return self.directory / "server.pem"

    @property
    def server_key(self) -> Path:
        """Private key of the application's server."""
        return self.directory / "server.key"

    @property
    def client_cert(self) -> Path:
        """Certificate of the application's client."""
        return self.directory / "client.pem"

    @property
    def client_key(self) -> Path:
        """Private key of the application's client."""
        return self.directory / "client.key"


def write_demo_pki(
    directory: str | os.PathLike[str],
    sae_a: str = "SAE-A",
    sae_b: str = "SAE-B",
    *,
    hosts: Iterable[str] = _LOOPBACK,
) -> DemoPKI:
    """Write a new demo PKI: ECDSA P-256, valid for a year; directory mode 0700, keys 0600.

    Args:
        directory: made if absent; files of an earlier PKI are replaced.
        sae_a: SAE ID of side A: common name and SAN URI (`urn:sae:` and the percent-encoded ID).
        sae_b: SAE ID of side B, in the same way.
        hosts: names and addresses of the KMEs and of the application's server.
    """
    path = Path(directory)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    pki = DemoPKI(path, sae_a, sae_b)
    names = [_general_name(host) for host in hosts]
    kms_ca = _Authority.new("Demo KMS CA", path / "kms-ca")
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    kms_ca.issue(KME_ID_A, names, both, path / "kme-a")
    kms_ca.issue(KME_ID_B, names, both, path / "kme-b")
    for sae_id, stem in ((sae_a, "sae-a"), (sae_b, "sae-b")):
        kms_ca.issue(sae_id, [_sae_uri(sae_id)], both[1:], path / stem)
    app_ca = _Authority.new("Demo application CA", path / "app-ca")
    app_ca.issue("Demo server", names, both[:1], path / "server")
    app_ca.issue("Demo client", [x509.DNSName("client.example")], both[1:], path / "client")
    return pki


def ensure_demo_pki(
    directory: str | os.PathLike[str],
    sae_a: str = "SAE-A",
    sae_b: str = "SAE-B",
    *,
    hosts: Iterable[str] = _LOOPBACK,
) -> DemoPKI:
    """Return the PKI in `directory`, written if absent; safe if several processes do so at once.

    Raises:
        ValueError: the PKI there is for other SAE IDs, or has expired.
    """
    path = Path(directory)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pki = DemoPKI(path, sae_a, sae_b)
        if not pki.client_key.exists():  # the last file written
            return write_demo_pki(path, sae_a, sae_b, hosts=hosts)
    finally:
        os.close(lock)
    for cert, sae_id in ((pki.sae_a_cert, sae_a), (pki.sae_b_cert, sae_b)):
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        if found.not_valid_after_utc < _now():
            raise ValueError(f"the certificates in {path} have expired: remove the directory")
        if _common_name(found) != sae_id:
            raise ValueError(
                f"{cert} is for SAE {_common_name(found)}, not {sae_id}: choose another directory"
            )
    return pki


def add_sae(pki: DemoPKI, sae_id: str, stem: str) -> tuple[Path, Path]:
    """Issue a certificate for another SAE; return paths of certificate and key, `stem`.pem and .key."""
    client = [ExtendedKeyUsageOID.CLIENT_AUTH]
    return _Authority.load(pki.directory / "kms-ca").issue(
        sae_id, [_sae_uri(sae_id)], client, pki.directory / stem
    )


@dataclass
class _Authority:
    key: ec.EllipticCurvePrivateKey
    cert: x509.Certificate

    @classmethod
    def new(cls, name: str, stem: Path) -> _Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        cert = (
            _builder(subject, subject, key, key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        _write(stem, [cert], key)
        return cls(key, cert)

    @classmethod
    def load(cls, stem: Path) -> _Authority:
        key = serialization.load_pem_private_key(stem.with_suffix(".key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # as new() has written it
        return cls(key, x509.load_pem_x509_certificate(stem.with_suffix(".pem").read_bytes()))

    def issue(
        self, name: str, names: list[x509.GeneralName], usages: list[x509.ObjectIdentifier], stem: Path
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        cert = (
            _builder(_name(name), self.cert.subject, key, self.key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _write(stem, [cert], key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    # Key identifiers: without them, strict verification (the default of newer Python versions) refuses.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(hours=1))
        .not_valid_after(_now() + _VALIDITY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(stem: Path, certs: list[x509.Certificate], key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
    cert_path, key_path = stem.with_suffix(".pem"), stem.with_suffix(".key")
    cert_path.write_bytes(b"".join(cert.public_bytes(serialization.Encoding.PEM) for cert in certs))
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    key_path.unlink(missing_ok=True)  # the mode below is for new files only
    with open(os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return cert_path, key_path


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _common_name(cert: x509.Certificate) -> str:
    return str(cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _sae_uri(sae_id: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(SAE_URI_PREFIX + quote(sae_id, safe=""))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
