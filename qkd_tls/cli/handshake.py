"""A handshake shown while it happens: a line for each step of the engine and for each request to the KME."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kms_client import KeyManager, KMSError, KMSStatus, QKDKey
from qkd_tls.cli.terminal import printable
from qkd_tls.engine import Event, State, Step

__all__ = ["Handshake", "TimelineEntry", "Watch", "describe_step"]

_WITH_CERTIFICATES: Final = "ClientHello sent: a handshake with certificates"
_NOT_NEEDED_OR_LOST: Final = "no hybrid PSK that this server knows: going on with certificates"
_AGREED: Final = "established: both sides hold the same QKD key"
_REJECTED: Final = "rejected: established without a QKD key"

_TEXTS: Final[dict[tuple[State, Event], str]] = {
    (State.CLIENT_START, Event.NO_KEY_NEEDED): _WITH_CERTIFICATES,
    (State.CLIENT_START, Event.KEY_AT_HAND): "ClientHello sent: associated, with an announced key",
    (
        State.CLIENT_START,
        Event.KEY_WANTED,
    ): "there is an association with this server: a fresh QKD key is needed",
    (State.CLIENT_KEY, Event.KEYS): "ClientHello sent: associated, with this key",
    (State.CLIENT_KEY, Event.NO_KEYS): _WITH_CERTIFICATES + ", without a QKD key",
    (State.CLIENT_HELLO, Event.PSK_ACCEPTED): _AGREED,
    (
        State.CLIENT_HELLO,
        Event.PLAIN,
    ): "server authenticated by its certificate; established without a QKD key",
    (State.CLIENT_HELLO, Event.BOOTSTRAP): "bootstrap: server authenticated by its certificate",
    (State.CLIENT_HELLO, Event.BOOTSTRAP_UNKNOWN_PEER): (
        "bootstrap: server authenticated by its certificate; asking for its SAE ID"
    ),
    (State.CLIENT_DISCOVER, Event.IDENTITY): "identity: the server has named its SAE ID",
    (State.CLIENT_DISCOVER, Event.REJECT): _REJECTED,
    (State.CLIENT_OFFER_KEYS, Event.KEYS): "offer sent: the key's ID",
    (State.CLIENT_OFFER_KEYS, Event.NO_KEYS): "the server is told that there is no key",
    (State.CLIENT_OFFER, Event.ACCEPT): "accept: the server has fetched the key too; hybrid handshake",
    (State.CLIENT_OFFER, Event.REJECT): _REJECTED,
    (State.CLIENT_HYBRID, Event.PSK_ACCEPTED): _AGREED,
    (State.SERVER_HELLO, Event.NAMED): "ClientHello received: choosing a context by the server name",
    (State.SERVER_NAME, Event.CHOSEN): "context chosen",
    (State.SERVER_HELLO, Event.NO_KEY_NEEDED): "ClientHello received: a handshake with certificates",
    (State.SERVER_HELLO, Event.KEY_AT_HAND): "ClientHello received: it names a key that is at hand",
    (State.SERVER_HELLO, Event.KEY_WANTED): "ClientHello received: it names a key of an association",
    (State.SERVER_KEY, Event.KEYS): "the key of the ClientHello is here",
    (State.SERVER_KEY, Event.NO_KEYS): _NOT_NEEDED_OR_LOST,
    (State.SERVER_HANDSHAKE, Event.PSK_ACCEPTED): _AGREED,
    (
        State.SERVER_HANDSHAKE,
        Event.PLAIN,
    ): "established without a QKD key: the client does not speak qkd-tls/1",
    (
        State.SERVER_HANDSHAKE,
        Event.BOOTSTRAP,
    ): "bootstrap: TLS with certificates is complete; waiting for an offer",
    (State.SERVER_CONTROL, Event.DISCOVER): "discover: the client has asked for this server's SAE ID",
    (State.SERVER_CONTROL, Event.OFFER): "offer received: a key's ID",
    (State.SERVER_CONTROL, Event.REJECT): _REJECTED,
    (State.SERVER_CONTROL, Event.REJECT_PIPELINED): "reject sent",
    (State.SERVER_OFFER_KEYS, Event.KEYS): "accept sent; waiting for the hybrid handshake",
    (State.SERVER_OFFER_KEYS, Event.REJECT): _REJECTED,
    (State.SERVER_OFFER_KEYS, Event.REJECT_PIPELINED): "reject sent",
    (State.SERVER_SKIP, Event.SKIPPED): _REJECTED,
}


def describe_step(step: Step) -> str:
    """Describe a step of the engine in plain words, on one line."""
    text = _TEXTS.get((step.before, step.event))
    # A later version's steps are better shown in the engine's own words than not at all.
    return f"{step.event.value}: {step.after.value}" if text is None else text


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """An event: milliseconds since the start, the layer ("TCP", "TLS" or "KME"), and a text."""

    milliseconds: float
    what: str
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Return the entry's members in the JSON."""
        return {"milliseconds": round(self.milliseconds, 3), "what": self.what, "text": self.text}

    def __str__(self) -> str:
        return f"{self.milliseconds:8.1f} ms  {self.what}  {self.text}"


