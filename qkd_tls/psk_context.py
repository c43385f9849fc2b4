"""TLS 1.3 keyed by one external PSK that both ends have been given, without certificates (RFC 8446 section 2.2).

For programs beside qkd-tls/1 that want it, such as a key provider that speaks SKIP. Each connection has a fresh
X25519MLKEM768 (or X25519) exchange beside the PSK, so that whoever steals the PSK later cannot read what was recorded.
"""

from __future__ import annotations

import ssl
from socket import socket
from typing import TYPE_CHECKING, Final, cast

from qkd_tls.engine import Established, NeedData
from qkd_tls.errors import ssl_error
from qkd_tls.hybrid import KDF
from qkd_tls.info import Protection, QKDInfo
from qkd_tls.openssl import ML_KEM_GROUPS, TLSConnection, TLSContext, TLSSettings
from qkd_tls.psk import PSK
from qkd_tls.socket import QKDSocket

if TYPE_CHECKING:
    from qkd_tls.context import QKDContext

__all__ = ["PSKContext", "PSKSocket"]

_GROUPS: Final = ("X25519MLKEM768", "X25519")
_MAX_IDENTITY_SIZE: Final = 255
_MIN_SECRET_SIZE: Final = 16  # RFC 9257 section 6: 128 bits of entropy at least
_MAX_SECRET_SIZE: Final = 512  # what OpenSSL's sessions hold


class PSKContext:
    """Makes connections that nobody can make who has not the PSK; cipher suite TLS_AES_256_GCM_SHA384.

    Args:
        identity: names the PSK, in the clear: 1 to 255 bytes of UTF-8.
        secret: 16 to 512 random bytes, best 32 or more; copied. Not a password: whoever sees one handshake could try
            guesses against it.
        server_side: whether its sockets are servers.

    Raises:
        ValueError: identity or secret are too short or too long.

    Serves any number of connections and threads. Give each pair of programs a PSK of its own: two programs that know it
    can pass for each other (RFC 9257 section 4).
    """

    def __init__(self, identity: str, secret: bytes | bytearray, *, server_side: bool = False) -> None:
        name = identity.encode()
        if not 1 <= len(name) <= _MAX_IDENTITY_SIZE:
            raise ValueError(f"a PSK's identity must have 1 to {_MAX_IDENTITY_SIZE} bytes, not {len(name)}")
        if not _MIN_SECRET_SIZE <= len(secret) <= _MAX_SECRET_SIZE:
            raise ValueError(
                f"a PSK's secret must have {_MIN_SECRET_SIZE} to {_MAX_SECRET_SIZE} bytes, not {len(secret)}"
            )
        self.identity = identity
        self.server_side = server_side
        self._psk = PSK(name, bytearray(secret), KDF.SHA384, key_id="")
        self._tls = TLSContext(
            TLSSettings(server_side=server_side, groups=_GROUPS, cipher_suites=KDF.SHA384.cipher_suites)
        )

    def wrap_socket(self, sock: socket, *, server_hostname: str | None = None) -> PSKSocket:
        """Take over a connected socket and shake hands, within its timeout.

        Args:
            sock: a stream socket.
            server_hostname: client: name for the server to see, in the clear. Nothing is compared with it: the PSK says
                who the server is.

        Raises:
            ssl.SSLError: the peer has not this PSK, or no TLS 1.3 with these algorithms.
            TimeoutError, OSError: as in the standard library.
        """
        return PSKSocket._create(
            sock,
            cast("QKDContext", self),
            server_side=self.server_side,
            do_handshake_on_connect=True,
            suppress_ragged_eofs=True,
            server_hostname=server_hostname,
        )

    def new_engine(
        self, *, server_side: bool, server_hostname: str | None, server_port: object
    ) -> _PSKEngine:
        """For the socket: the handshake of one connection."""
        return _PSKEngine(TLSConnection(self._tls, server_hostname=server_hostname, psk=self._psk))

    def _count(self, what: str) -> None:
        """Nothing: these contexts keep no statistics."""

    def __repr__(self) -> str:
        """The identity, not the secret."""
        return f"<PSKContext {self.identity!r}{' server' if self.server_side else ''}>"


class PSKSocket(QKDSocket):
    """A connection of a `PSKContext`, with the methods of `ssl.SSLSocket`.

    `qkd.group` names the key exchange; `qkd.protection` says what that gives, to which the PSK adds.
    """

    def _warn(self, info: QKDInfo) -> None:
        """Nothing: the PSK protects the connection also where the group has no ML-KEM."""


class _PSKEngine:
    """The part of `Engine` that a socket drives: what is to be sent is there before the socket waits."""

    peer_certificate = None

    def __init__(self, connection: TLSConnection) -> None:
        self.connection = connection
        self._complete = False
        self._error: OSError | None = None
        self._advance()

    def _advance(self) -> None:
        try:
            self._complete = self.connection.handshake()
        except OSError as error:
            self._error = error

    def data_to_send(self) -> bytes:
        return self.connection.take()

    def receive_data(self, data: bytes) -> None:
        if data:
            self.connection.feed(data)
            self._advance()
        else:
            self._error = ssl_error(ssl.SSLEOFError, "the peer has closed the connection in the handshake")

    def next_action(self) -> NeedData | Established:
        if self._error is not None:
            raise self._error
        connection = self.connection
        if not self._complete:
            return NeedData()
        if not connection.psk_accepted:
            # A server that does not know it goes on with its certificate, which is not checked here.
            raise ssl_error(
                ssl.SSLError, "[PSK_NOT_ACCEPTED] the server does not know this PSK", "PSK_NOT_ACCEPTED"
            )
        protection = Protection.PQ_ONLY if connection.group in ML_KEM_GROUPS else Protection.CLASSICAL
        return Established(
            QKDInfo(protection=protection, group=connection.group, cipher=connection.cipher_suite)
        )

    def abort(self) -> None:
        """Nothing: no secrets are held here."""
