"""The reserve of one-time keys: no key is used twice, spent ones are wiped, and the counts are right."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_client.emulator.link.authentication.errors import ReserveEmpty
from kms_client.emulator.link.authentication.reserve import ANCHOR_BYTES, KEY_BYTES, KeyReserve
from tests.support.link_session import A, B

pytestmark = pytest.mark.pure


def filled(a_to_b: int = 4, b_to_a: int = 3) -> tuple[KeyReserve, bytes]:
    reserve = KeyReserve()
    material = os.urandom(reserve.material_size((a_to_b, b_to_a)))
    reserve.put(material, (a_to_b, b_to_a))
    return reserve, material


def test_each_direction_has_its_own_keys() -> None:
    reserve, material = filled(2, 1)
    keys = material[ANCHOR_BYTES:]
    assert reserve.anchor == material[:ANCHOR_BYTES]
    assert reserve.take(A) == keys[:KEY_BYTES]
    assert reserve.take(B) == keys[2 * KEY_BYTES :]
    assert reserve.take(A) == keys[KEY_BYTES : 2 * KEY_BYTES]
    for direction in (A, B):
        with pytest.raises(ReserveEmpty, match="is empty: start a new session, which bootstraps"):
            reserve.take(direction)


def test_counts() -> None:
    reserve, _ = filled(4, 3)
    assert (reserve.available(A), reserve.available(B), reserve.level) == (4, 3, 3)
    assert reserve.made_bits == 8 * (7 * KEY_BYTES + ANCHOR_BYTES)
    assert reserve.spent_bits == 8 * ANCHOR_BYTES
    reserve.take(A, 2)
    assert (reserve.spent_keys, reserve.discarded_keys) == (1, 2)
    assert reserve.spent_bits == 8 * (3 * KEY_BYTES + ANCHOR_BYTES)
    assert reserve.wanted(4) == (3, 1)
    assert reserve.material_size((3, 1)) == 4 * KEY_BYTES
    assert "1 keys A_TO_B, 3 keys B_TO_A" in repr(reserve)


def test_what_was_passed_over_is_gone() -> None:
    reserve, _ = filled(4, 0)
    reserve.take(A, 1)
    for number in (0, 1, 4):
        with pytest.raises(ReserveEmpty, match="the reserve has 2 to 3"):
            reserve.take(A, number)
    assert reserve.next(A) == 2


def test_spent_keys_are_wiped() -> None:
    reserve, _ = filled(2, 2)
    held = [lane.keys[number] for lane in reserve._lanes for number in (0, 1)]
    reserve.take(A)
    assert held[0] == bytes(KEY_BYTES)
    assert any(held[1])
    reserve.truncate(B, 1)
    assert held[3] == bytes(KEY_BYTES)
    reserve.restart(b"origin", forget_anchor=False)
    assert not any(map(any, held))
    assert reserve.level == 0
    assert reserve.anchor is not None


def test_wrong_material() -> None:
    reserve = KeyReserve()
    for material, counts in ((bytes(ANCHOR_BYTES), (1, 0)), (bytes(ANCHOR_BYTES), (-1, 1))):
        with pytest.raises(ValueError, match="bytes of key are needed"):
            reserve.put(material, counts)


def test_the_anchor_is_kept() -> None:
    kept: list[tuple[bytes | None, bool]] = []
    reserve = KeyReserve(keep=lambda anchor, proven: kept.append((anchor, proven)))
    material = os.urandom(ANCHOR_BYTES)
    reserve.put(material, (0, 0))
    reserve.prove()
    reserve.prove()
    assert kept == [(material, False), (material, True)]
    again = KeyReserve(material, proven=True)
    assert (again.anchor, again.proven, again.anchors) == (material, True, 0)
    reserve.restart(b"", forget_anchor=True)
    assert kept[-1] == (None, False)
    assert not reserve.proven
    assert not KeyReserve(proven=True).proven
    with pytest.raises(ValueError, match="an anchor has 48 bytes"):
        KeyReserve(bytes(47))


@given(st.lists(st.one_of(st.just("take"), st.integers(0, 12), st.tuples(st.integers(0, 5)), st.just("end"))))
def test_never_the_same_key_twice(steps: list[object]) -> None:
    reserve, _ = filled(0, 0)
    taken: list[bytes] = []
    for step in steps:
        try:
            if step == "take":
                taken.append(reserve.take(A))
            elif isinstance(step, int):
                taken.append(reserve.take(A, step))
            elif isinstance(step, tuple):
                reserve.put(os.urandom(KEY_BYTES * step[0]), (step[0], 0))
            else:
                reserve.truncate(A, max(reserve.next(A), reserve.end(A) - 1))
        except ReserveEmpty:
            continue
    assert len(set(taken)) == len(taken) == reserve.spent_keys
    assert reserve.made_keys == reserve.spent_keys + reserve.discarded_keys + reserve.available(A)
