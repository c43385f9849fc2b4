"""Draw the plots of the page about the emulated link: formulas as lines, simulations of the optics as points.

Usage, from the root of the repository, with the package and matplotlib installed (takes half a minute)::

    python docs/qkd_link_plots.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kms_client.emulator.link.photonics.analytic import (
    asymptotic_rate,
    bound_single_photons,
    expected_counts,
    intercepted_qber,
    live_share,
    rates,
    single_photons,
)
from kms_client.emulator.link.photonics.experiment import ExperimentCounts, measured_rate, run, total
from kms_client.emulator.link.photonics.parameters import DEFAULT, GYS, Eavesdropper, Optics
from kms_client.emulator.link.postprocessing.finite_key import Security, binary_entropy, secret_length

STATIC: Final = Path(__file__).resolve().parent / "_static"
SECURITY: Final = Security()
CASCADE: Final = 1.12
"""Bits leaked by reconciliation on the default link, in Shannon limits; GYS has 1.22 as in the paper."""
PAPER: Final = 1.22

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#c85200", "#2a7f3f", "#6b6b6b"


def simulate(optics: Optics, pulses: int, seed: int) -> ExperimentCounts:
    """Simulate one frame."""
    return total(run(optics, pulses, np.random.default_rng(seed)))


def finite_rate(optics: Optics, key_bits: float, efficiency: float) -> float:
    """Return secret bits per pulse, for blocks of so many key bits with the counts expected on average."""
    pulses = key_bits / sum(expected_counts(optics, 1e15).key) * 1e15
    counts = expected_counts(optics, pulses)
    seen = rates(optics)
    qber = sum(n * e for n, e in zip(counts.key, seen.qbers, strict=True)) / sum(counts.key)
    leaked = round(key_bits * efficiency * binary_entropy(qber))
    return secret_length(counts, optics.source, leaked, SECURITY).bits / pulses


def simulated_share(seen: ExperimentCounts, optics: Optics) -> float:
    """Return the secret share of a simulated block's key bits."""
    counts = seen.block_counts()
    key_bits = sum(counts.key)
    leaked = round(key_bits * CASCADE * binary_entropy(seen.key_qber))
    return secret_length(counts, optics.source, leaked, SECURITY).bits / key_bits


def qber_points(
    axes: Axes, x: NDArray[np.float64], counts: list[tuple[int, int]], marker: str, label: str | None
) -> None:
    """Plot error rates in percent with their standard errors, from the numbers of errors and detections."""
    errors, detected = np.array(counts).T
    qber = errors / detected
    axes.errorbar(
        x,
        100 * qber,
        yerr=100 * np.sqrt(qber * (1 - qber) / detected),
        fmt=marker,
        markersize=4,
        capsize=3,
        color="black",
        label=label,
    )


def curve(
    axes: Axes,
    x: NDArray[np.float64],
    function: Callable[[float], float],
    label: str,
    color: str,
    style: str = "-",
) -> None:
    """Draw a line wherever the function is above 0."""
    y = np.array([function(float(value)) for value in x])
    axes.plot(x, np.where(y > 0, y, np.nan), style, color=color, label=label)


def save(figure: Figure, name: str) -> None:
    """Save a figure as SVG, the same bytes each time."""
    figure.savefig(STATIC / name, metadata={"Date": None, "Creator": None}, facecolor="white")
    text = (STATIC / name).read_text(encoding="utf-8")
    (STATIC / name).write_text(
        "\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8"
    )


