"""`QKDContext`: an `ssl.SSLContext` whose connections are keyed with QKD keys.

It keeps its settings as plain data and compiles them to OpenSSL when a connection needs them, again after a
change: so a program may change its context between connections. The underlying `ssl.SSLContext` keeps and
checks the flags that have the same meaning here (`verify_mode`, `check_hostname`, `verify_flags`...); no
connection ever runs on it.
"""

from __future__ import annotations

import operator
import os
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from socket import socket as Socket
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Self, TypeVar

from kms_client import KeyManager
from qkd_tls import control, kems
from qkd_tls.association import AssociationStore
from qkd_tls.endpoint import Endpoint
from qkd_tls.engine import ALPN_PROTOCOL, ClientEngine, Engine, EngineConfig, ServerEngine, Step
from qkd_tls.errors import ssl_error
from qkd_tls.hybrid import KDF
from qkd_tls.openssl import DEFAULT_CIPHER_SUITES, Credentials, TLSContext, TLSSettings
from qkd_tls.pem import Passphrase, Password, StrPath, read_chain, read_pem, split_der
from qkd_tls.policy import Policy
from qkd_tls.socket import QKDSocket
from qkd_tls.sslobject import QKDObject
from qkd_tls.stdlib import BaseContext, SSLContext

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["QKDContext", "create_default_context"]

_Kind = TypeVar("_Kind")

_LARGEST_ALERT: Final = 255
_HASHED_NAME: Final = re.compile(r"[0-9a-f]{8}\.r?\d+")


