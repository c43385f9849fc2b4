"""Cascade: the receiver makes its sifted block equal to the transmitter's, told parities of it over the public channel.

G. Brassard and L. Salvail, "Secret-key reconciliation by public discussion", EUROCRYPT '93, with the reuse of all known
sub-blocks and the long later passes of J. Martinez-Mateo et al., "Demystifying the information reconciliation protocol
Cascade", Quantum Inf. Comput. 15 (2015), 453.

A pass puts the bits into another order (the first keeps theirs) and cuts them into blocks. A block whose
parity differs on both sides holds an odd number of errors, and bisection finds one of them. Each error found
changes the parity of one block in each other pass, which may be bisected in its turn. All blocks of a pass
are bisected at the same time: a question asks for the middle of each. The transmitter only sends parities of
the first x bits of a pass: to halve a block, one bit.

The transmitter is an oracle without state except the count of its answers: `Reference`. The receiver decides
on the questions: `Corrector`. Neither does I/O. Both count one leaked bit for each parity told.

Messages. The first question is ``00`` and the number of bits (4 bytes); it asks for the parities at the ends of all
blocks of all passes. Each other one is the number of the pass (1 byte, from 1), the width w of a number (1 byte: 1, 2
or 4), and the places asked for, ascending, each as its distance from the one before (from 0 for the first) in w bytes.
All numbers are big-endian. The answer is one bit for each place, packed from the most significant bit on, padded with
zeros.

The order of a pass is public and made from a seed that both sides know: SHA-256 of the seed and the number of the pass
(1 byte) seeds NumPy's PCG64, whose raw output is the same in all versions; entry i of the order is found by replacing
the low bits of output i by i, as many as are needed, and sorting. No distribution of NumPy's takes part: those may
change.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from kms_client.emulator.link.arrays import Bits, Places

__all__ = [
    "MAXIMUM_BITS",
    "Corrector",
    "ReconciliationError",
    "Reference",
    "block_sizes",
    "permutation",
]

MAXIMUM_BITS = 1 << 26
START = 0
HEADER_BYTES = 2
WIDTHS = (1, 2, 4)
# Found by experiment: larger blocks tell less, smaller ones need fewer rounds.
FIRST_BLOCK = 0.75  # bits, times 1 / qber
SECOND_BLOCK = 4  # times the first
THIRD_BLOCK = 1 << 12  # bits
# Two errors that the first passes hide from each other go on hiding in each of these with a chance of 1 in 4.
LATER_PASSES = 7
LATER_BLOCKS = 4
# The third pass begins when the first two find no more than this share of the errors: they take many rounds for them.
TAIL = 0.002


class ReconciliationError(ValueError):
    """The peer's message makes no sense, or the blocks differ too much to reconcile: discard the block."""


