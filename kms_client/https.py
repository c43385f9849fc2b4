"""One HTTPS request to a KME: mutual TLS, one deadline, a bounded body; every failure a `KMSError`.

Built on `requests`, with its open points closed: no redirects, no proxies or certificate bundles from the
environment, no compression, no endless or endlessly slow answers, no address outside the secure site.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

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

__all__ = ["Answer", "HTTPSClient", "WrapsSockets"]

_CHUNK = 1 << 16  # bytes
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

    Sessions are kept in a stack and each is lent to one thread at a time: `requests.Session` does not
    promise to be thread-safe, and one session a thread would cost a TLS handshake in every short-lived
    thread.

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
        self._headers = _checked_headers(headers or {})
        self._timeout = (connect_timeout, read_timeout)
        instead = (cert, key, ca, pkcs12, key_password)
        if psk_context is not None and any(part is not None for part in (ssl_context, *instead)):
            raise ValueError("give either psk_context or certificates: with a pre-shared key there are none")
        if ssl_context is not None:
            _check_context(ssl_context, *instead)
        self._proof = "this SAE's certificate" if psk_context is None else "the pre-shared key"
        self._link = _Link(
            url=self.url,
            host=parts.hostname,
            port=parts.port,
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
        )
        self._idle: deque[requests.Session] = deque()
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
        failure: KMSError
        try:
            with self._session() as session:
                return self._exchange(session, method, path, body, max_size)
        except KMSError:
            raise
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            failure = self._explain(error)
        # Out of the except block, so that the library's errors, which hold requests and answers, are let go.
        raise failure

    def close(self) -> None:
        """Close idle connections; those in use are closed when their answer is read."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def forget(self) -> None:
        """Start afresh in a forked child, which must not speak on its parent's connections."""
        self._idle = deque()

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        try:
            session = self._idle.pop()
        except IndexError:
            session = self._new_session()
        try:
            yield session
        except BaseException:
            session.close()
            raise
        self._idle.append(session)
        if self._closed:
            self.close()

    def _new_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.headers.update({"Accept": "application/json", **self._headers, "Accept-Encoding": "identity"})
        session.mount("https://", _Adapter(self._link))
        return session

    def _exchange(
        self, session: requests.Session, method: str, path: str, body: bytes | None, max_size: int
    ) -> Answer:
        response = session.request(
            method,
            self.url + path,
            data=body,
            headers={"Content-Type": "application/json"} if body is not None else None,
            timeout=self._timeout,
            allow_redirects=False,
            stream=True,
        )
        with response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise self._protocol_error(f"the answer is encoded ({shown(encoding)}), unasked", response)
            received = _read(response, max_size)
            if received is None:
                raise self._protocol_error(f"the answer is larger than {max_size} bytes", response)
        return Answer(response.status_code, received)

    def _protocol_error(self, message: str, response: requests.Response) -> KMSProtocolError:
        return KMSProtocolError(message, kms=self.url, status=response.status_code)

    def _explain(self, error: Exception) -> KMSError:
        """Return the `KMSError` for an error of requests, urllib3, http.client, ssl or the socket."""
        causes = list(_causes(error))

        def caused_by(*kinds: type[BaseException]) -> Any:
            return next((cause for cause in causes if isinstance(cause, kinds)), None)

        connect, read = self._timeout
        if refusal := caused_by(ssl.SSLCertVerificationError):
            return KMSAuthenticationError(
                f"the KME's certificate was refused: {shown(refusal.verify_message)}",
                kms=self.url,
                hint=_OTHER_NAME_HINT if refusal.verify_code in _NAME_MISMATCHES else "",
            )
        if caused_by(requests.ConnectTimeout):
            return KMSTimeout(
                f"no connection within {connect:g} seconds",
                kms=self.url,
                hint=KMSUnavailable.default_hint,
                keys_may_be_lost=False,
            )
        if caused_by(requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError):
            return KMSTimeout(f"no complete answer within {read:g} seconds", kms=self.url)
        if caused_by(urllib3.exceptions.NewConnectionError):
            # requests' errors are OSErrors too, without an errno.
            refusals = [c for c in causes if isinstance(c, OSError) and c.errno is not None]
            reason = refusals[0].strerror if refusals else "the host is unknown or unreachable"
            return KMSUnavailable(f"cannot connect: {reason}", kms=self.url)
        failure = caused_by(ssl.SSLError)
        if failure is not None and not isinstance(failure, ssl.SSLEOFError):
            reason = failure.reason or "unknown reason"
            if "ALERT" in reason or "PSK" in reason:
                return KMSAuthenticationError(
                    f"the KME ended the TLS handshake ({reason}): it probably refused {self._proof}",
                    kms=self.url,
                )
            return KMSProtocolError(f"TLS failed ({reason})", kms=self.url)
        garbage = caused_by(http.client.HTTPException)
        if garbage is not None and not isinstance(
            garbage, (http.client.RemoteDisconnected, http.client.IncompleteRead)
        ):
            return KMSProtocolError("the answer is not HTTP", kms=self.url)
        if caused_by(requests.exceptions.InvalidURL, urllib3.exceptions.LocationParseError):
            return KMSUnavailable("the URL cannot be used", kms=self.url, hint="Correct the KME's URL.")
        return KMSUnavailable(
            "the connection was lost before the answer was complete",
            kms=self.url,
            hint=_LOST_HINT,
            keys_may_be_lost=True,
        )


