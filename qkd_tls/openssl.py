"""The only module that touches OpenSSL.

`TLSSettings` is plain data, `TLSContext` is OpenSSL's form of it, `TLSConnection` is one handshake and the
stream behind it: over memory until it is attached to a socket's file descriptor.

The standard library's `ssl` has no external PSKs before Python 3.13, no exporter and, as most distributions build
it, no ML-KEM. pyOpenSSL rides on the OpenSSL inside the `cryptography` wheel, which has all three; its public API
lacks the PSK callbacks, so those are reached through the bindings that pyOpenSSL itself uses.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import hashlib
import ipaddress
import os
import re
import ssl
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NoReturn

import cryptography
import OpenSSL
from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL, crypto

from qkd_tls.errors import ssl_error
from qkd_tls.hybrid import KDF
from qkd_tls.psk import PSK
from qkd_tls.records import FULL_RECORD

__all__ = [
    "DEFAULT_CIPHER_SUITES",
    "ML_KEM_GROUPS",
    "Credentials",
    "PrivateKey",
    "TLSConnection",
    "TLSContext",
    "TLSSettings",
    "VerificationFailed",
    "openssl_version",
]

_lib: Final[Any] = Binding.lib
_ffi: Final[Any] = Binding.ffi

ML_KEM_GROUPS: Final = frozenset(
    {"X25519MLKEM768", "SecP256r1MLKEM768", "SecP384r1MLKEM1024", "MLKEM512", "MLKEM768", "MLKEM1024"}
)
"""TLS groups that hold an ML-KEM secret, by OpenSSL's names."""

DEFAULT_CIPHER_SUITES: Final[dict[KDF, tuple[str, ...]]] = {
    # The PSK's hash has to be that of the suite that the server picks, and OpenSSL's servers follow the client's order.
    KDF.SHA384: ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"),
    KDF.SHA256: ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_256_GCM_SHA384"),
}

# Looked up once: each record goes through them.
_from_buffer: Final = _ffi.from_buffer
_release: Final = _ffi.release
_peek_error: Final = _lib.ERR_peek_error
_read: Final = _lib.SSL_read
_write: Final = _lib.SSL_write

_MEMORY: Final = _lib.BIO_s_mem()
_GROUP_SPELLINGS: Final = {"x25519": "X25519", "x448": "X448"}
_TLS1_3: Final = 0x0304
_PSK_SUITE: Final = {
    KDF.SHA384: _ffi.new("unsigned char[2]", b"\x13\x02"),
    KDF.SHA256: _ffi.new("unsigned char[2]", b"\x13\x01"),
}
# openssl/x509v3.h: what the standard library sets too, so that "f*.example" never matches.
_NO_PARTIAL_WILDCARDS: Final = 0x4
_LONGEST_HOST_NAME: Final = 255
_LARGEST: Final = 0x7FFF_FFFF
_WRITE_AT_ONCE: Final = 1 << 20
_SCRATCH_SIZE: Final = 1 << 15
# The standard library keeps the names that OpenSSL 3.0 gave to the oldest alerts.
_ALERT_SPELLING: Final = re.compile("^(SSL/)?TLS_ALERT_")
# openssl/err.h: set in the codes of errors that are the system's.
_SYSTEM_ERROR: Final = 1 << 31
_TRUNCATION: Final = "unexpected eof while reading"


def _check_bindings() -> None:
    needed = (
        "SSL_CTX_set_psk_use_session_callback",
        "SSL_CTX_set_psk_find_session_callback",
        "SSL_SESSION_set1_master_key",
        "SSL_SESSION_set_cipher",
        "SSL_SESSION_set_protocol_version",
        "Cryptography_SSL_SESSION_new",
        "SSL_CIPHER_find",
        "SSL_CTX_set1_curves_list",
        "SSL_get0_group_name",
        "SSL_set_fd",
    )
    missing = [name for name in needed if not hasattr(_lib, name)]
    if missing:
        raise ImportError(
            f"cryptography {cryptography.__version__} with pyOpenSSL {OpenSSL.__version__} lacks "
            f"{', '.join(missing)}, which external PSKs in TLS 1.3 need. Known to have them: cryptography 50 with "
            "pyOpenSSL 26.4; install those versions"
        )


_check_bindings()


def openssl_version() -> str:
    """Return the OpenSSL that runs the connections, e.g. ``OpenSSL 4.0.3 29 Sep 2026``.

    It is not the standard library's.
    """
    return SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()


