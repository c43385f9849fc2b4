"""The examination: all checks, and the report of their findings."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator

from kms_client.doctor.answers import Outcome, failed, skipped
from kms_client.doctor.checks import CHECKS, KEYS_NEEDED, Check
from kms_client.doctor.findings import ExaminedSide, Finding, Report
from kms_client.doctor.side import Setting, Side
from kms_client.errors import KMSError

__all__ = ["examine"]


def examine(setting: Setting) -> Report:
    """Make all checks at all sides; the keys taken are wiped even if a check raises.

    Raises:
        ValueError: this SAE's certificate cannot be read.
    """
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    findings: list[Finding] = []
    try:
        for number, check in enumerate(CHECKS, 1):
            for side in setting.sides:
                if check.need == "pair" and (side is not setting.sides[0] or len(setting.sides) == 1):
                    continue
                setting.progress(f"{number}/{len(CHECKS)} {side.name}: {check.title}")
                findings += _made(check, setting, side)
    finally:
        for side in setting.sides:
            side.close()
    return Report(
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - begun,
        sides=[
            ExaminedSide(side.name, side.url, side.sae_id, side.peer_sae_id, side.keys)
            for side in setting.sides
        ],
        findings=findings,
    )


def _made(check: Check, setting: Setting, side: Side) -> Iterator[Finding]:
    where = "A-B" if check.need == "pair" else side.name
    for outcome in _outcomes(check, setting, side):
        yield Finding(
            check.name, where, check.title, outcome.verdict, outcome.text, check.clause, outcome.advice
        )


def _outcomes(check: Check, setting: Setting, side: Side) -> list[Outcome]:
    if lacking := _lacking(check, setting, side):
        return [lacking]
    try:
        return list(check.run(setting, side))
    except KMSError as error:
        return [failed(error.summary, error.hint)]


def _lacking(check: Check, setting: Setting, side: Side) -> Outcome | None:
    """Return the reason why a check is skipped, or None."""
    if check.need == "nothing":
        return None
    if side.facts is None:
        return skipped("the KME cannot be reached")
    if check.need == "tls":
        return None
    if side.status is None:
        return skipped("the KME gives no status")
    if check.need == "answer":
        return None
    if not side.usable:
        return skipped("the KME's status cannot be used")
    if check.need in ("slave", "pair"):
        other = setting.opposite(side)
        if other is None:
            return skipped("needs the other side too", "Give --peer-url and the peer's certificate.")
        if not other.usable:
            return skipped(f"the KME of side {other.name} gives no usable status")
    if check.need in ("keys", "slave") and not setting.take_keys:
        return skipped("takes keys, which --no-keys forbids")
    if check.need == "keys" and not side.keys and (stored := side.number("stored_key_count")) < KEYS_NEEDED:
        return skipped(f"{stored} keys are stored, {KEYS_NEEDED} needed", "Wait for the link to make more.")
    return None
