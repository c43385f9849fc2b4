"""The state that a `KeyPool` keeps for one peer: keys fetched ahead, and the callers who wait for some.

Pure: no lock, no thread, no KMS; time comes in as an argument, in seconds of a monotonic clock.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from kms_client.breaker import Breaker
from kms_client.errors import KMSError, KMSTimeout, KMSUnavailable, NoKeysLeft
from kms_client.keys import QKDKey, wipe_keys

__all__ = ["KeyCounts", "Marks", "Order", "Stock", "is_permanent"]


def is_permanent(error: KMSError) -> bool:
    """Return True if waiting does not help: a person has to correct something."""
    return not isinstance(error, KMSUnavailable)


@dataclass(frozen=True)
class Marks:
    """The number of keys kept for a peer, and for how long."""

    low: int  # fewer than these: fetch
    high: int  # up to these
    max_age: float  # seconds until a key is wiped
    idle_after: float  # seconds without a caller until no key is fetched ahead


@dataclass
class KeyCounts:
    """Numbers of keys, over all stocks of a pool."""

    fetched: int = 0
    delivered: int = 0
    expired: int = 0


class Order:
    """A caller who waits for `number` keys until `deadline`."""

    def __init__(self, number: int, now: float, deadline: float) -> None:
        self.number = number
        self.placed = now
        self.deadline = deadline
        self._outcome: list[QKDKey] | KMSError | None = None
        self._settled = threading.Event()

    @property
    def outcome(self) -> list[QKDKey] | KMSError | None:
        """The keys, or the error that explains their absence; None while that is open."""
        return self._outcome

    def settle(self, outcome: list[QKDKey] | KMSError) -> None:
        """Give the caller its keys or its error, and wake it."""
        self._outcome = outcome
        self._settled.set()

    def wait(self, seconds: float) -> None:
        """Return when the order is settled, or after this many seconds."""
        self._settled.wait(seconds)

    def too_late(self, now: float, reason: KMSError | None, peer: str, kms: str) -> KMSError:
        """Return the error of a missed deadline, of the kind of `reason` (the last failure, if any)."""
        keys = f"{self.number} key" + "s" * (self.number > 1)
        if now >= self.deadline:
            what = f"waited {now - self.placed:.3g} seconds for {keys}"
        else:
            what = (
                f"{keys} cannot be had within {self.deadline - self.placed:.3g} seconds,"
                " for until then the KME is not asked again"
            )
        if reason is None:
            return KMSTimeout(
                f"{what}: the KME has not delivered enough by then",
                kms=kms,
                peer=peer,
                hint="Check how fast the KME answers and the link makes keys, or give callers more time.",
                keys_may_be_lost=False,
            )
        kind = next(kind for kind in (NoKeysLeft, KMSTimeout, KMSUnavailable) if isinstance(reason, kind))
        return kind(
            f"{what}; the last failure was: {reason.message}",
            kms=reason.kms or kms,
            peer=peer,
            status=reason.status,
            hint=reason.hint,
            keys_may_be_lost=False,
        )


class Stock:
    """The keys of one peer, oldest first, and its orders, first come first served.

    Args:
        peer: its SAE ID.
        kms: name of the key manager, for errors.
        marks: how many keys, for how long.
        breaker: for failures that concern this peer alone.
        now: the time.
        tally: to count in.
        always: fetch ahead even if no key was requested for `marks.idle_after` seconds.

    Attributes:
        orders: of callers who wait.
        error: the last failure that concerned this peer alone; None after a success.
        max_request: keys that the KME gives at once, as its status said; None if the status has to be
            requested.
    """

    def __init__(
        self,
        peer: str,
        kms: str,
        marks: Marks,
        breaker: Breaker,
        now: float,
        tally: KeyCounts,
        *,
        always: bool = False,
    ) -> None:
        self.orders: deque[Order] = deque()
        self.error: KMSError | None = None
        self.breaker = breaker
        self.max_request: int | None = None
        self._peer, self._kms = peer, kms
        self._marks = marks
        self._tally = tally
        self._always = always
        self._asked_at = now
        self._filling = True
        self._scarce = False  # the KME had fewer keys than were asked for
        self._keys: deque[tuple[float, QKDKey]] = deque()  # with the time when it is too old

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, number: int, now: float) -> list[QKDKey] | None:
        """Return `number` keys for a caller who comes now; None if it has to wait."""
        self._asked_at = now
        self.expire(now)
        if self.orders or len(self._keys) < number:
            return None
        return self._pop(number)

    def withdraw(self, order: Order, now: float) -> None:
        """Drop the order of a caller that is gone; wipe keys it got, as it may or may not have seen them."""
        if isinstance(order.outcome, list):
            wipe_keys(order.outcome)
            self._tally.delivered -= order.number
            self._tally.expired += order.number
        elif order in self.orders:
            self.orders.remove(order)
            self._serve(now)  # those behind it may need fewer keys

    def expire(self, now: float) -> None:
        """Wipe the keys that are too old."""
        while self._keys and self._keys[0][0] <= now:
            self._keys.popleft()[1].wipe()
            self._tally.expired += 1

    @property
    def expires_at(self) -> float | None:
        """Time at which the oldest key is too old."""
        return self._keys[0][0] if self._keys else None

    def awake(self, now: float) -> bool:
        """Return True if keys are fetched ahead."""
        return self._always or now - self._asked_at < self._marks.idle_after

    def wanted(self, now: float, *, ahead: bool) -> int:
        """Return the number of keys to fetch: for the orders, and if `ahead` more up to the high mark."""
        number = sum(order.number for order in self.orders) - len(self._keys)
        if -number < self._marks.low:
            self._filling = True
        elif -number >= self._marks.high:
            self._filling = False
        if ahead and self._filling and self.awake(now) and not (self.error and is_permanent(self.error)):
            number += self._marks.high
        return max(0, number)

    @property
    def asks_status(self) -> bool:
        """True if the KME's status is to be requested before keys are."""
        return self.max_request is None or self._scarce

    def request(self, wanted: int, stored: int | None, *, probe: bool) -> int:
        """Return the number of keys to ask the KME for at once.

        Args:
            wanted: number of keys to be fetched.
            stored: number of keys that the KME reports; None if it was not asked.
            probe: True if the KME failed the last time.

        A KME that has just had too few keys is not asked for more than it reports. A KME whose report was
        wrong, that reports no keys, or that failed the last time is asked for a single key: keys that it
        takes out of its store while it fails are lost.
        """
        number = min(wanted, self.max_request or 1)
        if self._scarce and stored is not None:
            number = min(number, max(1, stored))
        if probe or self.breaker.failures > 1:
            number = min(number, 1)
        return number

    def receive(self, keys: Collection[QKDKey], now: float, *, enough: bool, drained: bool) -> None:
        """Take in keys that the KME delivered: all that were wanted (`enough`), or all it had (`drained`)."""
        self.breaker.succeeded()
        if self._scarce and drained and not enough:
            self.breaker.failed(now)  # no need to ask at once
        else:
            self.error = None
        if enough:
            self._scarce = False
        self._keys.extend((now + self._marks.max_age, key) for key in keys)
        self._tally.fetched += len(keys)
        self._serve(now)

    def failed(self, error: KMSError, now: float) -> None:
        """Note a failed request whose reason concerns this peer alone."""
        self.breaker.failed(now)
        self.error = error
        self.max_request = None
        self._scarce = self._scarce or isinstance(error, NoKeysLeft)
        if is_permanent(error):
            self.refuse(error)

    def refuse(self, error: KMSError) -> None:
        """Give every caller this error."""
        while self.orders:
            # A copy for each: the traceback of an exception is its thread's.
            self.orders.popleft().settle(copy.copy(error))

    def refuse_hopeless(self, next_request: float, now: float, reason: KMSError | None) -> None:
        """Give an error at once to the callers whose deadline comes before the KME is asked again."""
        hopeless = [order for order in self.orders if order.deadline < next_request]
        for order in hopeless:
            self.orders.remove(order)
            order.settle(order.too_late(now, reason, self._peer, self._kms))
        if hopeless:
            self._serve(now)

    def wipe(self) -> None:
        """Forget every key."""
        wipe_keys(key for _, key in self._keys)
        self._keys.clear()

    def _serve(self, now: float) -> None:
        self.expire(now)
        while self.orders and self.orders[0].number <= len(self._keys):
            order = self.orders.popleft()
            order.settle(self._pop(order.number))

    def _pop(self, number: int) -> list[QKDKey]:
        self._tally.delivered += number
        return [self._keys.popleft()[1] for _ in range(number)]
