"""Many blocks through the QKD link's post-processing, both sides, and the randomness of the resulting keys.

Each block is drawn afresh: the transmitter's bits with a bias, as detectors of unequal efficiency cause it,
the receiver's with errors at one of several rates. It is reconciled over messages, verified and amplified on
each side. The report says how many blocks were kept, whether both sides' keys were ever unequal, how many
residual errors verification found, and how many bits leaked.

Then the keys, one after the other, go through tests of dieharder (R. Brown's battery, with Marsaglia's
diehard and tests of NIST SP 800-22), with as many samples as the default size has data for: nothing is read
twice. The transmitter's sifted bits go through the same tests, as a control: they have a bias, so that some
test must fail. Usage::

    python benchmarks/link_study.py [--blocks 10000] [--bits 75000] [--no-battery]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor, log, log2, sqrt

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.postprocessing.amplification import amplify, seed_length
from kms_client.emulator.link.postprocessing.cascade import Corrector, ReconciliationError, Reference
from kms_client.emulator.link.postprocessing.verification import (
    LEAKED_BITS,
    ResidualErrors,
    challenge,
    verify,
)

BIAS = 0.01
ERROR_RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08)
SECRECY_BITS = 128  # what privacy amplification takes away for an epsilon of 2**-64
CONFIDENCE = 1e-10  # with which the phase error rate is higher than assumed

Bits = NDArray[np.uint8]


@dataclass
class Figures:
    """The results so far; bits are packed, one block's after the other's."""

    blocks: int = 0
    kept: int = 0
    unequal: int = 0
    residual: int = 0
    given_up: int = 0
    empty: int = 0
    sifted_bits: int = 0
    secret_bits: int = 0
    leaked_bits: int = 0
    least_bits: float = 0.0
    rounds: int = 0
    secret: list[bytes] = field(default_factory=list, repr=False)
    sifted: list[bytes] = field(default_factory=list, repr=False)

    def report(self) -> str:
        """Return the figures in words."""
        efficiency = self.leaked_bits / self.least_bits
        return "\n".join(
            (
                f"{self.blocks} blocks of {self.sifted_bits} sifted bits in all",
                f"kept: {self.kept}, with {self.secret_bits} secret bits in all",
                f"kept with unequal keys: {self.unequal}",
                f"residual errors found by verification: {self.residual}",
                f"given up by reconciliation: {self.given_up}; too many errors for a key: {self.empty}",
                f"efficiency f = {efficiency:.4f}, {self.rounds / self.blocks:.0f} rounds a block",
            )
        )


def entropy(rate: float) -> float:
    """Return the binary entropy of `rate`."""
    return -rate * log2(rate) - (1 - rate) * log2(1 - rate) if 0 < rate < 1 else 0.0


def secret_bits(bits: int, errors: int, leaked: int) -> int:
    """Return the length of the key for as many phase errors as bit errors, and a single photon in each pulse.

    The link counts with decoy states instead: `kms_client.emulator.link.postprocessing.finite_key`.
    """
    phase = min(0.5, errors / bits + sqrt(log(1 / CONFIDENCE) / (2 * bits)))
    return max(0, floor(bits * (1 - entropy(phase)) - leaked - SECRECY_BITS))


def one_block(bits: int, rate: float, rng: np.random.Generator, figures: Figures) -> None:
    """Draw a block, process it on both sides, and add to the figures."""
    sent = (rng.random(bits, dtype=np.float32) < 0.5 + BIAS).astype(np.uint8)
    received = sent ^ (rng.random(bits) < rate).astype(np.uint8)
    figures.blocks += 1
    figures.sifted_bits += bits
    figures.sifted.append(np.packbits(sent).tobytes())

    seed = os.urandom(16)
    alice, bob = Reference(sent, rate, seed), Corrector(received, rate, seed)
    try:
        while (question := bob.next_question()) is not None:
            bob.take(alice.answer(question))
    except ReconciliationError:
        figures.given_up += 1
        return
    assert alice.leaked_bits == bob.leaked_bits
    figures.rounds += bob.questions
    figures.leaked_bits += bob.leaked_bits
    figures.least_bits += bits * entropy(np.count_nonzero(sent != received) / bits)
    try:
        verify(bob.bits, challenge(sent))
    except ResidualErrors:
        figures.residual += 1
        return

    length = secret_bits(bits, bob.corrected, bob.leaked_bits + LEAKED_BITS)
    if length == 0:
        figures.empty += 1
        return
    needed = seed_length(bits, length)
    matrix = np.unpackbits(np.frombuffer(os.urandom((needed + 7) // 8), dtype=np.uint8), count=needed)
    keys = amplify(sent, matrix, length), amplify(bob.bits, matrix, length)
    figures.kept += 1
    figures.unequal += not np.array_equal(*keys)
    figures.secret_bits += length
    # Whole bytes only, so that no padding comes between two keys.
    figures.secret.append(np.packbits(keys[0][: length // 8 * 8]).tobytes())


def study(blocks: int, bits: int, rates: Sequence[float], rng: np.random.Generator) -> Figures:
    """Process `blocks` blocks of `bits` bits, with the error rates in turn."""
    figures = Figures()
    for number in range(blocks):
        one_block(bits, rates[number % len(rates)], rng, figures)
    return figures


# Of dieharder's tests those that 46 MB are enough for, with as many samples as those give: number, name, arguments.
TESTS = (
    (3, "diehard rank 6x8", "-t 18000"),
    (12, "diehard minimum distance (3D)", ""),
    (15, "diehard runs", "-t 40000"),
    (16, "diehard craps", "-t 10000"),
    (100, "SP 800-22 monobit", "-t 40000"),
    (101, "SP 800-22 runs", "-t 40000"),
    (102, "SP 800-22 serial, generalised", "-t 40000"),
    (200, "bit distribution, pairs", "-n 2 -t 20000"),
    (202, "permutations of 5", "-n 5 -t 20000"),
    (206, "discrete cosine transform", "-t 40000"),
)
RESULT = re.compile(r"^ *\w+\| *\d+\| *\d+\| *\d+\|([0-9.]+)\| *\w+ *$", re.MULTILINE)

Outcome = list[tuple[str, list[float]]]


def battery(data: bytes) -> Outcome:
    """Return each test's name and p-values for `data` as random bytes; no p-values if data is too short."""
    program = shutil.which("dieharder")
    if program is None:
        raise SystemExit("dieharder is not installed (Debian package dieharder); --no-battery does without")
    outcome = []
    # Keys do not go into files: this one has no name and is in memory only.
    with os.fdopen(os.memfd_create("data"), "w+b") as file:
        file.write(data)
        file.flush()
        source = ["-g", "201", "-f", f"/dev/fd/{file.fileno()}", "-D", "default"]
        for number, name, samples in TESTS:
            result = subprocess.run(
                [program, "-d", str(number), *samples.split(), *source],
                pass_fds=[file.fileno()],
                capture_output=True,
                text=True,
                check=False,
            )
            values = [float(value) for value in RESULT.findall(result.stdout)]
            if not values:
                raise SystemExit(f"dieharder -d {number} gave no result: {result.stderr[-300:]}")
            outcome.append((name, [] if "rewound" in result.stderr else values))
    return outcome


