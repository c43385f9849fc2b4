"""The common parts of `QKDSocket` and `QKDObject`: the handshake's steps and the connection's properties.

The two differ in how ciphertext travels: through a socket, or through memory that the caller empties and
fills.

Three others take part in a handshake, and each enters by one interface: the context (`EndpointContext`), the state
machine that it makes (`EndpointEngine`), and the `Driver`, which keeps the handshake going if the calling thread must
not wait for a KMS.
"""

from __future__ import annotations

import _ssl
import socket
import ssl
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, NoReturn, Protocol, TypeAlias, TypeVar, runtime_checkable

from kms_client import KeyManager, KMSError, QKDKey, wipe_keys
from kms_client.forks import Claims, SharedDirection, share_with_children
from qkd_tls.certificate import certificate_dict
from qkd_tls.engine import (
    Action,
    ChooseContext,
    Engine,
    Established,
    FetchKeys,
    FetchKeysByID,
    NeedData,
    ServerEngine,
)
from qkd_tls.errors import ClassicalGroupWarning, QKDFallbackWarning, raised_anew, ssl_error
from qkd_tls.info import QKDInfo
from qkd_tls.openssl import ML_KEM_GROUPS, TLSConnection
from qkd_tls.records import RecordBuffer
from qkd_tls.stdlib import SSLContext, SSLObject

__all__ = [
    "Driver",
    "Endpoint",
    "EndpointContext",
    "EndpointEngine",
    "HoldingDriver",
    "KeyRequest",
    "KeysWanted",
    "NotThroughTheStandardLibrary",
    "driver_in_charge",
    "fetch_keys",
]

_T = TypeVar("_T")
_SSLSocket: Final[Any] = _ssl._SSLSocket  # type: ignore[attr-defined]
_QUESTIONS: Final = frozenset({"cipher", "getpeercert", "qkd", "selected_alpn_protocol", "version"})
_FORK_PATIENCE: Final = 1.0
"""Seconds that a fork waits for a call of OpenSSL in another thread, which takes less than a thousandth of that."""

KeyRequest: TypeAlias = FetchKeys | FetchKeysByID
"""An engine's request to a KMS."""


class KeysWanted(ssl.SSLWantReadError):
    """The handshake waits for a KMS that is being asked elsewhere: go on once `engine.keys` is called."""

    def __init__(self, request: KeyRequest) -> None:
        super().__init__(ssl.SSL_ERROR_WANT_READ, "The operation did not complete (waiting for the KMS)")
        self.request = request


def fetch_keys(request: KeyRequest, manager: KeyManager) -> list[QKDKey] | KMSError:
    """Return the keys, or the KMS's error, for `Engine.keys`.

    Blocks as long as the KMS client's time limits allow.
    """
    try:
        if isinstance(request, FetchKeys):
            return manager.get_keys(request.peer_sae_id, request.number)
        return manager.get_keys_by_id(request.peer_sae_id, request.key_ids)
    except KMSError as error:
        return error


class EndpointEngine(Protocol):
    """The interface of a state machine for an endpoint: an `Engine`, or the handshake of a `PSKContext`."""

    @property
    def connection(self) -> TLSConnection:
        """The connection that application data goes through, once the handshake is complete."""
        ...

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, DER; None if the peer sent none."""
        ...

    def data_to_send(self) -> bytes:
        """Return ciphertext for the peer."""
        ...

    def receive_data(self, data: bytes) -> None:
        """Take ciphertext from the peer; empty at the end of the stream."""
        ...

    def next_action(self) -> Action:
        """Return the next action. Raises the error that ended the handshake."""
        ...

    def abort(self) -> None:
        """Wipe the secrets of the handshake, unless it is complete."""
        ...


@runtime_checkable
class EndpointContext(Protocol):
    """The interface of a context for an endpoint: a `QKDContext`, or a `PSKContext`."""

    @property
    def key_manager(self) -> KeyManager | None:
        """The KMS of this side; None if no QKD key is ever asked for."""
        ...

    @property
    def verify_mode(self) -> ssl.VerifyMode:
        """`CERT_NONE` if the peer's certificate was not verified."""
        ...

    def new_engine(
        self, *, server_side: bool, server_hostname: str | None, server_port: int | None
    ) -> EndpointEngine:
        """Make the state machine for one connection."""
        ...

    def wrap_socket(
        self,
        sock: socket.socket,
        *,
        server_side: bool,
        do_handshake_on_connect: bool,
        suppress_ragged_eofs: bool,
    ) -> Any:
        """Take over a connection that a listening socket has accepted."""
        ...

    def _choose_context(self, engine: ServerEngine, connection: Endpoint, name: str | None) -> None:
        """Ask the `sni_callback` what to do with a client that wants to reach `name`."""
        ...

    def _count(self, what: str) -> None:
        """Count one more handshake, by the names of `SSLContext.session_stats`."""
        ...


