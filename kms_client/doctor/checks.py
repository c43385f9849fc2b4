"""The checks, in the order they are made: small functions that each examine one thing and report it.

Clauses are those of ETSI GS QKD 014 V1.1.1; "" if it says nothing.
"""

from __future__ import annotations

import datetime
import http.client
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cryptography import x509

from kms_client.doctor.answers import (
    Outcome,
    compare_keys,
    compare_status,
    describe,
    failed,
    is_usable,
    judge_container,
    judge_refusal,
    judge_status_members,
    judge_status_values,
    median,
    passed,
    skipped,
    warned,
)
from kms_client.doctor.side import Setting, Side
from kms_client.doctor.tls import accepts_old_tls, look
from kms_client.errors import KMSAuthenticationError, KMSTimeout, KMSUnavailable, shown
from kms_client.https import HTTPSClient

__all__ = ["CHECKS", "KEYS_NEEDED", "Check", "Need"]

Need = Literal["nothing", "tls", "answer", "status", "keys", "slave", "pair"]
"""The precondition of a check.

A TLS handshake; a status; a status whose numbers can be used; keys; keys and the slave's side; both KMEs, for
checks that are made once.
"""

KEYS_NEEDED = 8  # of each direction, for all checks of a KME that makes no mistake
_SOON = datetime.timedelta(days=30)
_STATUS_CALLS = 20
_SLOW = 0.25  # seconds; each first connection of qkd-tls waits for its KME
_MOST_KEYS = 1024  # that a KME without a limit may waste
_UNKNOWN_KEY = "one or more keys specified are not found on KME"

