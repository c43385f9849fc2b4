"""The protocol between both parties: keys that are equal or not there, whatever happens on the channels."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from kms_client.emulator.link.authentication.errors import ReserveEmpty
from kms_client.emulator.link.messages import Kind, LinkError, Reason
from kms_client.emulator.link.party import SecretKey, Settings, key_id
from kms_client.emulator.link.photonics.parameters import DEFAULT
from kms_client.emulator.link.postprocessing.finite_key import Security
from kms_client.emulator.link.postprocessing.verification import CHALLENGE_BYTES
from tests.support.link_memory import Cut, MemoryConversation, MemoryLink
from tests.support.sizes import sized

# Small blocks that still give keys: more check bits, and hardly any demand on the proof's certainty. A dead time takes
# most of the computing.
OPTICS = replace(
    DEFAULT,
    source=replace(DEFAULT.source, key_basis=0.5),
    detector=replace(DEFAULT.detector, dead_time=0),
)
SMALL = Settings(source=OPTICS.source, block_bits=10_000, security=Security(0.5, 0.5), reserve=8)

BLOCKS = sized(1000, 200)


@pytest.fixture
def link() -> MemoryLink:
    return MemoryLink(SMALL, OPTICS)


def both(link: MemoryLink, kept: int, aborted: int = 0) -> Callable[[], bool]:
    """Whether both sides have counted so many blocks, in all sessions."""
    return lambda: all(
        figures.kept >= kept and figures.aborted.total() >= aborted for figures in link.figures.values()
    )


def test_at_default_settings_keys_are_equal_and_authentication_costs_less_than_two_percent() -> None:
    link = MemoryLink(Settings())
    assert link.run(both(link, 2)) == [None, None]
    link.assert_equal()
    assert len(link.sink_a.keys) > 2000
    assert len(set(link.sink_a.keys.values())) == len(link.sink_a.keys)
    assert {uuid.UUID(text).version for text in link.sink_a.keys} == {8}
    assert {len(secret) for secret in link.sink_a.keys.values()} == {32}
    # Keys are shared out evenly.
    assert abs(len(link.sink_a.offered) - len(link.sink_a.held)) <= 1
    figures = link.figures["a"]
    assert 0 < link.reserve_a.spent_bits < 0.02 * figures.secret_bits
    assert link.line.optics.fibre.length == 20


def test_blocks_of_one_session_and_of_the_next(link: MemoryLink) -> None:
    for number in (3, 6):
        assert link.run(both(link, number)) == [None, None]
        link.assert_equal()
    first, second = link.figures["a"], link.figures["b"]
    assert (first.secret_bits, first.keys_made) == (second.secret_bits, second.keys_made)
    assert first.last == second.last
    # With a full reserve, what four messages have cost is put back from each block.
    assert first.last is not None
    assert first.last.authentication == 4 * 256


def test_intercepting_everything_never_gives_a_key_in_1000_blocks() -> None:
    """1000 at full size."""
    link = MemoryLink(replace(SMALL, block_bits=5_000), OPTICS)
    assert link.run(both(link, 1)) == [None, None]  # without her, blocks of this size can give keys
    kept, before, keys = link.figures["a"].kept, link.figures["a"].aborted.total(), link.sink_a.keys
    link.controls.change({"intercept": 1})
    end = both(link, kept, before + BLOCKS)
    while not end():
        for ended in link.run(end):
            # Blocks that come to nothing cost authentication keys, too, until the reserve is dry; then both bootstrap.
            assert ended is None or isinstance(ended, ReserveEmpty | Cut)
    for figures in link.figures.values():
        assert figures.kept == kept
        assert figures.aborted[Reason.QBER.text] >= 0.99 * BLOCKS
        assert figures.last is not None
        assert figures.last.qber == pytest.approx(0.25, abs=0.08)
    assert link.sink_a.keys == link.sink_b.keys == keys


def test_without_a_threshold_finite_key_analysis_alone_gives_no_key_either() -> None:
    link = MemoryLink(replace(SMALL, qber_threshold=0.45), OPTICS)
    link.controls.change({"intercept": 1})
    assert link.run(both(link, 0, 20)) == [None, None]
    assert link.sink_a.keys == link.sink_b.keys == {}
    for figures in link.figures.values():
        assert set(figures.aborted) <= {Reason.NOTHING_SECRET.text, Reason.RECONCILIATION.text}


def test_an_eavesdropper_who_goes_away_is_over(link: MemoryLink) -> None:
    link.controls.change({"intercept": 0.6})
    assert link.run(both(link, 0, 5)) == [None, None]
    assert link.figures["a"].kept == 0
    link.controls.change({"intercept": 0})
    assert link.run(both(link, 3, 5)) == [None, None]
    link.assert_equal()


def test_more_errors_in_the_key_basis_than_in_the_check_basis_are_noticed(link: MemoryLink) -> None:
    def alter(kind: Kind, data: bytes, last: bool) -> bytes:
        return struct.pack(">BI", Kind.DONE, 5000) if kind == Kind.DONE else data

    link.run(both(link, 0, 1), altering(bob=alter))
    assert link.figures["a"].aborted == link.figures["b"].aborted == {Reason.QBER.text: 1}


@pytest.mark.parametrize("capacity", [0, 5])
def test_keys_for_which_there_is_no_room_are_discarded_on_both_sides(capacity: int) -> None:
    link = MemoryLink(SMALL, OPTICS, capacity=capacity)
    assert link.run(both(link, 8)) == [None, None]
    link.assert_equal()
    assert len(link.sink_a.offered) == len(link.sink_a.held) == capacity
    assert link.figures["a"].keys_discarded == link.figures["b"].keys_discarded > 0


def test_production_pauses_until_there_is_room(link: MemoryLink) -> None:
    link.sink_a.open.clear()
    looks = iter(range(200))
    assert link.run(lambda: next(looks, None) is None) == [None, None]
    assert link.figures["b"].sifted_bits == 0
    link.sink_a.open.set()
    assert link.run(both(link, 1)) == [None, None]


# --- cuts


def cut_at(side: str, number: int) -> Callable[[MemoryConversation, MemoryConversation], None]:
    """Lose the message with this number of this side, and all after it."""

    def prepare(ours: MemoryConversation, theirs: MemoryConversation) -> None:
        end = ours if side == "a" else theirs

        def before(data: bytes, last: bool) -> bytes:
            if last and end.sent_tags == number:
                end.cut()
                raise Cut
            return data

        end.before_sending = before

    return prepare


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("number", range(5))
def test_a_cut_at_any_message_leaves_no_key_on_one_side_only(
    link: MemoryLink, side: str, number: int
) -> None:
    ended = link.run(lambda: False, cut_at(side, number))
    assert all(isinstance(error, Cut) for error in ended)
    before = link.figures["a"].kept
    assert link.run(both(link, before + 2)) == [None, None]
    link.assert_equal()
    assert link.figures["a"].kept == link.figures["b"].kept


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("number", range(5))
def test_so_does_a_side_that_has_forgotten_everything(link: MemoryLink, side: str, number: int) -> None:
    link.run(both(link, 1))
    link.run(lambda: False, cut_at(side, number))
    if side == "a":
        link.new_alice()
    else:
        link.new_bob()
    # The KMEs' own connection drops what is not in doubt and not at the other side.
    known, other = (link.sink_a, link.sink_b) if side == "b" else (link.sink_b, link.sink_a)
    for where in (known.held, known.offered):
        for text in list(where):
            if text not in known.doubt:
                del where[text]
    kept = max(figures.kept for figures in link.figures.values())
    assert link.run(both(link, kept + 2)) == [None, None]
    link.assert_equal()
    assert known.keys == other.keys != {}


# --- a peer that does not follow the protocol


def altering(
    alice: Callable[[Kind, bytes, bool], bytes] | None = None,
    bob: Callable[[Kind, bytes, bool], bytes] | None = None,
) -> Callable[[MemoryConversation, MemoryConversation], None]:
    """Let a side send something else, authenticated as its own."""

    def prepare(ours: MemoryConversation, theirs: MemoryConversation) -> None:
        for end, alter in ((ours, alice), (theirs, bob)):
            if alter is not None:
                end.before_sending = lambda data, last, alter=alter: alter(Kind(data[0]), data, last)  # type: ignore[misc]

    return prepare


def instead_of(wanted: Kind, data: Callable[[bytes], bytes]) -> Callable[[Kind, bytes, bool], bytes]:
    return lambda kind, sent, last: data(sent) if kind == wanted else sent


def final(**changes: int) -> Callable[[bytes], bytes]:
    """A final message with other numbers in it."""
    names = ("length", "material", "a_to_b", "b_to_a", "for_a", "for_b")

    def change(data: bytes) -> bytes:
        start = 1 + CHALLENGE_BYTES
        share = dict(zip(names, struct.unpack_from(">IHHHII", data, start), strict=True)) | changes
        return data[:start] + struct.pack(">IHHHII", *share.values()) + data[start + 18 :]

    return change


WRONG_FROM_ALICE: dict[str, tuple[Kind, Callable[[bytes], bytes], str]] = {
    "another kind": (Kind.FINAL, lambda data: bytes([Kind.CONFIRM]), "kind 9, FINAL was expected"),
    "nothing": (Kind.FINAL, lambda data: b"", "kind 0, FINAL was expected"),
    "cut short": (Kind.FINAL, lambda data: data[:40], "at least 66 bytes"),
    "short seed": (Kind.FINAL, lambda data: data[:-1], "seed"),
    "too long a key": (Kind.FINAL, final(length=100_000), "more key than is secret"),
    "too many keys": (Kind.FINAL, final(for_a=1000), "more key than is secret"),
    "another reserve": (Kind.FINAL, final(a_to_b=1), "reserves"),
    "no reason": (Kind.FINAL, lambda data: bytes([Kind.ABORT]), "without a reason"),
    "an unknown reason": (Kind.FINAL, lambda data: bytes([Kind.ABORT, 99]), "without a reason"),
    "short ready": (Kind.READY, lambda data: data[:-1], "88 bytes, not 87"),
}


@pytest.mark.parametrize("wrong", WRONG_FROM_ALICE)
def test_alice_does_not_follow_the_protocol(link: MemoryLink, wrong: str) -> None:
    kind, alter, text = WRONG_FROM_ALICE[wrong]
    _, ended = link.run(lambda: False, altering(alice=instead_of(kind, alter)))
    assert isinstance(ended, LinkError)
    assert text in str(ended)
    assert link.sink_b.keys == {}


def test_a_length_that_bob_does_not_find_secret(link: MemoryLink) -> None:
    def longer(data: bytes) -> bytes:
        start = 1 + CHALLENGE_BYTES
        [length] = struct.unpack_from(">I", data, start)
        return final(length=length + 8)(data)

    _, ended = link.run(lambda: False, altering(alice=instead_of(Kind.FINAL, longer)))
    assert isinstance(ended, LinkError)
    assert link.sink_b.keys == {}


@pytest.mark.parametrize(
    ("kind", "alter", "text"),
    [
        (Kind.DONE, lambda data: data + b"x", "how many errors"),
        (Kind.SIFT, lambda data: data[:-1], "too early"),
        (Kind.READY, lambda data: data + b"x", "88 bytes, not 89"),
    ],
)
def test_bob_does_not_follow_the_protocol(
    link: MemoryLink, kind: Kind, alter: Callable[[bytes], bytes], text: str
) -> None:
    ended, _ = link.run(lambda: False, altering(bob=instead_of(kind, alter)))
    assert isinstance(ended, LinkError | ValueError)
    assert text in str(ended)
    assert link.sink_a.keys == {}


def test_errors_left_after_reconciliation_are_found(link: MemoryLink) -> None:
    once = iter([True])

    def alter(kind: Kind, data: bytes, last: bool) -> bytes:
        if kind == Kind.FINAL and next(once, False):
            return data[:CHALLENGE_BYTES] + bytes([data[CHALLENGE_BYTES] ^ 1]) + data[1 + CHALLENGE_BYTES :]
        return data

    assert link.run(both(link, 1, 1), altering(alice=alter)) == [None, None]
    for figures in link.figures.values():
        assert figures.residual_errors == 1
        assert figures.aborted == {Reason.RESIDUAL_ERRORS.text: 1}
    link.assert_equal()


@pytest.mark.parametrize(("side", "kind"), [("a", Kind.ANSWER), ("b", Kind.QUESTION)])
def test_reconciliation_that_makes_no_sense_costs_the_block_only(
    link: MemoryLink, side: str, kind: Kind
) -> None:
    once = iter([True])

    def alter(sent: Kind, data: bytes, last: bool) -> bytes:
        return data + b"xyz" if sent == kind and next(once, False) else data

    prepare = altering(alice=alter) if side == "a" else altering(bob=alter)
    assert link.run(both(link, 1, 1), prepare) == [None, None]
    assert link.figures["a"].aborted == link.figures["b"].aborted == {Reason.RECONCILIATION.text: 1}
    link.assert_equal()


def test_the_smaller_store_decides() -> None:
    link = MemoryLink(SMALL, OPTICS, capacity_b=4)
    assert link.run(both(link, 5)) == [None, None]
    link.assert_equal()
    assert len(link.sink_a.offered) == len(link.sink_b.offered) == 4


# --- settings


def test_sides_with_different_settings_say_so() -> None:
    link = MemoryLink(SMALL, OPTICS, other_settings=replace(SMALL, qber_threshold=0.1))
    ended = link.run(lambda: False)
    assert all(isinstance(error, LinkError) and "other settings" in str(error) for error in ended)


@pytest.mark.parametrize(
    "change",
    [{"block_bits": 99}, {"qber_threshold": 0.5}, {"key_size": 100}, {"key_size": 0}, {"reserve": 7}],
)
def test_settings_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        replace(Settings(), **change)  # type: ignore[arg-type]


def test_key_ids_differ_and_are_the_same_again() -> None:
    ids = {
        key_id(session, block, position)
        for session in (b"a" * 16, b"b" * 16)
        for block in range(10)
        for position in range(10)
    }
    assert len(ids) == 200
    assert key_id(b"a" * 16, 1, 2) == key_id(b"a" * 16, 1, 2)


def test_no_repr_shows_a_key() -> None:
    assert repr([SecretKey("an-id", bytearray(b"secret"))]) == "[<SecretKey an-id>]"
