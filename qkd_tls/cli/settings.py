"""Options and environment variables that make a `QKDContext`. Secrets come from files only."""

from __future__ import annotations

import argparse
import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Final

from kms_client import Etsi014Client, KeyManager, KMSError, SecureSite
from qkd_tls import kems
from qkd_tls.cli.failure import CommandError
from qkd_tls.context import QKDContext, create_default_context
from qkd_tls.engine import ALPN_PROTOCOL
from qkd_tls.policy import Policy

__all__ = ["ENVIRONMENT_PREFIX", "add_qkd_options", "address", "alpn_names", "open_context", "seconds"]

ENVIRONMENT_PREFIX: Final = "QKD_TLS_"
_KME_OPTIONS: Final = ("kme", "sae_id", "kme_cert", "kme_key", "kme_ca")


def add_qkd_options(parser: argparse.ArgumentParser, *, server_side: bool = False) -> None:
    """Add the options that `open_context` reads. Each has an environment variable, which the option overrides."""
    kms = parser.add_argument_group(
        "KME (ETSI GS QKD 014)",
        "Every option below has an environment variable of the same name: QKD_TLS_KME for --kme, QKD_TLS_SAE_ID for "
        "--sae-id and so on. The option wins. Files are PEM.",
    )
    _add(kms, "--kme", metavar="URL", help="this side's KME")
    _add(kms, "--sae-id", metavar="ID", help="this side's SAE ID")
    _add(kms, "--kme-cert", metavar="FILE", help="certificate that the KME knows this SAE by")
    _add(kms, "--kme-key", metavar="FILE", help="its private key, not encrypted")
    _add(kms, "--kme-ca", metavar="FILE", help="CA of the KME's certificate")
    _add(kms, "--kme-timeout", metavar="SECONDS", type=seconds, help="for an answer of the KME (default 5)")
    _add(
        kms,
        "--kme-site",
        metavar="NETWORKS",
        type=_site,
        help="networks of the secure site, with commas between, that the KME may be in (default: this host only)",
    )
    peer = "client's SAE ID, the only one allowed" if server_side else "server's SAE ID (default: ask it)"
    _add(kms, "--peer-sae-id", metavar="ID", help=peer)

    tls = parser.add_argument_group("TLS")
    _add(
        tls,
        "--policy",
        choices=[str(policy) for policy in Policy],
        help="without a QKD key: no connection (require, default), go on and warn (prefer), or never ask (off)",
    )
    if server_side:
        _add(tls, "--cert", metavar="FILE", help="this server's certificate chain (needed)")
        _add(tls, "--key", metavar="FILE", help="its private key, not encrypted (default: in --cert's file)")
        _add(tls, "--ca", metavar="FILE", help="require client certificates, of this CA")
    else:
        _add(tls, "--ca", metavar="FILE", help="CA of the server's certificate (default: the system's)")
        _add(tls, "--cert", metavar="FILE", help="certificate chain of this client, if the server wants one")
        _add(tls, "--key", metavar="FILE", help="its private key, not encrypted (default: in --cert's file)")
    _add(tls, "--groups", metavar="NAMES", type=_names, help="key exchange groups (default X25519MLKEM768)")
    if not server_side:
        _add(tls, "--kem", metavar="NAME", help=f"explicit KEM to add: {', '.join(kems.names())}")
        _add(
            tls,
            "--announced-keys",
            metavar="N",
            type=int,
            help="QKD keys to fetch in a bootstrap for later connections, 0 (default) to 63",
        )


def _add(group: argparse._ArgumentGroup, name: str, **settings: Any) -> None:
    # A default that is text goes through `type` like an argument.
    variable = ENVIRONMENT_PREFIX + name.removeprefix("--").replace("-", "_").upper()
    group.add_argument(name, default=os.environ.get(variable) or None, **settings)


