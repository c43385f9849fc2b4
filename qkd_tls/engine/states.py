"""States, events, the one table of transitions, and an engine's requests to its driver."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from qkd_tls.info import QKDInfo

__all__ = [
    "TRANSITIONS",
    "Action",
    "ChooseContext",
    "Established",
    "Event",
    "FetchKeys",
    "FetchKeysByID",
    "NeedData",
    "State",
    "Step",
]


class State(enum.Enum):
    """The states of a handshake. The first part of a name is the role."""

    CLIENT_START = "client: nothing sent"
    CLIENT_KEY = "client: waits for its KMS, for an associated connection"
    CLIENT_HELLO = "client: first TLS handshake"
    CLIENT_DISCOVER = "client: waits for the server's identity"
    CLIENT_OFFER_KEYS = "client: waits for its KMS, for an offer"
    CLIENT_OFFER = "client: waits for accept or reject"
    CLIENT_HYBRID = "client: hybrid handshake after a bootstrap"
    SERVER_HELLO = "server: waits for a ClientHello"
    SERVER_NAME = "server: waits for the program's choice of a context for the name asked for"
    SERVER_KEY = "server: waits for its KMS, for the key that a ClientHello names"
    SERVER_HANDSHAKE = "server: TLS handshake"
    SERVER_CONTROL = "server: waits for discover or offer"
    SERVER_OFFER_KEYS = "server: waits for its KMS, for the keys of an offer"
    SERVER_SKIP = "server: skips the ClientHello of a rejected pipelined offer"
    ESTABLISHED = "established"
    FAILED = "failed"

    # Members are singletons; Enum's own hash is a call of Python for each look-up in TRANSITIONS.
    __hash__ = object.__hash__


class Event(enum.Enum):
    """The events that move a handshake from state to state."""

    NO_KEY_NEEDED = "no association, or no KMS"
    KEY_AT_HAND = "association and key at hand"
    KEY_WANTED = "association, key to be fetched"
    NAMED = "ClientHello, and the program wants to see its server name"
    CHOSEN = "the program has chosen a context"
    KEYS = "the KMS gave keys"
    NO_KEYS = "the KMS failed, and policy lets go on"
    PSK_ACCEPTED = "TLS done, keyed by the hybrid PSK"
    PLAIN = "TLS done, the peer does not speak qkd-tls/1"
    BOOTSTRAP = "TLS done, qkd-tls/1 selected"
    BOOTSTRAP_UNKNOWN_PEER = "TLS done, qkd-tls/1 selected, server's SAE ID unknown"
    IDENTITY = "identity"
    DISCOVER = "discover"
    OFFER = "offer"
    ACCEPT = "accept"
    REJECT = "reject, and policy lets go on"
    REJECT_PIPELINED = "reject of a pipelined offer, and policy lets go on"
    SKIPPED = "ClientHello skipped"

    __hash__ = object.__hash__


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.CLIENT_START, Event.NO_KEY_NEEDED): State.CLIENT_HELLO,
    (State.CLIENT_START, Event.KEY_AT_HAND): State.CLIENT_HELLO,
    (State.CLIENT_START, Event.KEY_WANTED): State.CLIENT_KEY,
    (State.CLIENT_KEY, Event.KEYS): State.CLIENT_HELLO,
    (State.CLIENT_KEY, Event.NO_KEYS): State.CLIENT_HELLO,
    (State.CLIENT_HELLO, Event.PSK_ACCEPTED): State.ESTABLISHED,
    (State.CLIENT_HELLO, Event.PLAIN): State.ESTABLISHED,
    (State.CLIENT_HELLO, Event.BOOTSTRAP): State.CLIENT_OFFER_KEYS,
    (State.CLIENT_HELLO, Event.BOOTSTRAP_UNKNOWN_PEER): State.CLIENT_DISCOVER,
    (State.CLIENT_DISCOVER, Event.IDENTITY): State.CLIENT_OFFER_KEYS,
    (State.CLIENT_DISCOVER, Event.REJECT): State.ESTABLISHED,
    (State.CLIENT_OFFER_KEYS, Event.KEYS): State.CLIENT_OFFER,
    (State.CLIENT_OFFER_KEYS, Event.NO_KEYS): State.CLIENT_OFFER,
    (State.CLIENT_OFFER, Event.ACCEPT): State.CLIENT_HYBRID,
    (State.CLIENT_OFFER, Event.REJECT): State.ESTABLISHED,
    (State.CLIENT_HYBRID, Event.PSK_ACCEPTED): State.ESTABLISHED,
    (State.SERVER_HELLO, Event.NAMED): State.SERVER_NAME,
    (State.SERVER_NAME, Event.CHOSEN): State.SERVER_HELLO,
    (State.SERVER_HELLO, Event.NO_KEY_NEEDED): State.SERVER_HANDSHAKE,
    (State.SERVER_HELLO, Event.KEY_AT_HAND): State.SERVER_HANDSHAKE,
    (State.SERVER_HELLO, Event.KEY_WANTED): State.SERVER_KEY,
    (State.SERVER_KEY, Event.KEYS): State.SERVER_HANDSHAKE,
    (State.SERVER_KEY, Event.NO_KEYS): State.SERVER_HANDSHAKE,
    (State.SERVER_HANDSHAKE, Event.PSK_ACCEPTED): State.ESTABLISHED,
    (State.SERVER_HANDSHAKE, Event.PLAIN): State.ESTABLISHED,
    (State.SERVER_HANDSHAKE, Event.BOOTSTRAP): State.SERVER_CONTROL,
    (State.SERVER_CONTROL, Event.DISCOVER): State.SERVER_CONTROL,
    (State.SERVER_CONTROL, Event.OFFER): State.SERVER_OFFER_KEYS,
    (State.SERVER_CONTROL, Event.REJECT): State.ESTABLISHED,
    (State.SERVER_CONTROL, Event.REJECT_PIPELINED): State.SERVER_SKIP,
    (State.SERVER_OFFER_KEYS, Event.KEYS): State.SERVER_HELLO,
    (State.SERVER_OFFER_KEYS, Event.REJECT): State.ESTABLISHED,
    (State.SERVER_OFFER_KEYS, Event.REJECT_PIPELINED): State.SERVER_SKIP,
    (State.SERVER_SKIP, Event.SKIPPED): State.ESTABLISHED,
}
"""All transitions. In addition, an error leads from every state but ESTABLISHED to FAILED."""


@dataclass(frozen=True, slots=True)
class Step:
    """One transition, for observers. `role` is "client" or "server"."""

    role: str
    before: State
    event: Event
    after: State


@dataclass(frozen=True, slots=True)
class NeedData:
    """Send the engine's data, then feed it the transport's data."""


@dataclass(slots=True)
class FetchKeys:
    """Client: get `number` fresh keys to share with the peer's SAE (ETSI GS QKD 014 "Get key")."""

    peer_sae_id: str
    number: int


@dataclass(slots=True)
class FetchKeysByID:
    """Server: get the keys that the peer's SAE named (ETSI GS QKD 014 "Get key with key IDs")."""

    peer_sae_id: str
    key_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChooseContext:
    """Server: choose the settings to go on with, now that the server name (RFC 6066 3) is known or absent."""

    server_name: str | None


@dataclass(slots=True)
class Established:
    """The handshake is complete; `Engine.connection` carries the application's data."""

    info: QKDInfo


Action = NeedData | FetchKeys | FetchKeysByID | ChooseContext | Established
