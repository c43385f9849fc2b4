"""docs/engine.md and its pictures are those of the table of transitions in the code."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ET
from types import ModuleType

import pytest

from qkd_tls.engine import TRANSITIONS, FetchKeys, FetchKeysByID, State
from tests.support.memory import Conversation
from tests.support.paths import DOCS
from tests.support.scenarios import scenario

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_diagram", DOCS / "engine_diagram.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "engine_diagram", module)
        spec.loader.exec_module(module)
    return module


def test_up_to_date(generator: ModuleType) -> None:
    """If this fails: python docs/engine_diagram.py."""
    for path, text in generator.files().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_every_state_and_transition_is_drawn(generator: ModuleType) -> None:
    drawn = [layout.states for layout in generator.LAYOUTS]
    assert frozenset().union(*drawn) == set(State) - {State.ESTABLISHED, State.FAILED}
    transitions = [
        (before, event, after)
        for layout in generator.LAYOUTS
        for (before, after), events in generator.arrows(layout).items()
        for event in events
    ]
    assert sorted(map(str, transitions)) == sorted(
        str((before, event, after)) for (before, event), after in TRANSITIONS.items()
    )


def test_pictures_are_well_formed_and_describe_themselves(generator: ModuleType) -> None:
    for path in DOCS.glob("_static/engine-*.svg"):
        root = ET.parse(path).getroot()
        assert root.get("role") == "img"
        description = root.find("{http://www.w3.org/2000/svg}desc")
        assert description is not None
        assert "established" in str(description.text)


def test_states_that_wait_for_the_kms(generator: ModuleType) -> None:
    """Those that the engine is in when it asks for keys."""
    bootstrap, associated = scenario("bootstrap"), scenario("associated")
    asking = {
        state for which in (bootstrap, associated) for state in _states_that_ask(which.begin(which.world()))
    }
    assert asking == generator.ASKS_KMS


def _states_that_ask(conversation: Conversation) -> set[State]:
    found: set[State] = set()
    client = conversation.client.engine
    if isinstance(client.next_action(), FetchKeys):
        found.add(client.state)
    for receiver, flight in conversation.each_flight():
        engine = receiver.engine
        if receiver.over:
            break
        engine.receive_data(flight)
        if isinstance(engine.next_action(), FetchKeys | FetchKeysByID):
            found.add(engine.state)
    return found


def test_a_page_without_places_for_the_tables(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match="0 places for the table of states"):
        generator.with_tables("# nothing")
