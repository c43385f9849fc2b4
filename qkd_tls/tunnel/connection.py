"""One connection through a tunnel: from accepting it to its audit line."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import itertools
import logging
import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from qkd_tls import aio
from qkd_tls.context import QKDContext
from qkd_tls.errors import QKDError, QKDKeyMismatch, QKDProtocolError, QKDUnavailable
from qkd_tls.info import HandshakePath
from qkd_tls.socket import QKDSocket
from qkd_tls.tunnel import proxy_protocol
from qkd_tls.tunnel.address import shown
from qkd_tls.tunnel.audit import AuditLog
from qkd_tls.tunnel.dial import connect, set_options
from qkd_tls.tunnel.metrics import Metrics
from qkd_tls.tunnel.proxy_protocol import ProxyTLV, encode_tlv
from qkd_tls.tunnel.relay import End, Relay, reset
from qkd_tls.tunnel.settings import TunnelLimits, TunnelSettings

__all__ = ["Connection", "Reporting"]

_log: Final = logging.getLogger("qkd_tls.tunnel")
_numbers: Final = itertools.count(1)

_OUTCOMES: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (QKDUnavailable, "qkd_unavailable"),
    (QKDKeyMismatch, "key_mismatch"),
    (QKDProtocolError, "protocol"),
    (ssl.SSLCertVerificationError, "certificate"),
    (ssl.SSLError, "tls"),
    (TimeoutError, "timeout"),
    (OSError, "connection"),
)

_AUDITED: Final = (
    "protection",
    "path",
    "group",
    "cipher",
    "alpn",
    "client_sae_id",
    "server_sae_id",
    "key_id",
    "announced",
    "kms",
    "kem",
    "association",
    "fallback",
)
"""The fields of `QKDInfo` in the audit line."""


@dataclass
class Reporting:
    """The metrics and the audit log of connections. The audit log is replaced at a reload."""

    metrics: Metrics
    audit: AuditLog


class Connection:
    """One connection; it keeps its initial settings."""

    def __init__(
        self,
        settings: TunnelSettings,
        context: QKDContext,
        accepted: socket.socket,
        address: Any,
        reporting: Reporting,
    ) -> None:
        self._settings, self._context, self._accepted = settings, context, accepted
        self._reporting = reporting
        self._loop = asyncio.get_running_loop()
        self._peer = shown(accepted, address)
        # Unique among the processes of this machine, and over restarts.
        self._id = (
            f"{os.getpid():x}-{int(datetime.datetime.now(datetime.UTC).timestamp()):x}-{next(_numbers):x}"
        )
        self._start = self._loop.time()
        self._hybrid: QKDSocket | None = None
        self._plain: socket.socket | None = None
        self._relay: Relay | None = None
        self._handshake_seconds: float | None = None
        self._refused = False
        self._certificate: x509.Certificate | None = None
        self._fingerprint: bytes | None = None
        self._reason: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve the connection until it ends; never raise."""
        self._task = asyncio.current_task()
        try:
            end = await self._serve()
        except asyncio.CancelledError:
            end = End(self._reason or "shutdown")
        except Exception as error:  # noqa: BLE001
            # A fault of this program's must not end the others' connections.
            _log.exception("%s: connection %s from %s failed", self._settings.name, self._id, self._peer)
            end = End("internal error", error=type(error).__name__)
        finally:
            for sock in (self._hybrid, self._plain, self._accepted):
                if sock is not None:
                    reset(sock)
        self._report(end)

    def abort(self, reason: str) -> None:
        """Reset both sides now."""
        self._reason = reason
        if self._relay is not None:
            self._relay.abort(reason)
        elif self._task is not None:
            self._task.cancel()

    # --- setting up

    async def _serve(self) -> End:
        settings = self._settings
        try:
            if settings.accepts_hybrid:
                set_options(self._accepted)
                await self._shake_hands(self._accepted)
                self._plain = await connect(settings.connect, settings.limits.connect_timeout)
            else:
                set_options(self._accepted)
                self._plain = self._accepted
                await self._shake_hands(await connect(settings.connect, settings.limits.connect_timeout))
        except OSError as error:
            what = "handshake failed" if self._refused else "connect failed"
            text = _text(error)
            _log.log(
                logging.WARNING if isinstance(error, QKDError) or what == "connect failed" else logging.INFO,
                "%s: %s, %s: %s",
                settings.name,
                self._peer,
                what,
                text,
            )
            return End(what, error=text)
        return await self._pass_on()

    async def _shake_hands(self, sock: socket.socket) -> None:
        settings, metrics = self._settings, self._reporting.metrics
        start = self._loop.time()
        try:
            hybrid = await aio.wrap_socket(
                sock,
                self._context,
                server_side=settings.accepts_hybrid,
                server_hostname=settings.server_name,
                handshake_timeout=settings.limits.handshake_timeout,
            )
        except OSError as error:
            self._refused = True
            outcome = next(name for kind, name in _OUTCOMES if isinstance(error, kind))
            metrics.handshakes.labels(settings.name, outcome, "none", "none").inc()
            raise
        # An end without close_notify is no end.
        hybrid.suppress_ragged_eofs = False
        self._hybrid = hybrid
        self._handshake_seconds = self._loop.time() - start
        metrics.handshake_seconds.labels(settings.name).observe(self._handshake_seconds)
        info = hybrid.qkd
        assert info is not None
        metrics.handshakes.labels(settings.name, "ok", str(info.protection), str(info.path or "none")).inc()
        if info.fallback is not None:
            _log.warning("%s: %s, no QKD key: %s", settings.name, self._peer, info.fallback)
        certificate = hybrid.getpeercert(True)
        if isinstance(certificate, bytes):
            self._certificate = x509.load_der_x509_certificate(certificate)
            self._fingerprint = hashlib.sha256(certificate).digest()

    # --- passing on

    async def _pass_on(self) -> End:
        assert self._plain is not None
        assert self._hybrid is not None
        bytes_passed = self._reporting.metrics.bytes
        self._relay = Relay(
            self._plain,
            self._hybrid,
            to_hybrid=bytes_passed.labels(self._settings.name, "to_hybrid").inc,
            to_plain=bytes_passed.labels(self._settings.name, "to_plain").inc,
            preface=self._proxy_header() if self._settings.proxy_protocol else b"",
        )
        watch = _Watch(self._relay, self._settings.limits)
        watch.check()
        self._relay.start()
        try:
            return await self._relay.ended
        except asyncio.CancelledError:
            self._relay.abort(self._reason or "shutdown")
            raise
        finally:
            watch.stop()

    def _proxy_header(self) -> bytes:
        hybrid = self._hybrid
        assert hybrid is not None
        info = hybrid.qkd
        assert info is not None
        tlvs = [
            proxy_protocol.ssl_tlv(
                version="TLSv1.3",
                cipher=info.cipher,
                common_name=self._common_name,
                with_certificate=self._certificate is not None,
                now=info.path is not HandshakePath.ASSOCIATED,
            ),
            encode_tlv(ProxyTLV.UNIQUE_ID, self._id.encode()),
            encode_tlv(ProxyTLV.PROTECTION, str(info.protection).encode()),
        ]
        for kind, text in (
            (ProxyTLV.ALPN, info.alpn),
            (ProxyTLV.KEY_ID, info.key_id),
            (ProxyTLV.CLIENT_SAE_ID, info.client_sae_id),
            (ProxyTLV.SERVER_SAE_ID, info.server_sae_id),
        ):
            if text is not None:
                tlvs.append(encode_tlv(kind, text.encode()))
        if self._fingerprint is not None:
            tlvs.append(encode_tlv(ProxyTLV.CERTIFICATE_SHA256, self._fingerprint))
        return proxy_protocol.encode_header(
            _endpoint(hybrid.getpeername()), _endpoint(hybrid.getsockname()), tlvs
        )

    # --- who the peer is

    @property
    def _common_name(self) -> str | None:
        if self._certificate is None:
            return None
        names = self._certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(names[0].value) if names else None

    # --- reporting

    def _report(self, end: End) -> None:
        settings, metrics = self._settings, self._reporting.metrics
        duration = self._loop.time() - self._start
        metrics.connections.labels(settings.name, end.reason.replace(" ", "_")).inc()
        metrics.connection_seconds.labels(settings.name).observe(duration)
        info = self._hybrid.qkd if self._hybrid is not None else None
        qkd = info.as_dict() if info is not None else {}
        record = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "tunnel": settings.name,
            "mode": settings.mode,
            "id": self._id,
            "from": self._peer,
            "to": str(settings.connect),
            **{name: qkd.get(name) for name in _AUDITED},
            "peer_subject": self._certificate.subject.rfc4514_string() if self._certificate else None,
            "peer_certificate_sha256": self._fingerprint.hex() if self._fingerprint else None,
            "bytes_to_hybrid": self._relay.to_hybrid if self._relay else 0,
            "bytes_to_plain": self._relay.to_plain if self._relay else 0,
            "handshake_seconds": _rounded(self._handshake_seconds),
            "seconds": _rounded(duration),
            "ended": end.reason,
            "clean": end.clean,
            "error": end.error,
        }
        try:
            self._reporting.audit.write(record)
        except OSError as error:
            _log.error("the audit log cannot be written: %s", error.strerror)


