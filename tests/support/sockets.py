"""What the tests over real sockets share: certificates, a server in threads, and a proxy that listens in."""

from __future__ import annotations

import base64
import collections
import contextlib
import datetime
import ipaddress
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kms_client import Etsi014Client, KeyManager, KMSStatus, LocalKeyManager, QKDKey
from kms_client.emulator import DemoPKI, RunningPair
from qkd_tls import QKDContext, QKDInfo, QKDSocket, create_default_context
from tests.support.patience import PATIENCE

TIMEOUT = PATIENCE

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1", "server.example", "other.example")

PrivateKey = (
    ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | mldsa.MLDSA65PrivateKey
)

KEY_KINDS: dict[str, Callable[[], PrivateKey]] = {
    "ECDSA P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RSA-2048": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "ML-DSA-65": mldsa.MLDSA65PrivateKey.generate,
}


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


# --- certificates


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, and the files in which they are."""

    certificate: x509.Certificate
    key: PrivateKey
    cert_file: Path
    key_file: Path

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def load_into(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self.cert_file, self.key_file)


class Authority:
    """A CA whose certificates also pass the strict checks of newer Python versions."""

    def __init__(
        self,
        directory: Path,
        name: str = "Test CA",
        kind: str = "ECDSA P-256",
        issuer: Authority | None = None,
    ) -> None:
        self._directory = directory
        self._name = name
        self.key = KEY_KINDS[kind]()
        issuer = issuer or self
        builder = issuer._builder(self._subject(name), self.key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.certificate = issuer._signed(builder.add_extension(_key_usage(ca=True), critical=True))
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.der = self.certificate.public_bytes(serialization.Encoding.DER)
        self.file = directory / f"{name}.pem"
        self.file.write_text(self.pem)

    def issue(
        self,
        name: str = "server",
        hosts: Iterable[str] = LOOPBACK_NAMES,
        *,
        kind: str = "ECDSA P-256",
        start: datetime.timedelta = datetime.timedelta(hours=-1),
        end: datetime.timedelta = datetime.timedelta(days=1),
        password: bytes | None = None,
    ) -> Identity:
        """A certificate for servers and clients, valid from `start` to `end` as seen from now."""
        key = KEY_KINDS[kind]()
        builder = self._builder(self._subject(name), key.public_key(), start, end)
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(ca=False), True),
            (
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                False,
            ),
        ]
        if names := [_general_name(host) for host in hosts]:
            extensions.append((x509.SubjectAlternativeName(names), False))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return write_identity(self._directory / name, self._signed(builder), key, password)

    def revoke(self, *identities: Identity) -> str:
        """A revocation list with these certificates, PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now() - datetime.timedelta(hours=1))
            .next_update(now() + datetime.timedelta(days=1))
            .add_extension(self._authority_key_identifier(), critical=False)
            .add_extension(x509.CRLNumber(1), critical=False)
        )
        for identity in identities:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(identity.certificate.serial_number)
                .revocation_date(now() - datetime.timedelta(minutes=1))
                .build()
            )
        return builder.sign(self.key, _hash_for(self.key)).public_bytes(serialization.Encoding.PEM).decode()

    def _builder(
        self,
        subject: x509.Name,
        public_key: Any,
        start: datetime.timedelta = datetime.timedelta(hours=-1),
        end: datetime.timedelta = datetime.timedelta(days=1),
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject(self._name))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() + start)
            .not_valid_after(now() + end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(self._authority_key_identifier(), critical=False)
        )

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())

    def _signed(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        return builder.sign(self.key, _hash_for(self.key))

    @staticmethod
    def _subject(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def write_identity(
    stem: Path, certificate: x509.Certificate, key: PrivateKey, password: bytes | None = None
) -> Identity:
    cert_file, key_file = stem.with_suffix(".pem"), stem.with_suffix(".key")
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
        )
    )
    return Identity(certificate, key, cert_file, key_file)


def _hash_for(key: PrivateKey) -> hashes.SHA256 | None:
    return hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) else None


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


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# --- contexts


