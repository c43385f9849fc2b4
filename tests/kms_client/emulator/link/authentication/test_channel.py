"""The channel of a session: what a man in the middle can do to its messages, in every phase and both directions."""

from __future__ import annotations

import copy

import pytest

from kms_client.emulator.link.authentication.channel import HEADER, LARGEST_PART, MOST_PARTS, ClassicalChannel
from kms_client.emulator.link.authentication.errors import AuthenticationFailed, ChannelError, ReserveEmpty
from kms_client.emulator.link.authentication.interceptor import ATTACKS, Interceptor
from kms_client.emulator.link.authentication.reserve import Direction
from tests.support.link_session import PKI, A, B, Pair, started

pytestmark = pytest.mark.pure

PHASES = ("signatures", "secret", "one-time", "resumed")


@pytest.mark.parametrize("side", [A, B])
@pytest.mark.parametrize("phase", PHASES)
class TestMiddle:
    @pytest.mark.parametrize("attack", ATTACKS)
    def test_attack_on_a_message(self, phase: str, side: Direction, attack: str) -> None:
        """One message is attacked; it or the next one fails, and the channel stays closed."""
        pair = started(phase)
        interceptor = Interceptor(attack, first=2)
        interceptor._frames = 2  # the session's start went by before it came
        receiver, sender = pair.channel(side.opposite), pair.channel(side)
        before = receiver.received
        wire = interceptor.feed(sender.seal(b"first"))
        if attack == "drop":
            # Who drops everything is only noticed by the silence.
            assert (wire, receiver.receive_data(wire)) == (b"", [])
            interceptor.attack = "off"
        wire += interceptor.feed(sender.seal(b"second"))
        with pytest.raises(AuthenticationFailed, match="not authentic"):
            receiver.receive_data(wire + interceptor.feed(sender.seal(b"third")))
        assert interceptor.touched == (1 if attack == "drop" else 3)
        assert receiver.received - before <= 1  # the one that was repeated
        with pytest.raises(AuthenticationFailed):
            receiver.receive_data(b"")
        with pytest.raises(AuthenticationFailed):
            receiver.seal(b"answer")

    def test_every_byte_counts(self, phase: str, side: Direction) -> None:
        pair = started(phase)
        wire = pair.channel(side).seal_part(b"ab") + pair.channel(side).seal(b"c")
        step = 1 if len(wire) < 200 else 29
        for offset in range(0, len(wire), step):
            clone = twin(pair.channel(side.opposite))
            changed = wire[:offset] + bytes([wire[offset] ^ 0x40]) + wire[offset + 1 :]
            try:
                got = clone.receive_data(changed)
            except AuthenticationFailed:
                continue
            assert not any(part.final for part in got)  # waits for more that never comes

    def test_reflected(self, phase: str, side: Direction) -> None:
        pair = started(phase)
        with pytest.raises(AuthenticationFailed):
            pair.channel(side).receive_data(pair.channel(side).seal(b"to you"))

    def test_of_another_session(self, phase: str, side: Direction) -> None:
        pair = started(phase)
        wire = pair.channel(side).seal(b"old")
        pair.connect()
        with pytest.raises(AuthenticationFailed):
            pair.channel(side.opposite).receive_data(wire)


def twin(channel: ClassicalChannel) -> ClassicalChannel:
    """The same channel with the same reserve once more, to try something out on."""
    shared = {id(one): one for one in channel._bootstrap.values() if one is not None}
    return copy.deepcopy(channel, shared)


@pytest.mark.parametrize("phase", PHASES)
def test_messages_in_parts_and_slices(phase: str) -> None:
    pair = started(phase)
    sender, receiver = pair.channel(A), pair.channel(B)
    wire = sender.seal_part(b"one") + sender.seal_part(b"") + sender.seal(b"two") + sender.seal(b"")
    got = [part for byte in wire for part in receiver.receive_data(bytes([byte]))]
    assert got == [(b"one", False), (b"", False), (b"two", True), (b"", True)]
    assert receiver.one_time is (phase == "resumed" or phase == "one-time")
    assert sender.session_id == receiver.session_id
    assert len(sender.session_id) == 16