def block_sizes(bits: int, qber: float) -> list[int]:
    """Return the block sizes of each pass, for `bits` bits of which a share of `qber` is expected wrong."""
    if not 1 <= bits <= MAXIMUM_BITS:
        raise ValueError(f"a block has 1 to {MAXIMUM_BITS} bits, not {bits}")
    if not 0 <= qber < 0.5:
        raise ValueError(f"the error rate is at least 0 and below 0.5, not {qber}")
    largest = max(1, bits // LATER_BLOCKS)
    first = FIRST_BLOCK / max(qber, 1 / bits)
    sizes = [round(first), round(SECOND_BLOCK * first), THIRD_BLOCK] + LATER_PASSES * [largest]
    return [min(max(1, size), largest) for size in sizes]


def permutation(bits: int, seed: bytes, number: int) -> Places:
    """Return the order of `bits` bits in the pass `number` (from 1): the bit that stands at each place."""
    if number == 1:
        return np.arange(bits, dtype=np.int32)
    digest = hashlib.sha256(seed + bytes([number])).digest()
    keys = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(bits)
    low = np.uint64((1 << (bits - 1).bit_length()) - 1)
    keys &= ~low
    keys |= np.arange(bits, dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.astype(np.int32)


def _edges(bits: int, size: int) -> Places:
    """Return the places at which the blocks of a pass begin and end, without 0."""
    return np.append(np.arange(size, bits, size, dtype=np.int32), np.int32(bits))


def _prefix_parities(bits: Bits) -> Bits:
    """Return the parities of the first 0, 1, 2, ... bits."""
    parities = np.zeros(bits.size + 1, dtype=np.uint8)
    np.bitwise_xor.accumulate(bits, out=parities[1:])
    return parities


class Reference:
    """The transmitter's side: answers questions about its block.

    `bits` are 0 or 1; `qber` and `seed` must be the corrector's.
    """

    def __init__(self, bits: Bits, qber: float, seed: bytes) -> None:
        self._bits = bits
        self._seed = seed
        self._sizes = block_sizes(bits.size, qber)
        self._parities: list[Bits] = []
        self.leaked_bits = 0

    def answer(self, question: bytes) -> bytes:
        """Return the parities that the corrector's question asks for.

        Raises `ReconciliationError` if the question makes no sense, or more parities are asked for than there are bits.
        """
        if not self._parities:
            told = self._start(question)
        else:
            number, places = _parse_question(question, len(self._sizes), self._bits.size)
            told = self._parities[number - 1][places]
        self.leaked_bits += told.size
        if self.leaked_bits > self._bits.size:
            raise ReconciliationError(
                f"the peer asks for more parities than the block has bits ({self._bits.size}): throw the block away"
            )
        return np.packbits(told).tobytes()

    def _start(self, question: bytes) -> Bits:
        expected = _start_question(self._bits.size)
        if question != expected:
            raise ReconciliationError(
                f"the first question is to be {expected.hex()}, the peer's begins with {question[:8].hex()!r}: "
                "both sides must have blocks of the same length"
            )
        told = []
        for number, size in enumerate(self._sizes, 1):
            ordered = (
                self._bits if number == 1 else self._bits[permutation(self._bits.size, self._seed, number)]
            )
            self._parities.append(_prefix_parities(ordered))
            places = _edges(self._bits.size, size)
            # The parity of the whole block is the same in all passes.
            told.append(self._parities[-1][places if number == 1 else places[:-1]])
        return np.concatenate(told)


class Corrector:
    """The receiver's side: asks, and flips the bits that are found wrong.

    `bits` are 0 or 1 and are not changed; `qber` and `seed` must be the reference's. Send `next_question()`
    to the other side, give the answer to `take()`, and so on until there is no next question; then `bits` is
    the corrected block, `corrected` the number of errors found, `leaked_bits` the number of parities told.
    """

    def __init__(self, bits: Bits, qber: float, seed: bytes) -> None:
        self.bits = bits.copy()
        self.corrected = 0
        self.leaked_bits = 0
        self.questions = 0
        self._seed = seed
        self._sizes = block_sizes(bits.size, qber)
        self._tail = TAIL * qber * bits.size
        self._told: list[Bits] = []  # at the ends of the blocks, by pass
        self._passes: list[_Pass] = []
        self._flipped = np.zeros(bits.size, dtype=np.bool_)
        self._search: _Search | None = None
        self._asked = 0  # parities that the pending question asks for, 0 if none is pending
        self._done = False

    def next_question(self) -> bytes | None:
        """Return the next question for the other side; `None` once Cascade can correct no more."""
        if self._asked:
            raise RuntimeError("the last question has not been answered")
        if self._done:
            return None
        if not self._told:
            self._asked = 1 + sum(_edges(self.bits.size, size).size - 1 for size in self._sizes)
            self.questions += 1
            return _start_question(self.bits.size)
        assert self._search is not None
        places = self._search.places
        self._asked = places.size
        self.questions += 1
        return _question(self._search.number, places)

    def take(self, answer: bytes) -> None:
        """Use the other side's answer to the last question.

        Raises `ReconciliationError` if its length is wrong, or if it contradicts earlier answers.
        """
        if not self._asked:
            raise ReconciliationError("the peer answers a question that was not asked")
        told = _unpack(answer, self._asked)
        self.leaked_bits += told.size
        self._asked = 0
        if self.leaked_bits > self.bits.size:
            raise ReconciliationError(
                f"more parities were told than the block has bits ({self.bits.size}): throw the block away"
            )
        if not self._told:
            self._begin(told)
        else:
            assert self._search is not None
            self._search.take(told)
        self._proceed()

    def _begin(self, told: Bits) -> None:
        position = 0
        for size in self._sizes:
            count = _edges(self.bits.size, size).size
            if not self._told:
                self._told.append(told[:count])
                whole = told[count - 1 : count]
                position = count
            else:
                self._told.append(np.concatenate((told[position : position + count - 1], whole)))
                position += count - 1

    def _proceed(self) -> None:
        """Continue until something has to be asked, or nothing is left to do."""
        while self._search is None or not self._search.places.size:
            if self._search is not None:
                self._finish(self._search)
                self._search = None
            odd = [int(np.count_nonzero(each.odd)) for each in self._passes]
            most = max(odd, default=0)
            few = self._tail if len(odd) == 2 else 0
            if most > few:
                index = odd.index(most)
                self._search = _Search(index + 1, self._passes[index])
            elif len(odd) < len(self._sizes):
                self._open_pass(len(odd) + 1)
            else:
                self._done = True
                return

    def _open_pass(self, number: int) -> None:
        order = permutation(self.bits.size, self._seed, number)
        edges = _edges(self.bits.size, self._sizes[number - 1])
        self._passes.append(_Pass(self.bits, order, edges, self._told[number - 1]))

    def _finish(self, search: _Search) -> None:
        """Flip the bits that the search has found, and let all passes know."""
        found = search.finish()
        if self._flipped[found].any():
            raise ReconciliationError("the peer's parities contradict each other: throw the block away")
        self._flipped[found] = True
        self.bits[found] ^= 1
        self.corrected += found.size
        for each in self._passes:
            each.flip(found, toggle=each is not search.searched)


class _Pass:
    """The receiver's knowledge in one pass: the transmitter's parities, and the parts that are odd."""

    def __init__(self, bits: Bits, order: Places, edges: Places, told: Bits) -> None:
        self.order = order
        self.place_of = np.empty_like(order)
        self.place_of[order] = np.arange(order.size, dtype=np.int32)
        self._own = _prefix_parities(bits[order])
        self._flips = np.empty(0, dtype=np.int32)
        self.edges = np.concatenate((np.zeros(1, dtype=np.int32), edges))
        self.told = np.concatenate((np.zeros(1, dtype=np.uint8), told))
        different = self.told ^ self._own[self.edges]
        self.odd = different[1:] ^ different[:-1]

    def own(self, places: Places) -> Bits:
        """Return the receiver's own parities of the first bits, as they are now."""
        return self._own[places] ^ (np.searchsorted(self._flips, places).astype(np.uint8) & np.uint8(1))

    def flip(self, bits: Places, *, toggle: bool) -> None:
        """Note flipped bits; `toggle` if the parts that they are in do not know it yet."""
        places = np.sort(self.place_of[bits])
        self._flips = np.sort(np.concatenate((self._flips, places)), kind="stable")
        if toggle:
            parts = np.searchsorted(self.edges, places, side="right") - 1
            self.odd ^= np.bincount(parts, minlength=self.odd.size).astype(np.uint8) & np.uint8(1)

    def split(self, places: Places, told: Bits) -> None:
        """Note further known parities, after which no part is odd any more."""
        order = np.argsort(places, kind="stable")
        where = np.searchsorted(self.edges, places[order])
        self.edges = np.insert(self.edges, where, places[order])
        self.told = np.insert(self.told, where, told[order])
        self.odd = np.zeros(self.edges.size - 1, dtype=np.uint8)


class _Search:
    """The bisection of all odd parts of a pass at once, down to single bits."""

    def __init__(self, number: int, searched: _Pass) -> None:
        self.number = number
        self.searched = searched
        odd = np.flatnonzero(searched.odd)
        self._low = searched.edges[odd]
        self._high = searched.edges[odd + 1]
        self._different = searched.told[odd] ^ searched.own(self._low)
        self._asked: list[Places] = []
        self._told: list[Bits] = []
        self._plan()

    def _plan(self) -> None:
        self._open = np.flatnonzero(self._high - self._low > 1)
        self.places: Places = (self._low[self._open] + self._high[self._open]) >> 1

    def take(self, told: Bits) -> None:
        """Take the transmitter's parities at `places`."""
        self._asked.append(self.places)
        self._told.append(told)
        right = (told ^ self.searched.own(self.places)) == self._different[self._open]
        self._low[self._open[right]] = self.places[right]
        self._high[self._open[~right]] = self.places[~right]
        self._plan()

    def finish(self) -> Places:
        """Return the places of the wrong bits."""
        if self._asked:
            self.searched.split(np.concatenate(self._asked), np.concatenate(self._told))
        else:
            self.searched.odd[:] = 0
        places: Places = self.searched.order[self._low]
        return places


def _start_question(bits: int) -> bytes:
    return bytes([START]) + bits.to_bytes(4, "big")


def _question(number: int, places: Places) -> bytes:
    distances = np.diff(places, prepend=np.int32(0))
    largest = int(distances.max())
    width = 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4
    return bytes([number, width]) + distances.astype(f">u{width}").tobytes()


def _parse_question(question: bytes, passes: int, bits: int) -> tuple[int, NDArray[np.int64]]:
    """Return the pass and the places of a question; places are inside the block, and no place comes twice."""
    if len(question) <= HEADER_BYTES:
        raise ReconciliationError(
            f"a question has more than {HEADER_BYTES} bytes, the peer's {len(question)}"
        )
    number, width = question[0], question[1]
    if not 1 <= number <= passes or width not in WIDTHS or (len(question) - HEADER_BYTES) % width:
        raise ReconciliationError(
            f"the peer's question of {len(question)} bytes about pass {number} in numbers of {width} bytes "
            f"makes no sense: there are {passes} passes, and numbers have {WIDTHS} bytes"
        )
    if (len(question) - HEADER_BYTES) // width >= bits:
        raise ReconciliationError(f"the peer asks for more than the {bits - 1} places that there are")
    distances = np.frombuffer(question, dtype=f">u{width}", offset=HEADER_BYTES).astype(np.int64)
    places = np.cumsum(distances)
    if distances.min() < 1 or places[-1] >= bits:
        raise ReconciliationError(
            f"the peer asks for places that are not ascending, or outside of 1 to {bits - 1}"
        )
    return number, places


def _unpack(answer: bytes, count: int) -> Bits:
    """Return the `count` bits of an answer."""
    if len(answer) != (count + 7) // 8:
        raise ReconciliationError(
            f"an answer of {count} bits has {(count + 7) // 8} bytes, the peer's {len(answer)}"
        )
    told = np.unpackbits(np.frombuffer(answer, dtype=np.uint8))
    if told[count:].any():
        raise ReconciliationError("the padding of the peer's answer is not zero")
    return told[:count]