@contextlib.contextmanager
def open_context(
    arguments: argparse.Namespace,
    *,
    server_side: bool = False,
    watched: Callable[[KeyManager], KeyManager] = lambda manager: manager,
) -> Iterator[QKDContext]:
    """Make the context that the options ask for; at the end, close its key manager, if any.

    `watched` may wrap the key manager. Raises CommandError if the options are wrong.
    """
    with contextlib.ExitStack() as stack:
        with _usage_errors():
            policy = _policy(arguments.policy)
            manager = None
            if policy is not Policy.OFF:
                manager = _key_manager(arguments, policy)
                stack.callback(manager.close)
            context = _context(arguments, policy, watched(manager) if manager else None, server_side)
        yield context


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn errors before the first connection into errors of the options or the files they name."""
    try:
        yield
    except KMSError as error:
        raise CommandError(error.message, hint=error.hint) from None
    except ssl.SSLError as error:
        hint = "check the files, the spelling of the groups, and that key and certificate belong together"
        raise CommandError(str(error.args[1]), hint=hint) from None
    except ValueError as error:
        raise CommandError(str(error), hint="see --help, and the environment variables QKD_TLS_*") from None


def _policy(text: str | None) -> Policy:
    try:
        return Policy(text or Policy.REQUIRE)
    except ValueError:
        raise ValueError(f"there is no policy {text!r}: it is require, prefer or off") from None


def _key_manager(arguments: argparse.Namespace, policy: Policy) -> KeyManager:
    missing = [name for name in _KME_OPTIONS if getattr(arguments, name) is None]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        variables = ", ".join(ENVIRONMENT_PREFIX + name.upper() for name in missing)
        raise CommandError(
            f"policy '{policy}' needs a KME, and this is missing: {options}",
            hint=f"give the options, or set {variables}; --policy off does without QKD keys",
        )
    return Etsi014Client(
        arguments.kme,
        sae_id=arguments.sae_id,
        cert=arguments.kme_cert,
        key=arguments.kme_key,
        ca=arguments.kme_ca,
        read_timeout=arguments.kme_timeout or 5.0,
        site=arguments.kme_site,
    )


def _context(
    arguments: argparse.Namespace, policy: Policy, manager: KeyManager | None, server_side: bool
) -> QKDContext:
    for name in (arguments.ca, arguments.cert, arguments.key):
        if name is not None:
            # OpenSSL's own error does not say which file it is.
            with open(name, "rb"):
                pass
    settings: dict[str, Any] = {"key_manager": manager, "policy": policy}
    if arguments.groups:
        settings["groups"] = arguments.groups
    if server_side:
        if arguments.peer_sae_id:
            settings["allowed_peer_sae_ids"] = [arguments.peer_sae_id]
        if arguments.cert is None:
            raise CommandError(
                "a server needs a certificate",
                hint="give --cert and --key, or set QKD_TLS_CERT and QKD_TLS_KEY",
            )
        context = create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=arguments.ca, **settings)
        if arguments.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
    else:
        settings |= {"peer_sae_id": arguments.peer_sae_id, "kem": arguments.kem}
        settings["announced_keys"] = arguments.announced_keys or 0
        context = create_default_context(cafile=arguments.ca, **settings)
    if arguments.cert is not None:
        context.load_cert_chain(arguments.cert, arguments.key)
    return context


def address(text: str, *, lowest_port: int = 1) -> tuple[str, int]:
    """Parse HOST:PORT, with an IPv6 address in brackets; for argparse."""
    host, separator, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not separator or not host or not port.isascii() or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    if not lowest_port <= int(port) < 65536:
        raise argparse.ArgumentTypeError(f"there is no port {port}")
    return host, int(port)


def seconds(text: str) -> float:
    """Parse a positive number of seconds; for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")


def alpn_names(text: str) -> list[str]:
    """Parse names of application protocols, separated by commas (RFC 7301); for argparse."""
    names = [name for name in text.split(",") if name]
    if not all(name.isascii() and len(name) <= 255 for name in names) or ALPN_PROTOCOL in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of application protocols")
    return names


def _names(text: str) -> list[str]:
    return [name for name in text.replace(":", ",").split(",") if name]


def _site(text: str) -> SecureSite:
    try:
        return SecureSite(name.strip() for name in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
