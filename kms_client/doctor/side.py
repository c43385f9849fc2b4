"""The two sides of an examination, and the raw requests to their KMEs."""

from __future__ import annotations

import datetime
import http.client
import json
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12

from kms_client.credentials import FilePath, Password, client_context, hidden
from kms_client.doctor.answers import Reply, read
from kms_client.doctor.tls import TLSFacts
from kms_client.https import HTTPSClient
from kms_client.keys import QKDKey
from kms_client.secure_site import SecureSite

__all__ = ["SAECredentials", "Setting", "Side"]

_MAX_BODY = 1 << 22  # bytes
# An examination goes to any address: whether that is inside the secure site is one of its checks. Keys are thrown away.
_ANYWHERE = SecureSite(["0.0.0.0/0", "::/0"])


@dataclass(frozen=True)
class SAECredentials:
    """An SAE's credentials towards its KME; the files as of `Etsi014Client`."""

    sae_id: str
    ca: FilePath
    cert: FilePath | None = None
    key: FilePath | None = None
    pkcs12: FilePath | None = None
    key_password: Password | None = field(default=None, repr=False)

    def context(self, kms: str) -> ssl.SSLContext:
        """Return a new context that has them loaded.

        Raises:
            ValueError: something is missing.
            KMSAuthenticationError: a file cannot be loaded.
        """
        return client_context(
            cert=self.cert,
            key=self.key,
            ca=self.ca,
            pkcs12=self.pkcs12,
            key_password=hidden(self.key_password),
            kms=kms,
        )

    def certificate(self) -> x509.Certificate:
        """Return the SAE's own certificate.

        Raises:
            ValueError: it has a form that OpenSSL accepts but `cryptography` rejects.
        """
        if self.cert is not None:
            return x509.load_pem_x509_certificate(Path(self.cert).read_bytes())
        password = hidden(self.key_password)
        content = pkcs12.load_pkcs12(Path(self.pkcs12 or "").read_bytes(), password() if password else None)
        assert content.cert is not None  # context() has loaded it
        return content.cert.certificate


