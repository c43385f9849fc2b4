"""`QKDSocket`, returned by `QKDContext.wrap_socket`, with the methods and errors of `ssl.SSLSocket`.

During the handshake the engine stands between the socket and OpenSSL; it takes one record at a time and no byte beyond
it, as OpenSSL does. Afterwards OpenSSL reads and writes the socket itself, which is as fast as the standard library.
The file descriptor always is non-blocking and the timeouts are kept here, so that no lock is held while waiting: a
thread may read while another one writes. What waits is looked up when it is called (`select.poll`, locks), so that a
program that replaces it, as gevent does, waits in its own way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn, Self, TypeVar

from kms_client.forks import Claims, SharedDirection
from kms_client.waiting import READ, WRITE, is_ready
from qkd_tls.endpoint import Endpoint, EndpointContext, EndpointEngine
from qkd_tls.errors import ssl_error
from qkd_tls.openssl import TLSConnection
from qkd_tls.records import FULL_RECORD
from qkd_tls.stdlib import Socket, SSLSocket

__all__ = ["QKDSocket"]

_T = TypeVar("_T")
_CHUNK: Final = 1 << 16
_DEFAULT_READ: Final = 1024


class QKDSocket(Endpoint, SSLSocket):  # type: ignore[misc]
    """A TLS 1.3 connection over TCP. Made by `QKDContext.wrap_socket`, not by calling the class."""

    do_handshake_on_connect: bool
    suppress_ragged_eofs: bool
    _handshaking: threading.Lock
    """A lock held throughout a handshake, which is many calls."""
    _writing: threading.Lock
    """A lock held throughout a write: data that OpenSSL could not send at once must go out first."""
    _unsent: bytearray
    """Ciphertext that the transport has not taken yet."""
    _plain: bool
    """True if TLS is over, by `unwrap`, and the socket goes on without."""
    _connected: bool
    _timeout: float | None
    _busy: tuple[bool, bool]
    """At a fork: whether a handshake, and a write, were under way."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("QKDSocket has no public constructor: use QKDContext.wrap_socket")

    @classmethod
    def _create(
        cls,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | None = None,
        context: EndpointContext | None = None,
        session: None = None,
    ) -> Self:
        # The arguments are those of the standard library's class, for contexts that it makes connections of.
        assert context is not None
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise NotImplementedError("only stream sockets are supported")
        # Complains about arguments that do not fit before the socket is taken over.
        engine = context.new_engine(
            server_side=server_side, server_hostname=server_hostname, server_port=_peer_port(sock)
        )
        self = cls.__new__(cls)
        timeout = sock.gettimeout()
        Socket.__init__(self, sock.family, sock.type, sock.proto, sock.fileno())
        sock.detach()
        self._initialise(context, server_side=server_side, server_hostname=server_hostname)
        self.do_handshake_on_connect = do_handshake_on_connect
        self.suppress_ragged_eofs = suppress_ragged_eofs
        self._handshaking, self._writing = threading.Lock(), threading.Lock()
        self._unsent = bytearray()
        self._plain = False
        self._connected = False
        self._timeout = timeout
        Socket.setblocking(self, False)
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
        try:
            left = Socket.recv(self, 1)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EINVAL, errno.EAGAIN):
                raise
            left = b""
        if left:
            closed = ssl_error(ssl.SSLError, "Closed before TLS handshake with data in recv buffer.")
            closed.reason = closed.args[1]
            raise closed
        return False

    def _start(self, engine: EndpointEngine) -> None:
        self._connected = True
        self._begin(engine)

    # --- waiting: the one place

    def _pump(
        self,
        operation: Callable[[TLSConnection], _T],
        deadline: float | None,
        what: str,
        *directions: SharedDirection,
        again: bool = False,
    ) -> _T:
        """Run a TLS operation until it succeeds, waiting for the socket in between."""
        while True:
            try:
                with self._lock:
                    if self._tls is None:
                        raise _closed()
                    if self._contested or not self._tls.attached:
                        return self._contested_operation(self._tls, operation, directions)
                    return operation(self._tls)
            except ssl.SSLWantReadError:
                again = self._wait_for_record(deadline, what, again)
            except ssl.SSLWantWriteError:
                if self._timeout == 0.0:
                    raise
                self._wait(WRITE, deadline, what)

    def _wait_for_record(self, deadline: float | None, what: str, again: bool) -> bool:
        """Wait until the peer's next record is there; return whether OpenSSL is to be asked once more before that.

        OpenSSL returns after each ticket or KeyUpdate, and the caller should not have to ask again. Where it owes the
        answer to a KeyUpdate, it sends it when it has read the next message, and keeps that one: nobody sees it in the
        descriptor.
        """
        if self._timeout != 0.0 and again:
            self._wait(READ, deadline, what)
            return False
        if not is_ready(self._descriptor(), READ, 0):
            if again:
                raise _want(READ)
            return True
        if self._timeout and deadline is not None and time.monotonic() >= deadline:
            # The peer goes on and on without saying anything.
            raise _timed_out(what)
        return False

    def _contested_operation(
        self,
        tls: TLSConnection,
        operation: Callable[[TLSConnection], _T],
        directions: tuple[SharedDirection, ...],
    ) -> _T:
        """Run a TLS operation after a fork, if this process may.

        As long as another process may be sending, ciphertext goes through memory: what OpenSSL would send by itself,
        such as the answer to a KeyUpdate, stays there.
        """
        self._use(*directions)
        if self._sending.owned:
            if not tls.attached:
                self._unsent += tls.take()
            self._flush()
            if not (tls.attached or self._records):
                tls.attach(self.fileno())
        elif tls.attached:
            tls.detach()
        if tls.attached:
            return operation(tls)
        result = self._over_memory(tls, operation, reading=self._receiving in directions)
        if self._sending.owned:
            self._unsent += tls.take()
            # What cannot go out now goes before the next operation.
            with contextlib.suppress(ssl.SSLWantWriteError):
                self._flush()
        return result

    def _plainly(self, operation: Callable[[], _T], event: int, what: str) -> _T:
        """Run an operation of the socket itself until it succeeds, waiting in between."""
        deadline = self._deadline()
        while True:
            try:
                return operation()
            except BlockingIOError:
                if self._timeout == 0.0:
                    raise
            self._wait(event, deadline, what)

    def _wait_for_turn(self, lock: threading.Lock, want: int, deadline: float | None, what: str) -> None:
        """Acquire the lock, if need be after waiting for other threads within the deadline."""
        if lock.acquire(blocking=False):
            return
        if self._timeout == 0.0:
            raise _want(want)
        if not lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise _timed_out(what)

    def _wait(self, event: int, deadline: float | None, what: str) -> None:
        descriptor = self._descriptor()
        remaining = None if deadline is None else deadline - time.monotonic()
        if (remaining is not None and remaining <= 0) or not is_ready(descriptor, event, remaining):
            raise _timed_out(what)

    def _descriptor(self) -> int:
        descriptor = self.fileno()
        if descriptor < 0:
            raise _closed()
        return descriptor

    def _deadline(self) -> float | None:
        return None if self._timeout is None else time.monotonic() + self._timeout

    # --- handshake

    def do_handshake(self, block: bool = False) -> None:
        """Shake hands, unless done already; ask the key manager in this thread."""
        if self._info is not None and self._tls is None and not self._plain:
            raise _closed()
        self._wait_for_turn(self._handshaking, READ, self._deadline(), "handshake")
        try:
            if not self._connected:
                # Raises where there is no connection; a non-blocking one may have come about since `connect`.
                self.getpeername()
                self._start_client()
            saved, self._timeout = self._timeout, None if block and self._timeout == 0.0 else self._timeout
            try:
                self._shake_hands(self._deadline())
            finally:
                self._timeout = saved
        finally:
            self._handshaking.release()

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
                    self._wait(READ, deadline, "handshake")
                except ssl.SSLWantWriteError:
                    if self._timeout == 0.0:
                        raise
                    self._wait(WRITE, deadline, "handshake")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except BaseException as error:
            if engine is not None and self._info is None:
                # The peer should learn why, if it still listens.
                self._unsent += self._give_up(engine, error)
                with contextlib.suppress(OSError):
                    self._flush()
            raise

    def _handshake_step(self) -> None:
        if self._contested:
            self._use(self._sending, self._receiving)
        engine = self._engine
        if engine is not None:
            self._step(engine)
        elif self._tls is None:
            self._raise_failure()
            raise _closed()
        else:
            self._flush()

    def _send_ciphertext(self, data: bytes) -> None:
        self._unsent += data
        self._flush()

    def _receive_ciphertext(self, size: int) -> bytes:
        try:
            return Socket.recv(self, size)
        except BlockingIOError:
            raise _want(READ) from None

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = Socket.send(self, self._unsent)
            except BlockingIOError:
                raise _want(WRITE) from None
            del self._unsent[:sent]

    def _take_over(self, tls: TLSConnection) -> None:
        self._unsent += tls.take()
        with self._lock:
            if self._engine is None:
                # Closed by another thread: its file descriptor may be somebody else's by now.
                raise _closed()
            tls.attach(self.fileno())
            self._engine, self._tls = None, tls

    def _before_fork(self, claims: Claims) -> None:
        super()._before_fork(claims)
        self._busy = self._handshaking.locked(), self._writing.locked()

    def _after_fork(self, *, in_child: bool) -> None:
        super()._after_fork(in_child=in_child)
        if not in_child:
            return
        handshaking, writing = self._busy
        self._handshaking, self._writing = threading.Lock(), threading.Lock()
        # Another thread was in the middle, which is in the parent only.
        if handshaking or writing:
            self._sending.lose()
        if handshaking:
            self._receiving.lose()

    def _check_open(self, what: str) -> None:
        if self._engine is None and self._tls is None and self._failure is None:
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
        """Return at least one byte, at most `buflen` or a record's; no bytes at the end of the stream."""
        if self._plain:
            return self._plainly(lambda: Socket.recv(self, buflen, flags), READ, "recv")
        if flags:
            _refuse_flags("recv")
        if buflen < 0:
            raise ValueError("negative buffersize in recv")
        if not buflen:
            return b""
        buffer = bytearray(min(buflen, FULL_RECORD))
        size = self.recv_into(buffer)
        return bytes(memoryview(buffer)[:size])

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Fill the buffer with at least one byte; return the number, 0 at the end of the stream."""
        if self._plain:
            size = (memoryview(buffer).nbytes or _DEFAULT_READ) if nbytes is None else nbytes
            return self._plainly(lambda: Socket.recv_into(self, buffer, size, flags), READ, "recv_into")
        if flags:
            _refuse_flags("recv_into")
        if nbytes is not None and nbytes < 0:
            raise ValueError("negative buffersize in recv_into")
        # A view costs as much as a third of the rest.
        target = buffer if type(buffer) is bytearray and not nbytes else memoryview(buffer).cast("B")
        if nbytes:
            target = target[:nbytes]
        if not len(target):
            # Once closed, the standard library asks the socket itself, for more than the buffer holds.
            closed = self._engine is None and self._tls is None and self._failure is None
            return Socket.recv_into(self, buffer, nbytes or _DEFAULT_READ) if closed else 0
        try:
            try:
                # `with` takes longer, and these lines count: each small record is read by them.
                lock = self._lock
                lock.acquire()
                try:
                    tls = self._tls
                    if tls is not None and tls.attached and not (self._contested or self._unsent):
                        return tls.read_into(target)
                finally:
                    lock.release()
                again, deadline = False, self._deadline()
            except ssl.SSLWantReadError:
                deadline = self._deadline()
                again = self._wait_for_record(deadline, "read", False)
            self._ready()
            read = partial(TLSConnection.read_into, buffer=target)
            return self._pump(read, deadline, "read", self._receiving, again=again)
        except ssl.SSLZeroReturnError:
            if self._unwrapping:
                raise
            return 0
        except ssl.SSLEOFError:
            if self.suppress_ragged_eofs:
                return 0
            raise

    def pending(self) -> int:
        """Return the number of bytes already decrypted."""
        return self._of_tls(lambda tls: tls.pending) or 0

    # --- writing

    def write(self, data: Any) -> int:
        """Write like `send`."""
        self._check_open("Write")
        return self.send(data)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send everything; return its size in bytes.

        If the timeout is 0, only as much as the transport takes at once, at least one byte.
        """
        if self._plain:
            return self._plainly(lambda: Socket.send(self, data, flags), WRITE, "send")
        if flags:
            _refuse_flags("send")
        return self._write(data, whole=False)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send everything, within one timeout."""
        if self._plain:
            view = memoryview(data).cast("B")
            sent = 0
            while sent < len(view):
                sent += self.send(view[sent:], flags)
            return
        if flags:
            _refuse_flags("sendall")
        self._write(data, whole=True)

    def _write(self, data: Any, *, whole: bool) -> int:
        # These lines count, down to the first `return`: each small record is written by them.
        view = data if type(data) is bytes else memoryview(data).cast("B")
        size, sent, deadline = len(view), 0, self._deadline()
        if whole and not size:
            if self._info is not None and self._tls is None:
                raise _closed()
            return 0
        if self._info is None or self._unsent:
            self._ready()
        if not self._writing.acquire(False):
            self._wait_for_turn(self._writing, WRITE, deadline, "write")
        try:
            try:
                with self._lock:
                    tls = self._tls
                    if size and tls is not None and tls.attached and not (self._contested or self._unsent):
                        sent = tls.write_all(view, 0)
                        if sent == size:
                            return size
            except ssl.SSLWantWriteError:
                if self._timeout != 0.0:
                    self._wait(WRITE, deadline, "write")
            if not size:
                # OpenSSL may have the answer to a KeyUpdate to send, or an objection.
                return self._pump(lambda tls: tls.write(b""), deadline, "write", self._sending)
            while sent < size:
                if self._tls is not None and self._tls.clogged and self._timeout != 0.0:
                    self._wait(WRITE, deadline, "write")
                write = partial(TLSConnection.write_all, data=view, start=sent)
                try:
                    sent = self._pump(write, deadline, "write", self._sending)
                except ssl.SSLWantWriteError:
                    if whole or not sent:
                        raise
                    break
        finally:
            self._writing.release()
        return sent

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a file through TLS; return the number of bytes sent."""
        return self._sendfile_use_send(file, offset, count)  # type: ignore[attr-defined,no-any-return]

    # --- closing

    def shutdown(self, how: int) -> None:
        """Close one direction or both of the transport; send close_notify before writing ends."""
        if how != socket.SHUT_RD and not self._plain:
            self._say_goodbye()
        Socket.shutdown(self, how)

    def unwrap(self) -> Self:
        """End TLS in both directions; return this socket, which sends and receives in plain from now on.

        Raises ssl.SSLError if the peer sends data behind this side's close_notify, and ValueError if there is no TLS.
        """
        if self._engine is None and self._tls is None and self._failure is None:
            raise ValueError(f"No SSL wrapper around {self}")
        self._ready()
        deadline = self._deadline()
        both = self._sending, self._receiving
        self._unwrapping = True
        # Ours goes out first. The second call waits for the peer's.
        if not self._pump(lambda tls: tls.shutdown(), deadline, "unwrap", *both):
            self._pump(lambda tls: tls.shutdown(), deadline, "unwrap", *both)
        self._forget()
        self._plain = True
        return self

    def detach(self) -> int:
        """Give away the file descriptor without telling the peer."""
        self._forget()
        return Socket.detach(self)

    def _real_close(self) -> None:
        # `close` ends here, once all files that `makefile` made are closed too.
        self._say_goodbye()
        self._forget()
        if self._connected and not self._plain and self._receiving.owned:
            self._discard_what_has_come()
        Socket._real_close(self)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        with self._lock:
            engine, self._engine, self._tls = self._engine, None, None
            self._failure = None
        # Where another thread is shaking hands, it finds out at its next step and gives up by itself.
        if engine is not None and self._handshaking.acquire(blocking=False):
            engine.abort()
            self._handshaking.release()

    def _discard_what_has_come(self) -> None:
        # Closing with bytes unread resets the connection, and the peer might miss what was sent last, an alert for
        # instance. A client that only writes has not even read the server's tickets.
        with contextlib.suppress(OSError):
            for _ in range(4):
                if not Socket.recv(self, _CHUNK):
                    break

    def _say_goodbye(self) -> None:
        with self._lock:
            if self._tls is not None and self._sending.owned:
                # One try: closing does not wait for a peer that has stopped reading.
                with contextlib.suppress(OSError):
                    self._tls.shutdown()
                    if not self._tls.attached:
                        self._unsent += self._tls.take()
                        self._flush()

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

    def getblocking(self) -> bool:
        """Return whether operations wait."""
        return self._timeout != 0.0

    def setblocking(self, flag: bool) -> None:
        """Set the timeout to None (True) or 0 (False)."""
        self.settimeout(None if flag else 0.0)

    # --- connecting and accepting

    def connect(self, address: Any) -> None:
        """Connect and, unless do_handshake_on_connect is off, shake hands."""
        error = self._connect(address)
        if error:
            raise OSError(error, os.strerror(error))

    def connect_ex(self, address: Any) -> int:
        """Connect like `connect`; return an error number if TCP cannot connect."""
        try:
            return self._connect(address)
        except TimeoutError:
            return errno.EAGAIN

    def _connect(self, address: Any) -> int:
        if self.server_side:
            raise ValueError("can't connect in server-side mode")
        if self._connected:
            raise ValueError("attempt to connect already-connected QKDSocket!")
        error = Socket.connect_ex(self, address)
        if error == errno.EINPROGRESS and self._timeout != 0.0:
            self._wait(WRITE, self._deadline(), "connect")
            error = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
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
        accept: Callable[[], tuple[int, Any]] = super()._accept  # type: ignore[misc]
        descriptor, address = self._plainly(accept, READ, "accept")
        plain = Socket(self.family, self.type, self.proto, descriptor)
        if socket.getdefaulttimeout() is None:
            plain.setblocking(True)
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
    if event == READ:
        return ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "The operation did not complete (read)")
    return ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "The operation did not complete (write)")


def _closed() -> OSError:
    return OSError(errno.EBADF, "Bad file descriptor: the connection has been closed")


def _timed_out(what: str) -> TimeoutError:
    return TimeoutError(f"The {what} operation timed out")


def _refuse_flags(name: str) -> NoReturn:
    raise ValueError(f"non-zero flags not allowed in calls to {name}() on QKDSocket")


def _not_allowed(name: str, error: type[Exception]) -> NoReturn:
    raise error(f"{name} not allowed on instances of QKDSocket")