@dataclass
class Lab:
    """Two sites: the client's (SAE-A) and the server's (SAE-B), each with its KME, and a CA that both trust."""

    ca: Authority
    server_identity: Identity
    client_identity: Identity
    kmes: RunningPair | None = None
    managers: Mapping[str, KeyManager] = field(default_factory=dict)
    _close: list[Callable[[], None]] = field(default_factory=list)

    @property
    def pki(self) -> DemoPKI:
        """Certificates for the KMEs' interfaces."""
        assert self.kmes is not None
        return self.kmes.pki

    def manager(self, side: str, **settings: Any) -> Any:
        """A client of one site's KME; with `settings` a new one, closed at the end of the test."""
        if not settings:
            return self.managers[side]
        assert self.kmes is not None
        manager = self.kmes.client("a" if side == "client" else "b", **settings)
        self._close.append(manager.close)
        return manager

    def client(self, **settings: Any) -> QKDContext:
        """A client's context; `settings` are those of QKDContext."""
        self._default_manager("client", settings)
        if settings.get("policy") != "off":
            settings.setdefault("peer_sae_id", "SAE-B")
        return create_default_context(cafile=str(self.ca.file), **settings)

    def server(self, *, mutual: bool = False, **settings: Any) -> QKDContext:
        """A server's context; `mutual` asks the client for a certificate."""
        self._default_manager("server", settings)
        context = create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.ca.file), **settings)
        self.server_identity.load_into(context)
        context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
        return context

    def stock_client(self) -> ssl.SSLContext:
        """The standard library's TLS."""
        return ssl.create_default_context(cafile=str(self.ca.file))

    def stock_server(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.server_identity.load_into(context)
        return context

    def _default_manager(self, side: str, settings: dict[str, Any]) -> None:
        if "key_manager" not in settings and settings.get("policy") != "off":
            settings["key_manager"] = self.manager(side)

    def close(self) -> None:
        for close in self._close:
            close()


def local_lab(ca: Authority, server_identity: Identity, client_identity: Identity) -> Lab:
    """The same with a KMS in the process, which needs no HTTP: for tests of the sockets themselves."""
    client, server = LocalKeyManager.pair("SAE-A", "SAE-B")
    return Lab(ca, server_identity, client_identity, managers={"client": client, "server": server})


class StealingManager:
    """The client's key manager, but the next `steal` answers are fetched at the server's KME before it can."""

    protocol = "etsi-014"

    def __init__(self, client: Etsi014Client, server: Etsi014Client) -> None:
        self._client, self._server = client, server
        self.name, self.sae_id = client.name, client.sae_id
        self.steal = 0
        self.stolen: list[str] = []

    def status(self, peer_sae_id: str) -> KMSStatus:
        return self._client.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        keys = self._client.get_keys(peer_sae_id, number, size)
        if self.steal:
            self.steal -= 1
            self.stolen += [key.key_id for key in keys]
            self._server.get_keys_by_id(self.sae_id, [key.key_id for key in keys])
        return keys

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        return self._client.get_keys_by_id(peer_sae_id, key_ids)

    def close(self) -> None: ...


# --- a server


@dataclass
class Seen:
    """What the server saw of one connection."""

    info: QKDInfo | None = None
    certificate: dict[str, Any] | None = None
    certificate_der: bytes | None = None
    alpn: str | None = None
    session_reused: bool | None = None
    error: BaseException | None = None
    handler_error: BaseException | None = None


Handler = Callable[[Any], None]


def echo(sock: Any) -> None:
    """Send back whatever comes, until the peer closes."""
    while data := sock.recv(1 << 16):
        sock.sendall(data)


class Server:
    """Accepts TCP on a loopback port and serves each connection in a thread of its own.

    `context` may be replaced between connections, as after a restart. What was seen of each connection waits in
    `seen()`, in the order in which handshakes ended.
    """

    def __init__(
        self, context: ssl.SSLContext, handler: Handler = echo, *, host: str = "127.0.0.1", **wrap: Any
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self.context = context
        self.handler = handler
        self._wrap = wrap
        self._seen: queue.Queue[Seen] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, name="test server")
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone does not wake accept().
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(TIMEOUT)
        self._listening.close()
        for thread in self._threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in (*self._threads, self._acceptor)), (
            "a server thread hangs"
        )

    def tcp(self) -> socket.socket:
        """A TCP connection to this server."""
        return socket.create_connection(self.address, timeout=TIMEOUT)

    def connect(self, context: QKDContext, hostname: str | None = "localhost", **wrap: Any) -> QKDSocket:
        """A TLS connection to this server."""
        return connect(self.address, context, hostname, **wrap)

    def seen(self) -> Seen:
        """What the server saw of the next connection, once its handshake has ended one way or the other."""
        return self._seen.get(timeout=TIMEOUT)

    def seen_info(self) -> QKDInfo:
        """The same where it must have ended well."""
        seen = self.seen()
        if seen.error is not None:
            raise seen.error
        assert seen.info is not None
        return seen.info

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(raw,), name="test connection")
            self._threads = [*(old for old in self._threads if old.is_alive()), thread]
            thread.start()

    def _serve(self, raw: socket.socket) -> None:
        raw.settimeout(TIMEOUT)
        seen = Seen()
        try:
            sock: Any = self.context.wrap_socket(raw, server_side=True, **self._wrap)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            seen.error = error
            self._seen.put(seen)
            raw.close()
            return
        with sock:
            if self._wrap.get("do_handshake_on_connect", True):
                seen.info = getattr(sock, "qkd", None)
                seen.certificate, seen.certificate_der = (
                    sock.getpeercert(),
                    sock.getpeercert(binary_form=True),
                )
                seen.alpn = sock.selected_alpn_protocol()
                seen.session_reused = sock.session_reused
            self._seen.put(seen)
            try:
                self.handler(sock)
            except OSError as error:
                seen.handler_error = error