class _Owner:
    """An owner of one object of OpenSSL's, which is freed once; every use after that raises OSError (EBADF).

    Not left to `ffi.gc`: in a reference cycle, the collector calls its destructor before the `__del__` of objects that
    still use the memory.
    """

    _raw: Any = None
    _free: ClassVar[Any]
    _freed: ClassVar[type[_Owner]]
    """The class of owners whose object has been freed."""

    def __init_subclass__(cls) -> None:
        """Give each class its twin for what has been freed."""
        if not hasattr(cls, "_is_freed"):
            cls._freed = type(cls.__name__, (cls,), _FREED)

    def __del__(self) -> None:
        """Free the object. The collector may call this before others stop using it."""
        raw = self._raw
        # To ask whether it is there at each use would take longer.
        self.__class__ = self._freed
        if raw is not None:
            self._free(raw)


def _refuse(*_: object) -> NoReturn:
    raise OSError(errno.EBADF, f"{os.strerror(errno.EBADF)}: OpenSSL's object has been freed")


_FREED: Final[dict[str, Any]] = {
    "__module__": __name__,
    "__del__": lambda _: None,
    "_is_freed": True,
    # What it owned has been freed with it.
    **dict.fromkeys(("_raw", "_incoming", "_outgoing"), property(_refuse, _refuse, _refuse)),
}


class PrivateKey(_Owner):
    """The private key of a certificate."""

    _free = staticmethod(_lib.EVP_PKEY_free)

    def __init__(self, key: crypto.PKey) -> None:
        """Take the key over from pyOpenSSL."""
        self._raw = key._pkey
        _ffi.gc(self._raw, None)


class VerificationFailed(enum.IntEnum):
    """Codes of X509_V_ERR that get a text of their own (openssl/x509_vfy.h)."""

    HOSTNAME_MISMATCH = 62
    IP_ADDRESS_MISMATCH = 64


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate chain (DER, leaf first) and its private key."""

    chain: tuple[bytes, ...]
    # The leaf says which key it is, so two readings of the same files are equal.
    key: PrivateKey = field(compare=False, repr=False)

    @classmethod
    def load(
        cls, chain: Sequence[bytes], key_pem: bytes, password: Callable[..., bytes] | None
    ) -> Credentials:
        """Check that the key is the leaf's; raise ssl.SSLError like `ssl.SSLContext.load_cert_chain`."""
        try:
            # Without a callback OpenSSL would ask on the terminal.
            key = crypto.load_privatekey(crypto.FILETYPE_PEM, key_pem, password or (lambda *_: b""))
        except (crypto.Error, ValueError) as error:
            raise ssl_error(
                ssl.SSLError,
                f"[SSL] PEM lib: cannot read the private key ({_reason(error) or error}): wrong password, or not PEM",
            ) from None
        credentials = cls(tuple(chain), PrivateKey(key))
        try:
            TLSContext(TLSSettings(server_side=True, credentials=credentials))
        except ssl.SSLError as error:
            raise ssl_error(
                ssl.SSLError,
                f"[SSL: {error.reason}] {error.args[1]}; the key may not be the certificate's",
                error.reason,
            ) from None
        return credentials


@dataclass(frozen=True, slots=True)
class TLSSettings:
    """The settings of a context. Equal settings make interchangeable contexts."""

    server_side: bool
    credentials: Credentials | None = None
    trusted: tuple[bytes, ...] = ()
    """Trust anchors, DER."""
    crls: tuple[bytes, ...] = ()
    """Certificate revocation lists, DER."""
    verify_mode: ssl.VerifyMode = ssl.CERT_NONE
    verify_flags: int = 0
    check_hostname: bool = False
    common_name_fallback: bool = False
    """Accept the subject's common name in a certificate without DNS names (RFC 6125 6.4.4 discourages it)."""
    groups: tuple[str, ...] = ("X25519MLKEM768",)
    cipher_suites: tuple[str, ...] = DEFAULT_CIPHER_SUITES[KDF.SHA384]
    post_handshake_auth: bool = False
    """Client: answer a certificate request after the handshake. Server: ask only then (RFC 8446 4.6.2)."""
    keylog_filename: str | None = None
    """File to append the secrets of all connections to, in the format of SSLKEYLOGFILE."""


