"""The server's half of the state machine."""

from __future__ import annotations

import functools
import ssl
import weakref
from collections.abc import Callable
from functools import partial
from typing import Final, NoReturn

from kms_client import KMSError, QKDKey, UnknownKey, UnknownSAE, wipe_keys
from qkd_tls import control, kems
from qkd_tls.association import Association
from qkd_tls.client_hello import (
    ClientHello,
    ClientHelloError,
    ClientHelloReader,
    group_names,
    parse_client_hello,
)
from qkd_tls.control import RejectCode
from qkd_tls.engine.base import ALPN_PROTOCOL, NEVER_FALL_BACK, NO_KMS, Engine, EngineConfig
from qkd_tls.engine.hints import REJECT_HINTS, SERVER_HINTS, with_hint
from qkd_tls.engine.states import ChooseContext, Event, FetchKeysByID, State
from qkd_tls.errors import QKDUnavailable, ssl_error
from qkd_tls.hybrid import PSKIdentity
from qkd_tls.openssl import ML_KEM_GROUPS, TLSConnection, TLSContext, TLSSettings
from qkd_tls.policy import Policy
from qkd_tls.records import alert

__all__ = ["ServerEngine"]

_ALPN_PROTOCOL: Final = ALPN_PROTOCOL.encode()
_GIVE_THE_CLIENT_A_KMS: Final = (
    "give the client a key manager; policy 'prefer' would let it in without a QKD key"
)
_TLS1_3: Final = 0x0304
_ALERT_NO_APPLICATION_PROTOCOL: Final = 120
_ALERT_DESCRIPTION: Final = 6
"""The place of the description in an alert in clear."""
_HANDSHAKE_FAILURE: Final = bytes([40])


