"""Verification finds every residual error, and a short run of the study of many blocks."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
from cryptography.hazmat.primitives.poly1305 import Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_client.emulator.link.postprocessing import cascade
from kms_client.emulator.link.postprocessing.verification import (
    CHALLENGE_BYTES,
    LEAKED_BITS,
    ResidualErrors,
    challenge,
    collision_probability,
    verify,
)
from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@settings(max_examples=100)
@given(st.integers(1, 3000), st.data())
def test_equal_blocks_pass_and_one_wrong_bit_is_found(bits: int, data: st.DataObject) -> None:
    block = np.random.default_rng(bits).integers(0, 2, bits, dtype=np.uint8)
    sent = challenge(block)
    assert len(sent) == CHALLENGE_BYTES
    verify(block.copy(), sent)
    block[data.draw(st.integers(0, bits - 1))] ^= 1
    with pytest.raises(ResidualErrors, match="throw it away"):
        verify(block, sent)


def test_each_challenge_has_a_fresh_key() -> None:
    block = np.ones(100, dtype=np.uint8)
    assert challenge(block)[:32] != challenge(block)[:32]


def test_zeros_at_the_end_are_not_padding() -> None:
    sent = challenge(np.ones(7, dtype=np.uint8))
    with pytest.raises(ResidualErrors):
        verify(np.array([1] * 7 + [0], dtype=np.uint8), sent)


def test_the_tag_is_poly1305_of_length_and_packed_bits() -> None:
    sent = challenge(np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=np.uint8))
    Poly1305.verify_tag(sent[:32], (9).to_bytes(8, "big") + b"\xb0\x80", sent[32:])


@given(st.binary(max_size=100).filter(lambda data: len(data) != CHALLENGE_BYTES))
def test_challenges_of_a_wrong_length_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="has 48 bytes") as caught:
        verify(np.zeros(8, dtype=np.uint8), data)
    assert not isinstance(caught.value, ResidualErrors)


def test_figures_of_the_tag() -> None:
    assert LEAKED_BITS == 128
    assert 2**-91 < collision_probability(10**6) < 2**-90


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("link_study", BENCHMARKS / "link_study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["link_study"] = module  # where its dataclass looks its types up
    spec.loader.exec_module(module)
    return module


def test_many_blocks_give_equal_keys_whenever_they_are_kept(study: ModuleType) -> None:
    figures = study.study(200, 10_000, study.ERROR_RATES, np.random.default_rng(1))
    assert figures.unequal == 0
    assert figures.kept + figures.residual + figures.given_up + figures.empty == figures.blocks == 200
    assert figures.kept > 150
    assert figures.residual < 3
    assert figures.secret_bits > 500_000
    assert 1 < figures.leaked_bits / figures.least_bits < 1.2
    assert "unequal keys: 0" in figures.report()


def test_residual_errors_are_found_when_reconciliation_is_cut_short(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the later passes many blocks keep errors: none of them becomes a key."""
    monkeypatch.setattr(cascade, "LATER_PASSES", 0)
    figures = study.study(200, 3_000, [0.03], np.random.default_rng(2))
    assert figures.unequal == 0
    assert figures.residual > 5
