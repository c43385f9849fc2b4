"""The pure parts of the pool: one peer's keys and callers, and the circuit breaker, without threads or a KMS."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_client import (
    BreakerState,
    KMSAuthenticationError,
    KMSError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    QKDKey,
)
from kms_client.breaker import Breaker
from kms_client.pool_stock import KeyCounts, Marks, Order, Stock

pytestmark = pytest.mark.pure

_ids = itertools.count()


def keys(number: int) -> list[QKDKey]:
    return [QKDKey(f"key {next(_ids)}", b"x" * 32) for _ in range(number)]


def stock(low: int = 2, high: int = 5, max_age: float = 60, *, always: bool = False) -> Stock:
    breaker = Breaker(1, 1, 100, jitter=lambda: 0)
    return Stock("SAE-B", "kme", Marks(low, high, max_age, 600), breaker, 0, KeyCounts(), always=always)


def order(stock: Stock, number: int, now: float = 0, deadline: float = 10) -> Order:
    placed = Order(number, now, deadline)
    stock.orders.append(placed)
    return placed


def outcome(order: Order) -> list[QKDKey]:
    assert isinstance(order.outcome, list)
    return order.outcome


def error(order: Order) -> KMSError:
    assert isinstance(order.outcome, KMSError)
    return order.outcome


def receive(
    stock: Stock, number: int, now: float = 0, *, enough: bool = True, drained: bool = False
) -> list[QKDKey]:
    new = keys(number)
    stock.receive(new, now, enough=enough, drained=drained)
    return new


class TestBreaker:
    def test_opens_after_failures_in_a_row_and_for_longer_each_time(self) -> None:
        breaker = Breaker(2, 1, 5, jitter=lambda: 0)
        breaker.failed(0)
        breaker.succeeded()
        breaker.failed(0)
        assert breaker.state(0) is BreakerState.CLOSED
        assert breaker.acquire(0)
        now = 0.0
        for delay in (1, 2, 4, 5, 5):
            breaker.failed(now)
            assert breaker.retry_at == now + delay
            assert breaker.state(now + delay - 0.1) is BreakerState.OPEN
            assert not breaker.acquire(now + delay - 0.1)
            now += delay
            assert breaker.state(now) is BreakerState.HALF_OPEN
            assert breaker.acquire(now)
            assert not breaker.acquire(now)  # one probe
        breaker.released()
        assert breaker.acquire(now)
        breaker.succeeded()
        assert breaker.failures == 0
        assert breaker.state(now) is BreakerState.CLOSED
        assert breaker.acquire(now)
        assert breaker.acquire(now)

    def test_requests_that_fail_together_are_one_reason_to_open(self) -> None:
        breaker = Breaker(2, 1, 100, jitter=lambda: 0)
        for _ in range(20):
            breaker.failed(0)
        assert breaker.retry_at == 1
        assert breaker.failures == 20

    def test_jitter_shortens_by_up_to_half(self) -> None:
        for jitter, delay in ((0.0, 4.0), (0.5, 3.0), (1.0, 2.0)):
            breaker = Breaker(1, 4, 4, jitter=lambda jitter=jitter: jitter)  # type: ignore[misc]
            breaker.failed(10)
            assert breaker.retry_at == 10 + delay

    def test_a_year_of_failures(self) -> None:
        breaker, now = Breaker(1, 0.1, 15), 0.0
        for _ in range(5000):
            breaker.failed(now)
            assert 0 < breaker.retry_at - now <= 15
            now = breaker.retry_at

    @pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 2, 1)])
    def test_impossible_arguments(self, arguments: tuple[int, float, float]) -> None:
        with pytest.raises(ValueError, match="threshold must be 1 or more"):
            Breaker(*arguments)


class TestMarks:
    def test_fetched_up_to_the_high_mark_once_below_the_low_one(self) -> None:
        pool = stock(low=2, high=5)
        assert pool.wanted(0, ahead=True) == 5
        receive(pool, 3)
        assert pool.wanted(0, ahead=True) == 2
        receive(pool, 2)
        assert pool.wanted(0, ahead=True) == 0
        pool.take(3, 0)
        assert pool.wanted(0, ahead=True) == 0  # two are left: not below the low mark
        pool.take(1, 0)
        assert pool.wanted(0, ahead=True) == 4

    def test_callers_come_on_top(self) -> None:
        pool = stock(low=2, high=5)
        receive(pool, 5)
        order(pool, 7)
        assert pool.wanted(0, ahead=True) == 7
        assert pool.wanted(0, ahead=False) == 2
        pool = stock(low=2, high=5)
        order(pool, 7)
        assert pool.wanted(0, ahead=True) == 12
        assert pool.wanted(0, ahead=False) == 7

    def test_nothing_is_fetched_ahead_for_a_peer_that_nobody_asks_for(self) -> None:
        pool, always = stock(), stock(always=True)
        assert pool.wanted(599, ahead=True) == always.wanted(599, ahead=True) == 5
        assert pool.wanted(600, ahead=True) == 0
        assert always.wanted(600, ahead=True) == 5
        assert pool.take(1, 700) is None
        assert pool.wanted(1000, ahead=True) == 5

    def test_old_keys_are_wiped(self) -> None:
        pool = stock(max_age=60)
        old, young = receive(pool, 2, now=0), receive(pool, 1, now=30)
        assert pool.expires_at == 60
        pool.expire(59.9)
        assert len(pool) == 3
        pool.expire(60)
        assert [key.used for key in (*old, *young)] == [True, True, False]
        assert pool.expires_at == 90
        pool.wipe()
        assert young[0].used
        assert pool.expires_at is None

    def test_no_old_key_is_handed_out(self) -> None:
        pool = stock(max_age=60)
        [old] = receive(pool, 1, now=0)
        assert pool.take(1, 60) is None
        [other] = receive(pool, 1, now=0)
        first, second = order(pool, 2), order(pool, 1)
        pool.withdraw(first, 60)
        assert second.outcome is None
        assert old.used
        assert other.used
        receive(pool, 1, now=60)
        assert not outcome(second)[0].used


class TestOrders:
    def test_first_come_first_served(self) -> None:
        pool = stock()
        first, second = order(pool, 3), order(pool, 1)
        fetched = receive(pool, 2)
        assert first.outcome is second.outcome is None
        assert pool.take(1, 0) is None  # nobody overtakes
        fetched += receive(pool, 3)
        assert outcome(first) + outcome(second) == fetched[:4]
        assert pool.take(1, 0) == fetched[4:]

    def test_whoever_goes_makes_room(self) -> None:
        pool = stock()
        first, second = order(pool, 3), order(pool, 1)
        receive(pool, 2)
        pool.withdraw(first, 0)
        assert len(outcome(second)) == 1
        pool.withdraw(first, 0)  # a second time does nothing
        assert not pool.orders

    def test_keys_of_a_caller_that_is_gone_are_wiped(self) -> None:
        pool = stock()
        gone = order(pool, 2)
        fetched = receive(pool, 3)
        pool.withdraw(gone, 0)
        assert [key.used for key in fetched] == [True, True, False]
        assert pool._tally == KeyCounts(fetched=3, delivered=0, expired=2)

    def test_errors_that_time_does_not_heal_go_to_all_at_once(self) -> None:
        pool = stock()
        callers = [order(pool, 1), order(pool, 2)]
        pool.failed(KMSAuthenticationError("no", kms="kme", peer="SAE-B", status=401), 0)
        assert not pool.orders
        one, other = map(error, callers)
        assert one is not other  # each thread raises its own
        assert str(one) == str(other)
        assert (one.kms, one.peer, one.status) == ("kme", "SAE-B", 401)
        assert pool.wanted(0, ahead=True) == 0
        order(pool, 2)
        assert pool.wanted(0, ahead=True) == 2

    def test_those_without_hope_are_told_at_once(self) -> None:
        pool = stock()
        hopeless, hopeful = order(pool, 3, deadline=9), order(pool, 1, deadline=11)
        receive(pool, 1, enough=False)
        assert hopeful.outcome is None
        pool.refuse_hopeless(10, 0, NoKeysLeft("none stored", kms="kme", status=503))
        assert isinstance(error(hopeless), NoKeysLeft)
        assert str(error(hopeless)) == (
            "3 keys cannot be had within 9 seconds, for until then the KME is not asked again; the last failure was:"
            " none stored (KMS kme; peer SAE SAE-B; HTTP status 503)."
            " Wait for the QKD link to make more keys, or ask for fewer."
        )
        assert len(outcome(hopeful)) == 1

    @pytest.mark.parametrize("kind", [NoKeysLeft, KMSTimeout, KMSUnavailable])
    def test_the_deadline_gives_an_error_of_the_kind_of_the_last_failure(self, kind: type[KMSError]) -> None:
        late = Order(1, 5, 15).too_late(15.02, kind("so it was", kms="kme"), "SAE-B", "pool")
        assert type(late) is kind
        assert late.summary == (
            "waited 10 seconds for 1 key; the last failure was: so it was (KMS kme; peer SAE SAE-B)"
        )
        assert not late.keys_may_be_lost

    def test_the_deadline_without_any_failure(self) -> None:
        late = Order(2, 0, 1).too_late(1, None, "SAE-B", "kme")
        assert type(late) is KMSTimeout
        assert "waited 1 seconds for 2 keys: the KME has not delivered enough by then" in str(late)
        assert not late.keys_may_be_lost


class TestRequests:
    def test_at_most_what_the_kme_gives_at_once(self) -> None:
        pool = stock()
        assert pool.asks_status
        pool.max_request = 4
        assert not pool.asks_status
        assert pool.request(10, None, probe=False) == 4
        assert pool.request(3, 0, probe=False) == 3  # what a KME says it has counts where it had too few
        assert pool.request(0, 100, probe=False) == 0
        assert pool.request(3, None, probe=True) == 1

    def test_a_kme_without_keys_is_asked_for_what_it_says_it_has(self) -> None:
        pool = stock()
        pool.max_request = 4
        pool.failed(NoKeysLeft("none"), 0)
        assert pool.asks_status
        pool.max_request = 4
        assert pool.asks_status
        assert pool.request(10, 3, probe=False) == 3
        assert pool.request(10, 0, probe=False) == 1
        receive(pool, 3, 0, enough=False, drained=True)
        assert pool.breaker.retry_at == 1  # and not at once
        assert isinstance(pool.error, NoKeysLeft)
        receive(pool, 2, 1, enough=False)
        assert pool.asks_status
        receive(pool, 2, 1, enough=True)
        assert not pool.asks_status
        assert pool.error is None

    def test_a_kme_whose_word_did_not_hold_is_asked_for_one_key(self) -> None:
        pool = stock()
        for now in (0, 1):
            pool.failed(NoKeysLeft("none"), now)
        assert pool.breaker.retry_at == 1 + 2
        pool.max_request = 4
        assert pool.request(10, 1000, probe=False) == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["order", "order", "receive", "withdraw", "expire", "fail", "hopeless"]),
            st.integers(1, 6),
        ),
        max_size=60,
    )
)
def test_no_key_twice_none_forgotten_and_nobody_overtaken(steps: list[tuple[str, int]]) -> None:
    pool = stock(max_age=20)
    fetched: list[QKDKey] = []
    taken: list[QKDKey] = []
    placed: list[Order] = []
    for now, (step, number) in enumerate(steps):
        match step:
            case "order":
                if (got := pool.take(number, now)) is None:
                    placed.append(order(pool, number, now, now + 10))
                else:
                    assert not pool.orders
                    taken += got
            case "receive":
                fetched += receive(pool, number, now, enough=number % 2 == 0, drained=number % 3 == 0)
            case "withdraw" if pool.orders:
                pool.withdraw(pool.orders[number % len(pool.orders)], now)
            case "expire":
                pool.expire(now)
            case "fail":
                pool.failed(NoKeysLeft("none") if number % 2 else KMSUnavailable("down"), now)
            case "hopeless":
                pool.refuse_hopeless(pool.breaker.retry_at, now, pool.error)
        # Whoever waits has waited less long than anybody who was served, and none waits in vain.
        served = [entry for entry in placed if isinstance(entry.outcome, list)]
        assert all(late.placed >= done.placed for done in served for late in pool.orders)
        assert not pool.orders or pool.orders[0].number > len(pool)
    delivered = taken + [key for entry in placed if isinstance(entry.outcome, list) for key in entry.outcome]
    ids = [key.key_id for key in delivered]
    assert len(set(ids)) == len(ids) == pool._tally.delivered
    assert not any(key.used for key in delivered)
    assert len(fetched) == pool._tally.fetched == len(ids) + pool._tally.expired + len(pool)
    assert sum(key.used for key in fetched) == pool._tally.expired