class ServerEngine(Engine):
    """The TLS server, which is the slave SAE: it asks its KMS for the keys that the client names."""

    _role = "server"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, State.SERVER_HELLO)
        self._reader = ClientHelloReader()
        self._hello: ClientHello | None = None
        self._identity: PSKIdentity | None = None
        self._encoded = b""
        self._offer: control.Offer | None = None
        self._rejection: tuple[RejectCode, str, KMSError | None] | None = None
        self._discovered = False
        self._app_alpn: str | None = None
        self._named = False

    @property
    def offered_suites(self) -> tuple[int, ...]:
        """The cipher suites that the client offers (RFC 8446 B.4)."""
        return self._hello.cipher_suites if self._hello is not None else ()

    # --- the server name

    def choose(self, config: EngineConfig) -> None:
        """Answer `ChooseContext`: go on with these settings, associations included."""
        self._chosen()
        self._config = config
        self._guard(self._go_on_from_name)

    def refuse(self, description: int, error: ssl.SSLError) -> None:
        """Answer `ChooseContext`: end the handshake with this alert (RFC 8446 6.2) and this error."""
        self._chosen()
        self._out += alert(description)
        self._guard(self._fail, error)

    def _chosen(self) -> None:
        if not isinstance(self._request, ChooseContext):
            raise RuntimeError("the engine has not asked for a context")
        self._request = None

    def _go_on_from_name(self) -> None:
        self._go(Event.CHOSEN)
        self._advance()

    def _advance(self) -> None:
        while (step := _STEPS.get(before := self._state)) is not None:
            step(self)
            if self._state is before:
                return

    # --- ClientHello

    def _read_hello(self) -> None:
        if not self._records:
            return
        self._hello = None
        try:
            message = self._reader.read(self._records)
            if message is None:
                return
            self._hello = parse_client_hello(message)
        except ClientHelloError as error:
            self._refuse_hello(error)
        # OpenSSL reads it again, and has the last word.
        self._reader.give_back(self._records)
        self._reader = ClientHelloReader()
        if self._config.chooses_by_name and not self._named:
            self._named = True
            self._request = ChooseContext(self._hello.server_name)
            self._go(Event.NAMED)
        elif self._config.uses_qkd:
            self._look_for_identity(self._hello)
        else:
            self._start_handshake(Event.NO_KEY_NEEDED)

    def _refuse_hello(self, error: ClientHelloError) -> NoReturn:
        """End the handshake with OpenSSL's alert and error, if it objects as well, else with our own."""
        self._reader.give_back(self._records)
        judge = TLSConnection(_judge())
        judge.feed(self._records.take_all())
        try:
            judge.handshake()
        except ssl.SSLError as objection:
            said = judge.take()
            if said[_ALERT_DESCRIPTION:] != _HANDSHAKE_FAILURE:
                self._out += said
                raise self._explained(objection) from None
        self._out += alert(error.alert)
        raise ssl_error(
            ssl.SSLError,
            f"[SSL: BAD_CLIENT_HELLO] the client's first message is refused: {error}; its TLS library is broken, or "
            "somebody is trying this port",
            "BAD_CLIENT_HELLO",
        )

    def _look_for_identity(self, hello: ClientHello) -> None:
        """Check all before the KMS is asked: only a holder of the association secret can cause a request."""
        try:
            (encoded,) = hello.psk_identities
            identity = PSKIdentity.parse(encoded)
            association = self._config.associations.by_id(identity.association_id, self._config.clock())
            if association is None or association.server_name != hello.server_name:
                raise ValueError("association unknown, expired, or made for another server name")
            association.verify_tag(identity)
            key = association.spend(identity.key_id)
        except ValueError:
            self._start_handshake(Event.NO_KEY_NEEDED)
            return
        self._identity, self._encoded, self._association = identity, encoded, association
        if key is not None:
            self._start_handshake(Event.KEY_AT_HAND, key, announced=not self._bootstrapped)
        else:
            self._request = FetchKeysByID(association.client_sae_id, (identity.key_id,))
            self._go(Event.KEY_WANTED)

    def _start_handshake(self, event: Event, key: QKDKey | None = None, *, announced: bool = False) -> None:
        if key is not None:
            assert self._association is not None and self._identity is not None
            try:
                self._psk = self._association.psk(
                    key, self._identity.kdf, identity=self._encoded, announced=announced
                )
            except ValueError:
                # The association has ended meanwhile; the client will bootstrap.
                key.wipe()
        if self._psk is None and self._config.uses_qkd:
            self._refuse_stock_client()
        self._go(event)
        self._app_alpn = None
        self._tls = TLSConnection(
            self._config.context,
            psk=self._psk,
            # Not by a reference from the connection, which would hold who holds it.
            select_alpn=partial(_select_alpn, weakref.ref(self)),
        )

    def _refuse_stock_client(self) -> None:
        if self._config.policy is not Policy.REQUIRE or self._hello is None or not _is_stock(self._hello):
            return
        self._out += alert(_ALERT_NO_APPLICATION_PROTOCOL)
        raise QKDUnavailable(
            f"the client does not speak {ALPN_PROTOCOL}, or has no QKD key; its groups are {_groups_of(self._hello)}",
            hint=_GIVE_THE_CLIENT_A_KMS,
        )

    def _select_alpn(self, tls: TLSConnection, offered: tuple[bytes, ...]) -> bytes | None:
        for name in self._config.alpn:
            if name.encode() in offered:
                self._app_alpn = name
                break
        if self._config.uses_qkd and not tls.psk_accepted and _ALPN_PROTOCOL in offered:
            return _ALPN_PROTOCOL
        return self._app_alpn.encode() if self._app_alpn else None

    def _on_keys(self, result: list[QKDKey] | KMSError) -> None:
        if self._state is State.SERVER_OFFER_KEYS:
            self._answer_offer(result)
        elif isinstance(result, KMSError):
            # No PSK: an ordinary handshake, in which the client finds itself in a new bootstrap.
            self._start_handshake(Event.NO_KEYS)
        else:
            self._start_handshake(Event.KEYS, result[0])

    def _handshake(self) -> None:
        assert self._tls is not None
        while self._records:
            if self._tls.psk_accepted:
                self._feed_all()
            else:
                # A pipelined offer and the ClientHello behind it may follow in the same flight.
                record = self._records.next_record()
                if record is None:
                    return
                self._tls.feed(record)
            if self._run_handshake():
                self._after_handshake()
                return

    def _after_handshake(self) -> None:
        assert self._tls is not None
        if self._tls.psk_accepted:
            self._establish(Event.PSK_ACCEPTED, self._app_alpn)
            return
        self._forget_psk()
        self._association = None
        self._bootstrapped = False
        if self._tls.alpn == ALPN_PROTOCOL:
            self._frames = control.FrameReader()
            self._offer = None
            self._discovered = False
            self._go(Event.BOOTSTRAP)
            return
        if self._config.uses_qkd:
            self._no_qkd(
                f"the client does not speak {ALPN_PROTOCOL}, or has no QKD key",
                hint=_GIVE_THE_CLIENT_A_KMS,
            )
        self._establish(Event.PLAIN, self._tls.alpn)

    # --- control messages

    def _read_control(self) -> None:
        try:
            message = self._read_message()
        except control.UnsupportedVersion as error:
            self._reject(RejectCode.UNSUPPORTED_VERSION, str(error))
        except control.MalformedMessage as error:
            self._reject(RejectCode.MALFORMED, str(error))
        else:
            if isinstance(message, control.Discover) and not self._discovered:
                self._discovered = True
                self._send_message(
                    control.Identity(
                        self._config.sae_id, (self._config.kms_protocol,), kems.names(), self._config.max_keys
                    )
                )
                self._go(Event.DISCOVER)
                self._read_control()
            elif isinstance(message, control.Offer):
                self._on_offer(message)
            elif message is not None:
                self._reject(
                    RejectCode.MALFORMED, f"{type(message).__name__.lower()} where it does not belong"
                )

    def _on_offer(self, offer: control.Offer) -> None:
        self._offer = offer
        objection = self._objection(offer)
        if objection is None:
            self._request = FetchKeysByID(offer.sae_id, offer.key_ids)
            self._go(Event.OFFER)
        else:
            self._reject(*objection)

    def _objection(self, offer: control.Offer) -> tuple[RejectCode, str] | None:
        """Return the reason not to ask our KMS, if any, the worst first."""
        assert self._tls is not None
        config = self._config
        if self._frames.unread:
            return RejectCode.MALFORMED, "bytes after the offer"
        if len(offer.key_ids) > config.max_keys:
            return RejectCode.MALFORMED, f"{len(offer.key_ids)} keys offered, at most {config.max_keys}"
        if offer.kem is None and self._tls.group not in ML_KEM_GROUPS:
            return (
                RejectCode.KEM_REQUIRED,
                f"the group {self._tls.group} has no ML-KEM: offer an explicit KEM",
            )
        if offer.kms == NO_KMS:
            return RejectCode.UNSUPPORTED_KMS, "the client has no QKD key to offer"
        if offer.kms != config.kms_protocol:
            ours = config.kms_protocol
            return (
                RejectCode.UNSUPPORTED_KMS,
                f"no keys of a KMS of kind {offer.kms!r} here, only of {ours!r}",
            )
        if offer.kem is not None and offer.kem.name not in kems.names():
            return RejectCode.UNSUPPORTED_KEM, f"KEM {offer.kem.name!r} is not available here"
        if config.allowed_peer_sae_ids is not None and offer.sae_id not in config.allowed_peer_sae_ids:
            return RejectCode.UNKNOWN_SAE, f"SAE {offer.sae_id!r} is not allowed here"
        return None

    def _answer_offer(self, result: list[QKDKey] | KMSError) -> None:
        assert self._tls is not None and self._offer is not None
        if isinstance(result, KMSError):
            # The client learns what kind of failure it was, not what our KMS said about it.
            self._reject(_reject_code(result), f"{self._config.kms_protocol} KMS of the server", result)
            return
        ciphertext, kem_secret = None, b""
        if self._offer.kem is not None:
            try:
                ciphertext, kem_secret = kems.encapsulate(self._offer.kem.name, self._offer.kem.ek)
            except kems.KEMError as error:
                wipe_keys(result)
                self._reject(RejectCode.MALFORMED, str(error))
                return
        expires_at = self._until(self._config.lifetime)
        association = Association(
            secret=self._association_secret(kem_secret),
            client_sae_id=self._offer.sae_id,
            server_sae_id=self._config.sae_id,
            server_name=self._hello.server_name if self._hello else None,
            expires_at=expires_at,
            peer_certificate=self._tls.peer_certificate,
            kem=self._offer.kem.name if self._offer.kem else None,
        )
        association.announce(result)
        self._config.associations.add(association)
        self._send_message(
            control.Accept(
                self._config.sae_id,
                max(1, int(expires_at - self._config.clock())),
                tuple(key.key_id for key in result),
                ciphertext,
            )
        )
        self._tls = None
        self._bootstrapped = True
        self._go(Event.KEYS)

    def _reject(self, code: RejectCode, detail: str, error: KMSError | None = None) -> None:
        self._send_message(control.Reject(code, detail, None if code in NEVER_FALL_BACK else self._app_alpn))
        self._rejection = (code, error.summary if error else detail, error)
        if self._offer is not None and self._offer.pipelined:
            # Skipped even where an error follows: closing with bytes unread would reset the transport, and the
            # client might never see the reject.
            self._go(Event.REJECT_PIPELINED)
        else:
            self._after_reject(Event.REJECT)

    def _skip_hello(self) -> None:
        try:
            message = self._reader.read(self._records)
        except ClientHelloError as error:
            self._fail(self._malformed(f"a pipelined offer without its ClientHello: {error}"))
        if message is not None:
            self._after_reject(Event.SKIPPED)

    def _after_reject(self, event: Event) -> None:
        assert self._rejection is not None
        code, detail, error = self._rejection
        if code in NEVER_FALL_BACK:
            broken = self._malformed(detail)
            broken.code = code
            self._fail(broken)
        client = f" for client SAE {self._offer.sae_id!r}" if self._offer is not None else ""
        self._no_qkd(
            f"no QKD key{client}: {code} ({detail})", hint=REJECT_HINTS[code], error=error, code=code
        )
        self._establish(event, self._app_alpn)

    def _end_of_stream(self) -> None:
        if self._state is State.SERVER_SKIP:
            self._after_reject(Event.SKIPPED)
        else:
            super()._end_of_stream()

    # --- errors

    def _peer_closed(self) -> NoReturn:
        raise QKDUnavailable(
            "the client closed the bootstrap connection without an offer",
            hint="look at the client's log: its KMS may be down, and its policy is 'require'",
        )

    def _explained(self, error: ssl.SSLError) -> ssl.SSLError:
        mismatch = self._mismatch(error)
        if mismatch is not None:
            return mismatch
        ours = ", ".join(self._config.context.settings.groups)
        hint = SERVER_HINTS.get(error.reason or "", "")
        return with_hint(error, hint.format(ours=ours, theirs=_groups_of(self._hello)))


