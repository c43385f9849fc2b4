"""Two engines that talk through memory: the whole flight at once, in pieces, or cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kms_client import KeyManager, KMSError
from qkd_tls.engine import Engine, Established, FetchKeys, FetchKeysByID, NeedData
from qkd_tls.info import QKDInfo


@dataclass
class Side:
    """An engine, its key manager, and how it ended."""

    engine: Engine
    manager: KeyManager | None = None
    info: QKDInfo | None = None
    error: Exception | None = None

    def pump(self) -> bytes:
        """Let it do all that it can without more bytes; returns what it sends."""
        while True:
            try:
                action = self.engine.next_action()
            except OSError as error:
                self.error = error
                break
            match action:
                case FetchKeys(peer, number):
                    self._answer(lambda: self._kms.get_keys(peer, number))  # noqa: B023
                case FetchKeysByID(peer, key_ids):
                    self._answer(lambda: self._kms.get_keys_by_id(peer, key_ids))  # noqa: B023
                case Established(info):
                    self.info = info
                    break
                case NeedData():
                    break
        return self.engine.data_to_send()

    @property
    def _kms(self) -> KeyManager:
        assert self.manager is not None
        return self.manager

    def _answer(self, call: Callable[[], list]) -> None:  # type: ignore[type-arg]
        try:
            self.engine.keys(call())
        except KMSError as error:
            self.engine.keys(error)

    @property
    def over(self) -> bool:
        return self.info is not None or self.error is not None


@dataclass
class Conversation:
    """What went over the wire: (who sent, bytes), one entry a flight."""

    client: Side
    server: Side
    flights: list[tuple[str, bytes]] = field(default_factory=list)

    def run(self, piece: int | None = None) -> Conversation:
        """Exchange flights until nobody has anything to send; `piece` bytes are delivered at a time."""
        while True:
            sent = False
            for name, side, other in (("client", self.client, self.server), ("server", self.server, self.client)):
                data = side.pump()
                if not data:
                    continue
                sent = True
                self.flights.append((name, data))
                deliver(other, data, piece)
            if not sent:
                return self

    def hang_up(self) -> None:
        """Both ends see the end of the stream, as they would when nobody sends any more."""
        for side in (self.client, self.server):
            if not side.over:
                side.engine.receive_data(b"")
                side.pump()

    @property
    def round_trips(self) -> float:
        """Flights until the client may send application data, in round trips."""
        return len(self.flights) / 2


def deliver(side: Side, data: bytes, piece: int | None) -> None:
    step = piece or len(data)
    reply = b""
    for start in range(0, len(data), step):
        if side.info is not None:
            side.engine.connection.feed(data[start : start + step])
        else:
            side.engine.receive_data(data[start : start + step])
            if side.over or start + step < len(data):
                # Answer the KMS in between; what it wants to send waits for the next flight.
                reply += side.pump() if piece else b""
    if reply:
        # Give it back: the caller asks for the next flight.
        side.engine._out[:0] = reply