@dataclass(slots=True)
class Handshake:
    """The events of one handshake so far. `show` is called with each line, in the handshake's thread."""

    show: Callable[[TimelineEntry], None]
    start: float = field(default_factory=time.perf_counter)
    """The start on `time.perf_counter`."""
    lines: list[TimelineEntry] = field(default_factory=list)
    kme_milliseconds: float = 0.0
    """Milliseconds spent waiting for this side's KME."""

    @property
    def milliseconds(self) -> float:
        """Milliseconds since the start."""
        return 1000 * (time.perf_counter() - self.start)

    def add(self, what: str, text: str) -> None:
        """Note an event that happens now."""
        line = TimelineEntry(self.milliseconds, what, printable(text))
        self.lines.append(line)
        self.show(line)


class Watch:
    """An observer of all handshakes of a context; it notes those in a thread that has called `of`."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextlib.contextmanager
    def of(self, handshake: Handshake) -> Iterator[None]:
        """Note this thread's events within the block under this handshake."""
        self._local.handshake = handshake
        try:
            yield
        finally:
            self._local.handshake = None

    @property
    def current(self) -> Handshake | None:
        """The handshake of this thread."""
        return getattr(self._local, "handshake", None)

    def step(self, step: Step) -> None:
        """Note a step; for `QKDContext.observer`."""
        if self.current is not None:
            self.current.add("TLS", describe_step(step))

    def manager(self, manager: KeyManager) -> KeyManager:
        """Return the same key manager, watched."""
        return _WatchedManager(manager, self)


class _WatchedManager:
    """A key manager whose requests and answers are noted; never the keys."""

    def __init__(self, manager: KeyManager, watch: Watch) -> None:
        self._manager, self._watch = manager, watch
        self.protocol, self.name, self.sae_id = manager.protocol, manager.name, manager.sae_id

    def status(self, peer_sae_id: str) -> KMSStatus:
        return self._manager.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        with self._asking(f"for {_keys(number)} shared with {peer_sae_id}") as answer:
            answer += self._manager.get_keys(peer_sae_id, number, size)
        return answer

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        what = f"key {key_ids[0]}" if len(key_ids) == 1 else f"{len(key_ids)} keys by their IDs"
        with self._asking(f"for {what} shared with {peer_sae_id}") as answer:
            answer += self._manager.get_keys_by_id(peer_sae_id, key_ids)
        return answer

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[list[QKDKey]]:
        handshake = self._watch.current
        keys: list[QKDKey] = []
        if handshake is None:
            yield keys
            return
        handshake.add("KME", f"asking {self.name} {what}")
        begin = time.perf_counter()
        outcome = "interrupted", ""
        try:
            yield keys
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            outcome = "answered", f": key {keys[0].key_id}{more}"
        except KMSError as error:
            outcome = "failed", f": {error.message}"
            raise
        finally:
            milliseconds = 1000 * (time.perf_counter() - begin)
            handshake.kme_milliseconds += milliseconds
            handshake.add("KME", f"{outcome[0]} after {milliseconds:.1f} ms{outcome[1]}")


def _keys(number: int) -> str:
    return "a key" if number == 1 else f"{number} keys"