class _ThisThread(threading.local):
    """The buffers of a thread: bindings release the interpreter's lock."""

    connection: TLSConnection | None = None
    """The connection that is shaking hands, for the callbacks."""
    raised: BaseException | None = None
    """The exception that ended a callback, such as that of a signal's handler; OpenSSL cannot pass it on."""

    def __init__(self) -> None:
        # For ciphertext on its way out.
        self.scratch = _ffi.new("char[]", _SCRATCH_SIZE)
        # For what OpenSSL says by reference.
        self.pointer, self.size = _ffi.new("unsigned char **"), _ffi.new("unsigned int *")


_this_thread: Final = _ThisThread()


def _keep_exception(_kind: object, exception: BaseException, _traceback: object) -> None:
    _this_thread.raised = exception


def _raise_kept() -> None:
    exception = _this_thread.raised
    if exception is not None:
        _this_thread.raised = None
        raise exception


class TLSContext(_Owner):
    """Settings, compiled once and never changed afterwards; serves any number of connections and threads.

    Raises ssl.SSLError if OpenSSL refuses a setting.
    """

    _free = staticmethod(_lib.SSL_CTX_free)

    def __init__(self, settings: TLSSettings) -> None:
        self.settings = settings
        self._key_log: Any = None
        # Says for a client which associations it may go on with; cheaper to compare than the settings.
        self.fingerprint: Final = hashlib.sha256(repr(settings).encode()).digest()
        context = self._raw = _lib.SSL_CTX_new(_lib.TLS_method())
        _require(context != _ffi.NULL)
        _lib.SSL_CTX_set_min_proto_version(context, SSL.TLS1_3_VERSION)
        _lib.SSL_CTX_set_max_proto_version(context, SSL.TLS1_3_VERSION)
        # No connection is ever resumed: the tickets that a server still sends are names in a cache that is off.
        _lib.SSL_CTX_set_options(context, SSL.OP_NO_TICKET)
        _lib.SSL_CTX_set_session_cache_mode(context, SSL.SESS_CACHE_OFF)
        _lib.SSL_CTX_set_mode(
            context,
            _lib.SSL_MODE_AUTO_RETRY
            | _lib.SSL_MODE_ENABLE_PARTIAL_WRITE
            | _lib.SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER
            # An idle connection keeps no buffers for records, 20 KB and more; a busy one is no slower for it.
            | _lib.SSL_MODE_RELEASE_BUFFERS,
        )
        self._set_suites_and_groups(settings)
        self._set_verification(settings)
        if settings.credentials is not None:
            self._set_credentials(settings.credentials)
        if settings.server_side:
            # A server that asks for client certificates takes no PSK without it; nothing is ever looked up by it.
            name = b"qkd-tls/1"
            _require(_lib.SSL_CTX_set_session_id_context(context, name, len(name)) == 1)
            _lib.SSL_CTX_set_psk_find_session_callback(self._raw, _find_session)
            _lib.SSL_CTX_set_alpn_select_cb(self._raw, _select_alpn, _ffi.NULL)
        else:
            _lib.SSL_CTX_set_psk_use_session_callback(self._raw, _use_session)
            _lib.SSL_CTX_set_post_handshake_auth(self._raw, settings.post_handshake_auth)
        if settings.keylog_filename is not None:
            self._log_keys(settings.keylog_filename)

    def _log_keys(self, filename: str) -> None:
        lock = threading.Lock()
        log = open(filename, "ab", buffering=0)  # noqa: SIM115 - as long as the context
        weakref.finalize(self, log.close)

        # The signature is OpenSSL's. An exception must not leave it.
        @_ffi.callback("void(SSL const *, char const *)", onerror=_keep_exception)  # type: ignore[untyped-decorator]
        def write_line(_pointer: Any, line: Any) -> None:
            with lock, contextlib.suppress(OSError):
                log.write(_ffi.string(line) + b"\n")

        self._key_log = write_line
        _lib.SSL_CTX_set_keylog_callback(self._raw, write_line)

    def _set_suites_and_groups(self, settings: TLSSettings) -> None:
        suites = ":".join(settings.cipher_suites).encode()
        _require(_lib.SSL_CTX_set_ciphersuites(self._raw, suites) == 1)
        if _lib.SSL_CTX_set1_curves_list(self._raw, ":".join(settings.groups).encode()) != 1:
            _lib.ERR_clear_error()
            raise ssl.SSLError(
                ssl.SSL_ERROR_SSL,
                f"{openssl_version()} does not know one of the groups {', '.join(settings.groups)}: check the "
                "spelling, or install a cryptography wheel with OpenSSL 3.5 or newer for ML-KEM",
            )

    def _set_verification(self, settings: TLSSettings) -> None:
        mode = {
            ssl.CERT_NONE: SSL.VERIFY_NONE,
            ssl.CERT_OPTIONAL: SSL.VERIFY_PEER,
            ssl.CERT_REQUIRED: SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
        }[settings.verify_mode]
        if settings.server_side and mode and settings.post_handshake_auth:
            mode |= _lib.SSL_VERIFY_POST_HANDSHAKE
        _lib.SSL_CTX_set_verify(self._raw, mode, _ffi.NULL)
        store = _lib.SSL_CTX_get_cert_store(self._raw)
        for der in settings.trusted:
            _require(_lib.X509_STORE_add_cert(store, _certificate(der)) == 1)
        for der in settings.crls:
            crl = _ffi.gc(_lib.d2i_X509_CRL_bio(_memory(der), _ffi.NULL), _lib.X509_CRL_free)
            _require(crl != _ffi.NULL and _lib.X509_STORE_add_crl(store, crl) == 1)
        parameters = _lib.SSL_CTX_get0_param(self._raw)
        _require(_lib.X509_VERIFY_PARAM_set_flags(parameters, settings.verify_flags) == 1)
        flags = _NO_PARTIAL_WILDCARDS
        if not settings.common_name_fallback:
            flags |= _lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT
        _lib.X509_VERIFY_PARAM_set_hostflags(parameters, flags)

    def _set_credentials(self, credentials: Credentials) -> None:
        for number, der in enumerate(credentials.chain):
            certificate = _certificate(der)
            if number == 0:
                _require(_lib.SSL_CTX_use_certificate(self._raw, certificate) == 1)
            else:
                # The context takes over the reference.
                _require(_lib.SSL_CTX_add_extra_chain_cert(self._raw, _lib.X509_dup(certificate)) == 1)
        _require(_lib.SSL_CTX_use_PrivateKey(self._raw, credentials.key._raw) == 1)
        _require(_lib.SSL_CTX_check_private_key(self._raw) == 1)


