"""Subcommands of `qkd-kme`: a QKD link with a KME at each end."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .kme import KME, server_context
from .pair import KMEPair
from .pki import KME_ID_A, KME_ID_B, DemoPKI, ensure_demo_pki
from .source import OSRandomSource
from .store import Delivery, KeyStore
from .stream_link import ConnectingLink, ListeningLink

__all__ = ["add_parsers"]

_Ready = Callable[[dict[str, Any]], None]


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `pair`, `serve` and `pki`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, required=True, help="directory of the PKI; written if absent")
    common.add_argument("--sae-a", default="SAE-A", metavar="ID", help="SAE ID of side A (default SAE-A)")
    common.add_argument("--sae-b", default="SAE-B", metavar="ID", help="SAE ID of side B (default SAE-B)")
    common.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, and to put into the certificates"
    )
    common.add_argument("--json", action="store_true", help="print one line of JSON when ready")

    link = argparse.ArgumentParser(add_help=False)
    link.add_argument("--rate", type=float, default=1000.0, help="keys a second (default 1000)")
    link.add_argument("--buffer", type=int, default=2000, help="keys stored of each direction (default 2000)")
    link.add_argument("--initial", type=int, help="keys of each direction at the start (default: all)")
    link.add_argument("--key-size", type=int, default=256, metavar="BITS", help="default 256")
    link.add_argument(
        "--record", type=Path, metavar="FILE", help="append a line of JSON for each delivery; no keys in it"
    )

    link.add_argument(
        "--local-slaves",
        action="store_true",
        help="let SAEs of one KME share keys with each other, and with themselves",
    )

    pair = commands.add_parser("pair", parents=[common, link], help="run both KMEs in one process")
    pair.add_argument("--port-a", type=int, default=0, help="0 (default) for a free port")
    pair.add_argument("--port-b", type=int, default=0, help="0 (default) for a free port")
    pair.set_defaults(run=_run_pair)

    serve = commands.add_parser("serve", parents=[common, link], help="run one KME; the other elsewhere")
    serve.add_argument("--side", choices=["a", "b"], required=True, help="a has the key source")
    serve.add_argument("--port", type=int, default=0, help="0 (default) for a free port")
    serve.add_argument("--link-port", type=int, default=0, help="side a: port for side b; 0 for a free one")
    serve.add_argument("--link", metavar="HOST:PORT", help="side b: where side a listens for it")
    serve.set_defaults(run=_run_serve)

    pki = commands.add_parser("pki", parents=[common], help="write the PKI only")
    pki.set_defaults(run=_run_pki)


def _run_pki(arguments: argparse.Namespace, stack: ExitStack) -> None:
    pki = _pki(arguments)
    _print_ready(arguments, {"kmes": [], "dir": str(pki.directory)})


def _run_pair(arguments: argparse.Namespace, stack: ExitStack) -> None:
    pki = _pki(arguments)
    pair = KMEPair(
        pki,
        OSRandomSource(arguments.rate, arguments.key_size),
        buffer=arguments.buffer,
        initial=arguments.initial,
        local_slaves=arguments.local_slaves,
        on_delivery=_recorder(arguments, stack),
    )

    async def start() -> dict[str, Any]:
        await pair.start(arguments.host, arguments.port_a, arguments.port_b)
        kmes = [_described(side, kme, arguments.host) for side, kme in pair.kmes.items()]
        return {"kmes": kmes, "dir": str(pki.directory)}

    asyncio.run(_run(arguments, start, pair.stop))


def _run_serve(arguments: argparse.Namespace, stack: ExitStack) -> None:
    if (arguments.side == "b") != (arguments.link is not None):
        raise ValueError("side b needs --link HOST:PORT, side a takes none")
    pki = _pki(arguments)
    store = KeyStore(arguments.key_size, arguments.buffer)
    link: ListeningLink | ConnectingLink
    if arguments.side == "a":
        ids, saes, cert, key = (KME_ID_A, KME_ID_B), (pki.sae_a, pki.sae_b), pki.kme_a_cert, pki.kme_a_key
        context = server_context(cert, key, pki.kms_ca)
        source = OSRandomSource(arguments.rate, arguments.key_size)
        initial = arguments.buffer if arguments.initial is None else arguments.initial
        link = ListeningLink(store, source, initial, ids[1], context)
    else:
        ids, saes, cert, key = (KME_ID_B, KME_ID_A), (pki.sae_b, pki.sae_a), pki.kme_b_cert, pki.kme_b_key
        context = server_context(cert, key, pki.kms_ca)
        link_host, link_port = _host_and_port(arguments.link)
        link = ConnectingLink(store, ids[1], _link_client_context(cert, key, pki))
    kme = KME(
        *ids,
        saes[:1],
        saes[1:],
        store,
        link,
        local_slaves=arguments.local_slaves,
        on_delivery=_recorder(arguments, stack),
    )

    async def start() -> dict[str, Any]:
        await kme.start(arguments.host, arguments.port, context)
        ready = {
            "kmes": [_described(arguments.side, kme, arguments.host)],
            "dir": str(pki.directory),
        }
        if isinstance(link, ListeningLink):
            port = await link.start(arguments.host, arguments.link_port)
            ready["link"] = f"{arguments.host}:{port}"
        else:
            link.start(link_host, link_port)
            ready["link"] = arguments.link
        return ready

    async def stop() -> None:
        await link.stop()
        await kme.stop()

    asyncio.run(_run(arguments, start, stop))


async def _run(
    arguments: argparse.Namespace,
    start: Callable[[], Awaitable[dict[str, Any]]],
    stop: Callable[[], Awaitable[None]],
) -> None:
    """Start, say so, and stop on SIGTERM or SIGINT."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    _print_ready(arguments, await start())
    await ended.wait()
    await stop()


def _print_ready(arguments: argparse.Namespace, ready: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(ready), flush=True)
        return
    print(f"certificates and keys: {ready['dir']}")
    for kme in ready["kmes"]:
        print(f"{kme['kme_id']} at {kme['url']} for {', '.join(kme['sae_ids'])}")
    if "link" in ready:
        print(f"link: {ready['link']}")
    if ready["kmes"]:
        print("running; stop with Ctrl-C")
    sys.stdout.flush()


def _pki(arguments: argparse.Namespace) -> DemoPKI:
    hosts = dict.fromkeys(["localhost", "127.0.0.1", "::1", arguments.host])
    return ensure_demo_pki(arguments.dir, arguments.sae_a, arguments.sae_b, hosts=hosts)


def _described(side: str, kme: KME, host: str) -> dict[str, Any]:
    shown = f"[{host}]" if ":" in host else host
    url = f"https://{shown}:{kme.port}"
    return {"side": side, "kme_id": kme.kme_id, "url": url, "sae_ids": sorted(kme.sae_ids)}


def _recorder(arguments: argparse.Namespace, stack: ExitStack) -> Callable[[Delivery], None] | None:
    if arguments.record is None:
        return None
    # Line by line, so that the record is whole whenever the process ends.
    file = stack.enter_context(open(arguments.record, "a", buffering=1, encoding="utf-8"))  # noqa: SIM115

    def record(delivery: Delivery) -> None:
        file.write(json.dumps(delivery._asdict()) + "\n")

    return record


def _link_client_context(cert: Path, key: Path, pki: DemoPKI) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki.kms_ca)
    context.check_hostname = False  # the link checks the KME's ID instead
    context.load_cert_chain(cert, key)
    return context


def _host_and_port(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise ValueError(f"--link is HOST:PORT, not {text}")
    return host.strip("[]"), int(port)
