"""The optics' parameters: what they derive, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest

from kms_client.emulator.link.photonics.parameters import (
    DEFAULT,
    GYS,
    Detector,
    Eavesdropper,
    Fibre,
    Optics,
    Source,
)

pytestmark = pytest.mark.pure


def test_losses_add_up_in_db() -> None:
    optics = replace(DEFAULT, fibre=Fibre(50, 0.2), eavesdropper=Eavesdropper(extra_loss=10))
    assert optics.fibre.loss == pytest.approx(10)
    assert optics.transmittance == pytest.approx(0.01)
    assert replace(GYS, fibre=Fibre(0, 0.21)).transmittance == 1


@pytest.mark.parametrize(
    ("dead_time", "pulse_rate", "gates"),
    [(0, 1e9, 0), (30e-9, 50e6, 2), (20e-9, 50e6, 1), (1e-6, 1e6, 1), (1.01e-6, 1e6, 2), (1e-6, 1e3, 1)],
)
def test_a_dead_time_counts_in_whole_gates(dead_time: float, pulse_rate: float, gates: int) -> None:
    detector = replace(DEFAULT.detector, dead_time=dead_time)
    assert detector.dead_gates(pulse_rate) == gates


def test_parameters_are_compared_by_value_and_cannot_be_changed() -> None:
    assert replace(DEFAULT) == DEFAULT
    assert DEFAULT != GYS
    with pytest.raises(AttributeError):
        DEFAULT.fibre.length = 1  # type: ignore[misc]
    assert hash(DEFAULT) == hash(replace(DEFAULT))


SOURCE = {
    "pulse_rate": 1e6,
    "intensities": (0.5, 0.2, 0.0),
    "probabilities": (0.5, 0.3, 0.2),
    "key_basis": 0.8,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pulse_rate": 0}, "pulse_rate"),
        ({"pulse_rate": inf}, "pulse_rate"),
        ({"intensities": (0.5, 0.2)}, "three"),
        ({"probabilities": (0.5, 0.3, 0.1, 0.1)}, "three"),
        ({"intensities": (0.5, 0.2, -0.1)}, "from 0 to 5"),
        ({"intensities": (6.0, 0.2, 0.0)}, "from 0 to 5"),
        ({"intensities": (nan, 0.2, 0.0)}, "from 0 to 5"),
        ({"intensities": (0.3, 0.2, 0.1)}, "signal > decoy"),
        ({"intensities": (0.5, 0.1, 0.1)}, "decoy > weakest"),
        ({"probabilities": (0.8, 0.2, 0.0)}, "probability of an intensity"),
        ({"probabilities": (0.5, 0.3, 0.1)}, "sum up to 1"),
        ({"key_basis": 0}, "key_basis"),
        ({"key_basis": 1}, "key_basis"),
    ],
)
def test_a_source_refuses(change: dict[str, object], message: str) -> None:
    Source(**SOURCE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Source(**{**SOURCE, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("efficiency", 1.1),
        ("efficiency", nan),
        ("dark_count", 0.6),
        ("dead_time", -1e-9),
        ("misalignment", 0.51),
        ("afterpulsing", 1),
        ("afterpulse_lifetime", 0),
    ],
)
def test_a_detector_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(DEFAULT.detector, **{name: value})


def test_a_fibre_and_an_eavesdropper_refuse() -> None:
    with pytest.raises(ValueError, match="length in km must be a number from 0 to 10000, not -1"):
        Fibre(-1, 0.2)
    with pytest.raises(ValueError, match="attenuation"):
        Fibre(1, nan)
    with pytest.raises(ValueError, match="intercept"):
        Eavesdropper(intercept=1.01)
    with pytest.raises(ValueError, match="splitting"):
        Eavesdropper(splitting=-0.01)
    with pytest.raises(ValueError, match="extra_loss"):
        Eavesdropper(extra_loss=inf)


def test_optics_have_no_eavesdropper_unless_told() -> None:
    optics = Optics(DEFAULT.source, DEFAULT.fibre, Detector(0.5, 0, 0, 0))
    assert optics.eavesdropper == Eavesdropper(0, 0, 0)
