"""One HTTPS request to a KME: mutual TLS, one deadline, a bounded body; every failure a `KMSError`.

On `requests`, with what it leaves open closed: no redirects, no proxies or certificate bundles from the
environment, no compression, no endless or endlessly slow answers.
"""

from __future__ import annotations

import http.client
import io
import os
import ssl
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import socket
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPSConnection

from .errors import KMSAuthenticationError, KMSError, KMSProtocolError, KMSTimeout, KMSUnavailable, shown

__all__ = ["Answer", "HTTPSClient"]

_CHUNK = 1 << 16  # bytes
_LOST_HINT = (
    "Check that the KME runs. A KME that refuses this SAE's certificate may also end the connection like "
    "this. Keys that it took out of its store meanwhile are lost."
)


@dataclass
class Answer:
    """An HTTP answer; `body` may hold keys and is to be wiped by whoever got it."""

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
        key: path of its private key, PEM, not encrypted.
        ca: path of the CA certificates that the KME's certificate must chain to, PEM.
        connect_timeout: seconds to connect, for each address of the host; once more for the TLS handshake.
        read_timeout: seconds for the whole answer, however it trickles in.

    Raises:
        ValueError: the URL is not an HTTPS URL.
        KMSAuthenticationError: the certificates cannot be loaded.
    """

    def __init__(
        self,
        url: str,
        *,
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        ca: str | os.PathLike[str],
        connect_timeout: float,
        read_timeout: float,
    ) -> None:
        """Load the certificates once, to fail now rather than at the first request."""
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
        self._credentials = (os.fspath(cert), os.fspath(key))
        self._ca = os.fspath(ca)
        self._timeout = (connect_timeout, read_timeout)
        self._idle: deque[requests.Session] = deque()
        self._pid = os.getpid()
        self._closed = False
        self._check_credentials()

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
            KMSAuthenticationError: a certificate was refused, on either side.
            KMSProtocolError: the answer is no HTTP, too large, or encoded.
        """
        if self._closed:
            raise KMSUnavailable("this key manager is closed", kms=self.url, hint="Make a new Etsi014Client.")
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

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        if self._pid != os.getpid():
            # A forked child must not speak on its parent's connections.
            self._idle, self._pid = deque(), os.getpid()
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
        session.verify = self._ca
        session.cert = self._credentials
        session.headers.update({"Accept": "application/json", "Accept-Encoding": "identity"})
        session.mount("https://", _Adapter(pool_connections=1, pool_maxsize=1, max_retries=0))
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
            received = bytearray()
            try:
                while chunk := response.raw.read(_CHUNK, decode_content=False):
                    received += chunk
                    if len(received) > max_size:
                        raise self._protocol_error(f"the answer is larger than {max_size} bytes", response)
            except BaseException:
                received[:] = bytes(len(received))
                raise
        return Answer(response.status_code, received)

    def _protocol_error(self, message: str, response: requests.Response) -> KMSProtocolError:
        return KMSProtocolError(message, kms=self.url, status=response.status_code)

    def _check_credentials(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            # A password, even an empty one, keeps OpenSSL from asking for one on the terminal.
            context.load_cert_chain(*self._credentials, password="")
        except OSError as error:
            problem = (
                f"this SAE's certificate and key cannot be loaded from {' and '.join(self._credentials)}"
            )
            raise KMSAuthenticationError(f"{problem}: {error}", kms=self.url) from None
        try:
            context.load_verify_locations(self._ca)
        except OSError as error:
            problem = f"the CA certificates cannot be loaded from {self._ca}"
            raise KMSAuthenticationError(f"{problem}: {error}", kms=self.url) from None

    def _explain(self, error: Exception) -> KMSError:
        """The `KMSError` for an error of requests, urllib3, http.client, ssl or the socket."""
        causes = list(_causes(error))

        def caused_by(*kinds: type[BaseException]) -> Any:
            return next((cause for cause in causes if isinstance(cause, kinds)), None)

        connect, read = self._timeout
        if refusal := caused_by(ssl.SSLCertVerificationError):
            return KMSAuthenticationError(
                f"the KME's certificate was refused: {shown(refusal.verify_message)}", kms=self.url
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
            if "ALERT" in reason:
                return KMSAuthenticationError(
                    f"the KME ended the TLS handshake ({reason}): it probably refused this SAE's certificate",
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


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that led to it; requests and urllib3 keep some causes in `args` only."""
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        cause = pending.pop()
        if not isinstance(cause, BaseException) or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        pending += [*cause.args, getattr(cause, "reason", None), cause.__cause__, cause.__context__]


# What follows puts one deadline over the whole answer: the timeout of `requests` is for each recv(), so
# that a server which sends a byte now and then could hold a caller for hours.


class _DeadlineReader(io.RawIOBase):
    """Reads from a socket until a deadline, which is the socket's timeout from now on."""

    def __init__(self, sock: socket) -> None:
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
    def __init__(self, sock: socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock))


class _Connection(HTTPSConnection):
    response_class = _Response

    def connect(self) -> None:
        try:
            super().connect()
        except TimeoutError:
            # In the TLS handshake; urllib3 would take it for a request without an answer.
            raise urllib3.exceptions.ConnectTimeoutError(self, "the TLS handshake timed out") from None


class _Pool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Connection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        # A context of our own: urllib3's would log the keys of this connection, over which QKD keys come, where the
        # environment has SSLKEYLOGFILE.
        super().init_poolmanager(*args, ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"https": _Pool}
