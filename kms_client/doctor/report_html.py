"""A report as one HTML file: no script, nothing loaded from elsewhere, readable by screen readers and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from kms_client.doctor.findings import Finding, Report, Verdict

__all__ = ["html"]

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --line: #b8b8b8; --soft: #f2f2f2;
  --pass: #14602b; --warn: #7a4a00; --fail: #a11212; --skip: #555555; }
@media (prefers-color-scheme: dark) { :root { --text: #ececec; --back: #161616; --line: #5a5a5a; --soft: #242424;
  --pass: #7fd694; --warn: #f0bd6a; --fail: #ff9c94; --skip: #bdbdbd; } }
body { font: 1rem/1.45 system-ui, sans-serif; color: var(--text); background: var(--back);
  margin: 0 auto; max-width: 75rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.counts { display: flex; flex-wrap: wrap; gap: .75rem; list-style: none; padding: 0; }
.counts li { border: 1px solid var(--line); border-radius: .3rem; padding: .3rem .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
thead th { background: var(--soft); overflow-wrap: normal; }
tbody th { font-weight: 600; width: 22%; overflow-wrap: normal; }
a { color: inherit; }
.verdict { font-weight: 700; white-space: nowrap; overflow-wrap: normal; } .clause { white-space: nowrap; }
.PASS { color: var(--pass); } .WARN { color: var(--warn); } .FAIL { color: var(--fail); } .SKIP { color: var(--skip); }
.advice { margin: .25rem 0 0; } .advice b { font-weight: 600; }
@media print { body { max-width: none; padding: 0; } tr { break-inside: avoid; } }
"""
_MEANING = {
    Verdict.PASS: "as the standard says",
    Verdict.WARN: "works, with a reservation",
    Verdict.FAIL: "against the standard, or does not work",
    Verdict.SKIP: "not examined",
}


def html(report: Report) -> str:
    """Return the whole page."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield f"<title>KME examination: {_outcome(report)}</title>"
    yield f"<style>{_STYLE}</style></head><body><main>"
    yield "<h1>Examination of key management entities</h1>"
    yield (
        f'<p>By ETSI GS QKD 014 V1.1.1, <time datetime="{escape(report.started)}">{escape(report.started)}</time>, '
        f"in {report.seconds:.1f} seconds. {report.keys} keys were used up.</p>"
    )
    yield f"<p><strong>{_outcome(report)}</strong></p>"
    yield '<ul class="counts" aria-label="Findings by verdict">'
    for verdict, count in report.counts.items():
        yield f'<li><span class="verdict {verdict}">{count} {verdict}</span>: {_MEANING[verdict]}</li>'
    yield "</ul>"
    yield from _attention(report)
    yield from _sides(report)
    for name in dict.fromkeys(finding.side for finding in report.findings):
        title = f"Side {name}" if len(name) == 1 else "Both sides"
        yield f"<h2>{escape(title)}</h2>"
        yield from _findings([finding for finding in report.findings if finding.side == name], title)
    yield "</main></body></html>"


def _outcome(report: Report) -> str:
    if failures := report.counts[Verdict.FAIL]:
        return f"{failures} failed"
    if warnings := report.counts[Verdict.WARN]:
        return f"Nothing failed, {warnings} with a reservation"
    return "Nothing failed"


def _attention(report: Report) -> Iterator[str]:
    """Yield the section about findings that need attention, the worst first, with links to them."""
    urgent = [
        finding for v in (Verdict.FAIL, Verdict.WARN) for finding in report.findings if finding.verdict is v
    ]
    if not urgent:
        return
    yield "<h2>What needs attention</h2><ul>"
    for finding in urgent:
        yield (
            f'<li><span class="verdict {finding.verdict}">{finding.verdict}</span> '
            f'<a href="#{_anchor(finding)}">{escape(finding.side)}: {escape(finding.title)}</a></li>'
        )
    yield "</ul>"


def _anchor(finding: Finding) -> str:
    return escape(f"{finding.side}-{finding.check}")


def _sides(report: Report) -> Iterator[str]:
    yield "<h2>What was examined</h2>"
    yield '<div class="wide" role="region" aria-label="KMEs" tabindex="0"><table><caption>KMEs</caption>'
    yield "<thead><tr>"
    for heading in ("Side", "KME", "Asked as SAE", "Keys shared with SAE", "Keys used up"):
        yield f'<th scope="col">{heading}</th>'
    yield "</tr></thead><tbody>"
    for side in report.sides:
        cells = "".join(
            f"<td>{escape(str(v))}</td>" for v in (side.url, side.sae_id, side.peer_sae_id, side.keys)
        )
        yield f'<tr><th scope="row">{escape(side.name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _findings(findings: list[Finding], title: str) -> Iterator[str]:
    label = escape(title)
    yield f'<div class="wide" role="region" aria-label="Findings: {label}" tabindex="0"><table>'
    yield f"<caption>Findings: {label}. Clauses are those of the standard.</caption><thead><tr>"
    for heading in ("What", "Verdict", "Clause", "Seen"):
        yield f'<th scope="col">{heading}</th>'
    yield "</tr></thead><tbody>"
    for finding in findings:
        advice = (
            f'<p class="advice"><b>What to do:</b> {escape(finding.advice)}</p>' if finding.advice else ""
        )
        yield (f'<tr id="{_anchor(finding)}">' if _first(finding, findings) else "<tr>") + (
            f'<th scope="row">{escape(finding.title)}</th>'
            f'<td class="verdict {finding.verdict}">{finding.verdict}</td>'
            f'<td class="clause">{escape(finding.clause) or "none"}</td>'
            f"<td>{escape(finding.text)}{advice}</td></tr>"
        )
    yield "</tbody></table></div>"


def _first(finding: Finding, findings: list[Finding]) -> bool:
    """Return True for the first finding of a check: an ID may be there only once."""
    return next(other for other in findings if other.check == finding.check) is finding
