"""The transport ends, anywhere: at every offset of every flight. Nobody hangs, and no secret is left behind.

At full size; else at every eighth one.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator

import pytest

from kms_client import KMSUnavailable
from qkd_tls.engine import FetchKeys, FetchKeysByID, State
from qkd_tls.errors import QKDUnavailable
from tests.support.memory import SAE_B, Conversation, Side, World, only_alerts, records
from tests.support.scenarios import SCENARIOS, Scenario, scenario
from tests.support.sizes import FULL, sized

Offsets = Callable[[bytes], range | list[int]]

STEP = sized(1, 8)


def every_offset(flight: bytes) -> range:
    return range(0, len(flight) + 1, STEP)


def telling_offsets(flight: bytes) -> range | list[int]:
    """All of a short flight; of a long one where a record or its header ends, one byte off, and half-way."""
    if len(flight) < 300:
        return every_offset(flight)
    found = {0}
    start = 0
    for record in records(flight):
        end = start + len(record)
        found.update((start + 1, start + 5, end - 1, end))
        if FULL:
            found.update((start + 4, start + 6, (start + end) // 2))
        start = end
    return sorted(offset for offset in found if offset <= len(flight))


def cuts(which: Scenario, offsets: Offsets) -> Iterator[tuple[World, Conversation]]:
    """The scenario again and again, cut at one place after another; both sides have seen the transport's end."""
    world = which.world()
    handshake = 0
    for receiver, flight in which.begin(world).each_flight():
        # What an established side receives is the application's business.
        handshake += not receiver.over
        receiver.deliver(flight)
    for number in range(handshake):
        place = 0
        while cut(conversation := which.begin(world), number, place, offsets):
            yield world, conversation
            place += 1


def cut(conversation: Conversation, number: int, place: int, offsets: Offsets) -> bool:
    """Run as far as the flight of this number and a place in it; False where the flight has no such place."""
    for receiver, flight in conversation.each_flight():
        if len(conversation.flights) <= number:
            receiver.deliver(flight)
            continue
        # Signatures differ in size by a byte or two, so the offsets are those of this very flight.
        found = offsets(flight)
        if place < len(found):
            receiver.deliver(flight[: found[place]])
            ends(receiver)
            ends(conversation.server if receiver is conversation.client else conversation.client)
            return True
        break
    conversation.hang_up()
    return False


def ends(side: Side) -> None:
    """The transport ends for one side: it says nothing more, but perhaps an alert, and keeps no secret."""
    side.flight()
    was_over = side.over
    association = side.engine._association
    side.end_of_stream()
    assert side.over
    last_words = side.flight()
    if side.error is None:
        return
    if not was_over:
        assert isinstance(side.error, ssl.SSLEOFError | QKDUnavailable)
        assert side.engine.state is State.FAILED
    assert only_alerts(last_words)
    assert side.engine._psk is None
    if association is not None and association.id not in side.engine._config.associations._by_id:
        assert not any(association.secret)
        assert association.announced == 0


class TestEnd:
    @pytest.mark.parametrize("name", ["bootstrap", "associated"])
    def test_at_every_offset(self, name: str) -> None:
        count = 0
        for world, conversation in cuts(scenario(name), every_offset):
            assert world.loose_keys() == []
            count += conversation.ends == ("SSLEOFError", "SSLEOFError")
        # Behind its Finished, nothing that a client's end meets is the engine's any more.
        assert count > {"bootstrap": 6900, "associated": 2900}[name] // STEP

    @pytest.mark.parametrize("which", SCENARIOS, ids=str)
    def test_where_something_begins_or_ends(self, which: Scenario) -> None:
        for world, _ in cuts(which, telling_offsets):
            assert world.loose_keys() == []

    def test_a_client_that_has_sent_nothing_yet(self) -> None:
        world = World()
        world.established("bootstrap")
        client = world.new_client()
        assert client.engine.next_action() == FetchKeys(SAE_B, 1)
        assert client.engine.data_to_send() == b""
        client.engine.receive_data(b"")
        with pytest.raises(ssl.SSLEOFError, match="waits for its KMS, for an associated connection"):
            client.engine.next_action()


class TestEndWhileTheKMSIsAsked:
    """The keys that come nevertheless are wiped, and so is an error forgotten."""

    @staticmethod
    def asking(world: World, role: str) -> Side:
        """The client or the server of a bootstrap at the moment when it wants keys."""
        conversation = world.conversation()
        for receiver, flight in conversation.each_flight():
            receiver.engine.receive_data(flight)
            wanted = FetchKeys if role == "client" else FetchKeysByID
            if isinstance(receiver.engine.next_action(), wanted):
                return receiver
            receiver.pump()
        raise AssertionError("nobody asked")

    @pytest.mark.parametrize("role", ["client", "server"])
    def test_keys(self, role: str) -> None:
        world = World()
        side = self.asking(world, role)
        action = side.engine.next_action()
        side.engine.receive_data(b"")
        if isinstance(action, FetchKeys):
            keys = world.kms[0].get_keys(action.peer_sae_id, action.number)
        else:
            assert isinstance(action, FetchKeysByID)
            keys = world.kms[1].get_keys_by_id(action.peer_sae_id, action.key_ids)
        side.engine.keys(keys)
        assert all(key.used for key in keys)
        assert side.pump().end == "SSLEOFError"
        assert len(world.stores[1]) == 0

    @pytest.mark.parametrize("role", ["client", "server"])
    def test_an_error(self, role: str) -> None:
        side = self.asking(World(), role)
        side.engine.receive_data(b"")
        side.engine.keys(KMSUnavailable("down"))
        assert side.pump().end == "SSLEOFError"

    @pytest.mark.parametrize("role", ["client", "server"])
    def test_giving_up(self, role: str) -> None:
        """The driver's deadline has passed; a client that holds keys or an association wipes them."""
        world = World()
        side = self.asking(world, role)
        side.engine.abort()
        assert side.pump().end == "SSLError"
        assert only_alerts(records(side.flight())[-1])
        assert len(world.stores[1]) == 0
