"""A report for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from kms_client.doctor.findings import Finding, Report, Verdict

__all__ = ["text"]

_WIDTH = 110


def text(report: Report) -> str:
    """Return the report in lines, side by side; checks that were skipped for one reason share a line."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"qkd-kme doctor, {report.started}, ETSI GS QKD 014 V1.1.1"
    for side in report.sides:
        yield f"  {side.name}  {side.url}  as {side.sae_id}, keys shared with {side.peer_sae_id}"
    for name in dict.fromkeys(finding.side for finding in report.findings):
        yield ""
        yield f"Side {name}" if len(name) == 1 else "Both sides"
        of_side = [finding for finding in report.findings if finding.side == name]
        for skip, group in groupby(of_side, key=_reason_to_skip):
            findings = list(group)
            if skip and len(findings) > 1:
                yield from _line(Verdict.SKIP, "", f"{len(findings)} checks", findings[0].text)
                yield from _advice(findings[:1])
            else:
                for finding in findings:
                    yield from _line(finding.verdict, finding.clause, finding.title, finding.text)
                    yield from _advice([finding])
    yield ""
    yield ", ".join(f"{count} {verdict}" for verdict, count in report.counts.items())
    yield f"{report.keys} keys were used up. {report.seconds:.1f} s."


def _reason_to_skip(finding: Finding) -> str:
    return finding.text if finding.verdict is Verdict.SKIP else ""


def _line(verdict: Verdict, clause: str, title: str, seen: str) -> Iterator[str]:
    head = f"  {verdict}  {clause or '-':<4} {title}: "
    yield from textwrap.wrap(head + seen, _WIDTH, subsequent_indent=" " * 13, break_long_words=False)


def _advice(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        if finding.advice:
            yield from textwrap.wrap(
                finding.advice,
                _WIDTH,
                initial_indent=" " * 13 + "-> ",
                subsequent_indent=" " * 16,
                break_long_words=False,
            )
