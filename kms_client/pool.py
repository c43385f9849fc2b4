"""Keys fetched ahead: a `KeyManager` around a `KeyManager`, so that callers need not wait for the KME.

`pool_stock` decides about one peer's keys, `breaker` when a KME that failed is asked again. This module has
the lock, the thread and the requests.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kms_client.breaker import Breaker, BreakerState
from kms_client.errors import KMSError, KMSProtocolError, KMSRequestError, KMSUnavailable, NoKeysLeft
from kms_client.forks import forget_in_children
from kms_client.keys import QKDKey, wipe_keys
from kms_client.manager import KeyManager, KMSStatus, check_number_and_size
from kms_client.pool_stock import KeyCounts, Marks, Order, Stock, is_permanent

__all__ = ["KeyPool", "PoolStatistics"]

_log = logging.getLogger("kms_client.pool")

_CLOSE_TIMEOUT = 10.0  # seconds that close() waits for a request under way
_MAX_REMEMBERED = 10_000  # IDs of fetched keys, to notice one that comes a second time


@dataclass(frozen=True)
class PoolStatistics:
    """The contents and the counters of a `KeyPool`, for metrics; no secrets."""

    pooled: int
    """Keys held now."""
    waiting: int
    """Callers who wait now."""
    peers: int
    """Peers that keys are kept for, or were asked for lately."""
    fetched: int
    """Keys that the KME has delivered to the pool."""
    delivered: int
    """Keys handed out."""
    expired: int
    """Keys wiped unused: they were too old, or their caller had gone."""
    possibly_lost: int
    """Keys requested in requests that failed, of which the KME may have delivered some."""
    requests: int
    """Requests for keys sent to the KME."""
    failures: int
    """Requests, for keys or status, that failed."""
    breaker: BreakerState
    """State of the circuit breaker towards the KME."""


class KeyPool:
    """A `KeyManager` that keeps keys of another one ready, for each peer that is asked for.

    Args:
        manager: the source of the keys; closed with the pool.
        size: of the pooled keys in bits. Keys of another size are asked for directly.
        low_water: keys of a peer below which more are fetched.
        high_water: keys of a peer that are fetched up to, in requests of at most the KME's `max_key_per_request`.
        max_age: seconds that a key is kept. Then it is lost: never handed out, and wiped as soon as no request is under
            way.
        timeout: seconds that a caller waits for keys at most.
        idle_after: seconds after which no keys are fetched ahead any more for a peer whose keys are not
            requested.
        peers: SAE IDs to fetch ahead for from the start, and always. Others are added when they are asked for.
        min_backoff: seconds before a KME that has failed is asked again; doubled with each failure.
        max_backoff: seconds, at most.
        clock: monotonic, in seconds.
        jitter: see `Breaker`.

    Raises:
        ValueError: an argument is impossible.

    One thread fetches for all peers, one request at a time: peers in turn, those with waiting callers first.
    Callers of one peer get keys in the order they came. If the KME has none (`NoKeysLeft`) or fails, they
    wait; the KME is asked again after a growing pause. A caller whose deadline comes before that gets the
    error at once. Errors that time does not heal (authentication, refused requests, invalid answers) go to
    the callers at once, too.

    A failure without an answer (refused, lost, timed out) counts against the KME and holds up all peers; one that the
    KME has answered counts against the peer it was about. After a failure the KME is first asked for its status, which
    takes no keys, then for one key.

    A forked child starts without keys and with a thread of its own. Every method may be called from any thread.
    """

    def __init__(
        self,
        manager: KeyManager,
        *,
        size: int = 256,
        low_water: int = 4,
        high_water: int = 16,
        max_age: float = 60.0,
        timeout: float = 10.0,
        idle_after: float = 600.0,
        peers: Iterable[str] = (),
        min_backoff: float = 0.2,
        max_backoff: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        check_number_and_size(1, size)
        if not 1 <= low_water <= high_water:
            raise ValueError(f"1 <= low_water <= high_water is needed, not {low_water} and {high_water}")
        if min(max_age, timeout, idle_after) <= 0:
            raise ValueError("max_age, timeout and idle_after must be more than 0 seconds")
        self._manager = manager
        self._size = size
        self._marks = Marks(low_water, high_water, max_age, idle_after)
        self._timeout = timeout
        self._always = tuple(dict.fromkeys(peers))
        self._backoff = min_backoff, max_backoff
        self._jitter = jitter
        self._clock = clock
        self._stocks: OrderedDict[str, Stock] = OrderedDict()  # who is next comes first
        self._start_afresh()
        forget_in_children(self)
        if self._always:
            with self._lock:
                self._work()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)  # for the thread
        self._thread: threading.Thread | None = None
        self._closed = False
        self._breaker = self._new_breaker()
        self._error: KMSError | None = None  # the last failure that counted against the KME
        self._tally = KeyCounts()
        self._requests = self._failures = self._possibly_lost = 0
        self._remembered: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._stocks = OrderedDict()
        for peer in self._always:
            self._add(peer, always=True)

    def forget(self) -> None:
        """Start afresh in a forked child: its parent goes on with the keys."""
        closed = self._closed
        for stock in self._stocks.values():
            stock.wipe()
        self._start_afresh()
        self._closed = closed

    @property
    def protocol(self) -> str:
        """The manager's protocol."""
        return self._manager.protocol

    @property
    def name(self) -> str:
        """The manager's name."""
        return self._manager.name

    @property
    def sae_id(self) -> str:
        """The manager's SAE ID."""
        return self._manager.sae_id

    def status(self, peer_sae_id: str) -> KMSStatus:
        """Return the manager's status, requested now; pooled keys are not counted in it."""
        return self._manager.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = None) -> list[QKDKey]:
        """Return `number` keys shared with `peer_sae_id`, as their master: at once if there are enough.

        Args:
            peer_sae_id: SAE ID of the slave.
            number: how many, 1 or more; also more than the KME gives at once.
            size: of each key in bits; None for the pool's. With another size than the pool's the manager is asked
                directly.

        Raises:
            NoKeysLeft, KMSTimeout, KMSUnavailable: no keys by the deadline; the text has the time waited and
                the last failure of the KME.
            KMSAuthenticationError, KMSRequestError, UnknownSAE, KMSProtocolError: as the KME answered the pool.
            KMSUnavailable: the pool is closed.
            ValueError: `number` or `size` is impossible.
        """
        check_number_and_size(number, size)
        if size is not None and size != self._size:
            return self._manager.get_keys(peer_sae_id, number, size)
        with self._lock:
            self._check_open()
            now = self._clock()
            stock = self._stocks.get(peer_sae_id)
            if stock is None:
                stock = self._add(peer_sae_id)
            keys = stock.take(number, now)
            if keys is not None:
                if self._due(stock, now):
                    self._work()
                return keys
            order = self._order(stock, number, now)
            self._work()
        return self._wait(peer_sae_id, stock, order)

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Return the manager's answer: the keys that a peer has chosen cannot be known ahead."""
        return self._manager.get_keys_by_id(peer_sae_id, key_ids)

    @property
    def statistics(self) -> PoolStatistics:
        """The contents of the pool now, and its counters so far in this process."""
        with self._lock:
            return PoolStatistics(
                pooled=sum(map(len, self._stocks.values())),
                waiting=sum(len(stock.orders) for stock in self._stocks.values()),
                peers=len(self._stocks),
                fetched=self._tally.fetched,
                delivered=self._tally.delivered,
                expired=self._tally.expired,
                possibly_lost=self._possibly_lost,
                requests=self._requests,
                failures=self._failures,
                breaker=self._breaker.state(self._clock()),
            )

    def close(self) -> None:
        """Wipe every key, turn callers away, end the thread, close the manager.

        Wait for a request under way, ten seconds at most; its keys are wiped when they come.
        """
        with self._lock:
            self._closed = True
            for stock in self._stocks.values():
                stock.wipe()
                stock.refuse(self._is_closed())
            self._stocks.clear()
            self._news.notify()
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_TIMEOUT)
        self._manager.close()

    def __repr__(self) -> str:
        """Show the KME and the number of keys."""
        return f"<KeyPool {self.name} {sum(map(len, self._stocks.values()))} keys>"

    # --- callers; except in _wait, the lock is held

    def _check_open(self) -> None:
        if self._closed:
            raise self._is_closed()

    def _is_closed(self) -> KMSUnavailable:
        return KMSUnavailable("this key pool is closed", kms=self.name, hint="Make a new KeyPool.")

    def _add(self, peer: str, *, always: bool = False) -> Stock:
        self._stocks[peer] = stock = Stock(
            peer, self.name, self._marks, self._new_breaker(), self._clock(), self._tally, always=always
        )
        return stock

    def _new_breaker(self) -> Breaker:
        return Breaker(1, *self._backoff, jitter=self._jitter)

    def _order(self, stock: Stock, number: int, now: float) -> Order:
        order = Order(number, now, now + self._timeout)
        stock.orders.append(order)
        for error, retry_at in ((self._error, self._breaker.retry_at), (stock.error, stock.breaker.retry_at)):
            if error is not None and is_permanent(error) and now < retry_at:
                stock.refuse(error)
        stock.refuse_hopeless(self._next_request(stock), now, self._reason(stock))
        return order

    def _wait(self, peer: str, stock: Stock, order: Order) -> list[QKDKey]:
        try:
            order.wait(order.deadline - self._clock())
        except BaseException:  # KeyboardInterrupt
            with self._lock:
                stock.withdraw(order, self._clock())
            raise
        with self._lock:
            outcome = order.outcome
            if outcome is None:
                now = self._clock()
                stock.withdraw(order, now)
                outcome = order.too_late(now, self._reason(stock), peer, self.name)
        if isinstance(outcome, KMSError):
            raise outcome
        return outcome

    def _reason(self, stock: Stock) -> KMSError | None:
        """Return the reason why there are no keys: the last failure that stands."""
        for error in (self._error, stock.error):
            if error is not None and not is_permanent(error):
                return error
        return None

    # --- what is to be done; the lock is held

    def _next_request(self, stock: Stock) -> float:
        return max(self._breaker.retry_at, stock.breaker.retry_at)

    def _wanted(self, stock: Stock, now: float) -> int:
        # Where somebody has to put something right, the KME is asked when a caller asks.
        return stock.wanted(now, ahead=not (self._error and is_permanent(self._error)))

    def _due(self, stock: Stock, now: float) -> bool:
        return self._wanted(stock, now) > 0 and self._next_request(stock) <= now

    def _work(self) -> None:
        """Have the thread look for work."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kms_client key pool", daemon=True)
            self._thread.start()
        self._news.notify()

    def _turn(self, now: float) -> str | None:
        """Return the next peer: of those that keys are due for, the one whose last turn is longest ago."""
        turn = None
        for peer, stock in self._stocks.items():
            if self._due(stock, now):
                if stock.orders:
                    return peer
                turn = turn or peer
        return turn

    def _pause(self, now: float) -> float | None:
        """Return the seconds until there may be something to do."""
        times = []
        for stock in self._stocks.values():
            if stock.expires_at is not None:
                times.append(stock.expires_at)
            if self._wanted(stock, now):
                times.append(self._next_request(stock))
        return max(0.0, min(times) - now) if times else None

    # --- the thread

    def _run(self) -> None:
        while True:
            try:
                work = self._wait_for_work()
                if work is None:
                    return
                self._fetch(*work)
            except Exception as error:  # noqa: BLE001 - nothing may end this thread while callers wait for it
                # Not the error's text, which might hold a key.
                frames = "".join(traceback.format_tb(error.__traceback__))
                _log.error(
                    "the key pool of %s has failed with %s:\n%s", self.name, type(error).__name__, frames
                )
                failure = KMSError(
                    f"the key pool has failed ({type(error).__name__})",
                    kms=self.name,
                    hint="See the log, and report it: this is a mistake in the program.",
                )
                with self._lock:
                    self._failed(None, failure)
                    self._news.wait(self._backoff[0])

    def _wait_for_work(self) -> tuple[str, Stock] | None:
        """Wait for the next peer; return it with its stock, or None once the pool is closed."""
        with self._lock:
            while not self._closed:
                now = self._clock()
                for peer, stock in list(self._stocks.items()):
                    stock.expire(now)
                    if not (len(stock) or stock.orders or stock.awake(now)):
                        del self._stocks[peer]
                turn = self._turn(now)
                if turn is not None:
                    self._stocks.move_to_end(turn)
                    return turn, self._stocks[turn]
                self._news.wait(self._pause(now))
        return None

    def _fetch(self, peer: str, stock: Stock) -> None:
        """Ask the KME for keys of one peer, first for its status if that is needed."""
        asked = 0
        try:
            stored = None
            if stock.asks_status:
                stock.max_request, stored = self._limits(peer)
            with self._lock:
                wanted = 0 if self._closed else self._wanted(stock, self._clock())
                number = stock.request(wanted, stored, probe=self._breaker.failures > 0)
                self._requests += number > 0
            if number == 0:  # whoever waited is gone
                return
            asked = number
            keys = self._manager.get_keys(peer, number, self._size)
        except KMSError as error:
            with self._lock:
                self._possibly_lost += asked * error.keys_may_be_lost
                self._failed(stock, error)
            return
        with self._lock:
            self._received(peer, stock, keys, number == wanted, stored is not None and number >= stored)

    def _limits(self, peer: str) -> tuple[int, int | None]:
        """Return the number of keys that the KME gives at once and has; 1, None for an invalid status."""
        try:
            status = self._manager.status(peer)
        except KMSProtocolError:
            return 1, None
        return max(1, status.max_key_per_request), status.stored_key_count

    def _received(self, peer: str, stock: Stock, keys: list[QKDKey], enough: bool, drained: bool) -> None:
        if self._closed:
            wipe_keys(keys)
            return
        self._breaker.succeeded()
        self._error = None
        new = []
        for key in keys:
            if (peer, key.key_id) in self._remembered:
                key.wipe()
            else:
                self._remembered[peer, key.key_id] = None
                new.append(key)
        while len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        stock.receive(new, self._clock(), enough=enough, drained=drained)
        if len(new) < len(keys):
            again = [key.key_id for key in keys if key not in new]
            self._failed(
                stock,
                KMSProtocolError(
                    "the KME delivered keys a second time; they were wiped",
                    kms=self.name,
                    peer=peer,
                    key_ids=again,
                    status=200,
                    hint="Ask the KME's vendor: a key must leave its store when it is delivered.",
                ),
            )

    def _failed(self, stock: Stock | None, error: KMSError) -> None:
        now = self._clock()
        self._failures += 1
        answered = error.status is not None or isinstance(error, (NoKeysLeft, KMSRequestError))
        if stock is not None and answered:
            if stock.error is None:
                _log.warning("no keys fetched ahead: %s", error)
            self._breaker.succeeded()
            self._error = None
            stock.failed(error, now)
            concerned = [stock]
        else:
            if self._error is None:
                _log.warning("no keys fetched ahead: %s", error)
            self._breaker.failed(now)
            self._error = error
            if stock is not None:
                # Another peer's requests may succeed, where the manager stands for several KMEs.
                stock.breaker.failed(now)
            concerned = list(self._stocks.values())
            for other in concerned:
                other.max_request = None
                if is_permanent(error):
                    other.refuse(error)
        for other in concerned:
            other.refuse_hopeless(self._next_request(other), now, self._reason(other))