def rate_against_distance() -> None:
    """Plot GYS: the simulation against the analytic rate, and blocks of finite size below it."""
    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    x = np.concatenate([np.arange(0, 118, 1.0), np.arange(118, 143, 0.05)])

    def limit(length: float) -> float:
        optics = GYS.at(length)
        return asymptotic_rate(rates(optics), single_photons(optics), optics.source, PAPER)

    def decoys(length: float) -> float:
        optics = GYS.at(length)
        seen = rates(optics)
        return asymptotic_rate(seen, bound_single_photons(seen, optics.source), optics.source, PAPER)

    curve(axes, x, limit, "analytic, infinitely many decoys", GREY, ":")
    curve(axes, x, decoys, "analytic, two decoys, infinitely long", BLUE)
    points = [
        (0, 3_000_000),
        (20, 10_000_000),
        (40, 25_000_000),
        (60, 60_000_000),
        (80, 160_000_000),
        (100, 400_000_000),
        (115, 800_000_000),
        (125, 1_600_000_000),
    ]
    values = [
        measured_rate(
            run(GYS.at(length), pulses, np.random.default_rng(length), frames=25), GYS.source, PAPER
        )
        for length, pulses in points
    ]
    lengths = [length for length, _ in points]
    expected = [decoys(length) for length in lengths]
    for length, (rate, error), wanted in zip(lengths, values, expected, strict=True):
        print(f"GYS {length:4} km: {rate:.3e} +- {error:.1e}, analytic {wanted:.3e}")
    axes.errorbar(
        lengths,
        [rate for rate, _ in values],
        yerr=[error for _, error in values],
        fmt="o",
        markersize=4,
        capsize=3,
        color="black",
        label="simulation, with standard errors",
    )
    curve(axes, x, lambda length: finite_rate(GYS.at(length), 1e8, PAPER), "blocks of $10^8$ key bits", GREEN)
    curve(
        axes, x, lambda length: finite_rate(GYS.at(length), 1e7, PAPER), "blocks of $10^7$ key bits", ORANGE
    )
    axes.set_yscale("log")
    axes.set_xlim(-2, 150)
    axes.set_ylim(1e-8, 1e-2)
    axes.set_ylabel("secret bits per pulse")
    axes.set_title("Secret key rate with the parameters of GYS (2004)")
    axes.legend(loc="lower left")
    below.errorbar(
        lengths,
        [rate / wanted for (rate, _), wanted in zip(values, expected, strict=True)],
        yerr=[error / wanted for (_, error), wanted in zip(values, expected, strict=True)],
        fmt="o",
        markersize=4,
        capsize=3,
        color="black",
    )
    below.axhline(1, color=BLUE)
    below.set_ylim(0.85, 1.15)
    below.set_ylabel("simulation / analytic")
    below.set_xlabel("length of the fibre (km), 0.21 dB/km")
    for part in (axes, below):
        part.grid(alpha=0.3)
    save(figure, "qkd-link-rate.svg")


