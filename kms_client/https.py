"""One HTTPS request to a KME: mutual TLS, one deadline, a bounded body; every failure a `KMSError`.

No redirects, no proxies or certificate bundles from the environment, no compression, no endless or endlessly slow
answers, no address outside the secure site.

No HTTP library connects or sends here, so that no release of one can send a request elsewhere: `_Link` makes each
connection, checks it, and writes the request to it. `http.client` only reads the answer.
"""

from __future__ import annotations

import http.client
import io
import logging
import os
import re
import socket
import ssl
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit

from kms_client.credentials import FilePath, Password, client_context, hidden
from kms_client.errors import (
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSTimeout,
    KMSUnavailable,
    shown,
)
from kms_client.forks import forget_in_children
from kms_client.secure_site import SecureSite, has_ml_kem
from kms_client.waiting import READ, is_ready

__all__ = ["Answer", "HTTPSClient", "WrapsSockets"]

_log: Final = logging.getLogger("kms_client.https")

_CHUNK = 1 << 14  # bytes
_LOST_HINT = (
    "Check that the KME runs. A KME that refuses this SAE's certificate may also end the connection like "
    "this. Keys that it took out of its store meanwhile are lost."
)
_NAME_MISMATCHES = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_OTHER_NAME_HINT = (
    "The KME's certificate must have the URL's host as a subject alternative name. If it has another name only, "
    "give that name as server_hostname."
)
# What decides how a request is read.
_OWN_HEADERS = {
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "te",
    "transfer-encoding",
    "upgrade",
}
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[!-~](?:[ \t!-~]*[!-~])?|")
_HOST = re.compile(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_TARGET = re.compile(r"/[!-~]*")


class WrapsSockets(Protocol):
    """A TLS wrapper for connected sockets, like `ssl.SSLContext`, that authenticates the server by itself."""

    def wrap_socket(self, sock: socket.socket, *, server_hostname: str | None) -> ssl.SSLSocket:
        """Shake hands, within the socket's timeout."""
        ...


@dataclass
class Answer:
    """An HTTP answer; `body` may hold keys, and the caller must wipe it."""

    status: int
    body: bytearray = field(repr=False)


class HTTPSClient:
    """HTTPS requests to one KME, from any number of threads.

    Connections are kept in a stack and each is lent to one thread at a time: one connection a thread would cost a TLS
    handshake in every short-lived thread.

    Args:
        url: `https://host[:port][/prefix]`.
        cert: path of this SAE's certificate chain, PEM.
        key: path of its private key, PEM; None if it is in the same file.
        ca: path of the CA certificates that the KME's certificate must chain to, PEM.
        pkcs12: path of a PKCS#12 file with certificate chain and private key, instead of `cert` and `key`.
        key_password: of the private key or the PKCS#12 file: the password, the `Path` of a file, or a function.
        ssl_context: instead of all of these, a context that has them loaded.
        psk_context: instead of all of these, a maker of connections that a pre-shared key authenticates both
            ways.
        server_hostname: the name that the KME's certificate must have, if it is not the URL's host.
        unix_socket: path of a Unix socket to connect to, instead of the URL's host and port.
        site: the addresses that a KME may have; None for those of this host.
        headers: further header fields of each request.
        quirks: receives the names of the deviations met.
        connect_timeout: seconds to connect, for each address of the host; once more for the TLS handshake.
        read_timeout: seconds for the whole answer, however it trickles in.

    Raises:
        ValueError: the URL is not an HTTPS URL; certificates are missing, given twice, or not checked by `ssl_context`;
            a header field is impossible or one that this client needs to set itself.
        KMSAuthenticationError: the certificates cannot be loaded.
    """

    def __init__(
        self,
        url: str,
        *,
        cert: FilePath | None = None,
        key: FilePath | None = None,
        ca: FilePath | None = None,
        pkcs12: FilePath | None = None,
        key_password: Password | None = None,
        ssl_context: ssl.SSLContext | None = None,
        psk_context: WrapsSockets | None = None,
        server_hostname: str | None = None,
        unix_socket: FilePath | None = None,
        site: SecureSite | None = None,
        headers: Mapping[str, str] | None = None,
        quirks: set[str] | None = None,
        connect_timeout: float,
        read_timeout: float,
    ) -> None:
        """Load the certificates once, to fail now rather than at the first request."""
        key_password = hidden(key_password)
        parts = urlsplit(url)
        if (
            parts.scheme != "https"
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            # Not quoted: it might hold a password.
            raise ValueError("a KME's URL is https://host[:port][/prefix], with no user, query or fragment")
        self.url = url.rstrip("/")
        self._prefix = quote(parts.path.rstrip("/"), safe="!#$%&'()*+,/:;=?@[]~")
        self._headers = _checked_headers(headers or {})
        self._read_timeout = read_timeout
        instead = (cert, key, ca, pkcs12, key_password)
        if psk_context is not None and any(part is not None for part in (ssl_context, *instead)):
            raise ValueError("give either psk_context or certificates: with a pre-shared key there are none")
        if ssl_context is not None:
            _check_context(ssl_context, *instead)
        self._proof = "this SAE's certificate" if psk_context is None else "the pre-shared key"
        self._link = _Link(
            url=self.url,
            # An interface of an IPv6 address stands behind %25 in a URL (RFC 6874).
            host=parts.hostname.replace("%25", "%"),
            port=parts.port or 443,
            server_hostname=server_hostname,
            unix_socket=None if unix_socket is None else os.fspath(unix_socket),
            site=site or SecureSite(),
            may_have_ml_kem=ssl_context is not None or psk_context is not None,
            context=psk_context
            or ssl_context
            or client_context(
                cert=cert, key=key, ca=ca, pkcs12=pkcs12, key_password=key_password, kms=self.url
            ),
            quirks=set() if quirks is None else quirks,
            timeout=connect_timeout,
        )
        self._idle: deque[_Connection] = deque()
        weakref.finalize(self, _close_all, self._idle)
        self._closed = False
        forget_in_children(self)

    def request(self, method: str, path: str, body: bytes | None, max_size: int) -> Answer:
        """Send one request and read its whole answer, whatever its status. Nothing is ever sent twice.

        Args:
            method: "GET" or "POST".
            path: appended to the URL; already percent-encoded.
            body: JSON, or None.
            max_size: of the answer's body, in bytes.

        Raises:
            KMSUnavailable: not connected, or the connection was lost.
            KMSTimeout: no connection or no whole answer in time.
            KMSOutsideSecureSite: the address connected to is not in the secure site; nothing was sent.
            KMSAuthenticationError: a certificate was refused, on either side.
            KMSProtocolError: the answer is not HTTP, too large, or encoded.
        """
        if self._closed:
            raise KMSUnavailable("this key manager is closed", kms=self.url, hint="Make a new client.")
        if not _TARGET.fullmatch(target := self._prefix + path):
            raise ValueError(
                f"{shown(path)!r} cannot be asked for: it must begin with / and be percent-encoded"
            )
        head = self._head(method, target, body)
        failure: KMSError
        try:
            with self._connection() as connection:
                return self._exchange(connection, method, target, head + (body or b""), max_size)
        except KMSError:
            raise
        except (OSError, http.client.HTTPException) as error:
            failure = self._explain(error)
        # Out of the except block, so that errors of libraries, which hold answers, are let go.
        raise failure

    def close(self) -> None:
        """Close idle connections; those in use are closed when their answer is read."""
        self._closed = True
        _close_all(self._idle)

    def forget(self) -> None:
        """Start afresh in a forked child, which must not speak on its parent's connections."""
        while self._idle:
            self._idle.pop().abandon()

    @contextmanager
    def _connection(self) -> Iterator[_Connection]:
        """Lend a connection; keep it if its answer was read and another may follow."""
        connection = self._kept_connection() or self._link.connect()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        if not connection.reusable:
            connection.close()
            return
        self._idle.append(connection)
        if self._closed:
            self.close()

    def _kept_connection(self) -> _Connection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.is_quiet():
                return connection
            connection.close()

    def _head(self, method: str, target: str, body: bytes | None) -> bytes:
        fields = {
            "Host": self._link.authority,
            "User-Agent": "qkd-tls",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
        }
        if body is not None:
            fields["Content-Type"] = "application/json"
        if body is not None or method != "GET":
            fields["Content-Length"] = str(len(body or b""))
        given = {name.lower() for name in self._headers}
        fields = {name: value for name, value in fields.items() if name.lower() not in given} | self._headers
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")

    def _exchange(
        self, connection: _Connection, method: str, target: str, request: bytes, max_size: int
    ) -> Answer:
        deadline = time.monotonic() + self._read_timeout
        connection.send(request, self._read_timeout)
        with http.client.HTTPResponse(_DeadlineReader(connection.tls, deadline), method=method) as response:  # type: ignore[arg-type]
            response.begin()
            _log.debug('%s "%s %s" %d', self.url, method, target, response.status)
            encoding = response.getheader("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise self._protocol_error(f"the answer is encoded ({shown(encoding)}), unasked", response)
            received = _read(response, max_size)
            if received is None:
                raise self._protocol_error(f"the answer is larger than {max_size} bytes", response)
            connection.reusable = not response.will_close
            return Answer(response.status, received)

    def _protocol_error(self, message: str, response: http.client.HTTPResponse) -> KMSProtocolError:
        return KMSProtocolError(message, kms=self.url, status=response.status)

    def _explain(self, error: Exception) -> KMSError:
        """Return the `KMSError` for an error of the TLS handshake, or of a request on its way."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return KMSAuthenticationError(
                f"the KME's certificate was refused: {shown(error.verify_message)}",
                kms=self.url,
                hint=_OTHER_NAME_HINT if error.verify_code in _NAME_MISMATCHES else "",
            )
        if isinstance(error, TimeoutError):
            return KMSTimeout(f"no complete answer within {self._read_timeout:g} seconds", kms=self.url)
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            reason = error.reason or "unknown reason"
            if "ALERT" in reason or "PSK" in reason:
                return KMSAuthenticationError(
                    f"the KME ended the TLS handshake ({reason}): it probably refused {self._proof}",
                    kms=self.url,
                )
            return KMSProtocolError(f"TLS failed ({reason})", kms=self.url)
        if isinstance(error, http.client.HTTPException) and not isinstance(
            error, (http.client.RemoteDisconnected, http.client.IncompleteRead)
        ):
            return KMSProtocolError("the answer is not HTTP", kms=self.url)
        return KMSUnavailable(
            "the connection was lost before the answer was complete",
            kms=self.url,
            hint=_LOST_HINT,
            keys_may_be_lost=True,
        )


def _read(response: http.client.HTTPResponse, max_size: int) -> bytearray | None:
    """Return the body, or None if it is too large. Nothing of it is left in an error, nor in a buffer of ours."""
    received, buffer = bytearray(), bytearray(_CHUNK)
    complete = False
    try:
        while size := response.readinto(buffer):
            received += memoryview(buffer)[:size]
            if len(received) > max_size:
                return None
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        complete = True
        return received
    finally:
        buffer[:] = bytes(len(buffer))
        if not complete:
            received[:] = bytes(len(received))


def _close_all(idle: deque[_Connection]) -> None:
    while idle:
        idle.pop().close()


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    # Values are not quoted: they may be secret.
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(
                f"header field {shown(name)!r} cannot be sent: it must be printable ASCII on one line"
            )
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"header field {name!r} is set by this client alone")
    return dict(headers)


def _check_context(context: ssl.SSLContext, *instead: object) -> None:
    if any(part is not None for part in instead):
        raise ValueError(
            "give either ssl_context or cert, key, ca, pkcs12 and key_password: the context has them"
        )
    if context.verify_mode is not ssl.CERT_REQUIRED or not context.check_hostname:
        raise ValueError(
            "ssl_context must check the KME: set verify_mode to CERT_REQUIRED, and check_hostname"
        )


class _DeadlineReader(io.RawIOBase):
    """A reader of a socket until a deadline, by `time.monotonic`, for `http.client.HTTPResponse`.

    A socket's own timeout is for each `recv`: a server that sends a byte now and then could hold a caller for hours.
    """

    def __init__(self, sock: ssl.SSLSocket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return a buffered reader; called by `HTTPResponse`."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(remaining)
        return self._sock.recv_into(buffer)


class _Connection:
    """A connection to the KME that `_Link` has made and checked; lent to one thread at a time.

    Attributes:
        tls: for reading.
        reusable: True once its last answer was read, if another request may follow.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self.tls = tls
        self.reusable = False

    def send(self, request: bytes, timeout: float) -> None:
        """Send a whole request within `timeout` seconds."""
        self.reusable = False
        self.tls.settimeout(timeout)
        # A KME that has closed may have said why: its answer, or the alert, is still to be read.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.tls.sendall(request)

    def is_quiet(self) -> bool:
        """Return True unless something has come since the last answer: as a rule, the end of the connection."""
        return not is_ready(self.tls.fileno(), READ, 0)

    def close(self) -> None:
        # What is sent at the end may find the KME gone.
        with suppress(OSError):
            self.tls.close()

    def abandon(self) -> None:
        """Close this process's file descriptor only; the TLS connection goes on in the parent."""
        os.close(self.tls.detach())


@dataclass(frozen=True, kw_only=True)
class _Link:
    """The address of a KME and the way to it."""

    url: str
    host: str
    port: int
    server_hostname: str | None
    unix_socket: str | None
    site: SecureSite
    may_have_ml_kem: bool
    context: WrapsSockets = field(repr=False)
    quirks: set[str] = field(repr=False)
    timeout: float

    @property
    def authority(self) -> str:
        """The KME as a request names it. Raises KMSUnavailable if no host can have this name."""
        try:
            address, is_name = self.host.partition("%")[0], ":" not in self.host
            host = address.encode("idna").decode("ascii") if is_name else f"[{address}]"
        except UnicodeError:
            host = ""
        # The system's resolver takes "*" for this host.
        if not _HOST.fullmatch(host):
            raise KMSUnavailable("the URL cannot be used", kms=self.url, hint="Correct the KME's URL.")
        return host if self.port == 443 else f"{host}:{self.port}"

    def connect(self) -> _Connection:
        """Connect, and check everything that a request relies on."""
        sock = self._reach()
        try:
            sock.settimeout(self.timeout)
            tls = self._protect(sock)
        except TimeoutError:
            sock.close()
            failure = self._no_connection()
        except BaseException:
            # Closes nothing if TLS has taken it over.
            sock.close()
            raise
        else:
            return _Connection(tls)
        raise failure

    def _reach(self) -> socket.socket:
        failure: KMSError
        try:
            if self.unix_socket is None:
                sock = socket.create_connection((self.host, self.port), self.timeout)
                # The first byte of a request is not to wait for the acknowledgement of an earlier one.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(self.timeout)
                sock.connect(self.unix_socket)
            except BaseException:
                sock.close()
                raise
            return sock
        except TimeoutError:
            failure = self._no_connection()
        except OSError as error:
            reason = error.strerror or "the host is unknown or unreachable"
            failure = KMSUnavailable(f"cannot connect: {reason}", kms=self.url)
        raise failure

    def _no_connection(self) -> KMSTimeout:
        return KMSTimeout(
            f"no connection within {self.timeout:g} seconds",
            kms=self.url,
            hint=KMSUnavailable.default_hint,
            keys_may_be_lost=False,
        )

    def _protect(self, sock: socket.socket) -> ssl.SSLSocket:
        """Start TLS on a connected socket; check it against the secure site before anything is asked."""
        inside = self.site.contains_peer(sock)
        if not inside and not self.site.ml_kem_outside:
            raise self.site.refusal(sock, "keys are fetched inside only", kms=self.url)
        if not inside and not self.may_have_ml_kem:
            raise self.site.refusal(sock, "this client's TLS has no ML-KEM", kms=self.url)
        name = (self.server_hostname or self.host).partition("%")[0].rstrip(".")
        tls = self.context.wrap_socket(sock, server_hostname=name)
        try:
            # A context of the program's own may do anything. Not asked by class: programs replace `ssl.SSLSocket`.
            version = getattr(tls, "version", None)
            if version is None or version() is None:
                raise KMSAuthenticationError(
                    "ssl_context has made no TLS connection: no request was sent",
                    kms=self.url,
                    hint="Its wrap_socket() must return an ssl.SSLSocket whose handshake is complete.",
                )
            if not inside and not has_ml_kem(tls):
                raise self.site.refusal(tls, "ML-KEM does not protect the link", kms=self.url)
            certificate = tls.getpeercert()
        except BaseException:
            tls.close()
            raise
        if certificate and not certificate.get("subjectAltName"):
            self.quirks.add("certificate without a subject alternative name")
        return tls