def connect(
    address: tuple[str, int], context: QKDContext, hostname: str | None = "localhost", **wrap: Any
) -> QKDSocket:
    raw = socket.create_connection(address, timeout=TIMEOUT)
    try:
        return context.wrap_socket(raw, server_hostname=hostname, **wrap)
    finally:
        # Wrapped, it has been detached and this does nothing; else it must not stay open.
        raw.close()


def talk(sock: Any, text: bytes = b"ping") -> None:
    """Send a message and see it come back."""
    sock.sendall(text)
    received = b""
    while len(received) < len(text):
        chunk = sock.recv(1 << 16)
        assert chunk, "the connection ended early"
        received += chunk
    assert received == text


@contextmanager
def connected(
    client: QKDContext, server: QKDContext, hostname: str | None = "localhost", **wrap: Any
) -> Iterator[tuple[QKDSocket, QKDSocket]]:
    """Both ends of one connection, in one thread's hands."""
    with tcp_pair() as (near, far):
        result: queue.Queue[Any] = queue.Queue()

        def serve() -> None:
            try:
                result.put(server.wrap_socket(far, server_side=True, **wrap))
            except BaseException as error:  # noqa: BLE001 - raised below
                result.put(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with client.wrap_socket(near, server_hostname=hostname, **wrap) as client_side:
                server_side = result.get(timeout=TIMEOUT)
                if isinstance(server_side, BaseException):
                    raise server_side
                with server_side:
                    yield client_side, server_side
        finally:
            thread.join(TIMEOUT)


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname(), timeout=TIMEOUT)
        far, _ = listening.accept()
    far.settimeout(TIMEOUT)
    with near, far:
        yield near, far


# --- proxies