def default_against_distance() -> None:
    """Plot the default link: bits per second and QBER."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    x = np.arange(0, 281, 2.0)
    pulse_rate = DEFAULT.source.pulse_rate

    def limit(length: float) -> float:
        optics = DEFAULT.at(length)
        rate = asymptotic_rate(rates(optics), single_photons(optics), optics.source, CASCADE)
        return rate * live_share(optics) * pulse_rate

    def sifted(length: float) -> float:
        return sum(expected_counts(DEFAULT.at(length), 1e15).key) / 1e15 * pulse_rate

    curve(above, x, sifted, "key bits, sifted", GREY, "--")
    curve(above, x, limit, "secret bits, infinitely long, infinitely many decoys", GREY, ":")
    for size, color, label in ((1e7, GREEN, "10^7"), (1e6, ORANGE, "10^6")):
        curve(
            above,
            x,
            lambda length, size=size: finite_rate(DEFAULT.at(length), size, CASCADE) * pulse_rate,  # type: ignore[misc]
            f"secret bits, blocks of ${label}$ key bits",
            color,
        )
    above.axvline(DEFAULT.fibre.length, color=GREY, linewidth=0.8)
    above.annotate("default", (DEFAULT.fibre.length + 2, 2), color=GREY)
    above.set_yscale("log")
    above.set_ylim(1, 2e7)
    above.set_ylabel("bits a second")
    above.set_title("The default link at other lengths: 50 MHz, 0.2 dB/km")
    above.legend(loc="upper right")
    curve(below, x, lambda length: 100 * rates(DEFAULT.at(length)).qbers[0], "signal pulses, analytic", BLUE)
    lengths = np.array([0, 40, 80, 120, 160, 200, 220])
    seen = [
        simulate(DEFAULT.at(float(length)), pulses, int(length))
        for length, pulses in zip(
            lengths,
            (3_000_000, 20_000_000, 100_000_000, 600_000_000, 3_000_000_000, 4_200_000_000, 4_200_000_000),
            strict=True,
        )
    ]
    counts = [(int(part.errors[:, 0].sum()), int(part.detections[:, 0].sum())) for part in seen]
    qber_points(below, lengths, counts, "o", "simulation, with standard errors")
    below.set_ylim(0, 8)
    below.set_xlim(-3, 280)
    below.set_ylabel("QBER (%)")
    below.set_xlabel("length of the fibre (km)")
    below.legend(loc="upper left")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    save(figure, "qkd-link-distance.svg")


def intercepted() -> None:
    """Plot QBER and secret share against the intercepted fraction of pulses."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x = np.linspace(0, 1, 101)
    for misalignment, color, marker in ((0.005, BLUE, "o"), (0.05, ORANGE, "s")):
        honest = replace(DEFAULT, detector=replace(DEFAULT.detector, misalignment=misalignment))
        start = intercepted_qber(honest)
        above.plot(
            x, 100 * (start + x / 4), "--", color=color, label=f"$e_0 + f/4$, $e_0$ = {100 * start:.1f} %"
        )
        above.plot(
            x,
            [
                100 * intercepted_qber(replace(honest, eavesdropper=Eavesdropper(intercept=float(f))))
                for f in x
            ],
            color=color,
            label="exact",
        )
        fractions = np.array([0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
        optics = [replace(honest, eavesdropper=Eavesdropper(intercept=float(f))) for f in fractions]
        seen = [simulate(there, 400_000, i) for i, there in enumerate(optics)]
        counts = [(int(part.errors.sum()), int(part.detections.sum())) for part in seen]
        label = "simulation, with standard errors" if marker == "s" else None
        qber_points(above, fractions, counts, marker, label)
    share_x = np.array(
        [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.4, 0.6, 0.8, 1]
    )
    shares = []
    for i, fraction in enumerate(share_x):
        optics_there = replace(DEFAULT, eavesdropper=Eavesdropper(intercept=float(fraction)))
        shares.append(simulated_share(simulate(optics_there, 22_500_000, i), optics_there))
        print(f"intercepted {fraction:.2f}: secret share {shares[-1]:.3f}")
    below.plot(
        share_x,
        shares,
        "o-",
        color=GREEN,
        markersize=4,
        label="simulated blocks of $10^6$ key bits, default link",
    )
    above.set_ylim(0, 32)
    above.set_ylabel("QBER (%)")
    above.set_title("Intercepted and sent again")
    above.legend(loc="upper left", fontsize="small")
    below.set_ylim(-0.02, 0.5)
    below.set_ylabel("secret share of key bits")
    below.set_xlabel("intercepted fraction f of the pulses")
    below.legend(loc="upper right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    save(figure, "qkd-link-intercept.svg")


def splitting() -> None:
    """Plot the effects of photon-number splitting at 50 km."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    honest = DEFAULT.at(50)
    reference = simulate(honest, 100_000_000, 99)
    fractions = np.array([0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])
    base = reference.rates(honest.source)
    rows = []
    for i, fraction in enumerate(fractions):
        optics = replace(honest, eavesdropper=Eavesdropper(splitting=float(fraction)))
        seen = simulate(optics, 100_000_000, i)
        there = seen.rates(honest.source)
        rows.append(
            (
                there.gains[0] / base.gains[0],
                there.qbers[0] / base.qbers[0],
                there.gains[1] / base.gains[1],
                simulated_share(seen, optics) / simulated_share(reference, honest),
            )
        )
        print(f"splitting {fraction:.2f}:", " ".join(f"{value:.3f}" for value in rows[-1]))
    columns = list(zip(*rows, strict=True))
    for column, label, color, style in (
        (columns[0], "rate of signal clicks", GREY, "s-"),
        (columns[1], "QBER of signal pulses", BLUE, "^-"),
        (columns[2], "rate of decoy clicks", ORANGE, "v-"),
        (columns[3], "secret bits of a block", GREEN, "o-"),
    ):
        axes.plot(fractions, column, style, color=color, markersize=4, label=label)
    axes.set_ylim(-0.05, 1.45)
    axes.set_xlabel("fraction of the pulses under a photon-number splitting attack")
    axes.set_ylabel("relative to no attack")
    axes.set_title("Photon-number splitting on 50 km (simulation)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", ncols=2)
    save(figure, "qkd-link-splitting.svg")


def main() -> None:
    """Draw all plots."""
    mpl.rcParams.update({"svg.hashsalt": "qkd-link", "font.size": 10, "axes.titlesize": 11})
    rate_against_distance()
    default_against_distance()
    intercepted()
    splitting()


if __name__ == "__main__":
    main()
