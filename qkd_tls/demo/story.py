"""The story of the demo, and its checks.

The two sides of an emulated QKD link with their KMEs, an HTTPS server and an HTTPS client run as processes of
their own. The separate reports of the two sides are compared and checked.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import requests

from kms_client import Etsi014Client, KMSUnavailable
from qkd_tls.demo.processes import DemoError, Process, Processes, wait_for
from qkd_tls.info import HandshakePath, Protection
from qkd_tls.policy import Policy

__all__ = ["run"]

_REQUESTS: Final = 10
_ANNOUNCED_KEYS: Final = 3
_GROUP: Final = "X25519MLKEM768"
_WIDTH: Final = 118


def run(out: TextIO | None = None) -> int:
    """Run the demo and describe it.

    Returns the exit code: 0 only if all checks passed; 1 if not; 2 if the KME emulator is not installed.
    """
    page = _Page(sys.stdout if out is None else out)
    try:
        import kms_client.emulator  # noqa: F401
    except ImportError as error:
        print(f"qkd-tls demo: {error}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    try:
        with (
            _ended_by_signals(),
            tempfile.TemporaryDirectory(prefix="qkd-tls-demo-") as name,
            Processes(Path(name)) as processes,
        ):
            checks = _Demo(Path(name), processes, page).run()
    except DemoError as error:
        print(f"qkd-tls demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qkd-tls demo: interrupted", file=sys.stderr)
        return 130
    page.checks(checks)
    failed = sum(not passed for passed in checks.values())
    seconds = time.monotonic() - begin
    page.line(
        f"{failed} of {len(checks)} checks failed."
        if failed
        else f"Everything was as it should be ({seconds:.1f} s)."
    )
    return 1 if failed else 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Stop the processes even if this one is terminated or its terminal is closed."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _KME:
    """One of the two KMEs, and the arguments to start it again at the same place."""

    side: str
    arguments: tuple[str, ...]
    process: Process
    url: str
    link: str
    fibre: str = ""
    page: str = ""

    @property
    def name(self) -> str:
        return f"KME {self.side.upper()}"


@dataclass
class _Demo:
    directory: Path
    processes: Processes
    page: _Page
    runs: int = 0
    checks: dict[str, bool] = field(default_factory=dict)

    def run(self) -> dict[str, bool]:
        page = self.page
        page.heading("Starting, all on 127.0.0.1")
        kme_a = self._start_kme("a")
        page.item(kme_a.name, f"{kme_a.url}, keys for SAE-A (the client)")
        kme_b = self._start_kme("b", "--link", kme_a.link, "--fibre", kme_a.fibre)
        page.item(kme_b.name, f"{kme_b.url}, keys for SAE-B (the server)")
        # The link makes its first keys meanwhile.
        server = self._start("HTTPS server", "qkd_tls.demo.peers", "server", *self._peer(kme_b))
        url = f"https://127.0.0.1:{server.first_report()['port']}"
        page.item("HTTPS server", f"{url}, policy prefer")
        begin = time.monotonic()
        self._wait_for_keys(kme_a, kme_b)
        self._link(kme_a, kme_b, time.monotonic() - begin)

        page.heading(f"{_REQUESTS} requests on {_REQUESTS} connections, client policy require")
        client = self._client(kme_a, url, Policy.REQUIRE, _REQUESTS, _ANNOUNCED_KEYS)
        self._ten_connections(client, server.reports[1:])

        page.heading(f"{kme_a.name} is turned off")
        kme_a.process.stop()
        self._refused(kme_a, url)
        self._fallen_back(kme_a, url, server)

        page.heading(f"{kme_a.name} is turned on again")
        self._restart_kme(kme_a)
        self._wait_for_keys(kme_a, kme_b)
        self._recovered(kme_a, url)
        return self.checks

    # --- processes

    def _start(self, name: str, module: str, *arguments: str) -> Process:
        return self.processes.start(name, module, *arguments)

    def _start_kme(self, side: str, *arguments: str) -> _KME:
        arguments = (
            *("link", "--side", side, "--dir", str(self.directory), "--json", "--page-port", "0"),
            *arguments,
        )
        process = self._start(f"KME {side.upper()}", "kms_client.emulator", *arguments)
        ready = process.first_report()
        return _KME(
            side, arguments, process, ready["kmes"][0]["url"], ready["link"], ready["fibre"], ready["page"]
        )

    def _restart_kme(self, kme: _KME) -> None:
        ports = ("--port", _port(kme.url), "--link-port", _port(kme.link), "--fibre-port", _port(kme.fibre))
        kme.process = self._start(f"{kme.name} again", "kms_client.emulator", *kme.arguments, *ports)
        kme.process.first_report()

    def _wait_for_keys(self, *kmes: _KME) -> None:
        for kme, peer in zip(kmes, ("SAE-B", "SAE-A"), strict=True):
            manager = Etsi014Client(
                kme.url,
                sae_id=f"SAE-{kme.side.upper()}",
                cert=self.directory / f"sae-{kme.side}.pem",
                key=self.directory / f"sae-{kme.side}.key",
                ca=self.directory / "kms-ca.pem",
            )

            def keys(manager: Etsi014Client = manager, peer: str = peer) -> int | None:
                try:
                    return manager.status(peer).stored_key_count or None
                except KMSUnavailable:
                    return None

            wait_for(f"keys at {kme.name}", keys)
            manager.close()

    def _peer(self, kme: _KME) -> tuple[str, ...]:
        return "--dir", str(self.directory), "--kme", kme.url

    def _client(
        self, kme: _KME, url: str, policy: Policy, number: int = 1, announced_keys: int = 0
    ) -> list[dict[str, Any]]:
        """Run the client; return its report of each request."""
        self.runs += 1
        return self._start(
            f"HTTPS client {self.runs}",
            "qkd_tls.demo.peers",
            "client",
            *self._peer(kme),
            *("--url", url, "--policy", policy, "--requests", str(number)),
            *("--announced-keys", str(announced_keys)),
        ).finish()

    # --- what should be

    def _link(self, kme_a: _KME, kme_b: _KME, seconds: float) -> None:
        """Show how the link makes keys, from the figures of both sides."""

        def both() -> list[dict[str, Any]] | None:
            # Side B has stored a block a moment after side A has.
            sides = [_figures(kme.page) for kme in (kme_a, kme_b)]
            return sides if len({side["blocks"]["kept"] for side in sides}) == 1 else None

        ours, theirs = wait_for("a block on both sides", both)
        block, optics = ours["blocks"]["last"], ours["optics"]
        authentication, keys = ours["authentication"], ours["keys"]
        self.page.item(
            "QKD link",
            f"emulated, {optics['length_km']:g} km of fibre, decoy-state BB84; first keys after {seconds:.1f} s more",
        )
        self.page.note(
            f"block {block['number']}: {block['sifted']:,} bits sifted, QBER {block['qber']:.2%},"
            f" {block['leaked']:,} bits told to correct it, {block['secret']:,} bits secret"
        )
        self.page.note(
            f"{ours['secret_bit_s'] / 1000:,.0f} kbit/s so far; {keys['for_a']:,} + {keys['for_b']:,} keys stored,"
            f" {authentication['made_bits']:,} bits kept to authenticate what follows"
        )
        compared = ("sifted", "qber", "leaked", "secret", "keys")
        self.checks["the QKD link: both sides report the same block, and its QBER is below the threshold"] = (
            all(block[name] == theirs["blocks"]["last"][name] for name in compared)
            and 0 < block["qber"] < optics["max_qber"]
        )

    def _ten_connections(self, client: list[dict[str, Any]], server: list[dict[str, Any]]) -> None:
        rows = [_Row.of(ours, theirs) for ours, theirs in zip(client, server, strict=False)]
        self.page.table(rows)
        associated = rows[1:]
        ids = [row.client_key_id for row in rows]
        announced = [1 <= index <= _ANNOUNCED_KEYS for index in range(_REQUESTS)]
        self.checks |= {
            f"{_REQUESTS} requests on {_REQUESTS} connections": len(client) == len(server) == _REQUESTS
            and len({report["port"] for report in server}) == _REQUESTS,
            "the first a bootstrap, the others associated": rows[0].path == HandshakePath.BOOTSTRAP
            and all(row.path == HandshakePath.ASSOCIATED for row in associated),
            "protection hybrid on both sides": all(row.protections == {Protection.HYBRID} for row in rows),
            f"group {_GROUP} on both sides": all(row.groups == {_GROUP} for row in rows),
            "each key ID the same on both sides": all(
                row.client_key_id is not None and row.client_key_id == row.server_key_id for row in rows
            ),
            "no key ID twice": len(set(ids)) == _REQUESTS,
            f"no KME asked for {_ANNOUNCED_KEYS} announced keys, each once for every other key": (
                [row.announced for row in rows] == announced
                and [row.round_trips for row in rows] == [(0, 0) if known else (1, 1) for known in announced]
            ),
        }

    def _refused(self, kme: _KME, url: str) -> None:
        [report] = self._client(kme, url, Policy.REQUIRE)
        if "error" in report:
            self.page.item("require", f"refused with {report['error']}")
            self.page.note(_in_short(report["text"]))
            self.page.note(f"what to do: {report['hint']}")
        else:
            self.page.item("require", _described(report["qkd"]))
        self.checks[f"{kme.name} off: require refuses with QKDUnavailable, which names the KME"] = (
            report.get("error") == "QKDUnavailable" and report["kms"] == kme.url and kme.url in report["text"]
        )

    def _fallen_back(self, kme: _KME, url: str, server: Process) -> None:
        [report] = self._client(kme, url, Policy.PREFER)
        both = [report.get("qkd", {}), server.reports[-1]["qkd"]]
        self.page.item("prefer", _described(both[0]))
        self.page.note(f"client: {_in_short(both[0].get('fallback'))}")
        self.page.note(f"server: {_in_short(both[1]['fallback'])}")
        self.checks[f"{kme.name} off: prefer connects, warns, says pq-only and why on both sides"] = (
            "QKDFallbackWarning" in report["warnings"]
        ) and all(
            qkd.get("protection") == Protection.PQ_ONLY
            and qkd["group"] == _GROUP
            and qkd["key_id"] is None
            and qkd["fallback"]
            for qkd in both
        )

    def _recovered(self, kme: _KME, url: str) -> None:
        [report] = self._client(kme, url, Policy.REQUIRE)
        self.page.item("require", _described(report.get("qkd", {})))
        self.checks[f"{kme.name} on again: require connects, hybrid"] = (
            report.get("qkd", {}).get("protection") == Protection.HYBRID
        )


@dataclass(frozen=True)
class _Row:
    """One connection as seen by both sides."""

    number: str
    path: str
    announced: bool
    groups: set[str]
    ciphers: set[str]
    protections: set[str]
    client_key_id: str | None
    server_key_id: str | None
    round_trips: tuple[int, int]
    milliseconds: float

    @classmethod
    def of(cls, client: dict[str, Any], server: dict[str, Any]) -> _Row:
        if "error" in client:
            raise DemoError(f"request {client['path']} failed: {client['text']}")
        both = [client["qkd"], server["qkd"]]
        return cls(
            number=client["path"].removeprefix("/"),
            path=" / ".join(dict.fromkeys(str(qkd["path"]) for qkd in both)),
            announced=client["qkd"]["announced"],
            groups={qkd["group"] for qkd in both},
            ciphers={qkd["cipher"] for qkd in both},
            protections={qkd["protection"] for qkd in both},
            client_key_id=client["qkd"]["key_id"],
            server_key_id=server["qkd"]["key_id"],
            round_trips=(client["qkd"]["kms_round_trips"], server["qkd"]["kms_round_trips"]),
            milliseconds=client["ms"],
        )

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.number,
            self.path + (", announced key" if self.announced else ""),
            " / ".join(sorted(self.groups)),
            " / ".join(sorted(self.ciphers)),
            _shortened(self.client_key_id),
            _shortened(self.server_key_id),
            "{} + {}".format(*self.round_trips),
            f"{self.milliseconds:.1f}",
        )


class _Page:
    """The demo's output: plain text, with colour only for a terminal whose user has not set NO_COLOR."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._begun = False
        self._colour = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def line(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def heading(self, text: str) -> None:
        if self._begun:
            self.line()
        self._begun = True
        self.line(self._painted("1", text))

    def item(self, name: str, text: str) -> None:
        self.line(f"  {name:<14}{text}")

    def note(self, text: str) -> None:
        self.line(textwrap.fill(text, _WIDTH, initial_indent=" " * 16, subsequent_indent=" " * 18))

    def table(self, rows: Sequence[_Row]) -> None:
        head = ("", "connection", "group", "cipher", "key: client", "key: server", "KME calls", "ms")
        cells = [head, *(row.cells for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numbers = {0, len(head) - 1}
        for row in cells:
            aligned = [
                cell.rjust(width) if index in numbers else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  " + "  ".join(aligned).rstrip())

    def checks(self, checks: dict[str, bool]) -> None:
        self.heading("Checks")
        for text, passed in checks.items():
            self.line(
                "  "
                + (self._painted("32", "ok    ") if passed else self._painted("31", "FAILED"))
                + f"  {text}"
            )

    def _painted(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


def _figures(page: str) -> dict[str, Any]:
    """Return the figures that one side of the link shows to operators."""
    answer = requests.get(f"{page}figures", timeout=20)
    answer.raise_for_status()
    [side] = answer.json()["sides"]
    return dict(side)


def _described(qkd: dict[str, Any]) -> str:
    if not qkd:
        return "refused"
    key = f"key {_shortened(qkd['key_id'])}" if qkd["key_id"] else "no QKD key"
    return f"connected, protection {qkd['protection']}, group {qkd['group']}, {key}"


def _shortened(key_id: str | None) -> str:
    return "none" if key_id is None else key_id if len(key_id) <= 10 else key_id[:8] + ".."


def _in_short(text: str | None) -> str:
    """Return an error's first sentence; the hint follows in the text."""
    return re.split(r"\.+ (?=[A-Z])", text)[0] if text else "nothing"


def _port(address: str) -> str:
    return address.rpartition(":")[2]
