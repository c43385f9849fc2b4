"""Cascade: blocks become equal, what is told is counted, and nonsense from the peer is refused."""

from __future__ import annotations

import struct
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kms_client.emulator.link.postprocessing import cascade
from kms_client.emulator.link.postprocessing.cascade import (
    Corrector,
    ReconciliationError,
    Reference,
    block_sizes,
    permutation,
)

pytestmark = pytest.mark.pure

Bits = NDArray[np.uint8]
SEED = b"public"


def blocks(bits: int, rate: float, seed: int) -> tuple[Bits, Bits]:
    rng = np.random.default_rng(seed)
    sent = rng.integers(0, 2, bits, dtype=np.uint8)
    return sent, sent ^ (rng.random(bits) < rate).astype(np.uint8)


def reconcile(alice: Reference, bob: Corrector) -> int:
    """How many bits were in the answers, padding included."""
    volume = 0
    while (question := bob.next_question()) is not None:
        answer = alice.answer(question)
        volume += 8 * len(answer)
        bob.take(answer)
    return volume


@pytest.mark.parametrize(
    ("rate", "efficiency"), [(0.005, 1.1), (0.01, 1.1), (0.03, 1.1), (0.05, 1.12), (0.08, 1.13), (0.11, 1.15)]
)
def test_a_long_block_is_corrected_and_told_little_more_than_the_limit(
    rate: float, efficiency: float
) -> None:
    sent, received = blocks(200_000, rate, 1)
    before = received.copy()
    alice, bob = Reference(sent, rate, SEED), Corrector(received, rate, SEED)
    volume = reconcile(alice, bob)
    assert np.array_equal(bob.bits, sent)
    assert np.array_equal(received, before)
    assert bob.corrected == np.count_nonzero(sent != received)
    assert alice.leaked_bits == bob.leaked_bits <= volume < bob.leaked_bits + 8 * bob.questions
    share = bob.corrected / sent.size
    limit = -sent.size * (share * log2(share) + (1 - share) * log2(1 - share))
    assert 1 < bob.leaked_bits / limit < efficiency
    assert bob.questions < 250


def test_every_parity_told_is_counted_once_and_adds_a_bit_of_knowledge() -> None:
    """The places asked for are all different, so that what leaks is at most what is counted."""
    sent, received = blocks(3000, 0.05, 2)
    alice, bob = Reference(sent, 0.05, SEED), Corrector(received, 0.05, SEED)
    asked: set[tuple[int, int]] = set()
    first = bob.next_question()
    assert first is not None
    bob.take(alice.answer(first))
    ends = [list(range(size, 3000, size)) for size in block_sizes(3000, 0.05)]
    asked.update((number, place) for number, places in enumerate(ends, 1) for place in places)
    count = len(asked) + 1  # and the parity of the whole block
    assert bob.leaked_bits == count
    while (question := bob.next_question()) is not None:
        number, width = question[:2]
        distances = [
            int.from_bytes(question[at : at + width], "big") for at in range(2, len(question), width)
        ]
        places = {(number, int(place)) for place in np.cumsum(distances)}
        assert not places & asked
        asked |= places
        count += len(distances)
        bob.take(alice.answer(question))
    assert np.array_equal(bob.bits, sent)
    assert alice.leaked_bits == bob.leaked_bits == count == len(asked) + 1


def test_the_answers_are_parities_of_the_first_bits_of_a_pass() -> None:
    sent, _ = blocks(500, 0.05, 3)
    alice = Reference(sent, 0.05, SEED)
    told = np.unpackbits(np.frombuffer(alice.answer(b"\0" + struct.pack("!I", 500)), dtype=np.uint8))
    size = block_sizes(500, 0.05)[0]
    assert list(told[:3]) == [sent[: size * blocks].sum() % 2 for blocks in (1, 2, 3)]
    for number in (1, 2, 5):
        order = permutation(500, SEED, number)
        answer = alice.answer(bytes([number, 2]) + struct.pack("!HH", 7, 400))
        assert answer == np.packbits([sent[order[:7]].sum() % 2, sent[order[:407]].sum() % 2]).tobytes()


def test_the_order_of_a_pass_is_fixed_for_all_versions() -> None:
    assert permutation(10, SEED, 1).tolist() == list(range(10))
    assert permutation(10, SEED, 2).tolist() == PASS_2
    assert permutation(10, SEED, 3).tolist() != PASS_2
    assert sorted(permutation(1000, b"", 2).tolist()) == list(range(1000))


PASS_2 = [8, 7, 5, 1, 3, 9, 0, 2, 4, 6]


def test_without_errors_little_is_told() -> None:
    sent, _ = blocks(10_000, 0, 4)
    alice, bob = Reference(sent, 0, SEED), Corrector(sent, 0, SEED)
    reconcile(alice, bob)
    assert bob.corrected == 0
    assert bob.questions == 1
    assert bob.leaked_bits < 50


@pytest.mark.parametrize(
    ("bits", "rate"), [(0, 0.01), (cascade.MAXIMUM_BITS + 1, 0.01), (10, 0.5), (10, -0.1)]
)
def test_sizes_and_rates_out_of_range_are_refused(bits: int, rate: float) -> None:
    with pytest.raises(ValueError, match="not"):
        block_sizes(bits, rate)


