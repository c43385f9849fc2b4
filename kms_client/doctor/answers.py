"""The answers of a KME, read and judged by the standard; no I/O; no result holds a key except as `QKDKey`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kms_client.doctor.findings import Verdict
from kms_client.errors import shown
from kms_client.etsi014_messages import Malformed, error_text, parse_key_container, parse_status
from kms_client.https import Answer
from kms_client.keys import QKDKey, wipe_keys
from kms_client.manager import KMSStatus

__all__ = [
    "Outcome",
    "Reply",
    "compare_keys",
    "compare_status",
    "describe",
    "failed",
    "is_usable",
    "judge_container",
    "judge_deviations",
    "judge_refusal",
    "judge_status_members",
    "judge_status_values",
    "median",
    "passed",
    "read",
    "skipped",
    "warned",
]

_STRINGS = ("source_KME_ID", "target_KME_ID", "master_SAE_ID", "slave_SAE_ID")
_INTEGERS = (
    "key_size",
    "stored_key_count",
    "max_key_count",
    "max_key_per_request",
    "max_key_size",
    "min_key_size",
    "max_SAE_ID_count",
)
_VENDOR = "Report it to the KME's vendor."
_SIZE_OF_QKD_TLS = 256  # bits


class Outcome(NamedTuple):
    """A finding without its check and its side."""

    verdict: Verdict
    text: str
    advice: str = ""


def passed(text: str) -> Outcome:
    """Return a PASS: as the standard says."""
    return Outcome(Verdict.PASS, text)


def warned(text: str, advice: str) -> Outcome:
    """Return a WARN: works, with a reservation."""
    return Outcome(Verdict.WARN, text, advice)


def failed(text: str, advice: str = _VENDOR) -> Outcome:
    """Return a FAIL: against the standard, or does not work."""
    return Outcome(Verdict.FAIL, text, advice)


def skipped(text: str, advice: str = "") -> Outcome:
    """Return a SKIP: not examined."""
    return Outcome(Verdict.SKIP, text, advice)


@dataclass(frozen=True)
class Reply:
    """A KME's answer, read.

    Attributes:
        status: of HTTP.
        seconds: from the request to the whole answer.
        message: the `message` of an error body, without anything that might be a key; None if there is none.
        document: the members of a status.
        keys: of a key container.
        deviations: from the standard, that a tolerant client gets over.
        problem: the reason why an answer with status 200 cannot be used; "" otherwise.
    """

    status: int
    seconds: float
    message: str | None = None
    document: Mapping[str, Any] | None = None
    keys: list[QKDKey] = field(default_factory=list)
    deviations: frozenset[str] = frozenset()
    problem: str = ""


def read(call: str, answer: Answer, seconds: float, kms: str) -> Reply:
    """Read the answer to a call ("status", "enc_keys", "dec_keys"), and wipe its body."""
    deviations: set[str] = set()
    try:
        if answer.status != 200:
            text = error_text(answer.body, quirks=deviations)
            return Reply(answer.status, seconds, message=None if deviations else text)
        if call == "status":
            return Reply(200, seconds, document=_document(answer.body))
        keys = parse_key_container(answer.body, kms=kms, quirks=deviations)
        return Reply(200, seconds, keys=keys, deviations=frozenset(deviations))
    except Malformed as error:
        return Reply(answer.status, seconds, problem=str(error))
    finally:
        answer.body[:] = bytes(len(answer.body))


def _document(body: bytearray) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Malformed("the answer is not a JSON object")
    return document


# --- status


def judge_status_members(document: Mapping[str, Any]) -> Iterator[Outcome]:
    """Check that all members of the status are there, and of the right type (clause 6.1)."""
    wrong = []
    for name in (*_STRINGS, *_INTEGERS):
        value = document.get(name)
        if name not in document:
            wrong.append(f"{name} is missing")
        elif name in _STRINGS and not (isinstance(value, str) and value):
            wrong.append(f"{name} is not a string with something in it")
        elif name in _INTEGERS and not (
            isinstance(value, int) and not isinstance(value, bool) and value >= 0
        ):
            wrong.append(f"{name} is not a number from 0 up")
    if "status_extension" in document and not isinstance(document["status_extension"], dict):
        wrong.append("status_extension is not an object")
    if wrong:
        yield failed("; ".join(wrong))
    else:
        yield passed("all 11 members, of the right types")
    if extra := sorted(document.keys() - {*_STRINGS, *_INTEGERS, "status_extension"}):
        names = ", ".join(shown(name) for name in extra[:8])
        yield warned(
            f"members that the standard does not have: {names}",
            "Clients must ignore them. The standard's place for a vendor's data is status_extension.",
        )


def is_usable(document: Mapping[str, Any]) -> bool:
    """Return True if a client can use a status: its numbers are there."""
    try:
        _parsed(document)
    except Malformed:
        return False
    return True


def judge_status_values(document: Mapping[str, Any], sae_id: str, peer_sae_id: str) -> Iterator[Outcome]:
    """Check that a status is about these two SAEs, and that its numbers go together (clause 6.1)."""
    try:
        status = _parsed(document)
    except Malformed as error:
        yield failed(f"no client can use it: {error}")
        return
    for name, found, expected in (
        ("master_SAE_ID", status.master_sae_id, sae_id),
        ("slave_SAE_ID", status.slave_sae_id, peer_sae_id),
    ):
        if found and found != expected:
            yield failed(
                f"{name} is {shown(found)}, not {shown(expected)}",
                "Check which SAE the certificate is registered for, and the SAE IDs that were given.",
            )
    odd = list(_odd_values(status))
    if odd:
        yield warned("; ".join(odd), "Have the KME's configuration checked. " + _VENDOR)
    else:
        yield passed(
            f"{shown(status.source_kme_id)} to {shown(status.target_kme_id)}; {status.stored_key_count} of at most "
            f"{status.max_key_count} keys stored; {status.key_size} bits, from {status.min_key_size} to "
            f"{status.max_key_size}; at most {status.max_key_per_request} a request"
        )
    if not status.min_key_size <= _SIZE_OF_QKD_TLS <= status.max_key_size:
        yield warned(
            f"keys of {_SIZE_OF_QKD_TLS} bits are not possible, which is what qkd-tls asks for by default",
            "Have the range widened, or give the client another size.",
        )


def _parsed(document: Mapping[str, Any]) -> KMSStatus:
    return parse_status(json.dumps(document).encode(), quirks=set())


def _odd_values(status: KMSStatus) -> Iterator[str]:
    if not status.min_key_size <= status.key_size <= status.max_key_size:
        yield f"key_size {status.key_size} is not from {status.min_key_size} to {status.max_key_size}"
    if not status.key_size or status.key_size % 8:
        yield f"key_size {status.key_size} is not a number of whole bytes"
    if status.stored_key_count > status.max_key_count:
        yield f"stored_key_count {status.stored_key_count} is above max_key_count {status.max_key_count}"
    if not status.max_key_per_request:
        yield "max_key_per_request is 0"
    if status.source_kme_id and status.source_kme_id == status.target_kme_id:
        yield "source_KME_ID and target_KME_ID are the same"


def compare_status(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Outcome]:
    """Check that the KMEs of a pair report that they belong together (clause 6.1)."""
    apart = [
        f"{name} is {shown(str(ours.get(name)))} at A, {twin} is {shown(str(theirs.get(twin)))} at B"
        for name, twin in (
            ("source_KME_ID", "target_KME_ID"),
            ("target_KME_ID", "source_KME_ID"),
            ("key_size", "key_size"),
        )
        if ours.get(name) != theirs.get(twin)
    ]
    if apart:
        yield failed("; ".join(apart), "Check that both URLs are of KMEs of one QKD link.")
    else:
        yield passed("each names the other, and both have the same key size")


# --- keys


def judge_deviations(deviations: frozenset[str]) -> Iterator[Outcome]:
    """Report the parts of a key container that the standard does not have (clause 6.3)."""
    if deviations:
        yield warned(
            f"the key container deviates: {', '.join(sorted(deviations))}",
            "The client of this package gets over it; others may not. " + _VENDOR,
        )


def judge_container(reply: Reply, number: int, size: int) -> Iterator[Outcome]:
    """Check that `number` keys of `size` bits were delivered (clause 6.3)."""
    if reply.status != 200:
        yield failed(f"no key: {describe(reply)}", "Find out why in the KME's log.")
        return
    if reply.problem:
        yield failed(f"no client can use the answer: {reply.problem}")
        return
    wrong = sorted({key.size for key in reply.keys} - {size})
    if len(reply.keys) != number:
        yield failed(f"asked for {_keys(number)}, got {len(reply.keys)}")
    elif wrong:
        yield failed(f"asked for {size} bits, got {wrong[0]}")
    else:
        yield passed(f"{_keys(number)} of {size} bits")
    yield from judge_deviations(reply.deviations)


def compare_keys(ours: Sequence[QKDKey], reply: Reply) -> Iterator[Outcome]:
    """Check that the slave got the keys that the master has; wipe those of both (clauses 5.4 and 6.3)."""
    try:
        if reply.status != 200:
            yield failed(
                f"the slave did not get the key: {describe(reply)}", "Find out why in both KMEs' logs."
            )
            return
        if reply.problem:
            yield failed(f"no client can use the answer: {reply.problem}")
            return
        theirs = {key.key_id.lower(): key for key in reply.keys}
        if theirs.keys() != {key.key_id.lower() for key in ours}:
            yield failed("the slave got keys with other IDs than it asked for")
            return
        different = 0
        for key in ours:
            with key.use() as secret, theirs[key.key_id.lower()].use() as twin:
                different += secret != twin
        if different:
            yield failed(
                f"{different} of {_keys(len(ours))} with different bits at the two KMEs",
                "Do not use this link. Check that the KMEs belong together and are in step; look for somebody between.",
            )
        else:
            yield passed(f"{_keys(len(ours))}, the same ID and the same bits at both KMEs")
        if {key.key_id for key in reply.keys} != {key.key_id for key in ours}:
            yield warned(
                "the letter case of a key ID changed", "Clients must compare IDs without it. " + _VENDOR
            )
        yield from judge_deviations(reply.deviations)
    finally:
        wipe_keys([*ours, *reply.keys])


# --- refusals


def judge_refusal(
    reply: Reply, asked: str, *, status: int = 400, text: str = "", message: bool = True
) -> Iterator[Outcome]:
    """Check that a request that must be refused was refused as the standard says (clauses 5 and 6.5).

    Args:
        reply: the answer.
        asked: the request, for display.
        status: that the standard has for it.
        text: that the standard has for it; "" for any.
        message: True if there must be one.
    """
    if reply.status == 200:
        delivered = f", {_keys(len(reply.keys))} delivered" if reply.keys else ""
        yield failed(f"{asked}: accepted{delivered}")
    elif reply.status != status:
        yield warned(
            f"{asked}: refused with {describe(reply)}; the standard has {status}",
            "Clients may take it for something else. " + _VENDOR,
        )
    elif message and reply.message is None:
        yield warned(f"{asked}: refused with {status}, without a JSON message", _VENDOR)
    elif text and (reply.message or "").rstrip(".").lower() != text.lower():
        yield warned(
            f'{asked}: refused with {describe(reply)}; the standard\'s text is "{text}"',
            "Clients that look at the text need to know this one. " + _VENDOR,
        )
    else:
        yield passed(f"{asked}: refused with {describe(reply)}")


def describe(reply: Reply) -> str:
    """Return status and message, for display."""
    return f'status {reply.status}, "{reply.message}"' if reply.message else f"status {reply.status}"


def median(values: Sequence[float]) -> float:
    """Return the middle one of the values, the upper of two."""
    return sorted(values)[len(values) // 2]


def _keys(number: int) -> str:
    return "1 key" if number == 1 else f"{number} keys"
