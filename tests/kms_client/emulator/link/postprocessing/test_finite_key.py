"""The secret length of a block, equation by equation, and where it has to be nothing."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, getcontext
from math import exp, inf, lgamma, log2, nan

import pytest

from kms_client.emulator.link.photonics.parameters import DEFAULT, GYS
from kms_client.emulator.link.postprocessing.finite_key import (
    BlockCounts,
    Security,
    _phase_error,
    binary_entropy,
    secret_length,
)

pytestmark = pytest.mark.pure

SOURCE = DEFAULT.source
SECURITY = Security(1e-10, 1e-15)
COUNTS = BlockCounts((2_400_000, 600_000, 2100), (75_000, 18_700, 64), (373, 93, 2))


def by_hand(counts: BlockCounts, leaked: int) -> float:
    """The paper's equations written down once more, in decimal arithmetic, for `SOURCE` and `SECURITY`."""
    getcontext().prec = 50
    mu1, mu2, mu3 = (Decimal(str(k)) for k in SOURCE.intensities)
    p = [Decimal(str(value)) for value in SOURCE.probabilities]
    mus = [mu1, mu2, mu3]
    secrecy, correctness = Decimal("1e-10"), Decimal("1e-15")
    beta = (Decimal(21) / secrecy).ln()
    ln2 = Decimal(2).ln()

    def plus_minus(values: tuple[int, int, int]) -> tuple[list[Decimal], list[Decimal]]:
        delta = (Decimal(sum(values)) / 2 * beta).sqrt()
        weights = [mu.exp() / share for mu, share in zip(mus, p, strict=True)]
        return (
            [w * (n - delta) for w, n in zip(weights, values, strict=True)],
            [w * (n + delta) for w, n in zip(weights, values, strict=True)],
        )

    tau0 = sum(((-mu).exp() * share for mu, share in zip(mus, p, strict=True)), Decimal(0))
    tau1 = sum(((-mu).exp() * mu * share for mu, share in zip(mus, p, strict=True)), Decimal(0))

    def vacuum_and_single(values: tuple[int, int, int]) -> tuple[Decimal, Decimal]:
        low, high = plus_minus(values)
        s0 = max(tau0 * (mu2 * low[2] - mu3 * high[1]) / (mu2 - mu3), Decimal(0))
        s1 = tau1 * mu1 * (low[1] - high[2] - (mu2**2 - mu3**2) / mu1**2 * (high[0] - s0 / tau0))
        return s0, s1 / (mu1 * (mu2 - mu3) - mu2**2 + mu3**2)

    x0, x1 = vacuum_and_single(counts.key)
    _, z1 = vacuum_and_single(counts.check)
    low, high = plus_minus(counts.errors)
    rate = tau1 * (high[1] - low[2]) / (mu2 - mu3) / z1
    spread = rate * (1 - rate)
    inner = (z1 + x1) / (z1 * x1 * spread) * 21**2 / secrecy**2
    phase = rate + ((z1 + x1) * spread / (z1 * x1 * ln2) * inner.ln() / ln2).sqrt()
    entropy = -(phase * phase.ln() + (1 - phase) * (1 - phase).ln()) / ln2
    tail = 6 * (21 / secrecy).ln() / ln2 + (2 / correctness).ln() / ln2
    return float(x0 + x1 * (1 - entropy) - leaked - tail)


def test_the_length_is_that_of_the_published_equations() -> None:
    for leaked in (0, 150_000):
        result = secret_length(COUNTS, SOURCE, leaked, SECURITY)
        assert result.bits == pytest.approx(by_hand(COUNTS, leaked), abs=2)
        assert result.bits > 1_000_000
    assert result.qber_check == pytest.approx(468 / 93_764)
    assert result.qber_check < result.phase_error_bound < 0.05
    assert 0 < result.single_photon_bound < sum(COUNTS.key)
    with_vacuum = BlockCounts((2_400_000, 600_000, 40_000), (75_000, 18_700, 1300), (1900, 1100, 600))
    result = secret_length(with_vacuum, SOURCE, 0, SECURITY)
    assert result.vacuum_bound > 0
    assert result.bits == pytest.approx(by_hand(with_vacuum, 0), abs=2)


def test_what_is_told_is_taken_off_bit_by_bit() -> None:
    first = secret_length(COUNTS, SOURCE, 0, SECURITY).bits
    assert secret_length(COUNTS, SOURCE, 1, SECURITY).bits == first - 1
    assert secret_length(COUNTS, SOURCE, first, SECURITY).bits == 0
    assert secret_length(COUNTS, SOURCE, 10**12, SECURITY).bits == 0
    with pytest.raises(ValueError, match="leaked_bits"):
        secret_length(COUNTS, SOURCE, -1, SECURITY)


