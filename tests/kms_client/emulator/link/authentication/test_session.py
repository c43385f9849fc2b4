"""The start of a session: modes, cuts at every offset, lost memories, and a thief of signing keys."""

from __future__ import annotations

import pytest

from kms_client.emulator.link.authentication.authenticators import Together
from kms_client.emulator.link.authentication.errors import AuthenticationFailed, SessionRefused
from kms_client.emulator.link.authentication.interceptor import ATTACKS
from kms_client.emulator.link.authentication.reserve import Direction, KeyReserve
from kms_client.emulator.link.authentication.session import LARGEST_GAP, Mode, Rebootstrap, Session
from tests.support.link_session import PKI, A, B, Pair, middle, secrets, started

pytestmark = pytest.mark.pure


def modes(pair: Pair) -> set[Mode | None]:
    return {session.mode for session in pair.sessions}


@pytest.mark.parametrize("kind", ["P-256", "P-384", "ML-DSA-65"])
def test_bootstrap_with_certificates_then_resume(kind: str) -> None:
    pair = Pair(PKI(kind).both())
    pair.connect()
    assert modes(pair) == {Mode.BOOTSTRAP}
    pair.say(A)
    pair.say(B)
    pair.fill()
    pair.say(B)
    pair.say(A)
    pair.connect()
    assert modes(pair) == {Mode.RESUME}
    pair.say(A)
    pair.say(B)
    assert all(reserve.spent_bits == 8 * (48 + 32 * 6) for reserve in pair.reserves)


def test_certificates_and_a_secret_together() -> None:
    pki, (one, two) = PKI(), secrets()
    pair = Pair((Together(pki.of("KME-A", "KME-B"), one), Together(pki.of("KME-B", "KME-A"), two)))
    pair.connect()
    pair.say(A)


@pytest.mark.parametrize("side", [A, B])
@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("phase", ["signatures", "secret", "one-time"])
def test_middle_at_the_start(phase: str, attack: str, frame: int, side: Direction) -> None:
    """Hello and proof are attacked: a side raises, or it waits; it never takes what the peer has not sent."""
    pair = started(phase)
    try:
        pair.connect(middle(attack, side, frame))
    except AuthenticationFailed:
        assert attack != "drop"
        return
    if (attack, frame) == ("replay", 1):
        # What comes behind the proof is for the channel, where it is in the way of the first message at the latest.
        with pytest.raises(AuthenticationFailed):
            pair.say(side)
        return
    assert attack in ("drop", "reorder")  # held back for ever is the same as dropped
    assert pair.sessions[side.opposite].channel is None


@pytest.mark.parametrize("side", [A, B])
@pytest.mark.parametrize("phase", ["signatures", "one-time", "dry"])
def test_cut_at_every_offset(phase: str, side: Direction) -> None:
    """Wherever a start is cut, the next one works, and no one-time key is ever used for two tags."""
    pair = started("signatures" if phase == "signatures" else "one-time")
    if phase == "dry":
        pair.bootstrap = secrets()
        pair.reserves[side].truncate(A, 0)
    tagged: list[bytes] = []
    take = KeyReserve.take

    def noted(self: KeyReserve, direction: Direction, number: int | None = None) -> bytes:
        key = take(self, direction, number)
        if self is pair.reserves[direction]:  # the sender of this direction
            tagged.append(key)
        return key

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyReserve, "take", noted)
        cut = Cut(0)
        while cut.cuts:
            cut = Cut(cut.length + 1)
            if phase == "one-time" and pair.reserves[A].level < 30:
                pair.fill((30, 30))
            pair.connect([cut, bytes] if side is A else [bytes, cut])
            pair.connect()
            pair.say(A)
            pair.say(B)
            expected = {"signatures": Mode.BOOTSTRAP, "one-time": Mode.RESUME, "dry": Mode.BOUND}[phase]
            assert modes(pair) == {expected}
    assert cut.length > 150
    assert len(tagged) == len(set(tagged))
    assert (len(tagged) > 4 * cut.length) is (phase == "one-time")


