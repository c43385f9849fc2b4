"""Privacy amplification: a shorter block of which an eavesdropper knows nothing, by a Toeplitz matrix.

Both sides multiply their block of n bits, over GF(2), with the same public random matrix of l rows, l being
the length that the finite-key analysis allows. The matrix is ``(T | I)``: T is a Toeplitz matrix of l rows
and n - l columns, I the identity. It needs a seed of n - 1 bits only, and is universal: if two blocks differ
in the columns of T, their images differ by a uniformly random block, thanks to T; if they differ only in
those of I, their images differ. So two blocks have the same image with a probability of at most 2**-l, as the
leftover hash lemma requires (H. Krawczyk, CRYPTO '94, for Toeplitz matrices; M. Hayashi, IEEE Trans. Inf.
Theory 57 (2011), 3989, for this form).

The seed must be drawn afresh for each block, after the quantum transmission, and be authentic; it need not be secret.

T times a vector is a part of a convolution of integers, computed with an FFT in double precision and reduced modulo 2.
The result is exact, not only probably so: see `rounding_bound`.
"""

from __future__ import annotations

from math import expm1, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAXIMUM_BITS",
    "amplify",
    "rounding_bound",
    "seed_length",
]

MAXIMUM_BITS = 1 << 26  # an FFT of this size takes 1.5 GB
UNIT_ROUNDOFF = 2.0**-53


def seed_length(bits: int, length: int) -> int:
    """Return the number of seed bits that `amplify` takes for `length` of `bits` bits (0 for none or all)."""
    _check_lengths(bits, length)
    return bits - 1 if 0 < length < bits else 0


def rounding_bound(bits: int) -> float:
    """Return a bound of the distance from the FFT's result to its integer, for a block of `bits` bits.

    R. Brent, C. Percival and P. Zimmermann, "Error bounds on complex floating-point multiplication", Math. Comp. 76
    (2007), 1469: the convolution of x and y by FFTs of size 2**k is off by at most
    ``|x| |y| ((1 + e)**3k (1 + sqrt(5) e)**(3k + 1) (1 + m)**3k - 1)`` with the unit roundoff e and roots of unity
    that are off by at most m; here m is 8 e, since they are products of two rounded ones. That is for a complex FFT
    of radix 2; the real one of radix 4 that NumPy takes for these sizes computes the same sums with fewer roundings.
    Both norms are at most the square root of the number of bits. A millionth is far from the half that would matter.
    """
    k = (max(bits, 1) - 1).bit_length()
    e = UNIT_ROUNDOFF
    return bits * expm1(3 * k * log1p(e) + (3 * k + 1) * log1p(sqrt(5) * e) + 3 * k * log1p(8 * e))


def amplify(bits: NDArray[np.uint8], seed: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Return the secret key of `length` bits from the block `bits`; `seed` has `seed_length` bits (0 or 1).

    Row i and column j of the Toeplitz matrix hold ``seed[i - j + n - l - 1]``. Raises `ValueError` if the lengths do
    not fit, or the block is longer than `MAXIMUM_BITS`.
    """
    expected = seed_length(bits.size, length)
    if seed.size != expected:
        raise ValueError(f"{length} bits out of {bits.size} take a seed of {expected} bits, not {seed.size}")
    columns = bits.size - length
    kept = bits[columns:]
    if expected == 0:
        return kept[:length].copy()
    # A cyclic convolution is enough: what wraps around falls on the first columns - 1 entries, which are not used.
    size = 1 << (expected - 1).bit_length()
    product = np.fft.rfft(seed.astype(np.float64), size)
    product *= np.fft.rfft(bits[:columns].astype(np.float64), size)
    sums = np.fft.irfft(product, size)[columns - 1 : expected]
    parities: NDArray[np.uint8] = (np.rint(sums).astype(np.int64) & 1).astype(np.uint8)
    return parities ^ kept


def _check_lengths(bits: int, length: int) -> None:
    if not 0 <= length <= bits:
        raise ValueError(f"a block of {bits} bits cannot give {length}")
    if bits > MAXIMUM_BITS:
        raise ValueError(f"a block has at most {MAXIMUM_BITS} bits, not {bits}")