def test_one_tag_for_all_parts_of_a_message() -> None:
    pair = started("resumed")
    spent = pair.reserves[A].spent_keys
    for _ in range(100):
        pair.channel(B).receive_data(pair.channel(A).seal_part(bytes(100)))
    pair.say(A)
    assert pair.reserves[A].spent_keys == spent + 1


@pytest.mark.parametrize("attack", ["swap", "leave out", "change", "join"])
def test_parts_moved(attack: str) -> None:
    """Parts are provisional: the change is found at once, or by the tag of the last part."""
    pair = started("resumed")
    sender, receiver = pair.channel(A), pair.channel(B)
    one, two, last = sender.seal_part(b"1"), sender.seal_part(b"2"), sender.seal(b"3")
    wire = {
        "swap": two + one + last,
        "leave out": one + last,
        "change": one + two[:-1] + b"x" + last,
        "join": HEADER.pack(1, receiver.received, 0, 2, 0) + b"12" + last,
    }[attack]
    with pytest.raises(AuthenticationFailed):
        receiver.receive_data(wire)


def test_no_bootstrap_proof_after_a_one_time_tag() -> None:
    """Whoever has the signing keys by now cannot go back to signatures, in neither direction."""
    pair = Pair(PKI().both())
    pair.connect()
    stolen = [twin(pair.channel(side)) for side in (A, B)]  # without one-time keys, with signing keys
    pair.fill()
    for side in (A, B):
        pair.say(side)
        stolen[side].sent = pair.channel(side).sent
    for side in (A, B):
        with pytest.raises(AuthenticationFailed, match="one-time tags are due"):
            pair.channel(side.opposite).receive_data(stolen[side].seal(b"forged"))


def test_the_reserve_runs_dry() -> None:
    pair = started("signatures")
    pair.fill((2, 5))
    pair.say(A)
    pair.say(A)
    with pytest.raises(ReserveEmpty, match="start a new session"):
        pair.channel(A).seal(b"third")
    with pytest.raises(ReserveEmpty):
        pair.channel(A).receive_data(b"")


def test_wrong_key_number_and_sizes_are_refused() -> None:
    pair = started("resumed")
    receiver = pair.channel(B)
    number = receiver.received

    def frame(kind: int, size: int, proof: bytes) -> bytes:
        return HEADER.pack(kind, number, 0, size, len(proof)) + bytes(min(size, 10)) + proof

    for wire in (
        frame(3, 1, (99).to_bytes(8, "big") + bytes(16)),
        frame(3, 1, bytes(7)),
        frame(9, 1, b""),
        frame(1, 1, b"proof"),
        frame(1, LARGEST_PART + 1, b""),
        HEADER.pack(2, number, 0, 1, (1 << 16) + 1),
    ):
        with pytest.raises(AuthenticationFailed):
            twin(receiver).receive_data(wire)


def test_too_much_to_send() -> None:
    pair = started("secret")
    with pytest.raises(ValueError, match="too many"):
        pair.channel(A).seal(bytes(LARGEST_PART + 1))
    pair.channel(A)._out = [b""] * MOST_PARTS
    with pytest.raises(ValueError, match="too many"):
        pair.channel(A).seal_part(b"")


def test_message_numbers_end() -> None:
    pair = started("secret")
    pair.channel(A).sent = (1 << 64) - 1
    with pytest.raises(ChannelError, match="start a new session"):
        pair.channel(A).seal(b"")


def test_forgery_bound_adds_up() -> None:
    pair = started("resumed")
    receiver = pair.channel(B)
    before = receiver.forgery_bound
    pair.say(A, bytes(1000))
    one = receiver.forgery_bound - before
    assert 8 * 1000 / 16 / 2**106 < one < 8 * 1500 / 16 / 2**106
    pair.say(A, bytes(1000))
    assert receiver.forgery_bound == pytest.approx(before + 2 * one)