class Cut:
    """A wire that lets `length` bytes through, then nothing."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.cuts = length == 0
        self._left = length

    def __call__(self, data: bytes) -> bytes:
        self.cuts = self.cuts or len(data) > self._left
        passed, self._left = data[: self._left], max(0, self._left - len(data))
        return passed


class TestThief:
    """Whoever gets the signing keys of both sides, and the CA's, after the bootstrap, gains nothing."""

    @pytest.mark.parametrize("victim", [A, B])
    @pytest.mark.parametrize("dry", [False, True])
    def test_impersonates_at_the_next_session(self, victim: Direction, dry: bool) -> None:
        """With nothing but signing keys: the attacker says that the keys were lost."""
        pair = started("one-time")
        if dry:
            for side in (A, B):
                pair.reserves[victim].truncate(side, 0)
        thief = Session(
            victim.opposite, "fibre 1: KME-A - KME-B", KeyReserve(), pair.bootstrap[victim.opposite]
        )
        session = pair.session(victim)
        session.start()
        with pytest.raises(SessionRefused, match="lost the keys"):
            session.receive_data(thief.start())
        with pytest.raises(SessionRefused):
            session.receive_data(b"")
        assert session.channel is None

    @pytest.mark.parametrize("victim", [A, B])
    def test_claims_the_anchor(self, victim: Direction) -> None:
        """The thief has seen the anchor's name in a hello, and says that only the one-time keys are lost."""
        pair = started("one-time")
        thief = Session(
            victim.opposite, "fibre 1: KME-A - KME-B", KeyReserve(bytes(48)), pair.bootstrap[victim.opposite]
        )
        session = pair.session(victim)
        name = session._anchor_id()
        thief._anchor_id = lambda: name  # type: ignore[method-assign]
        hello = session.start()
        proof = session.receive_data(thief.start())
        assert session.mode is Mode.BOUND
        with pytest.raises(AuthenticationFailed, match="earlier key of the link"):
            session.receive_data(thief.receive_data(hello))
        assert proof
        assert session.channel is None

    def test_drains_the_reserve(self) -> None:
        """Starts that are cut again and again cost one-time keys; what follows is bound to the anchor."""
        pair = started("one-time")
        for _ in range(30):
            pair.connect([bytes, lambda data: data if len(data) > 100 else b""])
        assert Mode.RESUME not in modes(pair)
        pair.connect()
        assert modes(pair) == {Mode.BOUND}
        assert any("dry" in event for event in pair.events)
        pair.say(A)
        pair.say(B)

    def test_strips_the_anchor_from_both_hellos(self) -> None:
        pair = started("one-time")
        names = [pair.session(side)._anchor_id() for side in (A, B)]

        def strip(data: bytes) -> bytes:
            return data.replace(names[0], bytes(16))

        with pytest.raises(SessionRefused):
            pair.connect([strip, strip])


@pytest.mark.parametrize("lost", [A, B])
class TestLostMemory:
    def test_forbidden(self, lost: Direction) -> None:
        pair = started("one-time")
        pair.reserves[lost] = KeyReserve()
        with pytest.raises(SessionRefused, match="allow a new bootstrap"):
            pair.connect()

    def test_allowed(self, lost: Direction) -> None:
        pair = started("one-time")
        pair.rebootstrap = Rebootstrap.ALLOWED
        pair.reserves[lost] = KeyReserve()
        pair.connect()
        assert any("ATTENTION" in event for event in pair.events)
        assert all(reserve.anchor is None for reserve in pair.reserves)
        pair.fill()
        pair.say(A)

    def test_the_anchor_was_kept(self, lost: Direction) -> None:
        """A restarted process that has kept the anchor needs no permission."""
        pair = started("one-time")
        pair.reserves[lost] = KeyReserve(pair.reserves[lost].anchor)
        pair.connect()
        assert modes(pair) == {Mode.BOUND}
        pair.fill()
        pair.say(A)
        pair.say(B)
        pair.connect()
        assert modes(pair) == {Mode.RESUME}

    def test_the_first_block_came_to_one_side_only(self, lost: Direction) -> None:
        """Nothing was proven yet: no permission is needed."""
        pair = started("signatures")
        pair.fill(sides=(lost.opposite,))
        pair.connect()
        assert modes(pair) == {Mode.BOOTSTRAP}

    def test_a_later_block_came_to_one_side_only(self, lost: Direction) -> None:
        pair = started("one-time")
        pair.fill(sides=(lost.opposite,))
        pair.connect()
        assert modes(pair) == {Mode.RESUME}
        assert {reserve.end(A) for reserve in pair.reserves} == {20}
        pair.fill()
        for _ in range(30):
            pair.say(A)

    def test_dry_on_one_side(self, lost: Direction) -> None:
        pair = started("one-time")
        pair.reserves[lost].truncate(A, 0)
        pair.connect()
        assert modes(pair) == {Mode.BOUND}
        assert all(reserve.level == 0 for reserve in pair.reserves)


def test_both_lost_their_memory() -> None:
    pair = started("one-time")
    pair.reserves = [KeyReserve(), KeyReserve()]
    pair.connect()
    assert modes(pair) == {Mode.BOOTSTRAP}


def test_a_long_gap_is_not_resumed_over() -> None:
    pair = started("one-time")
    pair.fill((200, 200))
    pair.reserves[A].take(A, pair.reserves[A].next(A) + LARGEST_GAP)
    pair.connect()
    assert modes(pair) == {Mode.BOUND}


def test_settings_that_differ() -> None:
    pair = Pair((secrets()[0], secrets(bytes(48))[1]))
    with pytest.raises(AuthenticationFailed, match="same secret"):
        pair.connect()
    pair = Pair(secrets())
    session = pair.session(A)
    session.start()
    with pytest.raises(AuthenticationFailed, match="another link"):
        session.receive_data(Session(B, "fibre 2", KeyReserve(), secrets()[1]).start())
    for wire, words in (
        (pair.session(A).start(), "reflected"),
        (b"\0\0\0\1x", "no hello"),
        (b"\xff" * 4, "too many"),
    ):
        session = pair.session(A)
        session.start()
        with pytest.raises(AuthenticationFailed, match=words):
            session.receive_data(wire)


def test_messages_right_behind_the_proof() -> None:
    pair = Pair(secrets())
    a, b = pair.session(A), pair.session(B)
    hello_a, hello_b = a.start(), b.start()
    proof_a, proof_b = a.receive_data(hello_b), b.receive_data(hello_a)
    b.receive_data(proof_a)
    assert b.channel is not None
    a.receive_data(proof_b + b.channel.seal(b"early"))
    assert a.channel is not None
    assert a.channel.receive_data(b"") == [(b"early", True)]
