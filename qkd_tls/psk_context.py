"""TLS 1.3 keyed by one external PSK that both ends have been given, without certificates (RFC 8446 section 2.2).

For programs beside qkd-tls/1 that want it, such as a key provider that speaks SKIP. Each connection has a
fresh X25519MLKEM768 (or X25519) exchange beside the PSK, so that an attacker who steals the PSK later cannot
read recordings.
"""

from __future__ import annotations

import ssl
from socket import socket
from typing import Any, Final, NoReturn

from qkd_tls.endpoint import Endpoint
from qkd_tls.engine import Established, NeedData, ServerEngine
from qkd_tls.errors import raised_anew, ssl_error
from qkd_tls.hybrid import KDF
from qkd_tls.info import Protection, QKDInfo
from qkd_tls.openssl import ML_KEM_GROUPS, TLSConnection, TLSContext, TLSSettings
from qkd_tls.psk import PSK
from qkd_tls.socket import QKDSocket

__all__ = ["PSKContext", "PSKSocket"]

_GROUPS: Final = ("X25519MLKEM768", "X25519")
_MAX_IDENTITY_SIZE: Final = 255
_MIN_SECRET_SIZE: Final = 16  # RFC 9257 section 6: 128 bits of entropy at least
_MAX_SECRET_SIZE: Final = 512  # what OpenSSL's sessions hold


class PSKContext:
    """A context for connections that need the PSK at both ends; cipher suite TLS_AES_256_GCM_SHA384.

    Args:
        identity: names the PSK, in the clear: 1 to 255 bytes of UTF-8.
        secret: 16 to 512 random bytes, best 32 or more; copied. Not a password: an attacker who sees one
            handshake could try guesses against it.
        server_side: True if its sockets are servers.

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

    @property
    def key_manager(self) -> None:
        """Always None: no KMS is asked."""
        return

    @property
    def verify_mode(self) -> ssl.VerifyMode:
        """Always `CERT_NONE`: there are no certificates."""
        return ssl.CERT_NONE

    def wrap_socket(
        self,
        sock: socket,
        *,
        server_side: bool | None = None,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | None = None,
    ) -> PSKSocket:
        """Take over a socket and, if it is connected, shake hands within its timeout.

        Args:
            sock: a stream socket.
            server_side: the context's side, which is also the default.
            do_handshake_on_connect: False: the program calls `do_handshake`, or reads or writes first.
            suppress_ragged_eofs: False: a stream that ends without close_notify raises SSLEOFError.
            server_hostname: client: name for the server to see, in the clear. Nothing is compared with it: the PSK says
                who the server is.

        Raises:
            ValueError: the context is for the other side.
            ssl.SSLError: the peer does not have this PSK, or no TLS 1.3 with these algorithms.
            TimeoutError, OSError: as in the standard library.
        """
        return PSKSocket._create(
            sock,
            context=self,
            server_side=self.server_side if server_side is None else server_side,
            do_handshake_on_connect=do_handshake_on_connect,
            suppress_ragged_eofs=suppress_ragged_eofs,
            server_hostname=server_hostname,
        )

    def new_engine(
        self, *, server_side: bool, server_hostname: str | None, server_port: int | None
    ) -> _PSKEngine:
        """Make the handshake of one connection, for its socket. Raises ValueError for the wrong side."""
        if server_side != self.server_side:
            ours = "server" if self.server_side else "client"
            raise ValueError(f"this PSKContext is a {ours}'s: server_side must be {self.server_side}")
        return _PSKEngine(TLSConnection(self._tls, server_hostname=server_hostname, psk=self._psk))

    def _choose_context(self, engine: ServerEngine, connection: Endpoint, name: str | None) -> NoReturn:
        raise NotImplementedError("a PSKContext has no sni_callback")

    def _count(self, what: str) -> None:
        """Keep no statistics."""

    def __repr__(self) -> str:
        """Return the identity, not the secret."""
        return f"<PSKContext {self.identity!r}{' server' if self.server_side else ''}>"


class PSKSocket(QKDSocket):
    """A connection of a `PSKContext`, with the methods of `ssl.SSLSocket`.

    `qkd.group` names the key exchange; `qkd.protection` is the protection from the key exchange alone,
    without the PSK.
    """

    @property
    def context(self) -> Any:
        """The `PSKContext` of this connection; it cannot be changed."""
        return self._context

    @context.setter
    def context(self, value: object) -> NoReturn:
        raise TypeError("a PSK connection keeps its PSKContext")

    def verify_client_post_handshake(self) -> NoReturn:
        """Raise NotImplementedError: a PSK connection has no certificates."""
        raise NotImplementedError("a PSK connection has no certificates")

    def _warn(self, info: QKDInfo) -> None:
        """Stay silent: the PSK protects the connection even if the group has no ML-KEM."""


class _PSKEngine:
    """The handshake of one connection; its data to send is ready before the socket waits."""

    peer_certificate: bytes | None = None

    def __init__(self, connection: TLSConnection) -> None:
        self.connection = connection
        self._complete = False
        self._error: OSError | None = None
        self._advance()

    def _advance(self) -> None:
        try:
            self._complete = self.connection.handshake()
        except OSError as error:
            self._error = raised_anew(error)

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
            raise raised_anew(self._error)
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
        """Do nothing: no secrets are held here."""