class Driver:
    """The driver of one connection's handshake. This one leaves it to the thread that calls `do_handshake`.

    An event loop has its own driver: it puts it into `driver_in_charge` while it makes the connection.
    """

    server_port: int | None = None
    """Client: the server's TCP port, if the connection cannot tell it."""

    def claim(self) -> bool:
        """Return whether the connection that is being made is this driver's."""
        return True

    def begin(self, connection: Endpoint) -> None:
        """Note the start of its connection's handshake."""

    def take_turn(self) -> None:
        """Let the handshake go on; raise SSLWantReadError if others come first."""

    def fetch(self, request: KeyRequest, manager: KeyManager) -> list[QKDKey] | KMSError:
        """Return the keys or the KMS's error; raise KeysWanted if the engine is given them later."""
        return fetch_keys(request, manager)

    def take_last_words(self, outgoing: ssl.MemoryBIO) -> None:
        """Send the last bytes of a failed handshake, if the owner of `outgoing` would not."""

    def end(self) -> None:
        """Note that the handshake is over, complete or not."""


class HoldingDriver(Driver):
    """The base of drivers that give the engine its keys later: it knows the connection while the handshake lasts."""

    _connection: weakref.ref[Endpoint] | None = None

    def begin(self, connection: Endpoint) -> None:
        """Remember the connection, until the end; it holds the driver, and not the reverse."""
        self._connection = weakref.ref(connection)

    def end(self) -> None:
        """Let go of the connection."""
        self._connection = None

    def _holder(self) -> Endpoint | None:
        return self._connection() if self._connection is not None else None

    def give_up(self) -> None:
        """End the handshake for good: wipe its secrets."""
        connection = self._holder()
        if connection is not None:
            connection.give_up()

    def deliver(self, result: list[QKDKey] | KMSError) -> bool:
        """Give the engine its keys; return False, and wipe them, if the handshake is over."""
        connection = self._holder()
        if connection is not None and isinstance(connection._engine, Engine):
            connection._engine.keys(result)
            return True
        wipe_keys([] if isinstance(result, KMSError) else result)
        return False


_IN_THIS_THREAD: Final = Driver()

driver_in_charge: Final[ContextVar[Driver]] = ContextVar("qkd_tls.driver", default=_IN_THIS_THREAD)
"""The driver of connections that are being made. Some functions, such as asyncio's, pass only a context."""


