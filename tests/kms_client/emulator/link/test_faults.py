"""A link under real faults: processes killed, connections torn, a cable cut; clients fetch keys all the time."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kms_client import KMSError
from tests.support.link_processes import Link, Pairs, SideProcess, running_link
from tests.support.patience import eventually
from tests.support.sizes import sized

ROUNDS = sized(6, 3)
TEARS = sized(8, 4)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    with running_link(tmp_path / "pki", "--buffer", "400") as running:
        yield running


def figures(side: SideProcess) -> dict[str, Any]:
    with urllib.request.urlopen(side.ready["page"] + "figures", timeout=20) as answer:
        [snapshot] = json.load(answer)["sides"]
    return dict(snapshot)


def compare(pairs: Pairs) -> None:
    """No key on one side only or different on both, but for error answers."""
    assert pairs.slaves.items() <= pairs.masters.items()
    lost = len(pairs.masters) - len(pairs.slaves)
    assert lost <= sum(number for text, number in pairs.refusals.items() if text.startswith("slave"))
    assert {text.partition(": ")[2] for text in pairs.refusals} <= {
        "KMSUnavailable",
        "KMSTimeout",
        "NoKeysLeft",
        "UnknownKey",
    }


def test_sides_are_killed_at_any_moment(link: Link) -> None:
    pairs = Pairs(link)
    chance = random.Random(2026)
    try:
        for _ in range(ROUNDS):
            pairs.wait_for_new(5)
            time.sleep(chance.uniform(0, 0.4))  # any moment of a block
            side = chance.choice([link.a, link.b])
            side.kill()
            side.start()
        pairs.wait_for_new(40)
    finally:
        pairs.stop()
    compare(pairs)
    assert pairs.refusals  # something did go wrong, and was said


def test_connections_torn_at_any_moment_lose_no_key(link: Link) -> None:
    pairs = Pairs(link)
    chance = random.Random(2027)
    try:
        for _ in range(TEARS):
            pairs.wait_for_new(20)
            link.cable.tear()
            time.sleep(chance.uniform(0, 0.5))
        pairs.wait_for_new(40)
    finally:
        pairs.stop()
    compare(pairs)
    # The KMEs have a connection of their own: what was stored could be delivered all the time, to both.
    assert pairs.masters == pairs.slaves
    assert set(pairs.refusals) <= {"master: NoKeysLeft"}
    a, b = figures(link.a), figures(link.b)
    assert a["blocks"]["kept"] > 0
    assert (a["authentication"]["bootstraps"], b["authentication"]["bootstraps"]) == (1, 1)


def test_a_cable_that_is_cut_and_mended(link: Link) -> None:
    pairs = Pairs(link)
    try:
        pairs.wait_for_new(20)
        link.cable.cut()
        eventually(lambda: figures(link.a)["keys"]["for_a"] == figures(link.a)["keys"]["for_b"] == 0)
        with pytest.raises(KMSError, match="not enough keys"):
            link.a.client(link.pki).get_keys("SAE-B")
        assert link.a.client(link.pki).status("SAE-B").stored_key_count == 0
        link.cable.mend()
        pairs.wait_for_new(50)
    finally:
        pairs.stop()
    compare(pairs)
    assert pairs.masters == pairs.slaves


def test_a_full_store_pauses_both_sides_alike(link: Link) -> None:
    eventually(lambda: figures(link.a)["state"] == "full")
    master, slave = link.a.client(link.pki), link.b.client(link.pki)
    # Nothing is made any more, and both KMEs say how much there is.
    kept = figures(link.a)["blocks"]["kept"]
    eventually(lambda: figures(link.b)["blocks"]["kept"] == kept)
    counts = master.status("SAE-B").stored_key_count, slave.status("SAE-A").stored_key_count
    assert counts == (figures(link.b)["keys"]["for_a"], figures(link.a)["keys"]["for_b"])
    assert master.status("SAE-B").max_key_count == 400
    assert 400 - 400 // 16 < min(counts) <= max(counts) <= 400
    # Room is made, and used.
    for _ in range(4):
        for key in master.get_keys("SAE-B", number=20):
            key.wipe()
    eventually(lambda: figures(link.a)["blocks"]["kept"] > kept and figures(link.a)["state"] == "full")
    assert figures(link.b)["blocks"]["kept"] == figures(link.a)["blocks"]["kept"]
    assert figures(link.b)["keys"]["discarded"] == figures(link.a)["keys"]["discarded"]
    master.close()
    slave.close()
