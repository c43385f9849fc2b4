"""The common part of both roles' engines: the transport's bytes, the state, the actions, the end."""

from __future__ import annotations

import abc
import contextlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, NoReturn

from kms_client import KMSError, KMSProtocolError, QKDKey, wipe_keys
from qkd_tls import certificate, control
from qkd_tls.association import Association, AssociationStore
from qkd_tls.control import RejectCode
from qkd_tls.engine.states import (
    TRANSITIONS,
    Action,
    ChooseContext,
    Established,
    Event,
    FetchKeys,
    FetchKeysByID,
    NeedData,
    State,
    Step,
)
from qkd_tls.errors import QKDKeyMismatch, QKDProtocolError, QKDUnavailable, raised_anew, ssl_error
from qkd_tls.hybrid import EXPORTER_LABEL, EXPORTER_SIZE, KDF, association_secret
from qkd_tls.info import HandshakePath, Protection, QKDInfo
from qkd_tls.openssl import ML_KEM_GROUPS, TLSConnection, TLSContext
from qkd_tls.policy import Policy
from qkd_tls.psk import PSK
from qkd_tls.records import RecordBuffer

__all__ = ["ALPN_PROTOCOL", "NEVER_FALL_BACK", "NO_KMS", "Engine", "EngineConfig"]

ALPN_PROTOCOL: Final = "qkd-tls/1"
NO_KMS: Final = "none"
"""The `kms` of an offer from a client with policy `prefer` that has no key to offer."""

NEVER_FALL_BACK: Final = frozenset(
    {RejectCode.MALFORMED, RejectCode.KEM_REQUIRED, RejectCode.UNSUPPORTED_VERSION}
)
"""Reject codes that end the connection under every policy: no QKD cause, the peer is not understood."""

_NEED_DATA: Final = NeedData()
_READ_SIZE: Final = 1 << 16
_MIN_KEY_BITS: Final = 256
# What the key schedule can take: a secret behind its length in two bytes.
_MAX_KEY_BITS: Final = 8 * 0xFFFF


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """The settings of an engine. `lifetime` in seconds, `clock` gives Unix seconds."""

    context: TLSContext
    policy: Policy
    associations: AssociationStore
    kms: str = ""
    """The KMS' name for people; empty if there is none."""
    kms_protocol: str = ""
    """The KMS' name on the wire, e.g. "etsi-014"."""
    sae_id: str = ""
    allowed_peer_sae_ids: frozenset[str] | None = None
    """SAE IDs that keys may be shared with; None for any that the KMS allows."""
    alpn: tuple[str, ...] = ()
    kdf: KDF = KDF.SHA384
    kem: str | None = None
    """Client: explicit KEM to add; one is added anyway if the group has no ML-KEM."""
    announced_keys: int = 0
    """Client: keys to fetch at a bootstrap for later connections."""
    pipelined: bool = True
    lifetime: int = 3600
    max_keys: int = 64
    """Server: the most keys it takes in one offer."""
    chooses_by_name: bool = False
    """Server: ask for the configuration once the server name is known (`ChooseContext`)."""
    observer: Callable[[Step], object] | None = None
    """Function called after each transition."""
    clock: Callable[[], float] = field(default=time.time)
    uses_qkd: bool = field(init=False)
    """True if QKD keys are to be used at all."""

    def __post_init__(self) -> None:
        self.uses_qkd = bool(self.kms) and self.policy is not Policy.OFF