def _read(response: requests.Response, max_size: int) -> bytearray | None:
    """Return the body, or None if it is too large; raise nothing: a traceback would lead to the data read."""
    received = bytearray()
    complete = False
    try:
        while chunk := response.raw.read(_CHUNK, decode_content=False):
            received += chunk
            if len(received) > max_size:
                return None
        complete = True
        return received
    finally:
        if not complete:
            received[:] = bytes(len(received))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and all that led to it; requests and urllib3 keep some causes in `args` only."""
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        cause = pending.pop()
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        pending += [*cause.args, getattr(cause, "reason", None), cause.__cause__, cause.__context__]


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


# What follows puts one deadline over the whole answer: the timeout of `requests` is for each recv(), so
# that a server which sends a byte now and then could hold a caller for hours.


class _DeadlineReader(io.RawIOBase):
    """A reader of a socket until a deadline, which is the socket's timeout from now on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = time.monotonic() + (sock.gettimeout() or 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(remaining)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock))


@dataclass(frozen=True, kw_only=True)
class _Link:
    """The address of a KME and the way to it."""

    url: str
    host: str
    port: int | None
    server_hostname: str | None
    unix_socket: str | None
    site: SecureSite
    may_have_ml_kem: bool
    context: WrapsSockets = field(repr=False)
    quirks: set[str] = field(repr=False)

    def protect(self, sock: socket.socket) -> ssl.SSLSocket:
        """Start TLS on a connected socket; check it against the secure site before anything is asked."""
        inside = self.site.contains_peer(sock)
        if not inside and not self.site.ml_kem_outside:
            raise self.site.refusal(sock, "keys are fetched inside only", kms=self.url)
        if not inside and not self.may_have_ml_kem:
            raise self.site.refusal(sock, "this client's TLS has no ML-KEM", kms=self.url)
        name = (self.server_hostname or self.host).partition("%")[0].rstrip(".")
        tls = self.context.wrap_socket(sock, server_hostname=name)
        if not inside and not has_ml_kem(tls):
            refusal = self.site.refusal(tls, "ML-KEM does not protect the link", kms=self.url)
            tls.close()
            raise refusal
        certificate = tls.getpeercert()
        if certificate and not certificate.get("subjectAltName"):
            self.quirks.add("certificate without a subject alternative name")
        return tls


class _Connection(HTTPSConnection):
    response_class = _Response

    def __init__(self, *args: Any, link: _Link, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._link = link

    def connect(self) -> None:
        # Not urllib3's own, which changes the context with each connection, and asks no site.
        self.sock = sock = self._new_conn()
        try:
            self.sock = self._link.protect(sock)
        except TimeoutError:
            # In the TLS handshake; urllib3 would take it for a request without an answer.
            raise ConnectTimeoutError(self, "the TLS handshake timed out") from None
        self.is_verified = True  # _check_context

    def _new_conn(self) -> socket.socket:
        if self._link.unix_socket is None:
            return super()._new_conn()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self._link.unix_socket)
        except OSError as error:
            sock.close()
            raise NewConnectionError(self, f"cannot connect to {self._link.unix_socket}") from error
        return sock


class _Pool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Connection


class _Adapter(HTTPAdapter):
    """A transport adapter that sends everything to one KME."""

    def __init__(self, link: _Link) -> None:
        super().__init__(max_retries=0)
        self._pool = _Pool(link.host, link.port, maxsize=1, link=link)

    def get_connection_with_tls_context(self, *args: Any, **settings: Any) -> urllib3.HTTPSConnectionPool:
        """Return the only pool; all about TLS is in its link."""
        return self._pool

    def cert_verify(self, *args: Any) -> None:
        """Do nothing: `requests` would load its own CA certificates."""

    def close(self) -> None:
        super().close()
        self._pool.close()