class NotThroughTheStandardLibrary:
    """A stand-in for the standard library's TLS object: a forgotten method fails, and sends nothing.

    It answers questions about the connection, which httpcore asks here.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = weakref.ref(endpoint)

    def __getattr__(self, name: str) -> Any:
        endpoint = self._endpoint()
        if name in _QUESTIONS and endpoint is not None:
            return getattr(endpoint, name)
        if not hasattr(_SSLSocket, name):
            raise AttributeError(f"'_ssl._SSLSocket' object has no attribute {name!r}")

        def refuse(*_: object, **__: object) -> NoReturn:
            raise NotImplementedError(
                f"this connection's TLS is not the standard library's: {name} is not implemented"
            )

        return refuse


class Endpoint:
    """One end of a connection."""

    server_side: bool
    server_hostname: str | None
    _context: EndpointContext
    _driver: Driver
    _engine: EndpointEngine | None
    """The engine; None once the handshake is over."""
    _failure: OSError | None = None
    """The error that the handshake has failed with, unless the connection is closed."""
    _tls: TLSConnection | None
    """The TLS connection, once the handshake is complete."""
    _info: QKDInfo | None
    _peer_certificate: bytes | None
    _offered_suites: tuple[int, ...] = ()
    _lock: threading.Lock
    """A lock around each call of OpenSSL; never held while waiting."""
    _records: RecordBuffer
    """The beginning of the peer's next record, as OpenSSL would keep it; what is behind it is left to the transport."""
    _sending: SharedDirection
    _receiving: SharedDirection
    _unwrapping = False
    """True once the program has called `unwrap`: from then on, the peer's close_notify is an error of a read."""
    _contested = False
    """True if a fork has left a direction to whichever process uses it first."""
    _locked_for_fork = False

    def _initialise(
        self, context: EndpointContext, *, server_side: bool, server_hostname: str | None
    ) -> None:
        self._context = context
        self.server_side, self.server_hostname = server_side, server_hostname
        self._engine = self._tls = self._info = self._peer_certificate = None
        driver = driver_in_charge.get()
        self._driver = driver if driver.claim() else _IN_THIS_THREAD
        self._lock = threading.Lock()
        self._records = RecordBuffer()
        self._sending, self._receiving = SharedDirection(), SharedDirection()
        self._sslobj = NotThroughTheStandardLibrary(self)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: two objects cannot share one TLS connection."""
        raise TypeError(f"cannot pickle or copy {type(self).__name__!r} object")

    # --- handshake

    def _send_ciphertext(self, data: bytes) -> None:
        raise NotImplementedError

    def _receive_ciphertext(self, size: int) -> bytes:
        """Take at most `size` bytes from the transport; none at its end. Raises SSLWantReadError if none are there."""
        raise NotImplementedError

    def _next_record(self) -> bytes:
        """Take the peer's next record, and no byte more: what is behind it stays where programs look for it.

        Returns nothing at the end of the stream. Raises SSLWantReadError if the record is not complete yet.
        """
        records = self._records
        while (record := records.next_record()) is None:
            data = self._receive_ciphertext(records.missing)
            if not data:
                return b""
            records.feed(data)
        return record

    def _take_over(self, tls: TLSConnection) -> None:
        """Set `_tls` in place of `_engine`: from now on, application data goes through TLS."""
        raise NotImplementedError

    def _begin(self, engine: EndpointEngine) -> None:
        self._engine = engine
        self._driver.begin(self)
        share_with_children(self)

    def _step(self, engine: EndpointEngine) -> None:
        """Do the engine's next action."""
        self._send_ciphertext(engine.data_to_send())
        action = engine.next_action()
        if isinstance(action, NeedData):
            engine.receive_data(self._next_record())
        elif isinstance(action, Established):
            self._establish(engine, action.info)
        elif isinstance(action, ChooseContext):
            assert isinstance(engine, ServerEngine)
            self._context._choose_context(engine, self, action.server_name)
        else:
            manager = self._context.key_manager
            assert isinstance(engine, Engine) and manager is not None
            engine.keys(self._driver.fetch(action, manager))

    def _establish(self, engine: EndpointEngine, info: QKDInfo) -> None:
        self._peer_certificate = engine.peer_certificate
        if isinstance(engine, ServerEngine):
            self._offered_suites = engine.offered_suites
        self._take_over(engine.connection)
        self._info = info
        self._driver.end()
        # A driver may hold the transport, which holds the connection.
        self._driver = _IN_THIS_THREAD
        self._context._count("accept_good" if self.server_side else "connect_good")
        self._warn(info)

    def _warn(self, info: QKDInfo) -> None:
        if info.fallback is not None:
            warnings.warn(
                f"no QKD key protects this connection: {info.fallback}",
                QKDFallbackWarning,
                stacklevel=_outside(),
            )
        if info.group not in ML_KEM_GROUPS:
            warnings.warn(
                f"the key exchange of this connection is {info.group}, which has no ML-KEM"
                + (f"; {info.kem} is mixed in beside it" if info.kem else ""),
                ClassicalGroupWarning,
                stacklevel=_outside(),
            )

    def _give_up(self, engine: EndpointEngine, error: BaseException | None = None) -> bytes:
        """Let go of a handshake that has failed, and of all its secrets; return the last words for the peer."""
        engine.abort()
        last_words = engine.data_to_send()
        self._engine = None
        self._driver.end()
        self._driver = _IN_THIS_THREAD
        given_up = ssl_error(ssl.SSLError, "the handshake was given up")
        self._failure = raised_anew(error) if isinstance(error, OSError) else given_up
        return last_words if self._sending.owned else b""

    def give_up(self) -> None:
        """End the handshake for good, if it lasts, and wipe its secrets; called by its driver."""
        if self._engine is not None:
            self._give_up(self._engine)

    def _raise_failure(self) -> None:
        """Raise the error that the handshake has failed with, if it has."""
        if self._failure is not None:
            raise raised_anew(self._failure)

    # --- data, if it goes through memory

    def _over_memory(
        self, tls: TLSConnection, operation: Callable[[TLSConnection], _T], *, reading: bool
    ) -> _T:
        """Run a TLS operation, giving it the peer's records one by one, and none that it does not need."""
        while True:
            if reading and tls.hungry:
                record = self._next_record()
                if record:
                    tls.feed(record)
                else:
                    tls.end()
            try:
                return operation(tls)
            except ssl.SSLWantReadError:
                if not tls.hungry:
                    raise
                reading = True

    # --- forks

    def _use(self, *directions: SharedDirection) -> None:
        """Own the directions of the connection from now on; raise OSError if another process does."""
        for direction in directions:
            direction.use()
        self._contested = not (self._sending.owned and self._receiving.owned)

    def _before_fork(self, claims: Claims) -> None:
        self._locked_for_fork = self._lock.acquire(timeout=_FORK_PATIENCE)
        self._sending.share(claims)
        self._receiving.share(claims)
        self._contested = True

    def _after_fork(self, *, in_child: bool) -> None:
        if in_child:
            # The threads that held the locks are not here.
            whole = self._locked_for_fork
            self._lock = threading.Lock()
            if not whole:
                # Copied in the middle of a change.
                self._sending.lose()
                self._receiving.lose()
        elif self._locked_for_fork:
            self._lock.release()

    # --- what the connection is

    def _of_tls(self, question: Callable[[TLSConnection], _T]) -> _T | None:
        tls = self._tls
        if tls is None:
            # Not locked: an `sni_callback` may ask in the middle of the handshake.
            return None
        with self._lock:
            return question(tls)

    @property
    def context(self) -> Any:
        """The `QKDContext` of this connection; an `sni_callback` may set another one, of the same class."""
        return self._context

    @context.setter
    def context(self, value: ssl.SSLContext) -> None:
        if not (isinstance(value, EndpointContext) and isinstance(value, SSLContext)):
            raise TypeError("The value must be a QKDContext")
        self._context = value

    @property
    def qkd(self) -> QKDInfo | None:
        """The protection of this connection; None before the handshake is complete."""
        return self._info

    @property
    def session(self) -> None:
        """Always None: no connection is ever resumed without a fresh QKD key."""
        return None

    @session.setter
    def session(self, value: object) -> None:
        raise ValueError("no connection is ever resumed without a fresh QKD key: session stays None")

    @property
    def session_reused(self) -> bool | None:
        """False after the handshake, see `session`; None before it is complete."""
        return None if self._info is None else False

    def version(self) -> str | None:
        """Return `TLSv1.3`, or None before the handshake is complete."""
        return "TLSv1.3" if self._tls is not None else None

    def cipher(self) -> tuple[str, str, int] | None:
        """Return the name of the cipher suite, protocol version and secret bits."""
        return self._of_tls(lambda tls: tls.cipher)

    def shared_ciphers(self) -> list[tuple[str, str, int]] | None:
        """Return the cipher suites that both sides have, in the client's order; None at the client."""
        if not self.server_side:
            return None
        return self._of_tls(lambda tls: tls.shared_ciphers(self._offered_suites))

    def compression(self) -> None:
        """Return None: TLS 1.3 has no compression."""
        return

    def selected_alpn_protocol(self) -> str | None:
        """Return the application's protocol; never `qkd-tls/1`."""
        return self._info.alpn if self._info is not None else None

    def selected_npn_protocol(self) -> None:
        """Return None: superseded by ALPN."""
        return

    def getpeercert(self, binary_form: bool = False) -> dict[str, Any] | bytes | None:
        """Return the certificate that authenticated the peer: on an associated connection, the bootstrap's.

        As in the standard library: None if there is none, an empty dictionary if it was not verified.
        """
        if self._info is None:
            raise ValueError("handshake not done yet")
        certificate = self._peer_certificate
        if certificate is None:
            # It may have come after the handshake.
            certificate = self._of_tls(lambda tls: tls.peer_certificate)
        if binary_form or certificate is None:
            return certificate
        return {} if self._context.verify_mode == ssl.CERT_NONE else certificate_dict(certificate)

    if hasattr(SSLObject, "get_verified_chain"):  # from Python 3.13 on

        def get_verified_chain(self) -> NoReturn:
            """Raise NotImplementedError: an association keeps the peer's own certificate only."""
            raise NotImplementedError("only the peer's own certificate is kept: use getpeercert(True)")

        def get_unverified_chain(self) -> NoReturn:
            """Raise NotImplementedError: an association keeps the peer's own certificate only."""
            self.get_verified_chain()

    def get_channel_binding(self, cb_type: str = "tls-exporter") -> bytes | None:
        """Return the channel binding, 32 bytes (RFC 9266); None before the handshake is complete."""
        if cb_type != "tls-exporter":
            raise ValueError(
                f"{cb_type} channel binding type not implemented: TLS 1.3 has tls-exporter (RFC 9266)"
            )
        return self._of_tls(lambda tls: tls.export(b"EXPORTER-Channel-Binding", 32))

    def verify_client_post_handshake(self) -> None:
        """Ask the client for its certificate now, as server (RFC 8446 4.6.2); it comes with later data."""
        tls = self._tls
        if tls is None:
            raise ValueError("no TLS connection: the handshake is not complete, or it has been closed")
        if not self.server_side:
            raise ssl_error(
                ssl.SSLError,
                "[SSL: NOT_SERVER] not server: only a server may ask for a certificate",
                "NOT_SERVER",
            )
        with self._lock:
            if self._contested:
                self._use(self._sending)
            tls.verify_client_post_handshake()


def _outside() -> int:
    """Return the stack level, for the caller's `warnings.warn`, of the program that uses this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("qkd_tls."):
        level, frame = level + 1, frame.f_back
    return level
