"""The operator's view of one side of a link: counters, rates, a history, events. No keys."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kms_client.emulator.link.controls import Controls

__all__ = ["Block", "Figures"]

_WINDOW: Final = 10.0  # seconds that rates are averaged over, at least
_BLOCKS: Final = 2  # and so many blocks
_POINTS: Final = 300  # of the history, one a second
_DELIVERIES: Final = 100
_EVENTS: Final = 200


class Block(NamedTuple):
    """A finished block; sizes in bits."""

    number: int
    sifted: int  # of the key basis
    qber: float  # of the check basis
    key_errors: int  # that reconciliation has corrected
    leaked: int  # by reconciliation and verification
    secret: int  # 0 where it was thrown away
    keys: int  # that went into the stores
    discarded: int  # keys for which the stores had no room
    authentication: int  # bits that went into the reserve
    reason: str  # why it was thrown away; empty where it was kept


class Figures:
    """The figures of one side.

    Args:
        side: "a" or "b".
        controls: the switches, of the side that has them.
        stored: keys stored now, for masters at A and for masters at B.
        capacity: keys of each direction that there is room for.
        names: further entries at the top of the snapshot; JSON-able.
        clock: returns seconds since 1970.

    Attributes:
        optics: the known parameters of the optics; JSON-able.
        authentication: returns the figures of the authenticated channel: ``mode`` (text), ``reserve_keys``,
            ``reserve_target``, ``made_bits``, ``spent_bits``, ``bootstraps``, ``failures`` (numbers).
    """

    def __init__(
        self,
        side: str,
        *,
        controls: Controls | None = None,
        stored: Callable[[], tuple[int, int]] = lambda: (0, 0),
        capacity: int = 0,
        names: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start with empty counters."""
        self.side = side
        self.controls = controls
        self.optics: dict[str, Any] = {}
        self.authentication: Callable[[], dict[str, Any]] = dict
        self.state = "starting"
        self.note = ""
        self.kept = 0
        self.aborted: Counter[str] = Counter()
        self.keys_made = 0
        self.keys_discarded = 0
        self.secret_bits = 0
        self.sifted_bits = 0
        self.residual_errors = 0
        self.delivered: Counter[str] = Counter()
        self.last: Block | None = None
        self._stored = stored
        self._capacity = capacity
        self._names = names or {}
        self._clock = clock
        self._since = self._ended = clock()
        self._window = _WINDOW
        self._state_since = self._since
        self._progress: tuple[int, int] = (0, 0)
        self._recent: deque[tuple[float, int, int]] = deque()  # time, sifted bits, secret bits
        self._history: deque[dict[str, Any]] = deque(maxlen=_POINTS)
        self._deliveries: deque[dict[str, Any]] = deque(maxlen=_DELIVERIES)
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)

    # --- what happens

    def set_state(self, state: str, note: str = "") -> None:
        """Record the link's state; a new state is an event."""
        if (state, note) == (self.state, self.note):
            return
        self.state, self.note = state, note
        self._state_since = self._clock()
        self.event(f"{state}: {note}" if note else state)

    def event(self, text: str) -> None:
        """Record a notice for the operator. A repetition of the last one is counted, not listed."""
        if self._events and self._events[-1]["text"] == text:
            self._events[-1] = {"time": self._clock(), "text": text, "count": self._events[-1]["count"] + 1}
        else:
            self._events.append({"time": self._clock(), "text": text, "count": 1})

    def sifted(self, bits: int, so_far: int, wanted: int) -> None:
        """Record a frame of `bits` sifted bits; the block under way has `so_far` of those `wanted`."""
        self.sifted_bits += bits
        self._progress = (so_far, wanted)
        self._count(bits, 0)

    def block(self, block: Block) -> None:
        """Record a finished block."""
        self.last = block
        now = self._clock()
        self._window = max(_WINDOW, _BLOCKS * (now - self._ended))
        self._ended = now
        self._progress = (0, self._progress[1])
        if block.reason:
            self.aborted[block.reason] += 1
            self.event(f"block {block.number} thrown away, QBER {block.qber:.1%}: {block.reason}")
            return
        self.kept += 1
        self.secret_bits += block.secret
        self.keys_made += block.keys
        self.keys_discarded += block.discarded
        self._count(0, block.secret)

    def delivery(self, key_id: str, sae_id: str, role: str) -> None:
        """Record a key that was delivered to an SAE."""
        self.delivered[role] += 1
        self._deliveries.append({"time": self._clock(), "key_id": key_id, "sae_id": sae_id, "role": role})

    def tick(self) -> None:
        """Record a point of the history; call it about once a second."""
        sifted, secret = self._rates()
        for_a, for_b = self._stored()
        authentication = self.authentication()
        self._history.append(
            {
                "time": self._clock(),
                "qber": self._qber(),
                "sifted_bit_s": sifted,
                "secret_bit_s": secret,
                "for_a": for_a,
                "for_b": for_b,
                "authentication_made_bits": authentication.get("made_bits", 0),
                "authentication_spent_bits": authentication.get("spent_bits", 0),
            }
        )

    # --- what is shown

    @property
    def authentication_share(self) -> float | None:
        """Authentication keys spent, as a share of the secret key made; None before there is any."""
        spent = int(self.authentication().get("spent_bits", 0))
        return spent / self.secret_bits if self.secret_bits else None

    def snapshot(self) -> dict[str, Any]:
        """Return everything, as JSON-able objects."""
        sifted, secret = self._rates()
        for_a, for_b = self._stored()
        return {
            "side": self.side,
            **self._names,
            "time": self._clock(),
            "since": self._since,
            "state": self.state,
            "note": self.note,
            "state_since": self._state_since,
            "optics": self.optics,
            "authentication": {**self.authentication(), "share": self.authentication_share},
            "blocks": {
                "kept": self.kept,
                "aborted": self.aborted.total(),
                "reasons": dict(self.aborted),
                "residual_errors": self.residual_errors,
                "last": None if self.last is None else self.last._asdict(),
                "progress": list(self._progress),
            },
            "qber": self._qber(),
            "sifted_bit_s": sifted,
            "secret_bit_s": secret,
            "sifted_bits": self.sifted_bits,
            "secret_bits": self.secret_bits,
            "keys": {
                "made": self.keys_made,
                "discarded": self.keys_discarded,
                "for_a": for_a,
                "for_b": for_b,
                "capacity": self._capacity,
                "delivered": {role: self.delivered[role] for role in ("master", "slave")},
            },
            "history": list(self._history),
            "deliveries": list(self._deliveries),
            "events": list(self._events),
            "controls": None if self.controls is None else self.controls.snapshot(),
        }

    def _qber(self) -> float | None:
        return None if self.last is None else self.last.qber

    def _count(self, sifted: int, secret: int) -> None:
        self._recent.append((self._clock(), sifted, secret))

    def _rates(self) -> tuple[float, float]:
        """Return sifted and secret bits a second, over the last seconds, or blocks if these are slow."""
        now = self._clock()
        while self._recent and self._recent[0][0] <= now - self._window:
            self._recent.popleft()
        # In the first seconds there is less to average over.
        seconds = min(self._window, max(now - self._since, 1.0))
        sifted = sum(point[1] for point in self._recent) / seconds
        secret = sum(point[2] for point in self._recent) / seconds
        return sifted, secret
