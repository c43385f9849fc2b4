"""The protection of a connection, as lines for people and as JSON."""

from __future__ import annotations

import dataclasses
import ssl
from dataclasses import dataclass
from typing import Any, Final, Self

from cryptography import x509

from qkd_tls.cli.failure import CommandError
from qkd_tls.cli.handshake import Handshake, TimelineEntry
from qkd_tls.cli.terminal import printable
from qkd_tls.info import HandshakePath, Protection, QKDInfo
from qkd_tls.openssl import ML_KEM_GROUPS
from qkd_tls.socket import QKDSocket

__all__ = ["ML_KEM_OF_ASSOCIATION", "Certificate", "ConnectionReport", "secrets_of"]

ML_KEM_OF_ASSOCIATION: Final = "ML-KEM (association)"
"""The name of the ML-KEM secret if the connection's own group has no ML-KEM."""

_NOT_TEXT: Final = ("announced", "kms_round_trips")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The names as in RFC 4514; `not_after` in ISO 8601, UTC. An audit log has the subject only."""

    subject: str
    issuer: str | None = None
    not_after: str | None = None

    @classmethod
    def from_der(cls, der: bytes) -> Self:
        """Read a certificate; if `cryptography`, stricter than OpenSSL, cannot, the subject says why."""
        try:
            certificate = x509.load_der_x509_certificate(der)
        except ValueError as error:
            return cls(printable(f"(cannot be read: {error})"))
        return cls(
            printable(certificate.subject.rfc4514_string()) or "(no subject)",
            printable(certificate.issuer.rfc4514_string()),
            certificate.not_valid_after_utc.isoformat(),
        )

    def __str__(self) -> str:
        more = [("issued by", self.issuer), ("expires", self.not_after)]
        return "; ".join([self.subject, *(f"{what} {value}" for what, value in more if value is not None)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionReport:
    """One side's view of a connection. Times in milliseconds."""

    qkd: QKDInfo
    role: str = "client"
    peer: str = "the peer"
    server_name: str | None = None
    policy: str | None = None
    certificate: Certificate | None = None
    """The peer's certificate, as verified."""
    own_certificate: bool = False
    milliseconds: float | None = None
    kme_milliseconds: float | None = None
    steps: tuple[TimelineEntry, ...] = ()

    @classmethod
    def of(cls, sock: QKDSocket, peer: str, handshake: Handshake, *, own_certificate: bool) -> Self:
        """Report on a connection whose handshake is complete."""
        assert sock.qkd is not None
        context = sock.context
        der = sock.getpeercert(binary_form=True)
        verified = isinstance(der, bytes) and context.verify_mode is not ssl.CERT_NONE
        return cls(
            qkd=sock.qkd,
            role="server" if sock.server_side else "client",
            peer=peer,
            server_name=sock.server_hostname,
            policy=str(context.policy),
            certificate=Certificate.from_der(der) if verified and isinstance(der, bytes) else None,
            own_certificate=own_certificate,
            milliseconds=handshake.milliseconds,
            kme_milliseconds=handshake.kme_milliseconds,
            steps=tuple(handshake.lines),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report's members in the JSON."""
        return {
            "role": self.role,
            "peer": self.peer,
            "server_name": self.server_name,
            "policy": self.policy,
            "qkd": self.qkd.as_dict(),
            "certificate": dataclasses.asdict(self.certificate) if self.certificate else None,
            "own_certificate": self.own_certificate,
            "milliseconds": _rounded(self.milliseconds),
            "kme_milliseconds": _rounded(self.kme_milliseconds),
            "steps": [line.as_dict() for line in self.steps],
        }

    @classmethod
    def from_dict(cls, record: Any) -> Self:
        """Read the JSON of `connect`, `serve`, `get` or `explain`, or a line of a tunnel's audit log.

        Raises CommandError if the JSON does not say what protected a connection.
        """
        if isinstance(record, dict) and isinstance(connections := record.get("connections"), list):
            record = connections[-1] if connections else None
        if not isinstance(record, dict):
            raise _no_record("it is not a JSON object")
        # The audit log has the members of `qkd` and of `certificate` beside the others.
        role = "server" if "server" in (record.get("role"), record.get("mode")) else "client"
        peer = record.get("peer") or record.get("from" if role == "server" else "to")
        certificate = record.get("certificate") or {"subject": record.get("peer_subject")}
        try:
            return cls(
                qkd=_info(record.get("qkd") or record),
                role=role,
                peer=_text(peer) or "the peer",
                server_name=_text(record.get("server_name")),
                policy=_text(record.get("policy")),
                certificate=_certificate(certificate),
                own_certificate=record.get("own_certificate") is True,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise _no_record(f"{type(error).__name__}: {error}") from None

    def lines(self) -> list[str]:
        """Return the summary."""
        qkd = self.qkd
        rows = [("protection", f"{qkd.protection}: {' + '.join(secrets_of(qkd))}")]
        if qkd.path is HandshakePath.BOOTSTRAP:
            rows.append(("connection", "bootstrap: certificates were checked on this connection"))
        elif qkd.path is HandshakePath.ASSOCIATED:
            rows.append(("connection", "associated: certificates were checked when the association was made"))
        if qkd.fallback is not None:
            rows.append(("no QKD key", printable(qkd.fallback)))
        rows.append(("TLS", f"TLSv1.3, {qkd.group}, {qkd.cipher}, ALPN {qkd.alpn or 'none'}"))
        if qkd.key_id is not None:
            known = " (announced: fetched with an earlier connection)" if qkd.announced else ""
            rows.append(("QKD key", printable(f"{qkd.key_id} of {qkd.kms}{known}")))
            rows.append(("SAEs", printable(f"client {qkd.client_sae_id}, server {qkd.server_sae_id}")))
        if qkd.association is not None:
            rows.append(("association", qkd.association))
        peer = "client" if self.role == "server" else "server"
        if self.certificate is not None or self.role == "server":
            rows.append((peer, str(self.certificate or "no certificate was asked for")))
        if self.milliseconds is not None:
            waited = f", {self.kme_milliseconds:.1f} ms of them for the KME" if self.kme_milliseconds else ""
            rows.append(("handshake", f"{self.milliseconds:.1f} ms{waited}"))
        return [f"{name:<13}{text}" for name, text in rows]


def secrets_of(qkd: QKDInfo) -> list[str]:
    """Return the names of the secrets that the connection's keys are made of."""
    secrets = [qkd.group]
    if qkd.group.startswith("X25519"):
        secrets = ["X25519"] + (["ML-KEM-768"] if qkd.group in ML_KEM_GROUPS else [])
    if qkd.kem is not None:
        secrets.append(f"{qkd.kem} (explicit)" if qkd.group in ML_KEM_GROUPS else qkd.kem)
    elif qkd.association is not None and qkd.group not in ML_KEM_GROUPS:
        # No association is made without ML-KEM, in its group or explicit.
        secrets.append(ML_KEM_OF_ASSOCIATION)
    return secrets + (["QKD key"] if qkd.key_id is not None else [])


def _info(record: Any) -> QKDInfo:
    if not isinstance(record, dict) or record.get("protection") is None:
        raise ValueError("no member 'protection'")
    known = {name: record[name] for name in QKDInfo.__slots__ if record.get(name) is not None}
    for name, value in known.items():
        if name not in _NOT_TEXT:
            if not isinstance(value, str):
                raise ValueError(f"member {name!r} is not text")
            known[name] = printable(value)
    known["protection"] = Protection(known["protection"])
    if "path" in known:
        known["path"] = HandshakePath(known["path"])
    if known["protection"] is Protection.HYBRID and not isinstance(known.get("key_id"), str):
        raise ValueError("a hybrid connection without a key_id")
    return QKDInfo(**{"group": "unknown group", "cipher": "unknown cipher"} | known)


def _certificate(record: Any) -> Certificate | None:
    subject = _text(record["subject"])
    return (
        None
        if subject is None
        else Certificate(subject, _text(record.get("issuer")), _text(record.get("not_after")))
    )


def _no_record(why: str) -> CommandError:
    return CommandError(
        f"this does not say what protected a connection ({why})",
        hint="give the output of `qkd-tls connect --json`, or one line of an audit log (tail -n 1 FILE)",
    )


def _text(value: Any) -> str | None:
    return printable(value) if isinstance(value, str) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