class TLSConnection(_Owner):
    """One TLS 1.3 connection; one thread at a time.

    Until `attach`, ciphertext goes in by `feed` and comes out by `take`. Methods raise the standard library's classes:
    SSLWantReadError, SSLWantWriteError, SSLZeroReturnError, SSLEOFError, SSLCertVerificationError, SSLError, OSError.
    """

    _free = staticmethod(_lib.SSL_free)

    attached = False
    clogged = False
    """True if the last write ended for want of room: wait for it before the next."""
    _selected: Any = None
    _truncated = False
    """True if the transport has ended without the peer's close_notify."""
    _failed = False
    """True if OpenSSL has ended the connection with an error."""
    _ended = False
    """True if the transport has ended, in memory."""

    def __init__(
        self,
        context: TLSContext,
        *,
        server_hostname: str | None = None,
        alpn: tuple[str, ...] = (),
        psk: PSK | None = None,
        select_alpn: Callable[[TLSConnection, tuple[bytes, ...]], bytes | None] | None = None,
    ) -> None:
        self.context = context
        self._psk = psk
        self._select_alpn = select_alpn
        self._server_hostname = server_hostname
        self._raw = _lib.SSL_new(context._raw)
        self.detach()
        if context.settings.server_side:
            _lib.SSL_set_accept_state(self._raw)
        else:
            _lib.SSL_set_connect_state(self._raw)
            self._name_the_server(server_hostname)
            if alpn:
                wire = _alpn_wire(alpn)
                # This one function of OpenSSL's returns 0 for success.
                _require(_lib.SSL_set_alpn_protos(self._raw, wire, len(wire)) == 0)

    def _name_the_server(self, server_hostname: str | None) -> None:
        if server_hostname is None:
            return
        name, address = _host(server_hostname)
        if address is None:
            # RFC 6066 3: literal addresses are not permitted in server_name.
            # The binding does not return OpenSSL's answer, which is no for longer names.
            _require(1 <= len(name) <= _LONGEST_HOST_NAME)
            _lib.SSL_set_tlsext_host_name(self._raw, name)
        if self.context.settings.check_hostname:
            parameters = _lib.SSL_get0_param(self._raw)
            if address is None:
                if _lib.X509_VERIFY_PARAM_set1_host(parameters, name, len(name)) != 1:
                    # It is not a host's name: a trailing dot, a port, an address in brackets.
                    _lib.ERR_clear_error()
                    raise self._verification_error(VerificationFailed.HOSTNAME_MISMATCH)
            else:
                _require(_lib.X509_VERIFY_PARAM_set1_ip(parameters, address, len(address)) == 1)

    # --- ciphertext, while in memory

    def detach(self) -> None:
        """Let ciphertext go through memory, as from the beginning; what the transport still holds stays there."""
        # OpenSSL owns them from now on, and frees those before.
        self._incoming, self._outgoing = _lib.BIO_new(_MEMORY), _lib.BIO_new(_MEMORY)
        _lib.SSL_set_bio(self._raw, self._incoming, self._outgoing)
        if self.attached:
            # As from the beginning: the whole record behind a ticket may be there already, and no later bytes ever
            # wake the caller up.
            _lib.SSL_set_mode(self._raw, _lib.SSL_MODE_AUTO_RETRY)
            self.attached = False

    def feed(self, data: bytes) -> None:
        """Give ciphertext from the transport."""
        if data:
            _require(_lib.BIO_write(self._incoming, data, len(data)) == len(data))

    def end(self) -> None:
        """Say that the transport has ended: nothing more will be fed."""
        self._ended = True
        _lib.BIO_set_mem_eof_return(self._incoming, 0)

    def take(self) -> bytes:
        """Return all ciphertext for the transport."""
        scratch = _this_thread.scratch
        size = _lib.BIO_read(self._outgoing, scratch, _SCRATCH_SIZE)
        if size <= 0:
            return b""
        if size < _SCRATCH_SIZE:
            return bytes(_ffi.buffer(scratch, size))
        # Much data: each copy counts. What is taken in place is then read once more, to be gone.
        pointer = _ffi.new("char **")
        rest = _lib.BIO_get_mem_data(self._outgoing, pointer)
        data = b"".join((_ffi.buffer(scratch, size), _ffi.buffer(pointer[0], rest)))
        while _lib.BIO_read(self._outgoing, scratch, _SCRATCH_SIZE) == _SCRATCH_SIZE:
            pass
        return data

    def attach(self, fileno: int) -> None:
        """Let OpenSSL read and write the socket itself from now on; nothing may be left in memory."""
        # SSL_set_fd frees the memory BIOs.
        del self._incoming, self._outgoing
        _require(_lib.SSL_set_fd(self._raw, fileno) == 1)
        # A read that met only a ticket returns to the caller, whose deadline it is.
        _lib.SSL_clear_mode(self._raw, _lib.SSL_MODE_AUTO_RETRY)
        self.attached = True

    @property
    def hungry(self) -> bool:
        """True if a read wants another record: nothing is decrypted, and the stream has not ended."""
        return not (self._failed or self._ended or _lib.SSL_pending(self._raw) or self.close_notify_received)

    # --- handshake

    def handshake(self) -> bool:
        """Go on with the handshake; return True when it is complete, False if it needs the peer's bytes."""
        _lib.ERR_clear_error()
        _this_thread.connection = self
        try:
            result = _lib.SSL_do_handshake(self._raw)
        finally:
            _this_thread.connection = None
        _raise_kept()
        if result != 1 and _lib.SSL_get_error(self._raw, result) == _lib.SSL_ERROR_WANT_READ:
            return False
        self._handshake_over()
        if result != 1:
            self._raise(result)
        return True

    def _handshake_over(self) -> None:
        self._select_alpn = None
        # OpenSSL has its own copy, which it cleanses; wiping ours is up to whoever made it.
        self._psk = None

    @property
    def psk_accepted(self) -> bool:
        """True if the peers agreed on the PSK."""
        return bool(_lib.SSL_session_reused(self._raw))

    @property
    def alpn(self) -> str | None:
        """The application protocol that the server selected (RFC 7301)."""
        pointer, size = _this_thread.pointer, _this_thread.size
        _lib.SSL_get0_alpn_selected(self._raw, pointer, size)
        return bytes(_ffi.buffer(pointer[0], size[0])).decode("ascii", "replace") if size[0] else None

    @property
    def group(self) -> str:
        """The key exchange group by OpenSSL's name."""
        # OpenSSL prints the classical groups by their older, lower-case names.
        name: str = _ffi.string(_lib.SSL_get0_group_name(self._raw)).decode()
        return _GROUP_SPELLINGS.get(name, name)

    @property
    def cipher_suite(self) -> str:
        """The name of the cipher suite."""
        name: str = _ffi.string(_lib.SSL_CIPHER_get_name(_lib.SSL_get_current_cipher(self._raw))).decode()
        return name

    @property
    def cipher(self) -> tuple[str, str, int]:
        """The name, protocol version and secret bits, as in `ssl.SSLSocket.cipher`."""
        bits = _lib.SSL_CIPHER_get_bits(_lib.SSL_get_current_cipher(self._raw), _ffi.NULL)
        return self.cipher_suite, "TLSv1.3", bits

    def shared_ciphers(self, offered: Iterable[int]) -> list[tuple[str, str, int]]:
        """Return the offered cipher suites (RFC 8446 B.4) that this side accepts, each like `cipher`."""
        shared = []
        for number in offered:
            suite = _lib.SSL_CIPHER_find(self._raw, _ffi.new("unsigned char[2]", number.to_bytes(2, "big")))
            if suite == _ffi.NULL:
                continue
            name = _ffi.string(_lib.SSL_CIPHER_get_name(suite)).decode()
            if name in self.context.settings.cipher_suites:
                shared.append((name, "TLSv1.3", int(_lib.SSL_CIPHER_get_bits(suite, _ffi.NULL))))
        return shared

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate, DER."""
        certificate = _lib.SSL_get_peer_certificate(self._raw)
        if certificate == _ffi.NULL:
            return None
        certificate = _ffi.gc(certificate, _lib.X509_free)
        bio = _ffi.gc(_lib.BIO_new(_MEMORY), _lib.BIO_free)
        _require(_lib.i2d_X509_bio(bio, certificate) == 1)
        pointer = _ffi.new("char **")
        size = _lib.BIO_get_mem_data(bio, pointer)
        return bytes(_ffi.buffer(pointer[0], size))

    def export(self, label: bytes, size: int, context: bytes = b"") -> bytes:
        """Export keying material of `size` bytes (RFC 8446 7.5)."""
        out = bytearray(size)
        with _ffi.from_buffer(out) as buffer:
            _require(
                _lib.SSL_export_keying_material(
                    self._raw, buffer, size, label, len(label), context, len(context), 1
                )
                == 1
            )
        return bytes(out)

    def verify_client_post_handshake(self) -> None:
        """Ask the client for its certificate now, as server (RFC 8446 4.6.2); it comes with later data."""
        _lib.ERR_clear_error()
        if _lib.SSL_verify_client_post_handshake(self._raw) != 1:
            self._raise(0)

    # --- plaintext

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.read_into(buffer)])

    def read_into(self, buffer: bytearray | memoryview) -> int:
        """Fill the (contiguous) buffer with at least one byte, at most a record's; return the number."""
        # These lines count: each record is read by them.
        target = (
            _from_buffer(buffer) if type(buffer) is bytearray else _from_buffer(buffer, require_writable=True)
        )
        try:
            if _peek_error():
                _lib.ERR_clear_error()
            room = len(target)
            size: int = _read(self._raw, target, room if room < _LARGEST else _LARGEST)
            if size <= 0:
                self._raise(size)
        finally:
            _release(target)
        if self.context._key_log is not None:
            _raise_kept()
        return size

    def write(self, data: bytes) -> int:
        """Write at most 16,384 bytes; return the number, 0 only for none. After a want, repeat the data."""
        if _peek_error():
            _lib.ERR_clear_error()
        result: int = _write(self._raw, data, len(data))
        if result <= 0 and (data or result):
            self._raise_unwritten(result)
        return result

    def write_all(self, data: bytes | memoryview, start: int) -> int:
        """Write from `start` on until the transport is full; return the position to go on from.

        The next call must pass the same data.

        Raises SSLWantWriteError if not one byte could be written.
        """
        end = len(data)
        self.clogged = False
        if end <= FULL_RECORD and type(data) is bytes and not start:
            return self.write(data)
        with _ffi.from_buffer(data) as source:
            _lib.ERR_clear_error()
            position = start
            # Not too long at a time: a thread that wants to read has to wait for it.
            while position < min(end, start + _WRITE_AT_ONCE):
                result = _write(self._raw, source + position, min(end - position, _LARGEST))
                if result > 0:
                    position += result
                elif position > start and _lib.SSL_get_error(self._raw, result) == _lib.SSL_ERROR_WANT_WRITE:
                    self.clogged = True
                    break
                else:
                    self._raise_unwritten(result)
        return position

    @property
    def pending(self) -> int:
        """The number of bytes already decrypted."""
        return int(_lib.SSL_pending(self._raw))

    def shutdown(self) -> bool:
        """Send close_notify; return True once the peer's has been seen too (RFC 8446 6.1)."""
        _lib.ERR_clear_error()
        result = _lib.SSL_shutdown(self._raw)
        if result < 0:
            self._raise(result)
        return bool(result == 1)

    @property
    def close_notify_received(self) -> bool:
        """True if the peer has closed its direction."""
        return bool(_lib.SSL_get_shutdown(self._raw) & SSL.RECEIVED_SHUTDOWN)

    # --- errors

    def _raise_unwritten(self, result: int) -> NoReturn:
        # Nothing can be written behind close_notify; what the peer sends can still be read.
        self._raise(result, fatal=not _lib.SSL_get_shutdown(self._raw) & SSL.SENT_SHUTDOWN)

    def _raise(self, result: int, *, fatal: bool = True) -> NoReturn:
        number = _ffi.errno
        _raise_kept()
        kind = _lib.SSL_get_error(self._raw, result)
        if kind == _lib.SSL_ERROR_WANT_READ:
            raise ssl_error(ssl.SSLWantReadError, "The operation did not complete (read)")
        if kind == _lib.SSL_ERROR_WANT_WRITE:
            raise ssl_error(ssl.SSLWantWriteError, "The operation did not complete (write)")
        if kind == _lib.SSL_ERROR_ZERO_RETURN:
            raise ssl_error(ssl.SSLZeroReturnError, "TLS/SSL connection has been closed (EOF)")
        reason = _drain_error_queue()
        self._failed = self._failed or fatal
        if kind == _lib.SSL_ERROR_SYSCALL and not reason and number:
            raise OSError(number, os.strerror(number))
        # An end is told to whoever asks again, too: OpenSSL itself gives a reason only once.
        if not reason and (kind == _lib.SSL_ERROR_SYSCALL or self._truncated):
            reason = _TRUNCATION
        if reason == _TRUNCATION:
            self._truncated = True
            raise ssl_error(ssl.SSLEOFError, "EOF occurred in violation of protocol")
        if reason == "certificate verify failed":
            raise self._verification_error(_lib.SSL_get_verify_result(self._raw))
        reason = reason or "unknown error"
        name = _ALERT_SPELLING.sub("SSLV3_ALERT_", reason.upper().replace(" ", "_"))
        raise ssl_error(ssl.SSLError, f"[SSL: {name}] {reason}", name)

    def _verification_error(self, code: int) -> ssl.SSLCertVerificationError:
        text = _ffi.string(_lib.X509_verify_cert_error_string(code)).decode()
        if code == VerificationFailed.HOSTNAME_MISMATCH:
            text = f"Hostname mismatch, certificate is not valid for '{self._server_hostname}'."
        elif code == VerificationFailed.IP_ADDRESS_MISMATCH:
            text = f"IP address mismatch, certificate is not valid for '{self._server_hostname}'."
        error = ssl_error(
            ssl.SSLCertVerificationError,
            f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {text}",
            "CERTIFICATE_VERIFY_FAILED",
        )
        error.verify_code, error.verify_message = code, text
        return error