class Side:
    """One KME, asked as one SAE.

    Args:
        name: "A" or "B".
        url: of the KME.
        credentials: of the SAE.
        peer_sae_id: the SAE that it shares keys with.
        timeout: seconds for a connection, and for an answer.

    Attributes:
        facts: of its TLS; None until it was reached.
        trusted: True if its certificate was verified.
        status: its last status; None until there was one.
        usable: True if the numbers of its status are there.
        keys: number of keys that it delivered to this SAE as master.
        pending: keys delivered to this SAE as master, that the slave has not fetched yet.
        fetched: IDs of the keys that the slave has fetched.
        delivery_seconds: duration of each delivery.

    Raises:
        ValueError: the URL or an SAE ID is impossible, or something is missing in the credentials.
        KMSAuthenticationError: the credentials cannot be loaded.
    """

    def __init__(
        self, name: str, url: str, credentials: SAECredentials, peer_sae_id: str, *, timeout: float
    ) -> None:
        """Load the credentials; the KME is not contacted yet."""
        for sae_id in (credentials.sae_id, peer_sae_id):
            if sae_id in ("", ".", ".."):
                raise ValueError(f"{sae_id!r} cannot be an SAE ID")
        self.name = name
        self.url = url.rstrip("/")
        self.credentials = credentials
        self.sae_id = credentials.sae_id
        self.peer_sae_id = peer_sae_id
        self.timeout = timeout
        self._client = self._new_client(credentials.context(url))
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or 443
        self._prefix = parts.path.rstrip("/")
        self.facts: TLSFacts | None = None
        self.trusted = False
        self.status: Mapping[str, Any] | None = None
        self.usable = False
        self.keys = 0
        self.pending: list[QKDKey] = []
        self.fetched: list[str] = []
        self.delivery_seconds: list[float] = []

    def ask(
        self,
        call: str,
        *,
        method: str = "GET",
        sae_id: str | None = None,
        query: str = "",
        body: object = None,
        raw: bytes | None = None,
        client: HTTPSClient | None = None,
    ) -> Reply:
        """Send one request.

        Args:
            call: the end of the path: "status", "enc_keys", "dec_keys".
            method: of HTTP.
            sae_id: in the path; the peer's if None.
            query: with its question mark, already percent-encoded.
            body: as JSON; None for none.
            raw: the body as it is, instead of `body`.
            client: with other credentials.

        Raises:
            KMSError: there was no answer.
        """
        data = raw if body is None else json.dumps(body).encode()
        path = self._path(call, self.peer_sae_id if sae_id is None else sae_id) + query
        begun = time.perf_counter()
        answer = (client or self._client).request(method, path, data, _MAX_BODY)
        reply = read(call, answer, time.perf_counter() - begun, self.url)
        if call == "enc_keys" and reply.keys:
            self.keys += len(reply.keys)
            self.delivery_seconds.append(reply.seconds)
        return reply

    def number(self, member: str) -> int:
        """Return a number of the status; 0 if it is missing."""
        value = (self.status or {}).get(member)
        return value if isinstance(value, int) else 0

    def shake_hands(self) -> None:
        """Verify the KME's certificate and name.

        Raises:
            ssl.SSLCertVerificationError: they were refused.
            OSError: no handshake; `ssl.SSLError` with a reason that names an alert if the KME ended it.
        """
        context = self.credentials.context(self.url)
        with (
            socket.create_connection((self.host, self.port), self.timeout) as sock,
            context.wrap_socket(sock, server_hostname=self.host),
        ):
            pass

    def content_type(self) -> str:
        """Return the media type that the KME gives for a status, without parameters.

        Raises:
            OSError, http.client.HTTPException: there was no answer.
        """
        context = self.credentials.context(self.url)
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout, context=context)
        try:
            connection.request("GET", self._prefix + self._path("status", self.peer_sae_id))
            header = connection.getresponse().getheader("Content-Type") or ""
        finally:
            connection.close()
        return header.partition(";")[0].strip().lower()

    def without_certificate(self) -> HTTPSClient:
        """Return a client that has no certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.credentials.ca)
        return self._new_client(context)

    def with_foreign_certificate(self) -> HTTPSClient:
        """Return a client with a copy of the SAE's certificate, signed by a CA that the KME does not know."""
        certificate, key = _impostor(self.credentials.certificate())
        with tempfile.TemporaryDirectory() as directory:
            # A key that opens nothing, if the KME does what it should.
            pem = Path(directory) / "foreign.pem"
            pem.write_bytes(certificate + key)
            return self._new_client(
                SAECredentials(self.sae_id, self.credentials.ca, cert=pem).context(self.url)
            )

    def as_other(self, credentials: SAECredentials) -> HTTPSClient:
        """Return a client of the same KME with the certificate of another SAE."""
        return self._new_client(credentials.context(self.url))

    def close(self) -> None:
        """Close the connections and wipe the remaining keys."""
        self._client.close()
        for key in self.pending:
            key.wipe()

    def _path(self, call: str, sae_id: str) -> str:
        return f"/api/v1/keys/{quote(sae_id, safe='')}/{call}"

    def _new_client(self, context: ssl.SSLContext) -> HTTPSClient:
        return HTTPSClient(
            self.url,
            ssl_context=context,
            site=_ANYWHERE,
            connect_timeout=self.timeout,
            read_timeout=self.timeout,
        )


@dataclass
class Setting:
    """The input of the checks.

    Attributes:
        sides: one KME, or both of a pair.
        other: an SAE at side B for which no key is meant; None if there is none.
        site: the operator's secure site.
        take_keys: True if keys may be taken.
        seconds: time for which the key rate is watched.
        progress: called with a text at each step.
    """

    sides: list[Side]
    other: SAECredentials | None
    site: SecureSite
    take_keys: bool
    seconds: float
    progress: Callable[[str], None]

    def opposite(self, side: Side) -> Side | None:
        """Return the other KME of the pair, if it is examined too."""
        return next((other for other in self.sides if other is not side), None)


def _impostor(original: x509.Certificate) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(original.subject)
        .issuer_name(original.issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
    )
    for extension in original.extensions:
        if extension.oid in (x509.SubjectAlternativeName.oid, x509.ExtendedKeyUsage.oid):
            builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), private
