"""The command `qkd-tls psk`: the PSK of one hybrid handshake, for a stock TLS program."""

from __future__ import annotations

import datetime
import ipaddress
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace

from qkd_tls.cli import peer
from qkd_tls.cli.failure import CommandError, ExitCode
from qkd_tls.cli.handshake import Handshake, Watch
from qkd_tls.cli.settings import add_qkd_options, address, open_context
from qkd_tls.cli.terminal import Terminal, add_output_options
from qkd_tls.context import QKDContext
from qkd_tls.hybrid import KDF
from qkd_tls.psk_export import ExportedPSK, export_psk

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "print identity and PSK of one handshake, for a TLS program that knows nothing of qkd-tls/1"
DESCRIPTION = (
    "Connects to the server, which makes an association, then takes one more QKD key and prints the identity and the "
    "PSK of one further handshake. The PSK is a secret: whoever sees it can connect as this client, once, until the "
    "association ends."
)
_WARNING = """\
The PSK is a SECRET, and it is about to be printed. Whoever sees it can open one connection to {peer} as
SAE {sae_id}, until the association ends. It stays in this terminal's scrollback and, on a command line, in the
shell's history and in the list of processes. Use it at once: it cannot be called back."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("target", metavar="HOST:PORT", type=address, help="the server")
    parser.add_argument("--yes", action="store_true", help="print the secret without asking")
    parser.add_argument(
        "--kdf",
        choices=[kdf.value for kdf in KDF],
        default=KDF.SHA256.value,
        help="hash of the PSK; stock programs mostly fix sha256 (default)",
    )
    peer.add_connection_options(parser)
    add_qkd_options(parser)
    add_output_options(parser)


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    watch = Watch()
    with open_context(arguments, watched=watch.manager) as context:
        context.observer = watch.step
        context.set_alpn_protocols(arguments.alpn)
        # Before any key is used up.
        _warn_and_ask(arguments, terminal, context)
        with peer.connect(context, watch, terminal, arguments.target, arguments) as (sock, _):
            pass
        handshake = Handshake(lambda line: terminal.note(str(line)))
        terminal.note()
        with watch.of(handshake), export_psk(sock, KDF(arguments.kdf)) as exported:
            terminal.note()
            _print(arguments, terminal, exported)
    return ExitCode.OK


def _warn_and_ask(arguments: Namespace, terminal: Terminal, context: QKDContext) -> None:
    sae_id = context.key_manager.sae_id if context.key_manager is not None else "none"
    terminal.note(_WARNING.format(peer=peer.shown_address(arguments.target), sae_id=sae_id))
    terminal.note()
    if arguments.yes:
        return
    if not sys.stdin.isatty():
        raise CommandError(
            "the PSK is a secret, and nobody can be asked whether to print it",
            hint="give --yes if you want it printed",
        )
    print("Print it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("not printed", hint="no key was used up")


def _print(arguments: Namespace, terminal: Terminal, exported: ExportedPSK) -> None:
    expires = datetime.datetime.fromtimestamp(exported.expires_at, datetime.UTC)
    minutes = max(0.0, exported.expires_at - time.time()) / 60
    command = _openssl(arguments, exported)
    terminal.note(
        f"For one handshake, in the next {minutes:.0f} min (until {expires:%Y-%m-%d %H:%M:%S} UTC), unless the server "
        f"restarts. QKD key {exported.key_id}; server name {exported.server_name or 'none'}; "
        f"cipher suites {', '.join(exported.cipher_suites)}."
    )
    terminal.result(f"identity: {exported.identity}\npsk:      {exported.secret.hex()}")
    if command is None:
        terminal.note("OpenSSL's s_client takes PSKs for SHA-256 only: --kdf sha256 prints its command line.")
    else:
        terminal.note(
            "With OpenSSL 3.5 or newer, which has X25519MLKEM768 (older ones: -groups X25519, where the server allows "
            f"it):\n{command}"
        )
    terminal.record(
        {
            "command": "psk",
            "identity": exported.identity,
            "psk": exported.secret.hex(),
            "kdf": exported.kdf.value,
            "cipher_suites": list(exported.cipher_suites),
            "key_id": exported.key_id,
            "server_name": exported.server_name,
            "expires_at": expires.isoformat(timespec="seconds"),
            "openssl": command,
        }
    )


def _openssl(arguments: Namespace, exported: ExportedPSK) -> str | None:
    if exported.kdf is not KDF.SHA256:
        return None
    target = peer.shown_address(arguments.target)
    command = ["openssl", "s_client", "-connect", target, "-tls1_3"]
    if exported.server_name is None or _is_address(exported.server_name):
        command.append("-noservername")
    else:
        command += ["-servername", exported.server_name]
    command += ["-groups", "X25519MLKEM768", "-ciphersuites", "TLS_AES_128_GCM_SHA256"]
    command += ["-psk_identity", exported.identity, "-psk", exported.secret.hex()]
    return shlex.join(command)


def _is_address(name: str) -> bool:
    """Return whether the name is an IP address, which is never a server name (RFC 6066 section 3)."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