class QKDContext(SSLContext):
    """Settings for any number of connections and threads; changes act on later connections.

    Args:
        protocol: `ssl.PROTOCOL_TLS_CLIENT` or `ssl.PROTOCOL_TLS_SERVER`.
        key_manager: this side's KMS. May be left out only under policy `off`.
        policy: `require` (default), `prefer` or `off`; see `Policy`.
        peer_sae_id: client: the server's SAE ID, or a mapping from server host name to SAE ID. If it is
            known, a first connection saves two round trips; if not, the server is asked.
        allowed_peer_sae_ids: SAE IDs that keys may be shared with; None for any that the KMS allows.
        groups: key exchange groups by OpenSSL's names. A group without ML-KEM brings a `ClassicalGroupWarning`.
        kdf: client: hash of the hybrid PSK; `KDF.SHA256` only for peers whose TLS stack fixes it.
        kem: client: explicit KEM to mix in beside the group's, e.g. "ML-KEM-1024"; see `kems.names()`.
        announced_keys: client: number of keys to fetch at a bootstrap for later connections (0 to 63).
            They wait in the memory of both sides and save both KMEs' round trips then.
        association_lifetime: seconds until the next bootstrap at the latest.
        pipelined: client: send the offer and the next ClientHello in one flight if possible.
        max_keys: server: the most keys it takes in one offer.

    Raises ValueError if the arguments do not fit together.
    """

    def __new__(cls, protocol: int = ssl.PROTOCOL_TLS_CLIENT, **_: Any) -> Self:
        """Pass the arguments on to `__init__`; see the class."""
        if protocol not in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
            raise ValueError("protocol must be ssl.PROTOCOL_TLS_CLIENT or ssl.PROTOCOL_TLS_SERVER")
        self = super().__new__(cls, protocol)
        # The object of OpenSSL below keeps settings, and has no version to shake hands with, whoever finds a way to it.
        BaseContext.minimum_version.__set__(self, ssl.TLSVersion.TLSv1_3)
        BaseContext.maximum_version.__set__(self, ssl.TLSVersion.TLSv1_2)
        return self

    @property
    def __class__(self) -> type:
        """The class for `isinstance`: `ssl.SSLContext`, too, if a program has put another class in its place."""
        current = ssl.SSLContext
        return type(self) if issubclass(type(self), current) else current

    @__class__.setter
    def __class__(self, value: object) -> NoReturn:
        raise TypeError("a QKDContext stays one")

    sslsocket_class: type[QKDSocket] = QKDSocket
    sslobject_class: type[QKDObject] = QKDObject

    def __init__(
        self,
        protocol: int = ssl.PROTOCOL_TLS_CLIENT,
        *,
        key_manager: KeyManager | None = None,
        policy: Policy | str = Policy.REQUIRE,
        peer_sae_id: str | Mapping[str, str] | None = None,
        allowed_peer_sae_ids: Iterable[str] | None = None,
        groups: Iterable[str] = ("X25519MLKEM768",),
        kdf: KDF = KDF.SHA384,
        kem: str | None = None,
        announced_keys: int = 0,
        association_lifetime: int = 3600,
        pipelined: bool = True,
        max_keys: int = 64,
    ) -> None:
        self._policy = Policy(policy)
        self._key_manager = key_manager
        if key_manager is None and self._policy is not Policy.OFF:
            raise ValueError(
                f"policy '{self._policy}' needs a key_manager; without QKD keys say so: policy='off'"
            )
        if kem is not None and kem not in kems.names():
            raise ValueError(f"KEM {kem!r} is not available here; these are: {', '.join(kems.names())}")
        if not 0 <= announced_keys < 64:
            raise ValueError("announced_keys must be 0 to 63")
        if association_lifetime < 1 or not 1 <= max_keys <= 1000:
            raise ValueError("association_lifetime must be 1 or more, and max_keys 1 to 1000")
        if key_manager is not None:
            # What a peer could not be told shall not surface in the middle of a handshake.
            control.Identity(key_manager.sae_id, (key_manager.protocol,), kems.names(), max_keys)
        self._server = protocol == ssl.PROTOCOL_TLS_SERVER
        self._peer_sae_id = None if isinstance(peer_sae_id, Mapping) else peer_sae_id
        self._peer_sae_ids = peer_sae_id if isinstance(peer_sae_id, Mapping) else {}
        self._allowed = None if allowed_peer_sae_ids is None else frozenset(allowed_peer_sae_ids)
        self._groups = tuple(groups)
        self._kdf, self._kem, self._announced_keys = kdf, kem, announced_keys
        self._lifetime, self._pipelined, self._max_keys = association_lifetime, pipelined, max_keys
        self._associations = AssociationStore()
        self._lock = threading.Lock()
        self._config: tuple[tuple[object, ...], EngineConfig] | None = None
        # Dictionaries keep the order and drop duplicates: programs load the same file for each connection.
        self._trusted: dict[bytes, None] = {}
        self._crls: dict[bytes, None] = {}
        self._credentials: Credentials | None = None
        self._alpn: tuple[str, ...] = ()
        self.observer: Callable[[Step], object] | None = None
        """A function called with each step of a handshake, in the handshake's thread; None for no calls."""
        self._handshakes = dict.fromkeys(super().session_stats(), 0)
        # A spelling mistake in a group shall not wait for the first connection.
        self._engine_config()

    @classmethod
    def from_config(
        cls,
        path: str | os.PathLike[str],
        *,
        table: str | None = None,
        role: Literal["client", "server"] | None = None,
    ) -> Self:
        """Make a context from a TOML file of KMEs, credentials, peers and policy; the manual lists its keys.

        Args:
            path: the file; paths in it are relative to its folder.
            table: NAME of the table `[tls.NAME]`. May be left out if there is only one.
            role: the context's side, if the table has no key `role`.

        The KMEs are not contacted yet. If the program ends before the process does, it should close the key
        manager of the context: `context.key_manager.close()`.

        Raises:
            qkd_tls.configuration.ConfigError: a `ValueError` that names file, table and key.
        """
        from qkd_tls.configuration.contexts import (
            load_context,  # Programs without a file need not wait for it.
        )

        return load_context(cls, Path(path), table, role)

    @property
    def policy(self) -> Policy:
        """The behaviour if no QKD key is available."""
        return self._policy

    @property
    def key_manager(self) -> KeyManager | None:
        """The KMS of this side."""
        return self._key_manager

    # --- trust and credentials

    def load_verify_locations(
        self,
        cafile: StrPath | None = None,
        capath: StrPath | None = None,
        cadata: str | Buffer | None = None,
    ) -> None:
        """Trust these CA certificates, and use the CRLs among them.

        The arguments are those of `ssl.SSLContext.load_verify_locations`.

        A `capath` is read now, once, not at each handshake.
        """
        super().load_verify_locations(cafile, capath, cadata)
        if cafile is not None:
            self._trust_pem(Path(os.fsdecode(cafile)).read_text("latin-1"))
        if capath is not None:
            for entry in sorted(Path(os.fsdecode(capath)).iterdir()):
                if _HASHED_NAME.fullmatch(entry.name):
                    # As a file of its own, so that get_ca_certs() shows it too.
                    self.load_verify_locations(cafile=entry)
        if isinstance(cadata, str):
            self._trust_pem(cadata)
        elif cadata is not None:
            self._trusted.update(dict.fromkeys(split_der(bytes(cadata))))

    def _trust_pem(self, text: str) -> None:
        certificates, crls = read_pem(text)
        self._trusted.update(dict.fromkeys(certificates))
        self._crls.update(dict.fromkeys(crls))

    def set_default_verify_paths(self) -> None:
        """Trust the system's CAs: the files that `ssl.get_default_verify_paths` names."""
        paths = ssl.get_default_verify_paths()
        if paths.cafile is not None:
            self.load_verify_locations(cafile=paths.cafile)
        if paths.capath is not None:
            self.load_verify_locations(capath=paths.capath)

    def load_default_certs(self, purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH) -> None:
        """Trust the system's CAs."""
        if not isinstance(purpose, ssl.Purpose):
            raise TypeError(purpose)
        self.set_default_verify_paths()

    def load_cert_chain(
        self, certfile: StrPath, keyfile: StrPath | None = None, password: Password | None = None
    ) -> None:
        """Present this certificate chain (PEM, leaf first); ECDSA, RSA, Ed25519 and ML-DSA keys work.

        The password is asked for if the key is encrypted.

        Raises ssl.SSLError if a file is not PEM, the key is not the certificate's, or the password is wrong;
        and the errors of a `password` function.
        """
        passphrase = None if password is None else Passphrase(password)
        name = os.fsdecode(certfile)
        chain = read_chain(name)
        try:
            self._credentials = Credentials.load(
                chain, Path(name if keyfile is None else os.fsdecode(keyfile)).read_bytes(), passphrase
            )
        except ssl.SSLError:
            if passphrase is not None and passphrase.error is not None:
                raise passphrase.error from None
            raise

    # --- protocol

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        """Set the application protocols to offer or accept, the preferred one first.

        The protocol `qkd-tls/1` is added by itself.
        """
        names = tuple(alpn_protocols)
        for name in names:
            if not 1 <= len(name.encode("ascii")) <= 255:
                raise ssl.SSLError("ALPN protocols must be 1 to 255 bytes long")
            if name == ALPN_PROTOCOL:
                raise ValueError(f"{ALPN_PROTOCOL} is not an application's protocol: it is offered by itself")
        self._alpn = names

    @property  # type: ignore[override]
    def minimum_version(self) -> ssl.TLSVersion:
        """Always TLS 1.3. A lower value is accepted and changes nothing."""
        return ssl.TLSVersion.TLSv1_3

    @minimum_version.setter
    def minimum_version(self, value: ssl.TLSVersion) -> None:
        ssl.TLSVersion(value)

    @property  # type: ignore[override]
    def maximum_version(self) -> ssl.TLSVersion:
        """Always TLS 1.3."""
        return ssl.TLSVersion.TLSv1_3

    @maximum_version.setter
    def maximum_version(self, value: ssl.TLSVersion) -> None:
        if value not in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.MAXIMUM_SUPPORTED):
            raise ValueError("a hybrid connection is TLS 1.3: a lower maximum_version cannot be had")

    @property
    def options(self) -> ssl.Options:
        """The options, for reading back; TLS 1.3 without tickets, compression or renegotiation is fixed."""
        return ssl.Options(BaseContext.options.__get__(self))

    @options.setter
    def options(self, value: int) -> None:
        if value < 0:
            raise OverflowError("options cannot be negative")
        if value & ssl.OP_NO_TLSv1_3:
            raise ValueError("a hybrid connection is TLS 1.3: OP_NO_TLSv1_3 cannot be had")
        BaseContext.options.__set__(self, value)

    # The standard library's properties of these names look for a class that a program may have replaced.

    @property
    def verify_mode(self) -> ssl.VerifyMode:
        """The check of the peer's certificate: `CERT_NONE`, `CERT_OPTIONAL` or `CERT_REQUIRED`."""
        return ssl.VerifyMode(BaseContext.verify_mode.__get__(self))

    @verify_mode.setter
    def verify_mode(self, value: int) -> None:
        BaseContext.verify_mode.__set__(self, value)

    @property
    def verify_flags(self) -> ssl.VerifyFlags:
        """The flags of the check."""
        return ssl.VerifyFlags(BaseContext.verify_flags.__get__(self))

    @verify_flags.setter
    def verify_flags(self, value: int) -> None:
        BaseContext.verify_flags.__set__(self, value)

    def session_stats(self) -> dict[str, int]:
        """Return this context's handshakes by the standard library's names; resumed sessions are always 0."""
        with self._lock:
            return dict(self._handshakes)

    def get_ciphers(self) -> list[Any]:
        """Return the TLS 1.3 cipher suites; as in `ssl`, `set_ciphers` acts on older versions only."""
        return [cipher for cipher in super().get_ciphers() if cipher["protocol"] == "TLSv1.3"]

    @property
    def num_tickets(self) -> int:
        """Always 0: no connection is ever resumed without a fresh QKD key."""
        return 0

    @num_tickets.setter
    def num_tickets(self, value: int) -> None:
        if value != 0:
            raise ValueError("no connection is ever resumed without a fresh QKD key: num_tickets stays 0")

    # --- what cannot be honoured says so

    def set_ecdh_curve(self, name: str) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("set_ecdh_curve", f"give groups=[...{name!r}...] to the context")

    def load_dh_params(self, path: object) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("load_dh_params", "TLS 1.3 has named groups only")

    def set_npn_protocols(self, npn_protocols: object) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("set_npn_protocols", "use set_alpn_protocols")

    def set_psk_client_callback(self, callback: object) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("set_psk_client_callback", "the PSK of a connection is the hybrid one")

    def set_psk_server_callback(self, callback: object, identity_hint: str | None = None) -> NoReturn:
        """Raise NotImplementedError."""
        _refuse("set_psk_server_callback", "the PSK of a connection is the hybrid one")

    def _wrap_socket(self, *_: object, **__: object) -> NoReturn:
        """Raise ssl.SSLError: here the standard library makes connections without a QKD key."""
        raise ssl.SSLError(
            ssl.SSL_ERROR_SSL, "a QKDContext makes connections by wrap_socket() and wrap_bio() only"
        )

    _wrap_bio = _wrap_socket

    # --- connections

    def _host_name(self, name: str | bytes | None) -> str | None:
        text: str | None = self._encode_hostname(name)  # type: ignore[attr-defined]
        if text is None:
            return None
        if self.check_hostname and not text:
            raise ValueError("check_hostname requires server_hostname")
        if "\0" in text:
            raise TypeError("server_hostname must not contain null characters")
        if not text or text.startswith("."):
            raise ValueError("server_hostname cannot be an empty string or start with a leading dot.")
        return text

    def wrap_socket(  # type: ignore[override]
        self,
        sock: Socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: None = None,
    ) -> QKDSocket:
        """Take over a TCP socket like `ssl.SSLContext.wrap_socket`; the result's `qkd` says what protects it.

        During the handshake the key manager is called in this thread.

        Raises:
            QKDUnavailable: policy `require`, and no QKD key is available.
            QKDKeyMismatch: the two KMEs gave different keys.
            QKDProtocolError: the peer broke the rules of qkd-tls/1.
            ssl.SSLCertVerificationError, ssl.SSLError, TimeoutError, OSError: as in the standard library.
        """
        _no_session(session)
        return _ours(self.sslsocket_class, QKDSocket)._create(
            sock,
            context=self,
            server_side=server_side,
            do_handshake_on_connect=do_handshake_on_connect,
            suppress_ragged_eofs=suppress_ragged_eofs,
            server_hostname=self._host_name(server_hostname),
        )

    def wrap_bio(  # type: ignore[override]
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: None = None,
    ) -> QKDObject:
        """Make a connection over memory like `ssl.SSLContext.wrap_bio`; the caller moves the ciphertext.

        `do_handshake` calls the key manager in this thread, and waits for it: under asyncio, use `qkd_tls.aio`.
        """
        _no_session(session)
        return _ours(self.sslobject_class, QKDObject)._create(
            incoming,
            outgoing,
            context=self,
            server_side=server_side,
            server_hostname=self._host_name(server_hostname),
        )

    def new_engine(
        self, *, server_side: bool, server_hostname: str | None = None, server_port: int | None = None
    ) -> Engine:
        """Make the state machine for one connection, for programs with their own driver.

        `server_hostname` is ASCII; with `server_port`, services of one host keep separate associations.
        Raises ValueError or ssl.SSLError if this context cannot serve that side.
        """
        if server_side != self._server:
            side, kind = ("server", "CLIENT") if server_side else ("client", "SERVER")
            raise ssl.SSLError(
                ssl.SSL_ERROR_SSL, f"Cannot create a {side} socket with a PROTOCOL_TLS_{kind} context"
            )
        if server_side:
            if server_hostname is not None:
                raise ValueError("server_hostname can only be specified in client mode")
            self._count("accept")
            return ServerEngine(self._engine_config())
        if self.check_hostname and not server_hostname:
            raise ValueError("check_hostname requires server_hostname")
        self._count("connect")
        return ClientEngine(
            self._engine_config(),
            server_hostname=server_hostname,
            server_port=server_port,
            server_sae_id=self._peer_sae_ids.get(server_hostname or "", self._peer_sae_id),
        )

    def _choose_context(self, engine: ServerEngine, connection: Endpoint, name: str | None) -> None:
        """Ask the `sni_callback` what to do with a client that wants to reach `name`."""
        callback: Any = self.sni_callback
        cause: Exception | None = None
        try:
            answer = callback(connection, name, self) if callback is not None else None
        except Exception as error:  # noqa: BLE001 - whatever the program's function raises
            cause, answer = error, ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE
        chosen = connection.context
        if answer is None and chosen._credentials is not None:
            if chosen is not self:
                # Counted where it is served, as OpenSSL does.
                self._count("accept", -1)
                chosen._count("accept")
            engine.choose(chosen._engine_config())
            return
        if answer is None:
            engine.refuse(
                ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE,
                ssl_error(
                    ssl.SSLError, "[SSL] no certificate: call load_cert_chain() on the server's context first"
                ),
            )
            return
        try:
            description = operator.index(answer)
            if not 0 <= description <= _LARGEST_ALERT:
                raise ValueError(f"no alert has the number {description}")
        except (TypeError, ValueError) as error:
            cause, description = error, ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        refusal = ssl_error(
            ssl.SSLError,
            f"[SSL] callback failed: the sni_callback refused the name {name!r} with alert {int(description)}"
            + (f" ({cause!r})" if cause else ""),
            "CALLBACK_FAILED",
        )
        refusal.__cause__ = cause
        engine.refuse(description, refusal)

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._handshakes[what] += number

    def forget_associations(self) -> None:
        """Wipe all association secrets and announced keys: the next connections are bootstraps."""
        self._associations.clear()

    def _engine_config(self) -> EngineConfig:
        """Return the configuration of all connections, made anew after a change of the settings."""
        # Many programs set what is set already, for each connection: that is no change.
        # Plain numbers: ssl.SSLContext makes enums of them, which takes 5 of a handshake's 700 microseconds.
        base: Any = super(SSLContext, self)
        state = (
            self._credentials,
            # The two collections only grow: their sizes tell whether they have changed.
            len(self._trusted),
            len(self._crls),
            base.verify_mode,
            base.verify_flags,
            base.check_hostname,
            base._host_flags,
            self.post_handshake_auth,
            self.keylog_filename,
            self.sni_callback is None,
            self.observer,
            self._alpn,
        )
        compiled = self._config
        if compiled is None or compiled[0] != state:
            compiled = self._config = state, self._new_config()
        return compiled[1]

    def _new_config(self) -> EngineConfig:
        settings = TLSSettings(
            server_side=self._server,
            credentials=self._credentials,
            trusted=tuple(self._trusted),
            crls=tuple(self._crls),
            verify_mode=self.verify_mode,
            verify_flags=int(self.verify_flags),
            check_hostname=self.check_hostname,
            common_name_fallback=self.hostname_checks_common_name,
            groups=self._groups,
            cipher_suites=DEFAULT_CIPHER_SUITES[self._kdf],
            post_handshake_auth=self.post_handshake_auth,
            keylog_filename=self.keylog_filename,
        )
        manager = self._key_manager
        return EngineConfig(
            context=TLSContext(settings),
            policy=self._policy,
            associations=self._associations,
            kms=manager.name if manager else "",
            kms_protocol=manager.protocol if manager else "",
            sae_id=manager.sae_id if manager else "",
            allowed_peer_sae_ids=self._allowed,
            alpn=self._alpn,
            kdf=self._kdf,
            kem=self._kem,
            announced_keys=self._announced_keys,
            pipelined=self._pipelined,
            lifetime=self._lifetime,
            max_keys=self._max_keys,
            # Without a certificate it is time to say so when a client comes: it may be loaded until then.
            chooses_by_name=self.sni_callback is not None or (self._server and self._credentials is None),
            observer=self.observer,
        )


