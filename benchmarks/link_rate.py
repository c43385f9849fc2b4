"""The rate of a link: secret key per second, and the CPU time of each step on each side.

First both sides run as processes with their KMEs, on all cores, and the figures of side A are read after a
while. Then both parties run in one thread, joined in memory and without authentication, and each step's CPU
time is measured. Usage::

    python benchmarks/link_rate.py [--seconds 20] [--block 1000000] [--length 20]

Needs the extra emulator, and psutil.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import numpy as np
import psutil

from kms_client.emulator.link.alice import Alice
from kms_client.emulator.link.authentication.reserve import KeyReserve
from kms_client.emulator.link.bob import Bob
from kms_client.emulator.link.controls import Controls
from kms_client.emulator.link.figures import Figures
from kms_client.emulator.link.messages import Part
from kms_client.emulator.link.party import Offload, SecretKey, Settings
from kms_client.emulator.link.photonics.line import Line, Photons
from kms_client.emulator.link.photonics.parameters import DEFAULT
from kms_client.emulator.link.photonics.receiver import Receiver

BUFFER = 1_000_000
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def start(side: str, directory: str, arguments: argparse.Namespace, *more: str) -> subprocess.Popen[str]:
    """Start one side as a process."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "kms_client", "link", "--json", "--side", side),
            *("--dir", directory, "--buffer", str(BUFFER), "--page-port", "0"),
            *("--block", str(arguments.block), "--length", str(arguments.length), *more),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what the process reports when it is ready."""
    assert process.stdout is not None
    said: dict[str, Any] = json.loads(process.stdout.readline())
    return said


def processes(arguments: argparse.Namespace) -> None:
    """Run both sides as processes and print the rates."""
    with tempfile.TemporaryDirectory(prefix="qkd-link-") as directory:
        a = start("a", directory, arguments)
        there = ready(a)
        b = start("b", directory, arguments, "--link", there["link"], "--fibre", there["fibre"])
        ready(b)
        try:
            page = there["page"] + "figures"
            before, after = (measured(page, a, b, wait) for wait in (5, arguments.seconds))
        finally:
            for process in (b, a):
                process.terminate()
                process.communicate()
    seconds = after["time"] - before["time"]
    secret, sifted = (after[name] - before[name] for name in ("secret_bits", "sifted_bits"))
    spent = after["authentication"]["spent_bits"] - before["authentication"]["spent_bits"]
    print(f"two processes, {seconds:.0f} s, {after['blocks']['kept'] - before['blocks']['kept']} blocks:")
    print(f"  secret key     {secret / seconds / 1e6:.2f} Mbit/s")
    print(f"  sifted key     {sifted / seconds / 1e6:.2f} Mbit/s")
    print(f"  authentication {spent / secret:.2%} of the secret key")
    for side in "ab":
        print(f"  CPU of side {side}  {(after[side] - before[side]) / seconds:.0%} of one core")


def measured(page: str, a: subprocess.Popen[str], b: subprocess.Popen[str], wait: float) -> dict[str, Any]:
    """Return side A's figures after `wait` seconds, at the end of a block, with both sides' CPU seconds."""
    time.sleep(wait)
    kept = None
    while True:
        with urllib.request.urlopen(page) as answer:
            [side] = json.load(answer)["sides"]
        if kept not in (None, side["blocks"]["kept"]):
            break
        kept = side["blocks"]["kept"]
        time.sleep(0.01)
    for name, process in (("a", a), ("b", b)):
        times = psutil.Process(process.pid).cpu_times()
        side[name] = times.user + times.system
    return dict(side)


class Channel:
    """A classical channel in memory."""

    def __init__(self, out: asyncio.Queue[Part], arriving: asyncio.Queue[Part]) -> None:
        self._out, self._arriving = out, arriving

    async def send(self, data: bytes, *, last: bool) -> None:
        """Send a part."""
        self._out.put_nowait(Part(data, last))

    async def receive(self) -> Part:
        """Return the next part."""
        return await self._arriving.get()


class Nowhere:
    """A store with room for everything."""

    def room(self) -> tuple[int, int]:
        """Return the room for keys of both directions."""
        return BUFFER, BUFFER

    async def wait_for_room(self) -> None:
        """Return at once: there always is room."""

    def hold(self, keys: list[SecretKey]) -> None:
        """Forget the keys."""

    offer = hold

    def settle(self) -> None:
        """Do nothing: no key is in doubt."""

    drop = settle


def timer(seconds: defaultdict[str, float]) -> Offload:
    """Return an offload that computes at once and adds the CPU seconds it took to `seconds`."""

    async def compute(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        begin = time.thread_time()
        result = function(*arguments)
        seconds[function.__qualname__] += time.thread_time() - begin
        return result

    return compute


async def steps(arguments: argparse.Namespace) -> None:
    """Run both sides in one thread and print the CPU time of each step."""
    settings = Settings(block_bits=arguments.block)
    optics = DEFAULT.at(arguments.length)
    times: tuple[defaultdict[str, float], defaultdict[str, float]] = defaultdict(float), defaultdict(float)
    figures = Figures("a"), Figures("b")
    there, back = asyncio.Queue[Part](), asyncio.Queue[Part]()
    fibre: asyncio.Queue[tuple[int, Photons]] = asyncio.Queue(2)
    offload = [timer(spent) for spent in times]
    rng = np.random.default_rng()
    alice = Alice(
        *(
            settings,
            Nowhere(),
            KeyReserve(),
            BUFFER,
            figures[0],
            Line(optics, rng),
            Controls(arguments.length),
        ),
        offload=offload[0],
        offload_optics=offload[0],
        paced=False,
    )
    receiver = Receiver(optics.detector, optics.source, rng)
    bob = Bob(
        *(settings, Nowhere(), KeyReserve(), BUFFER, figures[1], receiver),
        offload=offload[1],
        offload_optics=offload[1],
    )

    async def send(number: int, photons: Photons) -> None:
        await fibre.put((number, photons))

    begin = time.thread_time()
    parties = [
        asyncio.create_task(alice.run(Channel(there, back), send)),
        asyncio.create_task(bob.run(Channel(back, there), fibre.get)),
    ]
    while figures[1].kept < arguments.blocks:
        await asyncio.sleep(0)
    rest = time.thread_time() - begin
    times = times[0].copy(), times[1].copy()
    for party in parties:
        party.cancel()
    await asyncio.gather(*parties, return_exceptions=True)
    sifted = figures[0].sifted_bits / 1e6
    print(
        f"\nCPU ms for 10**6 sifted bits (secret: {figures[0].secret_bits / figures[0].sifted_bits:.0%} of them):"
    )
    for side, spent in zip("ab", times, strict=True):
        print(f"  side {side}")
        for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
            print(f"    {name:<28}{1000 * seconds / sifted:7.0f}")
            rest -= seconds
    print(f"  not in these{1000 * rest / sifted:27.0f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--block", type=int, default=1_000_000)
    parser.add_argument("--blocks", type=int, default=5, help="for the steps")
    parser.add_argument("--length", type=float, default=20.0)
    arguments = parser.parse_args()
    processes(arguments)
    asyncio.run(steps(arguments))


if __name__ == "__main__":
    main()
