"""Figures and switches of a link."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kms_client.emulator.link.controls import Controls
from kms_client.emulator.link.figures import Block, Figures

pytestmark = pytest.mark.pure

KEPT = Block(1, 1000, 0.01, 10, 120, 500, 1, 0, 244, "")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_new_link_has_nothing_to_show() -> None:
    snapshot = Figures("a").snapshot()
    assert (snapshot["side"], snapshot["state"], snapshot["qber"]) == ("a", "starting", None)
    assert snapshot["authentication"] == {"share": None}
    assert snapshot["blocks"]["last"] is None
    assert snapshot["controls"] is None
    json.dumps(snapshot)


def test_rates_are_of_the_last_ten_seconds() -> None:
    clock = Clock()
    figures = Figures("b", clock=clock)
    clock.now += 100
    figures.block(KEPT._replace(secret=0, reason="QBER"))
    figures.sifted(2000, 2000, 4000)
    figures.block(KEPT)
    clock.now += 9
    snapshot = figures.snapshot()
    assert (snapshot["sifted_bit_s"], snapshot["secret_bit_s"]) == (200, 50)
    clock.now += 1
    snapshot = figures.snapshot()
    assert (snapshot["sifted_bit_s"], snapshot["secret_bit_s"]) == (0, 0)
    assert (snapshot["sifted_bits"], snapshot["secret_bits"]) == (2000, 500)


def test_slow_blocks_are_averaged_over_two_of_them() -> None:
    clock = Clock()
    figures = Figures("a", clock=clock)
    for _ in range(5):
        clock.now += 100
        figures.sifted(1000, 1000, 1000)
        figures.block(KEPT)
    for _ in range(9):
        clock.now += 10
        snapshot = figures.snapshot()
        assert (snapshot["sifted_bit_s"], snapshot["secret_bit_s"]) == (10, 5)


def test_a_link_that_has_just_begun_is_averaged_over_what_there_is() -> None:
    clock = Clock()
    figures = Figures("a", clock=clock)
    clock.now += 2
    figures.sifted(1000, 1000, 4000)
    assert figures.snapshot()["sifted_bit_s"] == 500
    assert figures.snapshot()["blocks"]["progress"] == [1000, 4000]


def test_blocks_are_counted_with_the_reasons() -> None:
    figures = Figures("a")
    figures.block(KEPT)
    figures.block(KEPT._replace(number=2, qber=0.25, secret=0, keys=0, reason="QBER"))
    figures.block(KEPT._replace(number=3, qber=0.26, secret=0, keys=0, reason="QBER"))
    snapshot = figures.snapshot()
    blocks = snapshot["blocks"]
    assert (blocks["kept"], blocks["aborted"], blocks["reasons"]) == (1, 2, {"QBER": 2})
    assert blocks["last"]["number"] == 3
    assert (snapshot["qber"], snapshot["keys"]["made"]) == (0.26, 1)
    assert snapshot["events"][-1]["text"] == "block 3 thrown away, QBER 26.0%: QBER"


def test_the_share_of_authentication() -> None:
    figures = Figures("a")
    figures.authentication = lambda: {"mode": "one-time keys", "spent_bits": 5, "made_bits": 244}
    assert figures.authentication_share is None
    figures.block(KEPT)
    assert figures.snapshot()["authentication"]["share"] == 0.01
    assert figures.snapshot()["authentication"]["mode"] == "one-time keys"


def test_history_deliveries_and_events_are_bounded() -> None:
    figures = Figures("a", stored=lambda: (3, 4), capacity=9, names={"kme_id": "KME-A"})
    for number in range(400):
        figures.tick()
        figures.delivery(f"key-{number}", "SAE-A", "master")
        figures.event(f"event {number}")
    snapshot = figures.snapshot()
    assert (len(snapshot["history"]), len(snapshot["deliveries"]), len(snapshot["events"])) == (300, 100, 200)
    assert (snapshot["history"][-1]["for_a"], snapshot["history"][-1]["for_b"]) == (3, 4)
    assert snapshot["deliveries"][-1]["key_id"] == "key-399"
    assert snapshot["keys"]["delivered"] == {"master": 400, "slave": 0}
    assert (snapshot["kme_id"], snapshot["keys"]["capacity"]) == ("KME-A", 9)


def test_states_and_repeated_events_are_said_once() -> None:
    figures = Figures("a")
    figures.set_state("down", "no connection")
    figures.set_state("down", "no connection")
    figures.set_state("producing")
    for _ in range(3):
        figures.event("again")
    events = [(event["text"], event["count"]) for event in figures.snapshot()["events"]]
    assert events == [("down: no connection", 1), ("producing", 1), ("again", 3)]


def test_switches_tell_what_has_changed() -> None:
    controls = Controls(20)
    seen: list[dict[str, Any]] = []
    controls.on_change = seen.append
    controls.change({"intercept": 1, "length_km": 20, "middle": "drop", "paused": True})
    controls.change({"intercept": 1.0})
    assert seen == [{"intercept": 1.0, "middle": "drop", "paused": True}]
    assert Figures("a", controls=controls).snapshot()["controls"] == {
        "length_km": 20,
        "extra_loss_db": 0,
        "intercept": 1,
        "splitting": 0,
        "middle": "drop",
        "paused": True,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length_km", -1),
        ("length_km", float("nan")),
        ("extra_loss_db", 101),
        ("intercept", 1.5),
        ("splitting", True),
        ("splitting", "all"),
        ("middle", "burn"),
        ("middle", 1),
        ("paused", 1),
        ("on_change", 0),
    ],
)
def test_a_wrong_value_changes_nothing(name: str, value: object) -> None:
    controls = Controls(20)
    with pytest.raises(ValueError, match=name):
        controls.change({"extra_loss_db": 3, name: value})
    assert controls.snapshot() == Controls(20).snapshot()