def test_more_errors_than_expected_are_corrected_at_a_price() -> None:
    sent, received = blocks(20_000, 0.03, 5)
    alice, bob = Reference(sent, 0.01, SEED), Corrector(received, 0.01, SEED)
    reconcile(alice, bob)
    assert np.array_equal(bob.bits, sent)


def test_blocks_that_have_nothing_in_common_are_given_up() -> None:
    sent, received = blocks(2000, 0.5, 6)
    alice, bob = Reference(sent, 0.01, SEED), Corrector(received, 0.01, SEED)
    with pytest.raises(ReconciliationError, match="more parities"):
        reconcile(alice, bob)


def test_the_corrector_gives_up_by_itself() -> None:
    received = blocks(20, 0.1, 7)[1]
    bob = Corrector(received, 0.1, SEED)
    assert bob.next_question() is not None
    told = 1 + sum(-(-20 // size) - 1 for size in block_sizes(20, 0.1))
    with pytest.raises(ReconciliationError, match="more parities were told"):
        bob.take(bytes((told + 7) // 8))


def started(bits: int = 1000) -> Reference:
    alice = Reference(blocks(bits, 0.05, 8)[0], 0.05, SEED)
    alice.answer(b"\0" + struct.pack("!I", bits))
    return alice


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (b"", "more than 2 bytes"),
        (b"\1\1", "more than 2 bytes"),
        (b"\0\1\1", "makes no sense"),
        (b"\x0b\1\1", "makes no sense"),
        (b"\1\3\1\1\1", "makes no sense"),
        (b"\1\2\1", "makes no sense"),
        (b"\1\0\1", "makes no sense"),
        (b"\1\1\0", "not ascending"),
        (b"\1\1\5\0", "not ascending"),
        (b"\1\2\x03\xe8", "outside of 1 to 999"),
        (b"\1\4\xff\xff\xff\xff", "outside"),
        (b"\1\1" + b"\1" * 1000, "more than the 999 places"),
    ],
)
def test_the_reference_refuses_questions_that_make_no_sense(question: bytes, message: str) -> None:
    alice = started()
    leaked = alice.leaked_bits
    with pytest.raises(ReconciliationError, match=message):
        alice.answer(question)
    assert alice.leaked_bits == leaked


@pytest.mark.parametrize("question", [b"", b"\1\1\1", b"\0" + struct.pack("!I", 999)])
def test_the_first_question_must_be_the_first(question: bytes) -> None:
    alice = Reference(blocks(1000, 0.05, 8)[0], 0.05, SEED)
    with pytest.raises(ReconciliationError, match="the first question"):
        alice.answer(question)


def test_the_reference_tells_no_more_than_the_block_has() -> None:
    alice = started()
    question = b"\1\1" + b"\1" * 999
    with pytest.raises(ReconciliationError, match="more parities"):
        alice.answer(question)


def test_questions_and_answers_take_turns() -> None:
    bob = Corrector(blocks(1000, 0.05, 9)[0], 0.05, SEED)
    with pytest.raises(ReconciliationError, match="not asked"):
        bob.take(b"")
    bob.next_question()
    with pytest.raises(RuntimeError, match="not been answered"):
        bob.next_question()


def test_answers_of_a_wrong_length_or_with_padding_are_refused() -> None:
    sent, received = blocks(1000, 0.05, 10)
    alice, bob = Reference(sent, 0.05, SEED), Corrector(received, 0.05, SEED)
    question = bob.next_question()
    assert question is not None
    answer = alice.answer(question)
    assert alice.leaked_bits % 8
    for wrong in (b"", answer[:-1], answer + b"\0"):
        with pytest.raises(ReconciliationError, match="has"):
            bob.take(wrong)
    with pytest.raises(ReconciliationError, match="padding"):
        bob.take(answer[:-1] + bytes([answer[-1] | 1]))
    bob.take(answer)


@settings(max_examples=150)
@given(st.data())
def test_lies_of_the_reference_end_in_an_error_or_a_block(data: st.DataObject) -> None:
    """Arbitrary parities of the right length: the corrector ends, and has told no more than the block."""
    bits = data.draw(st.integers(100, 600))
    bob = Corrector(blocks(bits, 0.1, 11)[1], 0.1, SEED)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    for _ in range(bits + 1):
        if bob.next_question() is None:
            return
        told = rng.integers(0, 2, bob._asked, dtype=np.uint8)
        try:
            bob.take(np.packbits(told).tobytes())
        except ReconciliationError:
            return
    pytest.fail("the corrector goes on asking")


@settings(max_examples=150)
@given(st.binary(max_size=100))
def test_garbage_is_answered_or_refused(question: bytes) -> None:
    alice = started()
    leaked = alice.leaked_bits
    try:
        answer = alice.answer(question)
    except ReconciliationError:
        return
    assert len(answer) == -(-(alice.leaked_bits - leaked) // 8)


@settings(max_examples=100)
@given(st.integers(300, 3000), st.floats(0, 0.08), st.integers(0, 1 << 30))
def test_blocks_of_all_lengths_become_equal(bits: int, rate: float, seed: int) -> None:
    """Nearly always: one error more or less is what verification is for."""
    sent, received = blocks(bits, rate, seed)
    alice, bob = Reference(sent, rate, SEED), Corrector(received, rate, SEED)
    try:
        reconcile(alice, bob)
    except ReconciliationError:
        assert bits < 600
        return
    assert alice.leaked_bits == bob.leaked_bits
    assert np.count_nonzero(bob.bits != sent) in (0, 2, 4)
