"""What an examination finds: verdicts, findings and the report they make; no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ExaminedSide", "Finding", "Report", "Verdict"]

_FORMAT = "qkd-kme-doctor/1"
_STANDARD = "ETSI GS QKD 014 V1.1.1"


class Verdict(StrEnum):
    """What a finding means for whoever runs the KME."""

    PASS = "PASS"  # noqa: S105 - not a password
    """As the standard says."""
    WARN = "WARN"
    """Works, but clients need to be tolerant, or it will stop to work."""
    FAIL = "FAIL"
    """Against the standard, or does not work."""
    SKIP = "SKIP"
    """Not examined; the text says why."""


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        check: name of the check, which does not change between versions: "status.members".
        side: "A", "B", or "A-B" for what concerns both KMEs.
        title: what was examined, for people.
        verdict: the result.
        text: what was seen. Never holds a key.
        clause: of ETSI GS QKD 014 V1.1.1; "" where the standard says nothing.
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
    """A KME that was examined, and as whom.

    Attributes:
        name: "A" or "B".
        url: of the KME.
        sae_id: the SAE that asked.
        peer_sae_id: the SAE it shares keys with.
        keys: how many keys the KME delivered to this SAE as master. They are used up.
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
        started: when, as ISO 8601 in UTC.
        seconds: how long it took.
        sides: the KMEs.
        findings: in the order of the checks.
    """

    started: str
    seconds: float
    sides: Sequence[ExaminedSide]
    findings: Sequence[Finding]

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many findings there are of each verdict, those with none included."""
        counted = Counter(finding.verdict for finding in self.findings)
        return {verdict: counted[verdict] for verdict in Verdict}

    @property
    def keys(self) -> int:
        """How many keys were used up."""
        return sum(side.keys for side in self.sides)

    def exit_code(self, *, strict: bool = False) -> int:
        """For scripts: 1 if something is FAIL; 3 if something is WARN and `strict` is set; otherwise 0."""
        if self.counts[Verdict.FAIL]:
            return 1
        return 3 if strict and self.counts[Verdict.WARN] else 0

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON. Members may be added; those that are there keep name and meaning within a format."""
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