def test_more_security_costs_more_bits() -> None:
    loose = secret_length(COUNTS, SOURCE, 0, Security(1e-6, 1e-6)).bits
    medium = secret_length(COUNTS, SOURCE, 0, Security(1e-10, 1e-10)).bits
    strict = secret_length(COUNTS, SOURCE, 0, Security(1e-15, 1e-15)).bits
    assert loose > medium > strict > 0
    assert secret_length(COUNTS, SOURCE, 0, Security(1e-10, 1e-13)).bits - medium == pytest.approx(
        -log2(1000), abs=1
    )


@pytest.mark.parametrize(
    "counts",
    [
        BlockCounts((0, 0, 0), (0, 0, 0), (0, 0, 0)),
        BlockCounts((1, 0, 0), (0, 0, 0), (0, 0, 0)),
        BlockCounts((0, 0, 1), (1, 1, 1), (1, 1, 1)),
        BlockCounts((1000, 300, 2), (60, 20, 0), (0, 0, 0)),
        BlockCounts(COUNTS.key, (0, 0, 0), (0, 0, 0)),
        BlockCounts((0, 0, 0), COUNTS.check, COUNTS.errors),
        BlockCounts(COUNTS.key, COUNTS.check, COUNTS.check),
        BlockCounts(COUNTS.key, COUNTS.check, (37_500, 9350, 32)),
        BlockCounts((2_400_000, 0, 0), COUNTS.check, COUNTS.errors),
        BlockCounts((10**18, 1, 1), (10**18, 1, 1), (0, 0, 0)),
    ],
)
def test_nothing_is_secret_where_too_little_was_seen(counts: BlockCounts) -> None:
    for source in (SOURCE, GYS.source):
        result = secret_length(counts, source, 0, SECURITY)
        assert result.bits == 0
        assert 0 <= result.qber_check <= 1
        assert 0 < result.phase_error_bound <= 0.5


def test_fewer_errors_never_mean_a_shorter_key_and_none_do_not_mean_that_there_were_none() -> None:
    lengths = [
        secret_length(replace(COUNTS, errors=(4 * errors, errors, 0)), SOURCE, 0, SECURITY)
        for errors in (0, 1, 10, 100, 1000, 10_000)
    ]
    assert [result.bits for result in lengths] == sorted((result.bits for result in lengths), reverse=True)
    assert lengths[0].phase_error_bound > 0.002


def log_binomial(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


@pytest.mark.parametrize("secrecy", [1e-6, 1e-10, 1e-15])
@pytest.mark.parametrize(
    ("check", "key"), [(500, 500), (2000, 50_000), (25_000, 600_000), (5000, 50_000_000), (50_000, 5000)]
)
def test_the_step_from_one_basis_to_the_other_holds_exactly(check: int, key: int, secrecy: float) -> None:
    """Draw `check` of both at random: how probable are so few errors, if there are more in the rest than the bound?

    Computed from the hypergeometric distribution itself, not from its approximation, for all numbers seen.
    """
    said_something = 0
    for seen in sorted({*range(200), *(check * n // 40 for n in range(1, 16))}):
        bound = _phase_error(seen, check, key, Security(secrecy))
        if bound >= 0.5:
            continue
        said_something += 1
        errors = seen + int(bound * key) + 1
        logs = [
            log_binomial(errors, k)
            + log_binomial(check + key - errors, check - k)
            - log_binomial(check + key, check)
            for k in range(max(0, errors - key), seen + 1)
        ]
        top = max(logs)
        assert exp(top) * sum(exp(value - top) for value in logs) < secrecy / 21
    assert said_something > 30


def test_binary_entropy() -> None:
    assert binary_entropy(0.5) == 1
    assert binary_entropy(0) == binary_entropy(1) == binary_entropy(-0.1) == binary_entropy(1.1) == 0
    assert binary_entropy(0.11) == pytest.approx(0.4999, abs=1e-4)


@pytest.mark.parametrize("value", [0, 1, -1, nan, inf])
def test_probabilities_are_between_0_and_1(value: float) -> None:
    with pytest.raises(ValueError, match="secrecy"):
        Security(value, 1e-15)
    with pytest.raises(ValueError, match="correctness"):
        Security(1e-10, value)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        BlockCounts((1, 1, -1), (0, 0, 0), (0, 0, 0))
    with pytest.raises(ValueError, match="errors"):
        BlockCounts((1, 1, 1), (1, 1, 1), (0, 0, 2))
    with pytest.raises(ValueError, match="three"):
        BlockCounts((1, 1), (1, 1, 1), (0, 0, 0))  # type: ignore[arg-type]
