"""`QKDObject`, returned by `QKDContext.wrap_bio`, with the methods and errors of `ssl.SSLObject`.

Ciphertext goes in and out through two `ssl.MemoryBIO`s, which the caller fills and empties. No call waits,
except for the KMS during `do_handshake`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Self, TypeVar

from kms_client.forks import SharedDirection
from qkd_tls.endpoint import Endpoint, EndpointContext
from qkd_tls.errors import ssl_error
from qkd_tls.openssl import TLSConnection
from qkd_tls.records import FULL_RECORD
from qkd_tls.stdlib import SSLObject

__all__ = ["QKDObject"]

_T = TypeVar("_T")


class QKDObject(Endpoint, SSLObject):  # type: ignore[misc]
    """A TLS 1.3 connection over memory. Made by `QKDContext.wrap_bio`, not by calling the class."""

    # The standard library's class has properties of these names.
    server_side: bool = False
    server_hostname: str | None = None
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("QKDObject has no public constructor: use QKDContext.wrap_bio")

    @classmethod
    def _create(
        cls,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: None = None,
        *,
        context: EndpointContext,
    ) -> Self:
        # The arguments are those of the standard library's class, for contexts that it makes connections of.
        if not (isinstance(incoming, ssl.MemoryBIO) and isinstance(outgoing, ssl.MemoryBIO)):
            raise TypeError("incoming and outgoing must be ssl.MemoryBIO")
        self = cls.__new__(cls)
        self._initialise(context, server_side=server_side, server_hostname=server_hostname)
        self._incoming, self._outgoing = incoming, outgoing
        self._begin(
            context.new_engine(
                server_side=server_side,
                server_hostname=server_hostname,
                server_port=None if server_side else self._driver.server_port,
            )
        )
        return self

    # --- handshake

    def do_handshake(self) -> None:
        """Shake hands as far as the ciphertext at hand goes; ask the key manager in this thread.

        Raises SSLWantReadError until the handshake is complete, and the errors of `QKDContext.wrap_socket`.
        """
        self._driver.take_turn()
        with self._lock:
            self._raise_failure()
            try:
                while self._engine is not None:
                    if self._contested:
                        self._use(self._sending, self._receiving)
                    self._step(self._engine)
            except ssl.SSLWantReadError:
                raise
            except BaseException as error:
                if self._engine is not None:
                    driver = self._driver
                    # The peer should learn why.
                    self._send_ciphertext(self._give_up(self._engine, error))
                    driver.take_last_words(self._outgoing)
                raise

    def _send_ciphertext(self, data: bytes) -> None:
        if data:
            self._outgoing.write(data)

    def _receive_ciphertext(self, size: int) -> bytes:
        data = self._incoming.read(size)
        if not data and not self._incoming.eof:
            raise ssl_error(ssl.SSLWantReadError, "The operation did not complete (read)")
        return data

    def _take_over(self, tls: TLSConnection) -> None:
        self._send_ciphertext(tls.take())
        self._engine, self._tls = None, tls

    # --- data: the one place where TLS is called

    def _pump(self, operation: Callable[[TLSConnection], _T], *directions: SharedDirection) -> _T:
        if self._tls is None:
            # As OpenSSL does where a program reads or writes first.
            self.do_handshake()
        with self._lock:
            tls = self._tls
            assert tls is not None
            if self._contested:
                self._use(*directions)
            try:
                return self._over_memory(tls, operation, reading=self._receiving in directions)
            finally:
                if self._sending.owned:
                    # Else it waits, such as the answer to a KeyUpdate: another process may be sending.
                    self._send_ciphertext(tls.take())

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Read up to `len` bytes and return them, or read into `buffer` and return the number.

        At the end of the stream the result is empty or 0. Raises SSLEOFError if the peer's transport ended
        without close_notify.
        """
        if buffer is None:
            if len < 0:
                raise ValueError("size should not be negative")
            data = bytearray(min(len, FULL_RECORD))
            size = self._read_into(memoryview(data))
            return bytes(memoryview(data)[:size])
        target = memoryview(buffer).cast("B")
        return self._read_into(target[:len] if len > 0 else target)

    def _read_into(self, target: memoryview) -> int:
        if not target:
            return 0
        try:
            return self._pump(lambda tls: tls.read_into(target), self._receiving)
        except ssl.SSLZeroReturnError:
            if self._unwrapping:
                raise
            return 0

    def write(self, data: Any) -> int:
        """Encrypt all of it; return its size in bytes."""
        view = memoryview(data).cast("B")
        sent = 0
        if not view:
            # OpenSSL may have the answer to a KeyUpdate to send, or an objection.
            self._pump(lambda tls: tls.write(b""), self._sending)
        while sent < len(view):
            # Memory is never full.
            start = sent
            sent = self._pump(lambda tls: tls.write_all(view, start), self._sending)  # noqa: B023 - at once
        return sent

    def pending(self) -> int:
        """Return the number of bytes already decrypted."""
        return self._of_tls(lambda tls: tls.pending) or 0

    def unwrap(self) -> None:
        """Send close_notify. Raises SSLWantReadError until the peer's has come too.

        After a fork it needs a process that has sent and received since: event loops unwrap what they only close.
        """
        if not (self._sending.owned and self._receiving.owned):
            raise ssl_error(
                ssl.SSLError,
                "no close_notify after a fork: another process may go on with this connection, and this one has not",
            )
        self._unwrapping = True
        if not self._pump(lambda tls: tls.shutdown()):
            self._pump(lambda tls: tls.shutdown(), self._receiving)