# --- callbacks: they run inside SSL_do_handshake, in its thread


def _current(pointer: Any) -> TLSConnection:
    connection = _this_thread.connection
    # Any other SSL object must never get this connection's key.
    _require(connection is not None and connection._raw == pointer)
    assert connection is not None
    return connection


def _session(pointer: Any, psk: PSK) -> Any:
    session = _lib.Cryptography_SSL_SESSION_new()
    cipher = _lib.SSL_CIPHER_find(pointer, _PSK_SUITE[psk.kdf])
    with _ffi.from_buffer(psk.secret) as secret:
        _require(
            cipher != _ffi.NULL
            and _lib.SSL_SESSION_set1_master_key(session, secret, len(psk.secret)) == 1
            and _lib.SSL_SESSION_set_cipher(session, cipher) == 1
            and _lib.SSL_SESSION_set_protocol_version(session, _TLS1_3) == 1
        )
    return session


@_ffi.callback(  # type: ignore[untyped-decorator]
    "int(SSL *, const EVP_MD *, const unsigned char **, size_t *, SSL_SESSION **)",
    error=0,
    onerror=_keep_exception,
)
def _use_session(pointer: Any, _md: Any, identity: Any, identity_size: Any, session: Any) -> int:
    """Choose the PSK to offer, as client. A second call, after a HelloRetryRequest, gives the same one."""
    connection = _current(pointer)
    psk = connection._psk
    if psk is None:
        session[0] = _ffi.NULL
        return 1
    # OpenSSL copies the identity after the callback has returned: the connection keeps the buffer alive.
    connection._selected = _ffi.new("unsigned char[]", psk.identity)
    identity[0], identity_size[0] = connection._selected, len(psk.identity)
    session[0] = _session(pointer, psk)
    return 1


