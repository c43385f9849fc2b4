"""The cost of a key to the caller: from a warm `KeyPool`, and requested from the KME directly.

A KME emulator in this process answers after 20 ms, like a KME at that distance. Both ways take turns in one
run, so that the ratio holds on a noisy machine. Between two keys the pool has time to fetch more, as between
two connections of a program. Usage::

    python benchmarks/key_pool.py [--keys 300] [--delay 0.02]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from kms_client import KeyPool
from kms_client.emulator import run_pair

PEER = "SAE-B"
GOAL = 100  # microseconds


def microseconds(call: Callable[[], object]) -> float:
    """Return the microseconds that one call takes."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def row(name: str, times: list[float], unit: float) -> str:
    """Return a line of the table; `unit` is the direct request's median."""
    cut = statistics.quantiles(times, n=100)
    median = statistics.median(times)
    return f"{name:<16}{median:>9.0f} us{cut[89]:>9.0f} us{cut[98]:>9.0f} us{median / unit:>12.5f}"


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description="A key out of a warm pool, and one from the KME.")
    parser.add_argument("--keys", type=int, default=300, help="of each kind (default 300)")
    parser.add_argument(
        "--delay", type=float, default=0.02, help="seconds to the KME and back (default 0.02)"
    )
    arguments = parser.parse_args()

    with run_pair(rate=10_000) as kmes:
        direct = kmes.client("a")
        pool = KeyPool(kmes.client("a"), peers=[PEER], low_water=16, high_water=64)
        kmes.faults("a").delay = arguments.delay
        while pool.statistics.pooled < 64:
            time.sleep(0.01)
        times: dict[str, list[float]] = {"direct request": [], "warm pool": []}
        direct.get_keys(PEER)  # the connection stands
        for _ in range(arguments.keys):
            times["direct request"].append(microseconds(lambda: direct.get_keys(PEER)))
            times["warm pool"].append(microseconds(lambda: pool.get_keys(PEER)))
        assert pool.statistics.failures == 0
        pool.close()
        direct.close()

    unit = statistics.median(times["direct request"])
    print(f"{'':<16}{'median':>12}{'90 %':>12}{'99 %':>12}{'ratio':>12}")
    for name, values in times.items():
        print(row(name, values, unit))
    median = statistics.median(times["warm pool"])
    verdict = "under" if median < GOAL else "NOT under"
    print(f"A key out of the warm pool takes {median:.0f} us, {verdict} {GOAL} us.")


if __name__ == "__main__":
    main()