_STEPS: Final[dict[State, Callable[[ServerEngine], None]]] = {
    State.SERVER_HELLO: ServerEngine._read_hello,
    State.SERVER_HANDSHAKE: ServerEngine._handshake,
    State.SERVER_CONTROL: ServerEngine._read_control,
    State.SERVER_SKIP: ServerEngine._skip_hello,
}
"""The steps for bytes of the client. In the other states they wait."""


def _select_alpn(
    reference: weakref.ref[ServerEngine], tls: TLSConnection, offered: tuple[bytes, ...]
) -> bytes | None:
    """Choose a protocol, but none if nobody waits for this connection any more."""
    engine = reference()
    return engine._select_alpn(tls, offered) if engine is not None else None


def _is_stock(hello: ClientHello) -> bool:
    """Return whether the hello is one of TLS 1.3 without qkd-tls/1. OpenSSL names what is too old."""
    return _TLS1_3 in hello.versions and _ALPN_PROTOCOL not in hello.alpn


def _groups_of(hello: ClientHello | None) -> str:
    return group_names(hello.groups) if hello is not None else "unknown ones"


@functools.cache
def _judge() -> TLSContext:
    """Return a context that reads a ClientHello, and without a certificate never answers it."""
    return TLSContext(TLSSettings(server_side=True))


def _reject_code(error: KMSError) -> RejectCode:
    if isinstance(error, UnknownKey):
        return RejectCode.UNKNOWN_KEY
    if isinstance(error, UnknownSAE):
        return RejectCode.UNKNOWN_SAE
    return RejectCode.KMS_UNAVAILABLE