@_ffi.callback(  # type: ignore[untyped-decorator]
    "int(SSL *, const unsigned char *, size_t, SSL_SESSION **)",
    error=0,
    onerror=_keep_exception,
)
def _find_session(pointer: Any, identity: Any, identity_size: Any, session: Any) -> int:
    """Find the PSK of an identity, as server. Without one, the handshake goes on with certificates."""
    psk = _current(pointer)._psk
    if psk is None or bytes(_ffi.buffer(identity, identity_size)) != psk.identity:
        session[0] = _ffi.NULL
        return 1
    session[0] = _session(pointer, psk)
    return 1


@_ffi.callback(  # type: ignore[untyped-decorator]
    "int(SSL *, const unsigned char **, unsigned char *, const unsigned char *, unsigned int, void *)",
    error=_lib.SSL_TLSEXT_ERR_ALERT_FATAL,
    onerror=_keep_exception,
)
def _select_alpn(pointer: Any, out: Any, out_size: Any, offered: Any, size: int, _argument: Any) -> int:
    connection = _current(pointer)
    if connection._select_alpn is None:
        return int(_lib.SSL_TLSEXT_ERR_NOACK)
    chosen = connection._select_alpn(connection, _alpn_names(_ffi.buffer(offered, size)[:]))
    if chosen is None:
        return int(_lib.SSL_TLSEXT_ERR_NOACK)
    connection._selected = _ffi.new("unsigned char[]", chosen)
    out[0], out_size[0] = connection._selected, len(chosen)
    return int(_lib.SSL_TLSEXT_ERR_OK)


