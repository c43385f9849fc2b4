"""Privacy amplification: exactly the product with the matrix over GF(2)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kms_client.emulator.link.postprocessing.amplification import (
    MAXIMUM_BITS,
    amplify,
    rounding_bound,
    seed_length,
)

pytestmark = pytest.mark.pure

Bits = NDArray[np.uint8]


def random_bits(count: int, seed: int = 0) -> Bits:
    return np.random.default_rng(seed).integers(0, 2, count, dtype=np.uint8)


def dense(bits: Bits, seed: Bits, length: int) -> Bits:
    """The product with the matrix written out: Toeplitz beside the identity."""
    rows, columns = np.indices((length, bits.size - length))
    toeplitz = seed[rows - columns + bits.size - length - 1]
    matrix = np.hstack((toeplitz, np.eye(length, dtype=np.uint8)))
    return ((matrix.astype(np.int64) @ bits) % 2).astype(np.uint8)


@settings(max_examples=100)
@given(st.integers(2, 600), st.data())
def test_it_is_the_product_with_a_dense_matrix(bits: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, bits - 1))
    block, seed = random_bits(bits, length), random_bits(seed_length(bits, length), bits)
    key = amplify(block, seed, length)
    assert key.dtype == np.uint8
    assert np.array_equal(key, dense(block, seed, length))


@pytest.mark.parametrize("ones", [False, True])
def test_a_block_of_a_million_bits_is_exact(ones: bool) -> None:
    """Rows of the product computed as integers; with ones only, the sums are as large as they can be."""
    bits, length = 1_000_000, 400_000
    block, seed = (np.ones(size, dtype=np.uint8) if ones else random_bits(size) for size in (bits, bits - 1))
    key = amplify(block, seed, length)
    columns = bits - length
    for row in (0, 1, 12_345, length // 2, length - 1):
        toeplitz = seed[row : row + columns][::-1]
        assert key[row] == (np.count_nonzero(toeplitz & block[:columns]) + int(block[columns + row])) % 2


def test_the_rounding_error_is_far_from_a_half_and_the_bound_holds() -> None:
    assert rounding_bound(MAXIMUM_BITS) < 1e-4
    first, second = random_bits(1 << 20, 1).astype(float), random_bits(1 << 20, 2).astype(float)
    sums = np.fft.irfft(np.fft.rfft(first) * np.fft.rfft(second), 1 << 20)
    assert np.abs(sums - np.rint(sums)).max() < rounding_bound(1 << 20)


def test_nothing_and_everything_take_no_seed() -> None:
    block = random_bits(100)
    none = np.empty(0, dtype=np.uint8)
    assert seed_length(100, 0) == seed_length(100, 100) == 0
    assert amplify(block, none, 0).size == 0
    whole = amplify(block, none, 100)
    assert np.array_equal(whole, block)
    assert not np.shares_memory(whole, block)


def test_it_is_linear_and_each_bit_counts() -> None:
    seed = random_bits(seed_length(64, 32), 3)
    first, second = random_bits(64, 4), random_bits(64, 5)
    together = amplify(first ^ second, seed, 32)
    assert np.array_equal(together, amplify(first, seed, 32) ^ amplify(second, seed, 32))
    for place in range(32, 64):
        unit = np.zeros(64, dtype=np.uint8)
        unit[place] = 1
        assert np.flatnonzero(amplify(unit, seed, 32)).tolist() == [place - 32]


def test_the_family_is_universal() -> None:
    """Over all seeds, no block but zero is mapped to zero more often than 1 in 2**l times."""
    bits, length = 6, 3
    seeds = [np.array([number >> at & 1 for at in range(5)], dtype=np.uint8) for number in range(32)]
    for number in range(1, 1 << bits):
        block = np.array([number >> at & 1 for at in range(bits)], dtype=np.uint8)
        zeros = sum(not amplify(block, seed, length).any() for seed in seeds)
        assert zeros <= len(seeds) / 2**length


@pytest.mark.parametrize(
    ("bits", "seed", "length", "message"),
    [
        (10, 9, 11, "cannot give 11"),
        (10, 9, -1, "cannot give -1"),
        (10, 8, 5, "a seed of 9 bits, not 8"),
        (10, 9, 0, "0 bits, not 9"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(bits: int, seed: int, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        amplify(random_bits(bits), random_bits(seed), length)


def test_a_block_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        seed_length(MAXIMUM_BITS + 1, 1)
