"""Comparison of both sides' blocks: a universal hash with a public random key, compared by the receiver.

Reconciliation may leave errors; nothing after it would notice, and two keys that differ in one bit have
nothing in common after privacy amplification. So the transmitter draws a key *after* the block has been
corrected, and sends it with the Poly1305 tag of the block (RFC 8439, section 2.5). Poly1305 is used as a
universal hash, not as a secret MAC: key and tag are public, and the classical channel authenticates them.

Two different blocks of n bits have the same tag with a probability of at most ``8 * ceil((8 + n / 8) / 16) / 2**106``
over the choice of the key: D. J. Bernstein, "The Poly1305-AES message-authentication code", FSE 2005, theorem 3.3 (the
8 are the block's length, which is hashed, too). This is the epsilon of correctness: `collision_probability`. The tag
tells an eavesdropper `LEAKED_BITS` about the block, which privacy amplification has to take away.
"""

from __future__ import annotations

import os
from hmac import compare_digest
from math import ceil

import numpy as np
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

__all__ = [
    "CHALLENGE_BYTES",
    "LEAKED_BITS",
    "ResidualErrors",
    "challenge",
    "collision_probability",
    "verify",
]

KEY_BYTES = 32
TAG_BYTES = 16
CHALLENGE_BYTES = KEY_BYTES + TAG_BYTES
LEAKED_BITS = 8 * TAG_BYTES
LENGTH_BYTES = 8


class ResidualErrors(ValueError):
    """The blocks of both sides differ: this one must be thrown away on both sides."""


def collision_probability(bits: int) -> float:
    """Return the largest probability that two different blocks of `bits` bits are taken for equal."""
    return 8 * ceil((LENGTH_BYTES + ceil(bits / 8)) / TAG_BYTES) / 2**106


def challenge(bits: NDArray[np.uint8]) -> bytes:
    """Return a fresh key and the tag of `bits` (0 or 1 each) under it: `CHALLENGE_BYTES`, for the other side.

    Call it when the other side has reported that its correction is done: the key must not be known before.
    """
    key = os.urandom(KEY_BYTES)
    return key + _tag(bits, key)


def verify(bits: NDArray[np.uint8], challenge: bytes) -> None:
    """Check the block `bits` against the other side's `challenge`.

    Raises `ResidualErrors` if the blocks differ, and `ValueError` if the challenge has the wrong length.
    """
    if len(challenge) != CHALLENGE_BYTES:
        raise ValueError(f"a challenge has {CHALLENGE_BYTES} bytes, the peer sent {len(challenge)}")
    key, tag = challenge[:KEY_BYTES], challenge[KEY_BYTES:]
    if not compare_digest(_tag(bits, key), tag):
        raise ResidualErrors(
            f"the corrected block of {bits.size} bits differs from the peer's: both sides throw it away"
        )


def _tag(bits: NDArray[np.uint8], key: bytes) -> bytes:
    length = bits.size.to_bytes(LENGTH_BYTES, "big")
    return Poly1305.generate_tag(key, length + np.packbits(bits).tobytes())