# --- small helpers


def _memory(data: bytes) -> Any:
    # The BIO does not copy: the gc closure keeps the bytes alive as long as it.
    buffer = _ffi.from_buffer(data)
    return _ffi.gc(_lib.BIO_new_mem_buf(buffer, len(data)), lambda bio, _keep=buffer: _lib.BIO_free(bio))


def _certificate(der: bytes) -> Any:
    certificate = _ffi.gc(_lib.d2i_X509_bio(_memory(der), _ffi.NULL), _lib.X509_free)
    _require(certificate != _ffi.NULL)
    return certificate


# The names are those that the program has set.
@functools.lru_cache(maxsize=256)
def _alpn_wire(names: tuple[str, ...]) -> bytes:
    return b"".join(bytes([len(name)]) + name.encode() for name in names)


def _alpn_names(wire: bytes) -> tuple[bytes, ...]:
    names = []
    while wire:
        names.append(wire[1 : 1 + wire[0]])
        wire = wire[1 + wire[0] :]
    return tuple(names)


# 6 of the 700 microseconds of a handshake, both sides together. The names are those that the program connects to.
@functools.lru_cache(maxsize=256)
def _host(name: str) -> tuple[bytes, bytes | None]:
    """Return a host's name, and its address if it is one."""
    try:
        # A zone (RFC 4007) is this host's affair: no certificate has one.
        address = None if "%" in name else ipaddress.ip_address(name).packed
    except ValueError:
        address = None
    return name.encode("ascii"), address


def _drain_error_queue() -> str:
    """Return the reason of the first, innermost error in this thread's queue; empty the queue.

    The system's errors are left out: errno tells them.
    """
    first = ""
    while code := _lib.ERR_get_error():
        if code & _SYSTEM_ERROR:
            continue
        text = _lib.ERR_reason_error_string(code)
        first = first or (_ffi.string(text).decode() if text != _ffi.NULL else f"error {code:#x}")
    return first


def _require(succeeded: bool) -> None:
    if not succeeded:
        reason = _drain_error_queue() or "no reason given"
        raise ssl_error(ssl.SSLError, f"OpenSSL failed: {reason}", reason.upper().replace(" ", "_"))


def _reason(error: Exception) -> str:
    # pyOpenSSL's errors carry a list of (library, function, reason).
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return "; ".join(entry[2] for entry in entries)
