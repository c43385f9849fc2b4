"""The findings of an examination: verdicts, findings and the report they make; no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ExaminedSide", "Finding", "Report", "Verdict"]

_FORMAT = "qkd-kme-doctor/1"
_STANDARD = "ETSI GS QKD 014 V1.1.1"


class Verdict(StrEnum):
    """The meaning of a finding for the KME's operator."""

    PASS = "PASS"  # noqa: S105 - not a password
    """It agrees with the standard."""
    WARN = "WARN"
    """It works, but clients need to be tolerant, or it will stop working."""
    FAIL = "FAIL"
    """It breaks the standard, or does not work."""
    SKIP = "SKIP"
    """It was not examined; the text says why."""


@dataclass(frozen=True)
class Finding:
    """The result for one thing that was examined.

    Attributes:
        check: name of the check, which does not change between versions: "status.members".
        side: "A", "B", or "A-B" if it concerns both KMEs.
        title: the thing examined, for display.
        verdict: the result.
        text: the observation. Never holds a key.
        clause: of ETSI GS QKD 014 V1.1.1; "" if the standard says nothing.
        advice: what to do; "" for PASS.
    """

    check: str
    side: str
    title: str
    verdict: Verdict
    text: str
    clause: str
    advice: str


@dataclass(frozen=True)
class ExaminedSide:
    """A KME that was examined, and the SAE that asked.

    Attributes:
        name: "A" or "B".
        url: of the KME.
        sae_id: the SAE that asked.
        peer_sae_id: the SAE it shares keys with.
        keys: number of keys that the KME delivered to this SAE as master. They are used up.
    """

    name: str
    url: str
    sae_id: str
    peer_sae_id: str
    keys: int


@dataclass(frozen=True)
class Report:
    """All findings of one examination.

    Attributes:
        started: the time, as ISO 8601 in UTC.
        seconds: its duration.
        sides: the KMEs.
        findings: in the order of the checks.
    """

    started: str
    seconds: float
    sides: Sequence[ExaminedSide]
    findings: Sequence[Finding]

    @property
    def counts(self) -> dict[Verdict, int]:
        """The number of findings of each verdict, those with none included."""
        counted = Counter(finding.verdict for finding in self.findings)
        return {verdict: counted[verdict] for verdict in Verdict}

    @property
    def keys(self) -> int:
        """The number of keys used up."""
        return sum(side.keys for side in self.sides)

    def exit_code(self, *, strict: bool = False) -> int:
        """Return 1 if there is a FAIL, 3 if there is a WARN and `strict` is set, otherwise 0; for scripts."""
        if self.counts[Verdict.FAIL]:
            return 1
        return 3 if strict and self.counts[Verdict.WARN] else 0

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON. Within a format, members may be added; none is renamed or redefined."""
        return {
            "format": _FORMAT,
            "standard": _STANDARD,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "keys_used": self.keys,
            "summary": {str(verdict): count for verdict, count in self.counts.items()},
            "sides": [vars(side) for side in self.sides],
            "findings": [{**vars(finding), "verdict": str(finding.verdict)} for finding in self.findings],
        }
