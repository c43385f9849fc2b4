"""`QKDSocket`, returned by `QKDContext.wrap_socket`, with the methods and errors of `ssl.SSLSocket`.

During the handshake the engine stands between the socket and OpenSSL. Afterwards OpenSSL reads and writes the socket
itself, which is as fast as the standard library. The file descriptor always is non-blocking and the timeouts are kept
here, so that no lock is held while waiting: a thread may read while another one writes.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn, Self, TypeVar

from qkd_tls.endpoint import Endpoint, EndpointContext, EndpointEngine
from qkd_tls.errors import ssl_error
from qkd_tls.openssl import TLSConnection

__all__ = ["QKDSocket"]

_T = TypeVar("_T")
_CHUNK: Final = 1 << 16


class QKDSocket(Endpoint, ssl.SSLSocket):  # type: ignore[misc]
    """A TLS 1.3 connection over TCP. Made by `QKDContext.wrap_socket`, not by calling the class."""

    do_handshake_on_connect: bool
    suppress_ragged_eofs: bool
    _handshaking: threading.Lock
    """A lock held throughout a handshake, which is many calls."""
    _writing: threading.Lock
    """A lock held throughout a write: data that OpenSSL could not send at once must go out first."""
    _unsent: bytearray
    """Ciphertext that the transport has not taken yet."""
    _decrypted: bytearray
    """Application data that came with the last flight of the handshake."""
    _late_error: OSError | None
    _plain: socket.socket | None
    """The socket that `unwrap` has returned."""
    _connected: bool
    _timeout: float | None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("QKDSocket has no public constructor: use QKDContext.wrap_socket")

    @classmethod
    def _create(
        cls,
        sock: socket.socket,
        context: EndpointContext,
        *,
        server_side: bool,
        do_handshake_on_connect: bool,
        suppress_ragged_eofs: bool,
        server_hostname: str | None,
    ) -> Self:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise NotImplementedError("only stream sockets are supported")
        # Complains about arguments that do not fit before the socket is taken over.
        engine = context.new_engine(
            server_side=server_side, server_hostname=server_hostname, server_port=_peer_port(sock)
        )
        self = cls.__new__(cls)
        timeout = sock.gettimeout()
        socket.socket.__init__(self, sock.family, sock.type, sock.proto, sock.fileno())
        sock.detach()
        self._initialise(context, server_side=server_side, server_hostname=server_hostname)
        self.do_handshake_on_connect = do_handshake_on_connect
        self.suppress_ragged_eofs = suppress_ragged_eofs
        self._handshaking, self._writing = threading.Lock(), threading.Lock()
        self._unsent = bytearray()
        self._decrypted = bytearray()
        self._late_error = None
        self._plain = None
        self._connected = False
        self._timeout = timeout
        socket.socket.settimeout(self, timeout)
        try:
            if not self._has_peer():
                return self
            self._start(engine)
            if do_handshake_on_connect:
                if timeout == 0.0:
                    raise ValueError(
                        "do_handshake_on_connect should not be specified for non-blocking sockets"
                    )
                self.do_handshake()
        except BaseException:
            self.close()
            raise
        return self

    def _has_peer(self) -> bool:
        try:
            self.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
        else:
            return True
        # A peer that is gone already may have left data. It came through no TLS, and must not be taken for what did.
        socket.socket.setblocking(self, False)
        try:
            left = socket.socket.recv(self, 1)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EINVAL, errno.EAGAIN):
                raise
            left = b""
        socket.socket.settimeout(self, self._timeout)
        if left:
            closed = ssl_error(ssl.SSLError, "Closed before TLS handshake with data in recv buffer.")
            closed.reason = closed.args[1]
            raise closed
        return False

    def _start(self, engine: EndpointEngine) -> None:
        self._connected = True
        self._begin(engine)
        socket.socket.setblocking(self, False)

    # --- waiting: the one place

    def _pump(self, operation: Callable[[TLSConnection], _T], deadline: float | None, what: str) -> _T:
        """Run a TLS operation until it succeeds, waiting for the socket in between."""
        while True:
            try:
                with self._lock:
                    if self._tls is None:
                        raise OSError(9, "Bad file descriptor: the TLS connection has been closed")
                    return operation(self._tls)
            except ssl.SSLWantReadError:
                if self._timeout == 0.0:
                    raise
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                if self._timeout == 0.0:
                    raise
                event = select.POLLOUT
            self._wait(event, deadline, what)

    @contextlib.contextmanager
    def _turn(self, lock: threading.Lock, want: int, deadline: float | None, what: str) -> Iterator[None]:
        """Hold the lock for the block, after waiting for other threads within the deadline."""
        if not lock.acquire(blocking=False):
            if self._timeout == 0.0:
                raise _want(want)
            if not lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
                raise _timed_out(what)
        try:
            yield
        finally:
            lock.release()

    def _wait(self, event: int, deadline: float | None, what: str) -> None:
        descriptor = self.fileno()
        if descriptor < 0:
            raise OSError(9, "Bad file descriptor: the connection has been closed")
        poll = select.poll()
        poll.register(descriptor, event)
        remaining = None if deadline is None else deadline - time.monotonic()
        if (remaining is not None and remaining <= 0) or not poll.poll(
            None if remaining is None else remaining * 1000
        ):
            raise _timed_out(what)

    def _deadline(self) -> float | None:
        return None if self._timeout is None else time.monotonic() + self._timeout

    # --- handshake

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands, unless done already; ask the key manager in this thread."""
        with self._turn(self._handshaking, select.POLLIN, self._deadline(), "handshake"):
            if not self._connected:
                # Raises where there is no connection; a non-blocking one may have come about since `connect`.
                self.getpeername()
                self._start_client()
            saved, self._timeout = self._timeout, None if block and self._timeout == 0.0 else self._timeout
            try:
                self._shake_hands(self._deadline())
            finally:
                self._timeout = saved

    def _shake_hands(self, deadline: float | None) -> None:
        # Kept here, for another thread may close the socket meanwhile.
        engine = self._engine
        try:
            while self._info is None or self._unsent:
                try:
                    self._handshake_step()
                except ssl.SSLWantReadError:
                    if self._timeout == 0.0:
                        raise
                    self._wait(select.POLLIN, deadline, "handshake")
                except ssl.SSLWantWriteError:
                    if self._timeout == 0.0:
                        raise
                    self._wait(select.POLLOUT, deadline, "handshake")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except BaseException:
            if engine is not None and self._info is None:
                engine.abort()
                self._unsent += engine.data_to_send()
                # The peer should learn why, if it still listens.
                with contextlib.suppress(OSError):
                    self._flush()
            raise

    def _handshake_step(self) -> None:
        engine = self._engine
        if engine is not None:
            self._step(engine)
        elif self._tls is None:
            raise OSError(9, "Bad file descriptor: the connection has been closed")
        else:
            self._flush()

    def _send_ciphertext(self, data: bytes) -> None:
        self._unsent += data
        self._flush()

    def _receive_ciphertext(self) -> bytes:
        try:
            return socket.socket.recv(self, _CHUNK)
        except BlockingIOError:
            raise _want(select.POLLIN) from None

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = socket.socket.send(self, self._unsent)
            except BlockingIOError:
                raise _want(select.POLLOUT) from None
            del self._unsent[:sent]

    def _take_over(self, tls: TLSConnection) -> None:
        # What came with the last flight is decrypted now, so that nothing is left in memory when OpenSSL takes over
        # the socket. Its error, if any, is for the first read.
        try:
            while True:
                self._decrypted += tls.read(_CHUNK)
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            self._late_error = error
        self._unsent += tls.take()
        with self._lock:
            if self._engine is None:
                # Closed by another thread: its file descriptor may be somebody else's by now.
                raise OSError(9, "Bad file descriptor: the connection has been closed")
            tls.attach(self.fileno())
            self._engine, self._tls = None, tls

    def _check_open(self, what: str) -> None:
        if self._engine is None and self._tls is None:
            raise ValueError(f"{what} on closed or unwrapped QKDSocket.")

    def _check_connected(self) -> None:
        if not self._connected:
            # Raises unless a non-blocking `connect` has come about.
            self.getpeername()

    def getpeercert(  # type: ignore[override]
        self, binary_form: bool = False
    ) -> dict[str, Any] | bytes | None:
        """Return the certificate like `QKDObject.getpeercert`; raise OSError if there is no connection."""
        self._check_connected()
        return super().getpeercert(binary_form)

    def _ready(self) -> None:
        """Shake hands if a program reads or writes first, as OpenSSL does."""
        if self._info is None or self._unsent:
            self.do_handshake()

    # --- reading

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Read up to `len` bytes and return them, or read into `buffer` and return the number."""
        self._check_open("Read")
        if buffer is not None:
            return self.recv_into(buffer, max(len, 0))
        return self.recv(len)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Return at least one byte, at most `buflen`; no bytes at the end of the stream."""
        _no_flags(flags, "recv")
        if buflen < 0:
            raise ValueError("negative buffersize in recv")
        buffer = bytearray(min(buflen, 1 << 24))
        size = self.recv_into(buffer)
        return bytes(memoryview(buffer)[:size])

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Fill the buffer with at least one byte; return the number, 0 at the end of the stream."""
        _no_flags(flags, "recv_into")
        if nbytes is not None and nbytes < 0:
            raise ValueError("negative buffersize in recv_into")
        target = memoryview(buffer).cast("B")
        if nbytes:
            target = target[:nbytes]
        if not len(target):
            return 0
        self._ready()
        if self._decrypted and (size := self._take_decrypted(target)):
            return size
        try:
            if self._late_error is not None:
                error, self._late_error = self._late_error, None
                raise error
            deadline = self._deadline()
            if self._tls is not None and self._tls.starved and self._timeout != 0.0:
                # The last read has found out already that there is nothing to read.
                self._wait(select.POLLIN, deadline, "read")
            return self._pump(lambda tls: tls.read_into(target), deadline, "read")
        except ssl.SSLZeroReturnError:
            return 0
        except ssl.SSLEOFError:
            if self.suppress_ragged_eofs:
                return 0
            raise

    def _take_decrypted(self, target: memoryview) -> int:
        with self._lock:
            size = min(len(target), len(self._decrypted))
            target[:size] = self._decrypted[:size]
            del self._decrypted[:size]
        return size

    def pending(self) -> int:
        """Return the number of bytes that can be read without waiting for the peer."""
        return len(self._decrypted) + (self._of_tls(lambda tls: tls.pending) or 0)

    # --- writing

    def write(self, data: Any) -> int:
        """Write like `send`."""
        self._check_open("Write")
        return self.send(data)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send at least one byte; return the number sent."""
        _no_flags(flags, "send")
        view = memoryview(data).cast("B")
        self._ready()
        if not len(view):
            return 0
        deadline = self._deadline()
        with self._turn(self._writing, select.POLLOUT, deadline, "write"):
            return self._pump(lambda tls: tls.write(view), deadline, "write")

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send everything, within one timeout."""
        _no_flags(flags, "sendall")
        view = memoryview(data).cast("B")
        self._ready()
        deadline = self._deadline()
        sent = 0
        with self._turn(self._writing, select.POLLOUT, deadline, "write"):
            while sent < len(view):
                start = sent
                sent = self._pump(lambda tls: tls.write_all(view, start), deadline, "write")  # noqa: B023 - at once
                if self._tls is not None and self._tls.clogged and self._timeout != 0.0:
                    self._wait(select.POLLOUT, deadline, "write")

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file through TLS; return the number of bytes sent."""
        return self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined,no-any-return]

    # --- closing

    def shutdown(self, how: int) -> None:
        """Close one direction or both of the transport; send close_notify before writing ends."""
        if how != socket.SHUT_RD:
            self._say_goodbye()
        socket.socket.shutdown(self, how)

    def unwrap(self) -> socket.socket:
        """End TLS in both directions; return the plain socket.

        After that, this object can only be closed, which closes the plain socket: in the standard library
        they are one.
        """
        self._ready()
        deadline = self._deadline()
        while not self._pump(lambda tls: tls.shutdown(), deadline, "unwrap"):
            # Ours is out; now wait for the peer's. Data that it still sends is not for the plain socket.
            with contextlib.suppress(ssl.SSLZeroReturnError):
                self._pump(lambda tls: tls.read(_CHUNK), deadline, "unwrap")
        self._plain = socket.socket(fileno=self.detach())
        self._plain.settimeout(self._timeout)
        # A `with` block closes only what is not closed yet.
        self._closed = False
        return self._plain

    def detach(self) -> int:
        """Give away the file descriptor without telling the peer."""
        self._forget()
        return socket.socket.detach(self)

    def _real_close(self) -> None:
        # `close` ends here, once all files that `makefile` made are closed too.
        self._say_goodbye()
        self._forget()
        if self._connected:
            self._discard_what_has_come()
        if self._plain is not None:
            # ftplib drops what `unwrap` has returned, and closes this.
            self._plain.close()
        socket.socket._real_close(self)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        with self._lock:
            engine, self._engine, self._tls = self._engine, None, None
        # Where another thread is shaking hands, it finds out at its next step and gives up by itself.
        if engine is not None and self._handshaking.acquire(blocking=False):
            engine.abort()
            self._handshaking.release()

    def _discard_what_has_come(self) -> None:
        # Closing with bytes unread resets the connection, and the peer might miss what was sent last, an alert for
        # instance. A client that only writes has not even read the server's tickets.
        with contextlib.suppress(OSError):
            for _ in range(4):
                if not socket.socket.recv(self, _CHUNK):
                    break

    def _say_goodbye(self) -> None:
        with self._lock:
            if self._tls is not None:
                # One try: closing does not wait for a peer that has stopped reading.
                with contextlib.suppress(OSError):
                    self._tls.shutdown()

    # --- timeouts: kept here, the file descriptor stays non-blocking

    @property
    def timeout(self) -> float | None:
        """The same as `gettimeout`."""
        return self._timeout

    def gettimeout(self) -> float | None:
        """Return the seconds that an operation may take; None without limit, 0.0 for non-blocking."""
        return self._timeout

    def settimeout(self, value: float | None) -> None:
        """Set the limit in seconds for each later operation."""
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = None if value is None else float(value)
        if not self._connected:
            socket.socket.settimeout(self, value)

    def getblocking(self) -> bool:
        """Return whether operations wait."""
        return self._timeout != 0.0

    def setblocking(self, flag: bool) -> None:
        """Set the timeout to None (True) or 0 (False)."""
        self.settimeout(None if flag else 0.0)

    # --- connecting and accepting

    def connect(self, address: Any) -> None:
        """Connect and, unless do_handshake_on_connect is off, shake hands."""
        self._connect(socket.socket.connect, address)

    def connect_ex(self, address: Any) -> int:
        """Connect like `connect`; return an error number if TCP cannot connect."""
        return self._connect(socket.socket.connect_ex, address)

    def _connect(self, connect: Callable[[socket.socket, Any], int | None], address: Any) -> int:
        if self.server_side:
            raise ValueError("can't connect in server-side mode")
        if self._connected:
            raise ValueError("attempt to connect already-connected QKDSocket!")
        error = connect(self, address)
        if error:
            return error
        self._start_client()
        if self.do_handshake_on_connect:
            self.do_handshake()
        return 0

    def _start_client(self) -> None:
        self._start(
            self._context.new_engine(
                server_side=self.server_side,
                server_hostname=self.server_hostname,
                server_port=_peer_port(self),
            )
        )

    def accept(self) -> tuple[QKDSocket, Any]:
        """Accept a connection; the handshake is done here unless do_handshake_on_connect is off."""
        plain, address = socket.socket.accept(self)
        try:
            wrapped = self._context.wrap_socket(
                plain,
                server_side=True,
                do_handshake_on_connect=self.do_handshake_on_connect,
                suppress_ragged_eofs=self.suppress_ragged_eofs,
            )
        except BaseException:
            plain.close()
            raise
        return wrapped, address

    # --- what would put plaintext on the wire, or cannot be

    def sendto(self, *_: Any) -> NoReturn:
        """Raise ValueError, as in the standard library."""
        self._check_connected()
        _not_allowed("sendto", ValueError)

    def sendmsg(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError, as in the standard library."""
        _not_allowed("sendmsg", NotImplementedError)

    def sendmsg_afalg(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError."""
        _not_allowed("sendmsg_afalg", NotImplementedError)

    def recvfrom(self, *_: Any, **__: Any) -> NoReturn:
        """Raise ValueError, as in the standard library."""
        self._check_connected()
        _not_allowed("recvfrom", ValueError)

    def recvfrom_into(self, *_: Any, **__: Any) -> NoReturn:
        """Raise ValueError, as in the standard library."""
        self._check_connected()
        _not_allowed("recvfrom_into", ValueError)

    def recvmsg(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError, as in the standard library."""
        _not_allowed("recvmsg", NotImplementedError)

    def recvmsg_into(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError, as in the standard library."""
        _not_allowed("recvmsg_into", NotImplementedError)

    def dup(self) -> NoReturn:
        """Raise NotImplementedError: two sockets cannot share one TLS connection."""
        raise NotImplementedError("Can't dup() QKDSocket instances")


def _peer_port(sock: socket.socket) -> int | None:
    """Return the peer's TCP port; None before connecting, and for other kinds of address."""
    try:
        address = sock.getpeername()
    except OSError:
        return None
    return address[1] if isinstance(address, tuple) else None


def _want(event: int) -> ssl.SSLError:
    if event == select.POLLIN:
        return ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "The operation did not complete (read)")
    return ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)")


def _timed_out(what: str) -> TimeoutError:
    return TimeoutError(f"The {what} operation timed out")


def _no_flags(flags: int, name: str) -> None:
    if flags != 0:
        raise ValueError(f"non-zero flags not allowed in calls to {name}() on QKDSocket")


def _not_allowed(name: str, error: type[Exception]) -> NoReturn:
    raise error(f"{name} not allowed on instances of QKDSocket")