_Run = Callable[[Setting, Side], Iterator[Outcome]]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: for use by programs.
        title: for display.
        clause: of the standard.
        need: the precondition without which it is skipped.
        run: makes the findings; a `KMSError` that it raises is one too.
    """

    name: str
    title: str
    clause: str
    need: Need
    run: _Run


CHECKS: list[Check] = []


def _check(name: str, title: str, clause: str, need: Need) -> Callable[[_Run], _Run]:
    def register(run: _Run) -> _Run:
        CHECKS.append(Check(name, title, clause, need, run))
        return run

    return register


# --- reachability, TLS, identity


@_check("reach", "Reachable", "", "nothing")
def _reach(setting: Setting, side: Side) -> Iterator[Outcome]:
    where = f"{side.host} port {side.port}"
    try:
        facts = look(side.host, side.port, side.timeout)
    except OSError as error:
        yield failed(
            f"{where}: {error.strerror or error}", "Check the URL, that the KME runs, and what is between."
        )
        return
    if not facts.chain:
        yield failed(f"{where}: no TLS server answers", "Check the URL: another service listens there.")
        return
    side.facts = facts
    yield passed(f"{where}, address {facts.address}")


@_check("tls.version", "TLS version", "5.1", "tls")
def _version(setting: Setting, side: Side) -> Iterator[Outcome]:
    assert side.facts is not None
    group = side.facts.group or "not visible"
    yield passed(f"{side.facts.version}, {side.facts.cipher}, group {group}")


@_check("tls.old-versions", "Older TLS versions", "5.1", "tls")
def _old_versions(setting: Setting, side: Side) -> Iterator[Outcome]:
    accepted = accepts_old_tls(side.host, side.port, side.timeout)
    if accepted is None:
        yield skipped("the OpenSSL here cannot speak TLS 1.1")
    elif accepted:
        yield warned("TLS 1.1 or older is accepted", "Set the KME's lowest version to TLS 1.2, better 1.3.")
    else:
        yield passed("TLS 1.1 and older are refused")


@_check("tls.site", "Protected on the way to the KME", "", "tls")
def _site(setting: Setting, side: Side) -> Iterator[Outcome]:
    assert side.facts is not None
    address, group = side.facts.address, side.facts.group
    if setting.site.contains(address, side.facts.own_address):
        yield passed(f"{address} is inside the secure site")
    elif "MLKEM" in group.upper():
        yield passed(
            f"{address} is outside the secure site; the KME can protect keys on the way with {group}"
        )
    else:
        yield warned(
            f"{address} is outside the secure site, and the KME has no ML-KEM (group {group or 'not visible'}): "
            "who records the connection may read its keys one day",
            f"Use a KME inside. If {address} is inside, say so with --site, and to clients with SecureSite.",
        )


@_check("tls.certificate", "The KME's certificate", "5.1", "tls")
def _certificate(setting: Setting, side: Side) -> Iterator[Outcome]:
    assert side.facts is not None
    certificate = side.facts.chain[0]
    try:
        side.shake_hands()
    except ssl.SSLCertVerificationError as error:
        yield failed(
            f"refused: {shown(error.verify_message)}",
            "Check --ca, the URL, and that the certificate has the URL's host as a subject alternative name.",
        )
        return
    except OSError as error:
        # An alert is about this SAE's certificate: it comes after the KME's was verified.
        if "ALERT" not in str(getattr(error, "reason", "")):
            yield failed(f"the handshake failed: {error.strerror or error}", "Look into the KME's log.")
            return
    side.trusted = True
    issuer = shown(certificate.issuer.rfc4514_string())
    who = f"{shown(certificate.subject.rfc4514_string())}, issued by {issuer}"
    if names := _alternative_names(certificate):
        yield passed(f"{who}; names {', '.join(names)}")
    else:
        yield warned(
            f"{who}; no subject alternative name", "Have it reissued with one: most clients look at no other."
        )


@_check("tls.expiry", "The KME's certificate lasts", "5.1", "tls")
def _expiry(setting: Setting, side: Side) -> Iterator[Outcome]:
    assert side.facts is not None
    ends = [(shown(c.subject.rfc4514_string()), c.not_valid_after_utc) for c in side.facts.chain]
    yield _lasts(*min(ends, key=lambda end: end[1]))


@_check("sae.expiry", "This SAE's certificate lasts", "5.1", "nothing")
def _own_expiry(setting: Setting, side: Side) -> Iterator[Outcome]:
    certificate = side.credentials.certificate()
    yield _lasts(shown(certificate.subject.rfc4514_string()), certificate.not_valid_after_utc)


@_check("identity.accepted", "This SAE is let in", "5.1", "tls")
def _accepted(setting: Setting, side: Side) -> Iterator[Outcome]:
    if not side.trusted:
        yield skipped("the KME's certificate was not verified")
        return
    reply = side.ask("status")
    if reply.status != 200:
        yield failed(
            f"Get status: {describe(reply)}",
            f"Check that the KME knows {side.sae_id} by this certificate, and {side.peer_sae_id} as its peer.",
        )
    elif reply.document is None:
        yield failed(reply.problem, "Check that the URL is that of a KME.")
    else:
        side.status, side.usable = reply.document, is_usable(reply.document)
        yield passed(f"Get status as {side.sae_id}, for keys shared with {side.peer_sae_id}")


@_check("identity.no-certificate", "Strangers without a certificate", "5.1", "tls")
def _no_certificate(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _as_stranger(side, side.without_certificate(), "no certificate")


@_check("identity.foreign-certificate", "Strangers with a forged certificate", "5.1", "tls")
def _foreign_certificate(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _as_stranger(side, side.with_foreign_certificate(), "a certificate that no CA has signed")


def _as_stranger(side: Side, stranger: HTTPSClient, how: str) -> Iterator[Outcome]:
    if not side.trusted:
        yield skipped("the KME's certificate was not verified")
        return
    try:
        reply = side.ask("status", client=stranger)
    except KMSTimeout as error:
        yield warned(f"{how}: {error.message}", "The KME should refuse at once.")
    except (KMSAuthenticationError, KMSUnavailable):
        yield passed(f"{how}: refused in the TLS handshake")
    else:
        if reply.status == 200:
            yield failed(f"{how}: let in", "Whoever reaches the KME can take keys. Have mutual TLS enforced.")
        else:
            yield from judge_refusal(reply, how, status=401, message=False)
    finally:
        stranger.close()


# --- status


@_check("status.members", "Status: all members", "6.1", "answer")
def _members(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from judge_status_members(side.status or {})


@_check("status.values", "Status: values", "6.1", "answer")
def _values(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from judge_status_values(side.status or {}, side.sae_id, side.peer_sae_id)


@_check("status.content-type", "Status: content type", "5.1", "answer")
def _content_type(setting: Setting, side: Side) -> Iterator[Outcome]:
    try:
        found = side.content_type()
    except (OSError, http.client.HTTPException) as error:
        yield failed(f"no answer on a new connection: {type(error).__name__}", "Look into the KME's log.")
        return
    if found == "application/json":
        yield passed(found)
    else:
        yield warned(f"{shown(found) or 'none'}, not application/json", "Strict clients refuse the answer.")


@_check("status.pair", "Status: the KMEs belong together", "6.1", "pair")
def _pair(setting: Setting, side: Side) -> Iterator[Outcome]:
    other = setting.opposite(side)
    assert other is not None
    yield from compare_status(side.status or {}, other.status or {})


# --- Get key


@_check("get-key.post", "Get key by POST", "5.3", "keys")
def _post(setting: Setting, side: Side) -> Iterator[Outcome]:
    size = side.number("key_size")
    yield from _take(side, 1, size, method="POST", body={"number": 1, "size": size})


@_check("get-key.post-empty", "Get key by POST, nothing said", "6.2", "keys")
def _post_empty(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _take(side, 1, side.number("key_size"), method="POST", body={})


@_check("get-key.get", "Get key by GET", "5.3", "keys")
def _get(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _take(side, 1, side.number("key_size"))


@_check("get-key.get-query", "Get key by GET, number and size", "5.3", "keys")
def _get_query(setting: Setting, side: Side) -> Iterator[Outcome]:
    if side.number("max_key_per_request") < 2:
        yield skipped("the KME delivers one key a request")
        return
    size = side.number("key_size")
    yield from _take(side, 2, size, query=f"?number=2&size={size}")


@_check("get-key.size", "Get key of another size", "6.2", "keys")
def _other_size(setting: Setting, side: Side) -> Iterator[Outcome]:
    smallest, largest, usual = (side.number(n) for n in ("min_key_size", "max_key_size", "key_size"))
    sizes = [s for s in (128, 256, smallest) if s and s != usual and s % 8 == 0 and smallest <= s <= largest]
    if not sizes:
        yield skipped(f"the KME has keys of {usual} bits only")
        return
    yield from _take(side, 1, sizes[0], method="POST", body={"size": sizes[0]})


def _take(
    side: Side, number: int, size: int, *, method: str = "GET", query: str = "", body: object = None
) -> Iterator[Outcome]:
    reply = side.ask("enc_keys", method=method, query=query, body=body)
    side.pending += reply.keys
    yield from judge_container(reply, number, size)


# --- limits


@_check("limits.number", "More keys than max_key_per_request are refused", "6.1", "keys")
def _too_many(setting: Setting, side: Side) -> Iterator[Outcome]:
    most = side.number("max_key_per_request")
    if most >= _MOST_KEYS:
        yield skipped(f"a KME that does not refuse would use up {most + 1} keys")
        return
    yield from _refused(side, f"number {most + 1}", {"number": most + 1})


@_check("limits.zero", "No keys at all are refused", "6.2", "keys")
def _zero(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _refused(side, "number 0", {"number": 0})


@_check("limits.size-multiple", "A size that is no multiple of 8 is refused", "6.2", "keys")
def _multiple(setting: Setting, side: Side) -> Iterator[Outcome]:
    size = side.number("key_size") + 1
    yield from _refused(side, f"size {size}", {"size": size}, text="size shall be a multiple of 8")


@_check("limits.size-min", "A size below min_key_size is refused", "6.1", "keys")
def _too_small(setting: Setting, side: Side) -> Iterator[Outcome]:
    size = (side.number("min_key_size") - 1) // 8 * 8
    if size <= 0:
        yield skipped("no whole number of bytes is smaller than min_key_size")
        return
    yield from _refused(side, f"size {size}", {"size": size})


@_check("limits.size-max", "A size above max_key_size is refused", "6.1", "keys")
def _too_large(setting: Setting, side: Side) -> Iterator[Outcome]:
    size = (side.number("max_key_size") // 8 + 1) * 8
    yield from _refused(side, f"size {size}", {"size": size})


# --- the error contract


@_check("errors.unknown-sae", "An unknown SAE", "5.3", "keys")
def _unknown_sae(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _refused(side, "keys for an SAE that does not exist", {}, sae_id=f"nobody-{uuid.uuid4()}")


@_check("errors.malformed-json", "Malformed JSON", "5.3", "keys")
def _malformed(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _refused(side, "a body that is not JSON", None, raw=b'{"number": 1')


@_check("errors.wrong-type", "A number that is none", "6.2", "keys")
def _wrong_type(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _refused(side, 'number "one"', {"number": "one"})


@_check("errors.extension", "An unknown mandatory extension", "6.2", "keys")
def _extension(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _refused(
        side,
        "an extension that nobody has",
        {"extension_mandatory": [{"qkd_kme_doctor_unknown": "1"}]},
        text="not all extension_mandatory parameters are supported",
    )


def _refused(
    side: Side,
    asked: str,
    body: object,
    *,
    text: str = "",
    sae_id: str | None = None,
    raw: bytes | None = None,
) -> Iterator[Outcome]:
    reply = side.ask("enc_keys", method="POST", sae_id=sae_id, body=body, raw=raw)
    for key in reply.keys:
        key.wipe()
    yield from judge_refusal(reply, asked, text=text)


@_check("errors.unknown-key-post", "An unknown key ID by POST", "5.4", "status")
def _unknown_key_post(setting: Setting, side: Side) -> Iterator[Outcome]:
    reply = side.ask("dec_keys", method="POST", body=_ids(str(uuid.uuid4())))
    yield from judge_refusal(reply, "a key that does not exist", text=_UNKNOWN_KEY)


@_check("errors.unknown-key-get", "An unknown key ID by GET", "5.4", "status")
def _unknown_key_get(setting: Setting, side: Side) -> Iterator[Outcome]:
    reply = side.ask("dec_keys", query=f"?key_ID={uuid.uuid4()}")
    yield from judge_refusal(reply, "a key that does not exist", text=_UNKNOWN_KEY)


@_check("errors.method", "A wrong method", "5.2", "status")
def _wrong_method(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _client_error(side, "status", "PUT")


@_check("errors.path", "A wrong path", "5.1", "status")
def _wrong_path(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _client_error(side, "no_such_call", "GET")


def _client_error(side: Side, call: str, method: str) -> Iterator[Outcome]:
    # The standard has no status for these; HTTP has 405 and 404.
    reply = side.ask(call, method=method)
    asked = f"{method} .../{call}"
    if not 400 <= reply.status < 500:
        yield warned(f"{asked}: {describe(reply)}", "A status from 400 to 499 says that the client is wrong.")
    elif reply.message is None:
        yield warned(
            f"{asked}: {describe(reply)}, without a JSON message", "Clients show the message to people."
        )
    else:
        yield passed(f"{asked}: refused with {describe(reply)}")


# --- Get key with key IDs, at both sides


@_check("by-id.post", "The slave gets the key by POST", "5.4", "slave")
def _slave_post(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _fetch(setting, side, 1, "POST")


@_check("by-id.get", "The slave gets the key by GET", "5.4", "slave")
def _slave_get(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _fetch(setting, side, 1, "GET")


@_check("by-id.not-slave", "The key's master is not its slave", "5.4", "slave")
def _not_slave(setting: Setting, side: Side) -> Iterator[Outcome]:
    if not side.pending:
        yield skipped("no key was delivered to the master")
        return
    body = _ids(side.pending[0].key_id)
    reply = side.ask("dec_keys", method="POST", body=body)
    asked = "the master, for a key it got already"
    if reply.status == 401:
        yield from judge_refusal(reply, asked, status=401, message=False)
    else:
        yield from judge_refusal(reply, asked)


@_check("by-id.wrong-slave", "A wrong slave is refused", "5.4", "slave")
def _wrong_slave(setting: Setting, side: Side) -> Iterator[Outcome]:
    slave = setting.opposite(side)
    assert slave is not None
    if setting.other is None:
        yield skipped("needs a third SAE", "Give one of the peer's KME: --other-sae with its certificate.")
        return
    if slave.name != "B":
        yield skipped("the third SAE is one of side B's KME")
        return
    if not side.pending:
        yield skipped("no key was delivered to the master")
        return
    client = slave.as_other(setting.other)
    try:
        body = _ids(side.pending[0].key_id)
        reply = slave.ask("dec_keys", method="POST", sae_id=side.sae_id, body=body, client=client)
    finally:
        client.close()
    asked = f"{setting.other.sae_id}, for a key of {slave.sae_id}"
    yield from judge_refusal(reply, asked, status=401, message=False)


@_check("by-id.several", "The slave gets several keys", "6.4", "slave")
def _several(setting: Setting, side: Side) -> Iterator[Outcome]:
    yield from _fetch(setting, side, len(side.pending), "POST")


def _fetch(setting: Setting, side: Side, number: int, method: str) -> Iterator[Outcome]:
    slave = setting.opposite(side)
    assert slave is not None
    ours, side.pending = side.pending[:number], side.pending[number:]
    if not ours:
        yield skipped("no key was delivered to the master")
        return
    key_ids = [key.key_id for key in ours]
    query = f"?key_ID={key_ids[0]}" if method == "GET" else ""
    body = _ids(*key_ids) if method == "POST" else None
    yield from compare_keys(
        ours, slave.ask("dec_keys", method=method, sae_id=side.sae_id, query=query, body=body)
    )
    side.fetched += key_ids


@_check("by-id.deleted", "A delivered key is gone", "5.4", "slave")
def _deleted(setting: Setting, side: Side) -> Iterator[Outcome]:
    slave = setting.opposite(side)
    assert slave is not None
    if not side.fetched:
        yield skipped("no key was delivered to the slave")
        return
    reply = slave.ask("dec_keys", method="POST", sae_id=side.sae_id, body=_ids(side.fetched[0]))
    for key in reply.keys:
        key.wipe()
    yield from judge_refusal(reply, "a key that the slave has got already", text=_UNKNOWN_KEY)


# --- how it runs


@_check("latency", "Latency", "", "status")
def _latency(setting: Setting, side: Side) -> Iterator[Outcome]:
    seconds = [side.ask("status").seconds for _ in range(_STATUS_CALLS)]
    middle = median(seconds)
    seen = f"Get status {_STATUS_CALLS} times: median {1000 * middle:.1f} ms, longest {1000 * max(seconds):.1f} ms"
    if side.delivery_seconds:
        seen += f"; a request that delivers keys {1000 * median(side.delivery_seconds):.1f} ms"
    if middle > _SLOW:
        yield warned(seen, "Connections wait this long for a key. Look for load, or use a key pool.")
    else:
        yield passed(seen)


@_check("rate", "Key rate", "", "status")
def _rate(setting: Setting, side: Side) -> Iterator[Outcome]:
    begun, first = time.monotonic(), _stored(side)
    ends = begun + setting.seconds
    while (left := ends - time.monotonic()) > 0:
        setting.progress(f"{side.name}: key rate, {left:.0f} s left")
        time.sleep(min(left, 1))
    last, most = _stored(side), side.number("max_key_count")
    seconds = time.monotonic() - begun
    if first >= most and last >= most:
        yield passed(f"the store is full ({last} keys), so that the link's rate does not show")
    elif last > first:
        yield passed(f"{(last - first) / seconds:.1f} keys/s: {first} stored, {last} after {seconds:.1f} s")
    else:
        yield warned(
            f"no more keys after {seconds:.1f} s: {first} stored, then {last}",
            "Check that the QKD link is up, and that no other SAE takes keys; or watch it for longer with --seconds.",
        )


def _stored(side: Side) -> int:
    side.status = side.ask("status").document or side.status
    return side.number("stored_key_count")


def _ids(*key_ids: str) -> dict[str, object]:
    return {"key_IDs": [{"key_ID": key_id} for key_id in key_ids]}


def _lasts(name: str, end: datetime.datetime) -> Outcome:
    left = end - datetime.datetime.now(datetime.UTC)
    if left < datetime.timedelta(0):
        return failed(f"{name} has expired on {end:%Y-%m-%d}", "Have it renewed.")
    if left < _SOON:
        return warned(f"{name} expires on {end:%Y-%m-%d}, in {left.days} days", "Have it renewed in time.")
    return passed(f"{name} until {end:%Y-%m-%d}, {left.days} days")


def _alternative_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [shown(str(name.value)) for name in names]