class _Watch:
    """The time limits of one connection. Timers are set for the next possible limit, not for each byte."""

    def __init__(self, relay: Relay, limits: TunnelLimits) -> None:
        self._relay, self._limits = relay, limits
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()
        self._deadline: float | None = None
        """The time by which a gentle end must be done."""
        self._reason = ""
        self._timer: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Act on the limits that are due, and set the timer for the next."""
        due = self._act(self._loop.time())
        if due is not None and not self._relay.ended.done():
            self._timer = self._loop.call_at(due, self.check)

    def stop(self) -> None:
        """Stop: the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _act(self, now: float) -> float | None:
        limits, relay = self._limits, self._relay
        if self._deadline is not None:
            if now >= self._deadline:
                relay.abort(self._reason)
            return self._deadline
        due = []
        if limits.idle_timeout is not None:
            idle_at = relay.last_byte + limits.idle_timeout
            if now >= idle_at:
                return self._end_gently("idle", now)
            due.append(idle_at)
        if limits.max_age is not None:
            old_at = self._start + limits.max_age
            if now < old_at:
                due.append(old_at)
            else:
                quiet_at = relay.last_byte + limits.quiet
                if now >= quiet_at and not relay.busy:
                    return self._end_gently("max_age", now)
                if now >= old_at + limits.max_age_grace:
                    relay.abort("max_age")
                due += [max(quiet_at, now + limits.quiet / 2), old_at + limits.max_age_grace]
        return min(due, default=None)

    def _end_gently(self, reason: str, now: float) -> float:
        self._reason = reason
        self._deadline = now + self._limits.max_age_grace
        if self._relay.busy:
            # There is no gentle end while bytes are stuck.
            self._relay.abort(reason)
        else:
            self._relay.retire(reason)
        return self._deadline


def _endpoint(address: Any) -> tuple[str, int] | str:
    return (address[0], address[1]) if isinstance(address, tuple) else str(address)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _text(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error.args[-1])
    return error.strerror or str(error)
