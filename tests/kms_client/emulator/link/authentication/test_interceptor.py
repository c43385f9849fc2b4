"""The emulated man in the middle: he does to whole frames what he is told to, however the bytes come."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kms_client.emulator.link.authentication.interceptor import ATTACKS, Interceptor
from tests.support.link_session import A, B, started

pytestmark = pytest.mark.pure


def start_frame(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


def stream() -> list[bytes]:
    """The frames of one direction of a session: hello, proof, three messages."""
    channel = started("one-time").channel(A)
    return [
        start_frame(b"hello"),
        start_frame(b"proof"),
        *(channel.seal(text) for text in (b"1", b"2", b"3")),
    ]


EXPECTED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "off": lambda frames: frames,
    "drop": lambda frames: [],
    "replay": lambda frames: [frame for frame in frames for _ in range(2)],
    "reorder": lambda frames: [frames[1], frames[0]],
}


@pytest.mark.parametrize("slices", [1, 7, 1 << 16])
@pytest.mark.parametrize("attack", EXPECTED)
def test_deeds(attack: str, slices: int) -> None:
    frames = stream()
    interceptor = Interceptor(attack, first=2)
    data = b"".join(frames)
    got = b"".join(interceptor.feed(data[at : at + slices]) for at in range(0, len(data), slices))
    assert got == b"".join([*frames[:2], *EXPECTED[attack](frames[2:])])
    assert interceptor.touched == (0 if attack == "off" else 3)


@pytest.mark.parametrize("attack", ["change", "inject"])
def test_bits_that_nobody_sent(attack: str) -> None:
    frames = stream()
    got = Interceptor(attack, first=4).feed(b"".join(frames))
    assert got.startswith(b"".join(frames[:4]))
    rest = got.removeprefix(b"".join(frames[:4]))
    assert rest != frames[4]
    assert rest.endswith(frames[4]) == (attack == "inject")


def test_he_can_stop_and_gives_back_what_he_held() -> None:
    frames = stream()
    interceptor = Interceptor("reorder", first=2)
    assert interceptor.feed(b"".join(frames[:3])) == b"".join(frames[:2])
    interceptor.attack = "off"
    assert interceptor.feed(frames[3]) == frames[2] + frames[3]


def test_he_can_do_all_that_is_on_offer() -> None:
    for attack in ATTACKS:
        pair = started("one-time")
        wire = Interceptor(attack)
        wire._frames = 2  # the session's start went by
        message = pair.channel(B).seal(b"text")
        assert wire.feed(message) != message
