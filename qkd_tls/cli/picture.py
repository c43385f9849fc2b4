"""A drawing of what protected a connection, as text and as SVG: pure functions of a report."""

from __future__ import annotations

import textwrap
from html import escape
from typing import Final

from qkd_tls.cli.report import ConnectionReport, secrets_of
from qkd_tls.info import HandshakePath, Protection

__all__ = ["attacker_needs", "draw", "draw_svg"]

_WIDTH: Final = 100
_BOX: Final = 30
# By the beginnings of names.
_NATURES: Final = {
    "X25519": "elliptic curve: not safe from quantum computers",
    "ML-KEM": "lattices: no quantum attack is known",
    "FrodoKEM": "lattices: no quantum attack is known",
    "HQC": "codes: no quantum attack is known",
    "Classic-McEliece": "codes: no quantum attack is known",
    "QKD key": "physics: from the KMEs, used once",
}


def draw(report: ConnectionReport) -> list[str]:
    """Draw lines of text with box-drawing characters, at most 100 characters wide."""
    return [*_parties(report), "", *_secrets(report), "", *_paragraphs(report)]


def _parties(report: ConnectionReport) -> list[str]:
    """Draw the two sides, their KMEs, and the links between them."""
    client, server = _names(report)
    gap = _WIDTH - 2 * _BOX
    lines = []
    if report.qkd.key_id is not None:
        kmes = [_kme(report, side) for side in ("client", "server")]
        lines += _beside(
            _box(kmes[0], below=True), _box(kmes[1], below=True), "QKD link".center(gap, "═"), gap
        )
        pipe = "│".center(_BOX)
        lines.append(pipe + "the same QKD key".center(gap) + pipe)
        lines.append(pipe + report.qkd.key_id[:gap].center(gap) + pipe)
        lines += _beside(
            _box(client, above=True), _box(server, above=True), " TLS 1.3 ".center(gap, "═"), gap
        )
    else:
        lines += _beside(_box(client), _box(server), " TLS 1.3 ".center(gap, "═"), gap)
    return [line.rstrip() for line in lines]


def _names(report: ConnectionReport) -> tuple[list[str], list[str]]:
    """Return the texts in the boxes of client and server."""
    qkd = report.qkd
    us, them = "this program", report.server_name or report.peer
    client = ["client", us if report.role == "client" else report.peer]
    server = ["server", us if report.role == "server" else them]
    if qkd.key_id is not None:
        client.append(f"SAE {qkd.client_sae_id}")
        server.append(f"SAE {qkd.server_sae_id}")
    return client, server


def _kme(report: ConnectionReport, side: str) -> list[str]:
    return [
        f"KME of the {side}",
        (report.qkd.kms or "unknown") if side == report.role else "its own, unknown here",
    ]


def _box(texts: list[str], *, above: bool = False, below: bool = False) -> list[str]:
    inside = _BOX - 2
    middle = (_BOX - 1) // 2 - 1
    top, bottom = list("─" * inside), list("─" * inside)
    if above:
        top[middle] = "┴"
    if below:
        bottom[middle] = "┬"
    body = [f"│{_shortened(text, inside).center(inside)}│" for text in texts]
    return [f"┌{''.join(top)}┐", *body, f"└{''.join(bottom)}┘"]


def _beside(left: list[str], right: list[str], line: str, gap: int) -> list[str]:
    middle = len(left) // 2
    return [
        a + (line if index == middle else " " * gap) + b
        for index, (a, b) in enumerate(zip(left, right, strict=True))
    ]


def _secrets(report: ConnectionReport) -> list[str]:
    """Draw the secrets, and what they are mixed into."""
    qkd = report.qkd
    names = secrets_of(qkd)
    rows = [(name, _nature(name)) for name in names]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    joints = ["┐", *["┤"] * (len(rows) - 2), "┘"] if len(rows) > 1 else ["─"]
    middle = len(rows) // 2
    joints[middle] = {"┘": "┴", "┤": "┼", "─": "─"}[joints[middle]] + f"─▶ {qkd.cipher}"
    lines = [
        f"{name:<{widths[0]}}  {nature:<{widths[1]}} ─{joint}"
        for (name, nature), joint in zip(rows, joints, strict=True)
    ]
    if qkd.key_id is None:
        lines.append("no QKD key")
    return lines