class Engine(abc.ABC):
    """The common part of both roles: the transport's bytes, the actions, the end."""

    _role: ClassVar[str]

    _frames: control.FrameReader
    """The reader of control messages, in a bootstrap."""

    def __init__(self, config: EngineConfig, start: State) -> None:
        self._config = config
        self._state = start
        self._records = RecordBuffer()
        self._out = bytearray()
        self._tls: TLSConnection | None = None
        self._psk: PSK | None = None
        self._association: Association | None = None
        self._request: FetchKeys | FetchKeysByID | ChooseContext | None = None
        self._fallback: str | None = None
        self._kms_round_trips = 0
        self._bootstrapped = False
        self._info: QKDInfo | None = None
        self._error: OSError | None = None
        self._peer_sae_id: str | None = None

    # --- what a driver calls

    @property
    def state(self) -> State:
        """The handshake's state."""
        return self._state

    @property
    def connection(self) -> TLSConnection:
        """The TLS connection for application data, once established."""
        assert self._state is State.ESTABLISHED and self._tls is not None
        return self._tls

    @property
    def peer_certificate(self) -> bytes | None:
        """The certificate that authenticated the peer, DER: this connection's, or its association's."""
        if self._association is not None and self._info is not None and self._info.path is not None:
            return self._association.peer_certificate
        return self._tls.peer_certificate if self._tls is not None else None

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the transport; empty means that the peer has closed it."""
        if self._error is not None:
            return
        if self._info is not None:
            raise RuntimeError("the handshake is over: what comes now is for the connection")
        if not data:
            self._guard(self._end_of_stream)
            return
        self._records.feed(data)
        self._guard(self._advance)

    def keys(self, result: list[QKDKey] | KMSError) -> None:
        """Answer the FetchKeys or FetchKeysByID that `next_action` gave."""
        fetch = self._request
        if not isinstance(fetch, (FetchKeys, FetchKeysByID)):
            wipe_keys([] if isinstance(result, KMSError) else result)
            if self._error is not None:
                return
            raise RuntimeError("the engine has not asked for keys")
        self._request = None
        self._kms_round_trips += 1
        if not isinstance(result, KMSError):
            result = self._checked(fetch, result)
        self._guard(self._go_on_with, result)

    def data_to_send(self) -> bytes:
        """Return bytes for the transport; empty if there are none."""
        if not self._out:
            return self._taken()
        self._collect()
        data = bytes(self._out)
        self._out.clear()
        return data

    def next_action(self) -> Action:
        """Return the next action; raise the error that ended the handshake."""
        if self._error is not None:
            raise raised_anew(self._error)
        if self._info is not None:
            return Established(self._info)
        return self._request or _NEED_DATA

    def abort(self) -> None:
        """Give up, for instance after a deadline: wipe the handshake's secrets."""
        if self._info is None and self._error is None:
            self._guard(self._fail, ssl_error(ssl.SSLError, "the handshake was given up"))

    # --- state

    def _go(self, event: Event) -> None:
        before = self._state
        after = self._state = TRANSITIONS[before, event]
        if self._config.observer is not None:
            self._config.observer(Step(self._role, before, event, after))

    def _guard(self, step: Callable[..., object], *arguments: object) -> None:
        """Run a step; an error of the peer, the KMS or OpenSSL ends the handshake and waits for `next_action`."""
        try:
            step(*arguments)
        except OSError as error:
            self._collect()
            self._state = State.FAILED
            self._error = raised_anew(error)
            # It leads to the frames that hold it.
            error.__traceback__ = None
            self._clean_up()
            # OpenSSL wipes its secrets when its object is freed.
            self._tls = None

    def _fail(self, error: Exception) -> NoReturn:
        """End with a close_notify if there is a TLS connection to close."""
        if self._tls is not None:
            # In the middle of a handshake OpenSSL refuses; it has sent its own alert then.
            with contextlib.suppress(ssl.SSLError):
                self._tls.shutdown()
        raise error

    def _forget_psk(self) -> None:
        if self._psk is not None:
            self._psk.wipe()
            self._psk = None

    def _clean_up(self) -> None:
        """Wipe the keys and the PSK of an attempt that has failed."""
        self._forget_psk()
        self._request = None

    def _taken(self) -> bytes:
        return self._tls.take() if self._tls is not None and not self._tls.attached else b""

    def _collect(self) -> None:
        self._out += self._taken()

    def _go_on_with(self, result: list[QKDKey] | KMSError) -> None:
        self._on_keys(result)
        # The peer's next flight may have come in the meantime.
        self._advance()

    # --- steps, filled in by the roles

    @abc.abstractmethod
    def _advance(self) -> None: ...

    @abc.abstractmethod
    def _on_keys(self, result: list[QKDKey] | KMSError) -> None: ...

    def _end_of_stream(self) -> None:
        raise ssl_error(
            ssl.SSLEOFError,
            f"EOF occurred in violation of protocol: the peer closed the transport ({self._state.value})",
        )

    def _checked(self, fetch: FetchKeys | FetchKeysByID, keys: list[QKDKey]) -> list[QKDKey] | KMSError:
        """Check that the KMS has done as asked; return the keys, or an error."""
        problem = _what_is_wrong(fetch, keys)
        if problem is None:
            return keys
        wipe_keys(keys)
        return KMSProtocolError(
            f"the KMS {problem}",
            kms=self._config.kms,
            peer=fetch.peer_sae_id,
            hint="ask the KMS' vendor; set its key size to 256 bits",
        )

    # --- TLS

    def _feed_all(self) -> None:
        """Give TLS all bytes so far, if no other connection can come before our next flight."""
        assert self._tls is not None
        self._tls.feed(self._records.take_all())

    def _run_handshake(self) -> bool:
        assert self._tls is not None
        try:
            return self._tls.handshake()
        except ssl.SSLCertVerificationError:
            raise
        except ssl.SSLError as error:
            raise self._explained(error) from None

    @abc.abstractmethod
    def _explained(self, error: ssl.SSLError) -> ssl.SSLError: ...

    def _mismatch(self, error: ssl.SSLError) -> QKDKeyMismatch | None:
        """Return a mismatch if the binder is wrong: the two sides have different keys for one key ID."""
        if self._psk is None or error.reason not in ("BINDER_DOES_NOT_VERIFY", "TLSV1_ALERT_DECRYPT_ERROR"):
            return None
        kms = self._psk.kms or self._config.kms
        return QKDKeyMismatch(
            f"the two sides hold different keys for key ID {self._psk.key_id} ({error.reason}); this side's came from "
            f"{kms}",
            hint="check that the KMEs of both sites belong to one link and are in step; if they are, somebody "
            "is in between",
            kms=kms,
            key_ids=(self._psk.key_id,),
        )

    def _read_message(self) -> control.Message | None:
        """Return the next control message; None if more bytes are needed. No byte beyond it is fed to TLS."""
        assert self._tls is not None
        while True:
            message = self._frames.next()
            if message is not None:
                return message
            record = self._records.next_record()
            if record is None:
                return None
            self._tls.feed(record)
            try:
                while True:
                    self._frames.feed(self._tls.read(_READ_SIZE))
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLZeroReturnError:
                self._peer_closed()
            except ssl.SSLError as error:
                raise self._explained(error) from None

    @abc.abstractmethod
    def _peer_closed(self) -> NoReturn: ...

    def _send_message(self, message: control.Message) -> None:
        assert self._tls is not None
        # Memory is never full: the whole frame is written, however many records it takes.
        self._tls.write_all(memoryview(control.encode(message)), 0)
        self._collect()

    def _exchange_over(self) -> None:
        """Check that no control byte follows accept or reject."""
        if self._frames.unread:
            raise self._malformed("bytes after the control exchange was over")

    def _malformed(self, what: str) -> QKDProtocolError:
        return QKDProtocolError(
            f"the peer broke qkd-tls/1: {what}",
            hint="check the versions at both ends; a peer that goes on doing this is not speaking qkd-tls/1",
            code=RejectCode.MALFORMED,
        )

    def _association_secret(self, kem_secret: bytes = b"") -> bytearray:
        assert self._tls is not None
        exported = self._tls.export(EXPORTER_LABEL, EXPORTER_SIZE)
        return bytearray(association_secret(exported, kem_secret))

    def _until(self, lifetime: int) -> float:
        """Return the end of an association made now: its lifetime's or the certificate's (Unix seconds)."""
        assert self._tls is not None
        ends = self._config.clock() + lifetime
        peer = self._tls.peer_certificate
        return ends if peer is None else min(ends, certificate.not_after(peer))

    # --- the end

    def _establish(self, event: Event, alpn: str | None) -> None:
        assert self._tls is not None
        self._go(event)
        if self._records:
            # What came with the last flight already is application data.
            self._feed_all()
        group = self._tls.group
        association = self._association if event is Event.PSK_ACCEPTED else None
        if association is None:
            self._info = QKDInfo(
                protection=Protection.PQ_ONLY if group in ML_KEM_GROUPS else Protection.CLASSICAL,
                group=group,
                cipher=self._tls.cipher_suite,
                alpn=alpn,
                kms_round_trips=self._kms_round_trips,
                fallback=self._fallback,
            )
            return
        assert self._psk is not None
        self._info = QKDInfo(
            protection=Protection.HYBRID,
            group=group,
            cipher=self._tls.cipher_suite,
            alpn=alpn,
            path=HandshakePath.BOOTSTRAP if self._bootstrapped else HandshakePath.ASSOCIATED,
            key_id=self._psk.key_id,
            kms=self._psk.kms or self._config.kms,
            kms_protocol=self._config.kms_protocol,
            client_sae_id=association.client_sae_id,
            server_sae_id=association.server_sae_id,
            association=association.id.hex(),
            kem=association.kem,
            announced=self._psk.announced,
            kms_round_trips=self._kms_round_trips,
        )
        self._forget_psk()

    def _no_qkd(self, why: str, *, hint: str, error: KMSError | None = None, code: str | None = None) -> None:
        """Go on without a QKD key: raise an error under `require`, keep a note under `prefer`."""
        if self._config.policy is Policy.REQUIRE:
            self._fail(
                QKDUnavailable(
                    why,
                    hint=hint,
                    peer=error.peer if error else self._peer_sae_id,
                    kms=error.kms if error else self._config.kms,
                    key_ids=error.key_ids if error else (),
                    code=code,
                )
            )
        self._fallback = why

    def _kms_failed(self, error: KMSError) -> None:
        self._no_qkd(
            f"no QKD key: {error.summary}",
            hint=error.hint or "check the KME and the link; policy 'prefer' would go on without a QKD key",
            error=error,
        )


def _what_is_wrong(fetch: FetchKeys | FetchKeysByID, keys: list[QKDKey]) -> str | None:
    key_ids = tuple([key.key_id for key in keys])
    wanted = fetch.number if isinstance(fetch, FetchKeys) else len(fetch.key_ids)
    if len(keys) != wanted:
        return f"gave {len(keys)} keys, {wanted} were asked for"
    for key in keys:
        if not _MIN_KEY_BITS <= key.size <= _MAX_KEY_BITS:
            return f"gave a key of {key.size} bits, not of {_MIN_KEY_BITS} to {_MAX_KEY_BITS}: {key.key_id}"
        if key.used:
            return f"gave a key that is used already: {key.key_id}"
    if isinstance(fetch, FetchKeys):
        if not control.are_names(key_ids):
            return f"gave keys by IDs that no peer can be told: {', '.join(map(repr, key_ids))}"
    elif key_ids != fetch.key_ids:
        return "gave other keys than those asked for"
    return None
