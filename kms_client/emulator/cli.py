"""Subcommands of `qkd-kme`: a QKD link with a KME at each end."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kms_client.emulator.kme import KME, server_context
from kms_client.emulator.kme_sync_tls import ConnectingSync, ListeningSync, client_context
from kms_client.emulator.link.party import Settings
from kms_client.emulator.link.photonics.parameters import DEFAULT
from kms_client.emulator.pair import KMEPair
from kms_client.emulator.pki import KME_ID_A, KME_ID_B, DemoPKI, ensure_demo_pki
from kms_client.emulator.qkd_side import SIDES, QKDSide
from kms_client.emulator.source import OSRandomSource
from kms_client.emulator.store import Delivery, KeyStore
from kms_client.emulator.watch import WatchPage

__all__ = ["add_parsers"]

_Ready = Callable[[dict[str, Any]], None]


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `pair`, `serve`, `link` and `pki`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, required=True, help="directory of the PKI; written if absent")
    common.add_argument("--sae-a", default="SAE-A", metavar="ID", help="SAE ID of side A (default SAE-A)")
    common.add_argument("--sae-b", default="SAE-B", metavar="ID", help="SAE ID of side B (default SAE-B)")
    common.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, and to put into the certificates"
    )
    common.add_argument("--json", action="store_true", help="print one line of JSON when ready")

    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--rate", type=float, default=1000.0, help="keys a second (default 1000)")
    link = argparse.ArgumentParser(add_help=False)
    link.add_argument("--buffer", type=int, default=2000, help="keys stored of each direction (default 2000)")
    made.add_argument("--initial", type=int, help="keys of each direction at the start (default: all)")
    link.add_argument("--key-size", type=int, default=256, metavar="BITS", help="default 256")
    link.add_argument(
        "--record", type=Path, metavar="FILE", help="append a line of JSON for each delivery; no keys in it"
    )

    link.add_argument(
        "--local-slaves",
        action="store_true",
        help="let SAEs of one KME share keys with each other, and with themselves",
    )

    pair = commands.add_parser("pair", parents=[common, made, link], help="run both KMEs in one process")
    pair.add_argument("--port-a", type=int, default=0, help="0 (default) for a free port")
    pair.add_argument("--port-b", type=int, default=0, help="0 (default) for a free port")
    pair.set_defaults(run=_run_pair)

    serve = commands.add_parser(
        "serve", parents=[common, made, link], help="run one KME; the other elsewhere"
    )
    serve.add_argument("--side", choices=["a", "b"], required=True, help="a has the key source")
    serve.add_argument("--port", type=int, default=0, help="0 (default) for a free port")
    serve.add_argument("--link-port", type=int, default=0, help="side a: port for side b; 0 for a free one")
    serve.add_argument("--link", metavar="HOST:PORT", help="side b: where side a listens for it")
    serve.set_defaults(run=_run_serve)

    qkd = commands.add_parser(
        "link",
        parents=[common, link],
        help="run an emulated QKD link with its KMEs, or one side of it; the other elsewhere",
        description="An emulated QKD link whose keys come out of the protocol. Without --side both sides run in this"
        " process. With it, each side is a process, perhaps on another host; both need the files of --dir.",
    )
    qkd.add_argument("--side", choices=["a", "b"], help="a transmits and has the fibre; b receives")
    qkd.add_argument("--port", type=int, default=0, help="of the side's KME; 0 (default) for a free one")
    qkd.add_argument("--port-a", type=int, default=0, help="without --side: port of KME A")
    qkd.add_argument("--port-b", type=int, default=0, help="without --side: port of KME B")
    qkd.add_argument(
        "--link-port", type=int, default=0, help="side a: port for side b's KME; 0 for a free one"
    )
    qkd.add_argument("--fibre-port", type=int, default=0, help="side a: port for side b's receiver")
    qkd.add_argument("--link", metavar="HOST:PORT", help="side b: where side a listens for its KME")
    qkd.add_argument("--fibre", metavar="HOST:PORT", help="side b: where side a listens for its receiver")
    qkd.add_argument("--length", type=float, default=DEFAULT.fibre.length, metavar="KM", help="default 20")
    qkd.add_argument(
        "--block", type=int, default=Settings.block_bits, metavar="BITS", help="sifted bits; default 1000000"
    )
    qkd.add_argument(
        "--max-qber",
        type=float,
        default=Settings.qber_threshold,
        metavar="SHARE",
        help="error rate above which a block is thrown away; default 0.08",
    )
    qkd.add_argument(
        "--shared-secret",
        type=Path,
        metavar="FILE",
        help="32 random bytes or more, the same on both sides, to know each other by at first instead of certificates",
    )
    qkd.add_argument(
        "--rebootstrap",
        action="store_true",
        help="let the other side start anew when it has lost the keys of the link",
    )
    qkd.add_argument("--page-port", type=int, help="serve a page to watch it on loopback; 0 for a free port")
    qkd.set_defaults(run=_run_link)

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
    sync: ListeningSync | ConnectingSync
    if arguments.side == "a":
        ids, saes, cert, key = (KME_ID_A, KME_ID_B), (pki.sae_a, pki.sae_b), pki.kme_a_cert, pki.kme_a_key
        context = server_context(cert, key, pki.kms_ca)
        source = OSRandomSource(arguments.rate, arguments.key_size)
        initial = arguments.buffer if arguments.initial is None else arguments.initial
        sync = ListeningSync(store, source, initial, ids[1], context)
    else:
        ids, saes, cert, key = (KME_ID_B, KME_ID_A), (pki.sae_b, pki.sae_a), pki.kme_b_cert, pki.kme_b_key
        context = server_context(cert, key, pki.kms_ca)
        link_host, link_port = _host_and_port(arguments.link)
        sync = ConnectingSync(store, ids[1], client_context(cert, key, pki.kms_ca))
    kme = KME(
        *ids,
        saes[:1],
        saes[1:],
        store,
        sync,
        local_slaves=arguments.local_slaves,
        on_delivery=_recorder(arguments, stack),
    )

    async def start() -> dict[str, Any]:
        await kme.start(arguments.host, arguments.port, context)
        ready = {
            "kmes": [_described(arguments.side, kme, arguments.host)],
            "dir": str(pki.directory),
        }
        if isinstance(sync, ListeningSync):
            port = await sync.start(arguments.host, arguments.link_port)
            ready["link"] = f"{arguments.host}:{port}"
        else:
            sync.start(link_host, link_port)
            ready["link"] = arguments.link
        return ready

    async def stop() -> None:
        await sync.stop()
        await kme.stop()

    asyncio.run(_run(arguments, start, stop))


def _run_link(arguments: argparse.Namespace, stack: ExitStack) -> None:
    needed = arguments.side == "b"
    if (arguments.link is not None) != needed or (arguments.fibre is not None) != needed:
        raise ValueError("side b needs --link HOST:PORT and --fibre HOST:PORT, the others take neither")
    pki = _pki(arguments)
    settings = Settings(
        block_bits=arguments.block, qber_threshold=arguments.max_qber, key_size=arguments.key_size
    )
    optics = DEFAULT.at(arguments.length)
    record = _recorder(arguments, stack)
    secret = None if arguments.shared_secret is None else arguments.shared_secret.read_bytes()
    sides = [
        QKDSide(
            side,
            pki,
            settings,
            optics,
            buffer=arguments.buffer,
            local_slaves=arguments.local_slaves,
            on_delivery=record,
            secret=secret,
            rebootstrap=arguments.rebootstrap,
        )
        for side in SIDES
        if arguments.side in (None, side)
    ]
    page = WatchPage([side.figures for side in sides])

    async def start() -> dict[str, Any]:
        ready: dict[str, Any] = {"dir": str(pki.directory), "kmes": []}
        link, fibre = arguments.link, arguments.fibre
        for side in sides:
            port = arguments.port if arguments.side else getattr(arguments, f"port_{side.side}")
            await side.start(arguments.host, port)
            ready["kmes"].append(_described(side.side, side.kme, arguments.host))
            if side.side == "a":
                ports = await side.listen(arguments.host, arguments.link_port, arguments.fibre_port)
                link, fibre = (f"{arguments.host}:{port}" for port in ports)
            else:
                side.connect(_host_and_port(link), _host_and_port(fibre))
        if arguments.page_port is not None:
            await page.start(port=arguments.page_port)
            ready["page"] = page.url
        return {**ready, "link": link, "fibre": fibre}

    async def stop() -> None:
        await page.stop()
        for side in reversed(sides):
            await side.stop()

    asyncio.run(_run(arguments, start, stop))


async def _run(
    arguments: argparse.Namespace,
    start: Callable[[], Awaitable[dict[str, Any]]],
    stop: Callable[[], Awaitable[None]],
) -> None:
    """Start, print the addresses, and stop on SIGTERM or SIGINT."""
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
    for name in ("link", "fibre", "page"):
        if name in ready:
            print(f"{name}: {ready[name]}")
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


def _host_and_port(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise ValueError(f"--link is HOST:PORT, not {text}")
    return host.strip("[]"), int(port)