def _nature(name: str) -> str:
    return next((nature for start, nature in _NATURES.items() if name.startswith(start)), "key exchange")


def _paragraphs(report: ConnectionReport) -> list[str]:
    """Explain the connection in plain words."""
    lines: list[str] = []
    for title, texts in (
        ("Who authenticated whom", _authentication(report)),
        ("The QKD key", _key(report)),
        ("What an attacker would need", attacker_needs(report)),
    ):
        lines += [*([""] if lines else []), title]
        for text in texts:
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines


def _authentication(report: ConnectionReport) -> list[str]:
    certificate, qkd = report.certificate, report.qkd
    peer = "client" if report.role == "server" else "server"
    where = ", when the association was made" if qkd.path is HandshakePath.ASSOCIATED else ""
    if certificate is not None:
        texts = [f"This {report.role} checked the {peer}'s certificate{where}: {certificate}."]
    elif report.role == "client":
        texts = [f"The client checked the server's certificate{where}."]
    else:
        texts = ["The server asked the client for no certificate."]
    if report.role == "client":
        texts.append(
            "The client has a certificate to show, if the server asked for it."
            if report.own_certificate
            else "The client showed no certificate."
        )
    else:
        texts.append(f"The client checked this server's certificate{where}, if it does what TLS asks of it.")
    if qkd.key_id is not None:
        texts.append(
            f"Both proved that they hold the QKD key: the KMEs gave it to SAE {qkd.client_sae_id} and SAE "
            f"{qkd.server_sae_id} only."
        )
    return texts


def _key(report: ConnectionReport) -> list[str]:
    qkd = report.qkd
    if qkd.key_id is None:
        why = qkd.fallback or "the policy is 'off', or no KMS is configured"
        return [f"There is none: {why}."]
    texts = [
        f"Key ID {qkd.key_id}; this side got it from {qkd.kms or 'its KME'}, the other side from its own KME."
    ]
    if qkd.announced:
        texts.append(
            "It was announced: both sides fetched it with an earlier connection and kept it in memory."
        )
    if qkd.association is not None:
        texts.append(f"It was mixed with the secret of association {qkd.association}.")
    return texts


def attacker_needs(report: ConnectionReport) -> list[str]:
    """Return one sentence for each way to attack the connection."""
    qkd = report.qkd
    mathematics = [name.partition(" (")[0] for name in secrets_of(qkd) if name != "QKD key"]
    broken = " and ".join(mathematics)
    if qkd.protection is Protection.HYBRID:
        live = (
            "To get in between at the time: a forged certificate, or the private key of a real one, and the QKD key "
            "before the connection is made."
        )
        if qkd.path is HandshakePath.ASSOCIATED:
            live = (
                "To get in between at the time: to have been in between when the association was made, with a forged "
                "or stolen certificate and the QKD key used then, and to have this QKD key too."
            )
        return [
            f"To read a recording: break {broken}, and obtain QKD key {qkd.key_id} from a KME or from the QKD link.",
            live,
            "Who runs a KME knows the QKD key, which alone opens nothing.",
            "Who controls one of the two machines needs nothing of all this.",
        ]
    what = "enough" if len(mathematics) > 1 else "enough; a large quantum computer would do"
    return [
        f"To read a recording: break {broken}. That is {what}; no QKD key is in the way.",
        "To get in between at the time: a forged certificate, or the private key of a real one.",
        "Who controls one of the two machines needs nothing of all this.",
    ]


def draw_svg(report: ConnectionReport) -> str:
    """Draw the same as a self-contained SVG document, in a monospaced font."""
    lines = draw(report)
    height = 18 * len(lines) + 32
    rows = "\n".join(
        f'<text x="16" y="{32 + 18 * number}" xml:space="preserve">{escape(line)}</text>'
        for number, line in enumerate(lines)
        if line
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {int(8.5 * _WIDTH) + 32} {height}" role="img">\n'
        "<title>What protected a connection</title>\n"
        '<rect width="100%" height="100%" fill="white"/>\n'
        f'<g font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14" fill="#222">\n{rows}\n</g>\n'
        "</svg>\n"
    )


def _shortened(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"