def table(title: str, outcome: Outcome) -> str:
    """Return the outcome as a table; as in dieharder, a p-value outside 1e-6 to 1 - 1e-6 is a failure."""
    lines = [f"{title:<40}{'p-values':>9}{'smallest':>10}{'largest':>10}  verdict"]
    for name, values in outcome:
        if not values:
            lines.append(f"{name:<69}  too little data")
            continue
        failed = sum(not 1e-6 < value < 1 - 1e-6 for value in values)
        weak = sum(not 0.005 < value < 0.995 for value in values) - failed
        verdict = f"FAILED ({failed})" if failed else f"passed, {weak} weak" if weak else "passed"
        lines.append(f"{name:<40}{len(values):>9}{min(values):>10.5f}{max(values):>10.5f}  {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description="Blocks through the post-processing of the QKD link.")
    parser.add_argument("--blocks", type=int, default=10_000, help="how many (default 10000)")
    parser.add_argument("--bits", type=int, default=75_000, help="sifted bits of each (default 75000)")
    parser.add_argument("--no-battery", action="store_true", help="without dieharder")
    arguments = parser.parse_args()

    begin = time.process_time()
    figures = study(arguments.blocks, arguments.bits, ERROR_RATES, np.random.default_rng())
    print(figures.report())
    print(f"{time.process_time() - begin:.0f} s of CPU, both sides and drawing the blocks\n", flush=True)
    if not arguments.no_battery:
        secret = b"".join(figures.secret)
        print(table(f"keys, {len(secret) / 1e6:.1f} MB", battery(secret)) + "\n", flush=True)
        sifted = b"".join(figures.sifted)[: len(secret)]
        print(table(f"sifted bits, {len(sifted) / 1e6:.1f} MB (control)", battery(sifted)))


if __name__ == "__main__":
    main()
