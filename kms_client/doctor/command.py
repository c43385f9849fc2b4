"""`qkd-kme doctor`: options, progress, output, exit code."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from kms_client.doctor.examination import examine
from kms_client.doctor.report_html import html
from kms_client.doctor.report_text import text
from kms_client.doctor.side import SAECredentials, Setting, Side
from kms_client.errors import KMSAuthenticationError
from kms_client.secure_site import SecureSite

__all__ = ["add_parser"]

_EPILOG = """\
Exit code: 0 nothing failed; 1 something is FAIL; 2 the options or certificates cannot be used; 3 with --strict, if
something is WARN. The examination takes about 8 keys of each side that is examined and throws them away. No key is ever
shown or written. With one side only, the keys taken stay at the other KME until it drops them.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the subcommands of `qkd-kme`."""
    parser = commands.add_parser(
        "doctor",
        help="examine a KME, or a pair, by ETSI GS QKD 014",
        description="Examine a KME, or both KMEs of a link, by ETSI GS QKD 014 V1.1.1.",
        epilog=_EPILOG,
    )
    parser.add_argument("url", metavar="URL", help="of the KME: https://host[:port][/prefix]")
    parser.add_argument("--sae", required=True, metavar="ID", help="SAE ID to ask as")
    parser.add_argument("--peer-sae", required=True, metavar="ID", help="SAE ID that keys are shared with")
    _add_credentials(parser, "", "this SAE's")
    parser.add_argument("--ca", type=Path, required=True, metavar="FILE", help="CA of the KME, PEM")
    peer = parser.add_argument_group("the other side, for what takes both")
    peer.add_argument("--peer-url", metavar="URL", help="of the peer's KME")
    _add_credentials(peer, "peer-", "the peer SAE's")
    peer.add_argument("--peer-ca", type=Path, metavar="FILE", help="CA of the peer's KME (default: --ca)")
    other = parser.add_argument_group("a third SAE at the peer's KME, which must not get the peer's keys")
    other.add_argument("--other-sae", metavar="ID", help="its SAE ID")
    _add_credentials(other, "other-", "its")
    how = parser.add_argument_group("how")
    how.add_argument("--no-keys", action="store_true", help="take no keys: less is examined")
    how.add_argument(
        "--site",
        action="append",
        default=[],
        metavar="NETWORK",
        help="inside the secure site; may be repeated",
    )
    how.add_argument("--timeout", type=_seconds, default=5.0, metavar="S", help="for an answer (default 5)")
    how.add_argument(
        "--seconds", type=_seconds, default=3.0, metavar="S", help="to watch the key rate (default 3)"
    )
    how.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report as JSON; - instead of the text"
    )
    how.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as HTML; - instead of the text"
    )
    how.add_argument("--strict", action="store_true", help="exit code 3 if something is WARN")
    how.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.set_defaults(run=_run)


def _add_credentials(parser: argparse._ActionsContainer, prefix: str, whose: str) -> None:
    parser.add_argument(f"--{prefix}cert", type=Path, metavar="FILE", help=f"{whose} certificate chain, PEM")
    parser.add_argument(f"--{prefix}key", type=Path, metavar="FILE", help=f"{whose} private key, PEM")
    parser.add_argument(f"--{prefix}pkcs12", type=Path, metavar="FILE", help="both, instead, in PKCS#12")
    parser.add_argument(
        f"--{prefix}key-password",
        type=Path,
        metavar="FILE",
        help="file with the password of the key or PKCS#12",
    )


def _run(arguments: argparse.Namespace, stack: ExitStack) -> int:
    try:
        report = examine(_setting(arguments))
    except (KMSAuthenticationError, ValueError) as error:
        print(f"qkd-kme doctor: {error}", file=sys.stderr)
        return 2
    as_json = json.dumps(report.as_dict(), indent=2) + "\n"
    shown = text(report)
    for path, form in ((arguments.json, as_json), (arguments.html, html(report))):
        if path == Path("-"):
            shown = form
        elif path is not None:
            path.write_text(form, encoding="utf-8")
    sys.stdout.write(shown)
    return report.exit_code(strict=arguments.strict)


def _setting(arguments: argparse.Namespace) -> Setting:
    credentials = _credentials(arguments, arguments.sae, "")
    sides = [Side("A", arguments.url, credentials, arguments.peer_sae, timeout=arguments.timeout)]
    if arguments.peer_url is not None:
        credentials = _credentials(arguments, arguments.peer_sae, "peer_")
        sides.append(Side("B", arguments.peer_url, credentials, arguments.sae, timeout=arguments.timeout))
    other = None
    if arguments.other_sae is not None:
        if len(sides) == 1:
            raise ValueError("--other-sae is an SAE of the peer's KME: give --peer-url too")
        other = _credentials(arguments, arguments.other_sae, "other_")
        other.context(arguments.peer_url)
    return Setting(
        sides=sides,
        other=other,
        site=SecureSite(arguments.site),
        take_keys=not arguments.no_keys,
        seconds=arguments.seconds,
        progress=_silent if arguments.quiet else _say,
    )


def _credentials(arguments: argparse.Namespace, sae_id: str, prefix: str) -> SAECredentials:
    given = vars(arguments)
    return SAECredentials(
        sae_id,
        ca=arguments.ca if prefix == "" or arguments.peer_ca is None else arguments.peer_ca,
        cert=given[f"{prefix}cert"],
        key=given[f"{prefix}key"],
        pkcs12=given[f"{prefix}pkcs12"],
        key_password=given[f"{prefix}key_password"],
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise ValueError
    return seconds


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _silent(what: str) -> None:
    pass