class Proxy:
    """Passes TCP on: `piece` bytes at a time, and `latency` seconds after they came, as a long line would.

    `client_sent` and `server_sent` are what has gone over the wire, over all connections.
    """

    def __init__(self, target: tuple[str, int], *, piece: int = 1 << 16, latency: float = 0.0) -> None:
        self.target = target
        self.piece = piece
        self.latency = latency
        self.client_sent, self.server_sent = bytearray(), bytearray()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._wake, self._woken = socket.socketpair()
        self._other: dict[socket.socket, socket.socket] = {}
        self._clients: set[socket.socket] = set()
        self._on_the_way: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
        self._held: dict[str, tuple[bytearray, threading.Condition]] = {}
        self._thread = threading.Thread(target=self._run, name="test proxy")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.send(b"x")
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "the proxy hangs"
        for sock in (self._listening, self._wake, self._woken, *self._other):
            sock.close()

    def connect(self, context: QKDContext, hostname: str | None = "localhost", **wrap: Any) -> QKDSocket:
        return connect(self.address, context, hostname, **wrap)

    def hold(self, sender: str) -> None:
        """From now on keep what the "client" or the "server" sends, until `release`."""
        self._held[sender] = bytearray(), threading.Condition()

    def held(self, sender: str, at_least: int) -> bytearray:
        """What is kept, once so much has come; may be changed in place."""
        kept, changed = self._held[sender]
        with changed:
            assert changed.wait_for(lambda: len(kept) >= at_least, TIMEOUT), f"only {len(kept)} bytes came"
        return kept

    def release(self, sender: str, size: int) -> None:
        """Pass on so many of the bytes kept, in one piece."""
        self.held(sender, size)
        kept, changed = self._held[sender]
        with changed:
            piece = bytes(kept[:size])
            del kept[:size]
        # The receiver may have gone by itself.
        with contextlib.suppress(OSError, StopIteration):
            self._receiver_from(sender).sendall(piece)

    def _receiver_from(self, sender: str) -> socket.socket:
        return next(sock for sock in self._other if (sock in self._clients) == (sender == "server"))

    def end(self, sender: str) -> None:
        """End the stream of this sender, whose bytes are held; the other direction goes on."""
        # The receiver may have gone by itself.
        with contextlib.suppress(OSError, StopIteration):
            self._receiver_from(sender).shutdown(socket.SHUT_WR)

    @property
    def wire(self) -> bytes:
        return bytes(self.client_sent + self.server_sent)

    def _run(self) -> None:
        while True:
            wait = None
            if self._on_the_way:
                wait = max(0.0, self._on_the_way[0][0] - time.monotonic())
            ready, _, _ = select.select([self._listening, self._woken, *self._other], [], [], wait)
            for sock in ready:
                if sock is self._woken:
                    return
                if sock is self._listening:
                    self._accept()
                elif sock in self._other:
                    self._receive(sock)
            while self._on_the_way and self._on_the_way[0][0] <= time.monotonic():
                _, receiver, data = self._on_the_way.popleft()
                self._deliver(receiver, data)

    def _accept(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection(self.target)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._other[near], self._other[far] = far, near
        self._clients.add(near)

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(1 << 16)
        except OSError:
            data = b""
        sender = "client" if sock in self._clients else "server"
        (self.client_sent if sender == "client" else self.server_sent).extend(data)
        if sender in self._held:
            kept, changed = self._held[sender]
            with changed:
                kept += data
                changed.notify_all()
            if data:
                return
            # The end of the stream is not kept.
        self._on_the_way.append((time.monotonic() + self.latency, self._other[sock], data))
        if not data:
            del self._other[sock]
            sock.close()

    def _deliver(self, receiver: socket.socket, data: bytes) -> None:
        if receiver not in self._other:
            return
        try:
            for start in range(0, len(data), self.piece):
                receiver.sendall(data[start : start + self.piece])
            if not data:
                receiver.shutdown(socket.SHUT_WR)
        except OSError:
            # Gone; its own end will be seen above.
            pass


# --- leaks


def spellings(secret: bytes) -> Sequence[str]:
    """How a secret could be written in a log, a repr or a message."""
    return (
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        repr(secret)[2:-1],
        repr(bytearray(secret))[12:-2],
        ", ".join(str(byte) for byte in secret),
        secret.decode("latin-1"),
    )
