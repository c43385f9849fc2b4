"""The cost of post-processing a sifted block: CPU seconds of each side on one core, by error rate and step.

A block of 10**6 bits is reconciled, verified and amplified to half its length, both sides in one thread, each
side's calls timed on their own. The ratio is to the time for sorting as many random 64-bit numbers in the
same run, so that it holds on a noisy machine. Usage::

    python benchmarks/post_processing.py [--bits 1000000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from math import log2
from typing import TypeVar

import numpy as np

from kms_client.emulator.link.postprocessing.amplification import amplify, seed_length
from kms_client.emulator.link.postprocessing.cascade import Corrector, Reference
from kms_client.emulator.link.postprocessing.verification import challenge, verify

ERROR_RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.11)
GOAL = 1.0  # seconds a side
Result = TypeVar("Result")


class Stopwatch:
    """CPU seconds by side and step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)

    def call(self, side: str, step: str, function: Callable[[], Result]) -> Result:
        """Return the function's result; add its CPU time to the step's."""
        begin = time.process_time()
        result = function()
        self.seconds[side, step] += time.process_time() - begin
        return result

    def side(self, side: str) -> float:
        """Return the CPU seconds of all steps of a side."""
        return sum(seconds for (owner, _), seconds in self.seconds.items() if owner == side)


def process(bits: int, rate: float, watch: Stopwatch) -> tuple[float, int, int]:
    """Process one block; return the efficiency, the number of questions, and the bytes of all messages."""
    rng = np.random.default_rng()
    sent = rng.integers(0, 2, bits, dtype=np.uint8)
    received = sent ^ (rng.random(bits) < rate).astype(np.uint8)
    seed, volume = os.urandom(16), 0
    alice = watch.call("transmitter", "Cascade", lambda: Reference(sent, rate, seed))
    bob = watch.call("receiver", "Cascade", lambda: Corrector(received, rate, seed))
    while (question := watch.call("receiver", "Cascade", bob.next_question)) is not None:
        answer = watch.call("transmitter", "Cascade", lambda question=question: alice.answer(question))  # type: ignore[misc]
        watch.call("receiver", "Cascade", lambda answer=answer: bob.take(answer))  # type: ignore[misc]
        volume += len(question) + len(answer)
    tag = watch.call("transmitter", "verification", lambda: challenge(sent))
    watch.call("receiver", "verification", lambda: verify(bob.bits, tag))
    length = bits // 2
    matrix = rng.integers(0, 2, seed_length(bits, length), dtype=np.uint8)
    keys = [
        watch.call("transmitter", "amplification", lambda: amplify(sent, matrix, length)),
        watch.call("receiver", "amplification", lambda: amplify(bob.bits, matrix, length)),
    ]
    assert np.array_equal(keys[0], keys[1])
    wrong = bob.corrected / bits
    least = bits * -(wrong * log2(wrong) + (1 - wrong) * log2(1 - wrong))
    return bob.leaked_bits / least, bob.questions, volume


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="CPU time of the post-processing of the QKD link.")
    parser.add_argument("--bits", type=int, default=1_000_000, help="of a sifted block (default 1000000)")
    parser.add_argument("--rounds", type=int, default=3, help="blocks at each error rate (default 3)")
    arguments = parser.parse_args()

    slowest = 0.0
    columns = "".join(f"{name:>9}" for name in ("Cascade", "verif.", "amplif.", "sum"))
    print(f"{'QBER':>6}{'f':>8}{'rounds':>8}{'kB':>7}  {'side':<12}{columns}{'ratio':>7}")
    for rate in ERROR_RATES:
        units, watches, rows = [], [], []
        for _ in range(arguments.rounds):
            numbers = np.random.default_rng().integers(0, 1 << 63, arguments.bits, dtype=np.uint64)
            begin = time.process_time()
            numbers.sort()
            units.append(time.process_time() - begin)
            watch = Stopwatch()
            rows.append(process(arguments.bits, rate, watch))
            watches.append(watch)
        efficiency, rounds, volume = (statistics.mean(row[index] for row in rows) for index in range(3))
        for side in ("transmitter", "receiver"):
            steps = [
                statistics.median(watch.seconds[side, step] for watch in watches)
                for step in ("Cascade", "verification", "amplification")
            ]
            total = statistics.median(watch.side(side) for watch in watches)
            slowest = max(slowest, total)
            figures = "".join(f"{seconds:>9.3f}" for seconds in (*steps, total))
            head = f"{rate:>6.1%}{efficiency:>8.3f}{rounds:>8.0f}{volume / 1e3:>7.0f}"
            print(f"{head}  {side:<12}{figures}{total / statistics.median(units):>7.1f}")
    verdict = "under" if slowest < GOAL else "NOT under"
    print(f"A block of {arguments.bits} bits takes at most {slowest:.2f} s a side, {verdict} {GOAL:.0f} s.")


if __name__ == "__main__":
    main()