def create_default_context(
    purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH,
    *,
    cafile: StrPath | None = None,
    capath: StrPath | None = None,
    cadata: str | Buffer | None = None,
    **qkd: Any,
) -> QKDContext:
    """Make a context like `ssl.create_default_context`; `qkd` are the keyword arguments of `QKDContext`.

    `ssl.Purpose.SERVER_AUTH` makes a client's context, which verifies certificates and host names against `cafile`,
    `capath`, `cadata` or the system's CAs; `ssl.Purpose.CLIENT_AUTH` makes a server's. As there, the
    environment variable `SSLKEYLOGFILE` names a file that the secrets of all connections are written to.
    """
    if not isinstance(purpose, ssl.Purpose):
        raise TypeError(purpose)
    is_client = purpose == ssl.Purpose.SERVER_AUTH
    context = QKDContext(ssl.PROTOCOL_TLS_CLIENT if is_client else ssl.PROTOCOL_TLS_SERVER, **qkd)
    if sys.version_info >= (3, 13):
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    if cafile or capath or cadata:
        context.load_verify_locations(cafile, capath, cadata)
    elif context.verify_mode != ssl.CERT_NONE:
        context.load_default_certs(purpose)
    keylog_filename = os.environ.get("SSLKEYLOGFILE")
    if keylog_filename and not sys.flags.ignore_environment:
        context.keylog_filename = keylog_filename
    return context


def _ours(kind: type[_Kind], base: type[_Kind]) -> type[_Kind]:
    if not issubclass(kind, base):
        raise TypeError(
            f"{kind.__name__} cannot be a class for the connections of a QKDContext: derive it from {base.__name__}"
        )
    return kind


def _no_session(session: None) -> None:
    if session is not None:
        raise ValueError("no connection is ever resumed without a fresh QKD key: session must be None")


def _refuse(what: str, instead: str) -> NoReturn:
    raise NotImplementedError(f"QKDContext has no {what}: {instead}")
