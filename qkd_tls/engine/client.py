"""The client's half of the state machine."""

from __future__ import annotations

import ssl
from collections.abc import Hashable
from typing import NoReturn

from kms_client import KMSError, QKDKey, wipe_keys
from qkd_tls import control, kems
from qkd_tls.association import Association, AssociationEnded
from qkd_tls.control import RejectCode
from qkd_tls.engine.base import ALPN_PROTOCOL, NEVER_FALL_BACK, NO_KMS, Engine, EngineConfig
from qkd_tls.engine.hints import CLIENT_HINTS, CLIENT_PSK_HINTS, REJECT_HINTS, with_hint
from qkd_tls.engine.states import Event, FetchKeys, State
from qkd_tls.errors import QKDProtocolError, QKDUnavailable
from qkd_tls.openssl import ML_KEM_GROUPS, TLSConnection

__all__ = ["ClientEngine"]


class ClientEngine(Engine):
    """The TLS client, which is the master SAE: it asks its KMS for fresh keys."""

    _role = "client"

    def __init__(
        self,
        config: EngineConfig,
        *,
        server_hostname: str | None = None,
        server_port: int | None = None,
        server_sae_id: str | None = None,
    ) -> None:
        """Start the handshake. `server_hostname` is ASCII; without `server_sae_id`, the server is asked."""
        super().__init__(config, State.CLIENT_START)
        self._server_hostname = server_hostname
        self._server_port = server_port
        self._peer_sae_id = self._known_sae_id = server_sae_id
        self._server_max_keys: int | None = None
        self._offered: list[QKDKey] = []
        self._kem_key: kems.KEMKey | None = None
        self._hybrid: TLSConnection | None = None
        self._pipelined = False
        self._waiting: Association | None = None
        """The association that a key is being fetched for."""
        self._guard(self._start)

    @property
    def _scope(self) -> Hashable:
        """The conditions for using an association again: the same server, reached in the same way."""
        return (
            self._config.context.fingerprint,
            self._server_hostname,
            self._server_port,
            self._known_sae_id,
            self._config.sae_id,
        )

    def _start(self) -> None:
        if not self._config.uses_qkd:
            self._first_hello(Event.NO_KEY_NEEDED)
            return
        association = self._find_association()
        if association is None:
            self._first_hello(Event.NO_KEY_NEEDED)
            return
        key = association.take_announced()
        if key is None:
            self._waiting = association
            self._request = FetchKeys(association.server_sae_id, 1)
            self._go(Event.KEY_WANTED)
        else:
            self._derive(association, key, announced=True)
            self._first_hello(Event.KEY_AT_HAND)

    def _find_association(self) -> Association | None:
        return self._config.associations.by_scope(self._scope, self._config.clock())

    def _derive(self, association: Association | None, key: QKDKey, *, announced: bool = False) -> None:
        """Make the PSK; if the association has ended meanwhile, offer the fresh key in a bootstrap."""
        if association is not None:
            try:
                self._psk = association.psk(key, self._config.kdf, announced=announced)
            except AssociationEnded:
                pass
            else:
                self._association = association
                return
        if announced:
            # The server's KMS has delivered it already.
            key.wipe()
        else:
            self._offered = [key]

    def _first_hello(self, event: Event, *, speak_qkd: bool = True) -> None:
        self._go(event)
        speak_qkd = speak_qkd and self._config.uses_qkd
        self._tls = self._new_connection(speak_qkd=speak_qkd)
        self._run_handshake()

    def _new_connection(self, *, speak_qkd: bool = True) -> TLSConnection:
        alpn = (ALPN_PROTOCOL, *self._config.alpn) if speak_qkd else self._config.alpn
        return TLSConnection(
            self._config.context, server_hostname=self._server_hostname, alpn=alpn, psk=self._psk
        )

    # --- progress

    def _advance(self) -> None:
        if not self._records:
            return
        if self._state is State.CLIENT_HELLO:
            # In a bootstrap the server sends nothing more before it has an offer.
            self._feed_all()
            if self._run_handshake():
                self._after_first_handshake()
            return
        while self._state in (State.CLIENT_DISCOVER, State.CLIENT_OFFER):
            try:
                message = self._read_message()
            except control.MalformedMessage as error:
                raise self._malformed(str(error)) from None
            if message is None:
                return
            self._on_message(message)
        if self._state is State.CLIENT_HYBRID:
            self._feed_all()
            if self._run_handshake():
                self._after_hybrid_handshake()

    def _after_first_handshake(self) -> None:
        assert self._tls is not None
        alpn = self._tls.alpn
        if self._tls.psk_accepted:
            self._establish(Event.PSK_ACCEPTED, alpn)
            return
        # Where a PSK was offered, the server has lost the association or the key: a new bootstrap heals that.
        self._forget_psk()
        if self._association is not None:
            self._config.associations.discard(self._association)
            self._association = None
        if alpn != ALPN_PROTOCOL:
            # The key of an association that ended while the KMS was asked.
            wipe_keys(self._offered)
            self._offered = []
            if self._config.uses_qkd and self._fallback is None:
                self._no_qkd(
                    f"the server{_named(self._server_hostname)} does not speak {ALPN_PROTOCOL}, or has no KMS",
                    hint="configure a key manager on the server; policy 'prefer' would go on without a QKD key",
                )
            self._establish(Event.PLAIN, alpn)
            return
        self._frames = control.FrameReader()
        if self._peer_sae_id is None:
            self._go(Event.BOOTSTRAP_UNKNOWN_PEER)
            self._send_message(control.Discover())
        else:
            self._go(Event.BOOTSTRAP)
            self._want_offer_keys()

    def _want_offer_keys(self) -> None:
        assert self._peer_sae_id is not None
        number = 1 + self._config.announced_keys
        if self._server_max_keys is not None:
            number = min(number, self._server_max_keys)
        if self._offered:
            # The key that was fetched for an association which has ended meanwhile.
            self._make_offer(self._offered)
        else:
            self._request = FetchKeys(self._peer_sae_id, number)

    def _on_keys(self, result: list[QKDKey] | KMSError) -> None:
        if isinstance(result, KMSError):
            self._kms_failed(result)
            if self._state is State.CLIENT_KEY:
                # Without qkd-tls/1 in ALPN the server takes it for a stock client at once.
                self._first_hello(Event.NO_KEYS, speak_qkd=False)
            else:
                self._go(Event.NO_KEYS)
                self._send_message(control.Offer(NO_KMS, self._config.sae_id, (NO_KMS,), None, False))
        elif self._state is State.CLIENT_KEY:
            association = self._waiting
            if association is None or not association.usable(self._config.clock()):
                # The KMS has taken longer than the association lasted; another thread may have made the next one.
                association = self._find_association()
            self._derive(association, result[0])
            self._first_hello(Event.KEYS)
        else:
            self._make_offer(result)

    def _make_offer(self, keys: list[QKDKey]) -> None:
        assert self._tls is not None and self._peer_sae_id is not None
        self._offered = keys
        name = self._config.kem
        if name is None and self._tls.group not in ML_KEM_GROUPS:
            name = "ML-KEM-768"
        offered_kem = None
        if name is not None:
            self._kem_key = kems.generate(name)
            offered_kem = control.KEMOffer(name, self._kem_key.encapsulation_key)
        self._pipelined = self._config.pipelined and offered_kem is None and self._known_sae_id is not None
        self._go(Event.KEYS)
        self._send_message(
            control.Offer(
                self._config.kms_protocol,
                self._config.sae_id,
                tuple(key.key_id for key in keys),
                offered_kem,
                self._pipelined,
            )
        )
        if self._pipelined:
            self._start_hybrid(b"")

    def _start_hybrid(self, kem_secret: bytes) -> None:
        """Derive all secrets and make the second ClientHello."""
        assert self._tls is not None and self._peer_sae_id is not None
        self._association = Association(
            secret=self._association_secret(kem_secret),
            client_sae_id=self._config.sae_id,
            server_sae_id=self._peer_sae_id,
            server_name=self._server_hostname,
            # What the server grants comes with its accept, and may be less.
            expires_at=self._until(self._config.lifetime),
            peer_certificate=self._tls.peer_certificate,
            kem=self._kem_key.name if self._kem_key else None,
        )
        self._psk = self._association.psk(self._offered[0], self._config.kdf)
        self._hybrid = self._new_connection()
        self._hybrid.handshake()
        self._out += self._hybrid.take()

    # --- control messages

    def _on_message(self, message: control.Message) -> None:
        if self._state is State.CLIENT_DISCOVER and isinstance(message, control.Identity):
            self._on_identity(message)
        elif self._state is State.CLIENT_OFFER and isinstance(message, control.Accept):
            self._exchange_over()
            self._on_accept(message)
        elif isinstance(message, control.Reject):
            self._exchange_over()
            self._on_reject(message)
        else:
            raise self._malformed(f"{type(message).__name__.lower()} where it does not belong")

    def _on_identity(self, message: control.Identity) -> None:
        allowed = self._config.allowed_peer_sae_ids
        if allowed is not None and message.sae_id not in allowed:
            self._fail(
                QKDUnavailable(
                    f"the server says that it is SAE {message.sae_id!r}, which is not among the allowed ones",
                    hint="name it in allowed_peer_sae_ids, if it is the right one",
                    peer=message.sae_id,
                    code=RejectCode.UNKNOWN_SAE,
                )
            )
        self._peer_sae_id = message.sae_id
        self._server_max_keys = message.max_keys
        self._go(Event.IDENTITY)
        self._want_offer_keys()

    def _on_accept(self, message: control.Accept) -> None:
        assert self._tls is not None
        first = self._offered[0].key_id if self._offered else None
        offered = {key.key_id for key in self._offered}
        if first is None or first not in message.key_ids or not offered.issuperset(message.key_ids):
            raise self._malformed("accept does not name the key that was offered for this connection")
        if message.sae_id != self._peer_sae_id:
            raise QKDProtocolError(
                f"the server is SAE {message.sae_id!r}, the keys are for {self._peer_sae_id!r}",
                hint="correct peer_sae_id, or leave it out and let the client ask",
                peer=message.sae_id,
            )
        if (message.kem_ciphertext is None) != (self._kem_key is None):
            raise self._malformed("accept and offer disagree about an explicit KEM")
        if not self._pipelined:
            try:
                self._start_hybrid(
                    self._kem_key.decapsulate(message.kem_ciphertext)
                    if self._kem_key is not None and message.kem_ciphertext is not None
                    else b""
                )
            except kems.KEMError as error:
                raise self._malformed(str(error)) from None
        assert self._association is not None
        granted = self._config.clock() + message.lifetime
        self._association.expires_at = min(self._association.expires_at, granted)
        self._association.announce([key for key in self._offered[1:] if key.key_id in message.key_ids])
        wipe_keys(key for key in self._offered if key.key_id not in message.key_ids)
        self._offered = []
        # The bootstrap's TLS state is dropped without close_notify: the next byte belongs to the hybrid handshake.
        self._tls, self._hybrid = self._hybrid, None
        self._bootstrapped = True
        self._go(Event.ACCEPT)

    def _on_reject(self, message: control.Reject) -> None:
        if message.alpn is not None and message.alpn not in self._config.alpn:
            raise self._malformed("reject selects an application protocol that was not offered")
        self._clean_up()
        why = f"the server rejected the QKD keys: {message.code}"
        if message.detail:
            why += f" ({message.detail})"
        hint = REJECT_HINTS.get(message.code, "look at the server's log")
        if message.code in NEVER_FALL_BACK:
            self._fail(QKDProtocolError(why, hint=hint, peer=self._peer_sae_id, code=message.code))
        if self._fallback is None:
            self._no_qkd(why, hint=hint, code=message.code)
        self._establish(Event.REJECT, message.alpn)

    def _after_hybrid_handshake(self) -> None:
        assert self._tls is not None and self._association is not None and self._psk is not None
        if not self._tls.psk_accepted:
            self._fail(
                QKDUnavailable(
                    f"the server accepted key {self._psk.key_id} and then did not use it",
                    hint="look at the server's log; two servers behind one address must share one process, or each "
                    "connection must stay with one of them",
                    peer=self._peer_sae_id,
                    key_ids=(self._psk.key_id,),
                )
            )
        self._config.associations.add(self._association, self._scope)
        self._establish(Event.PSK_ACCEPTED, self._tls.alpn)

    # --- errors

    def _clean_up(self) -> None:
        super()._clean_up()
        wipe_keys(self._offered)
        self._offered = []
        if self._association is not None and (self._hybrid is not None or self._bootstrapped):
            # One that this very bootstrap was making; others are left to the next connection.
            self._config.associations.discard(self._association)
        self._association = None
        self._hybrid = None

    def _peer_closed(self) -> NoReturn:
        raise QKDUnavailable(
            "the server closed the bootstrap connection before it had answered the offer",
            hint="look at the server's log",
            peer=self._peer_sae_id,
        )

    def _explained(self, error: ssl.SSLError) -> ssl.SSLError:
        mismatch = self._mismatch(error)
        if mismatch is not None:
            return mismatch
        if error.reason == "TLSV1_ALERT_NO_APPLICATION_PROTOCOL":
            if self._config.uses_qkd and self._fallback is None:
                return with_hint(error, "the server speaks none of the application protocols offered in ALPN")
            return QKDUnavailable(
                f"the server insists on {ALPN_PROTOCOL}, and this side has no QKD key to offer"
                + (f" ({self._fallback})" if self._fallback else ""),
                hint="give this side a key manager that works; the server's policy is 'require'",
            )
        if self._psk is None:
            return with_hint(error, CLIENT_HINTS.get(error.reason or "", ""))
        return with_hint(error, CLIENT_PSK_HINTS.get(error.reason or "", "").format(key_id=self._psk.key_id))


def _named(name: str | None) -> str:
    return f" {name}" if name else ""
