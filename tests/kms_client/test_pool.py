"""`KeyPool` on real KMEs: real threads, real HTTPS, KMEs that are slow, empty, off or wrong."""

from __future__ import annotations

import inspect
import logging
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kms_client
from kms_client import (
    BreakerState,
    KeyManager,
    KeyPool,
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    LocalKeyManager,
    NoKeysLeft,
    QKDKey,
    UnknownSAE,
)
from kms_client.emulator import Limits, RunningPair, run_pair
from kms_client.emulator.kme import server_context
from tests.support.key_managers import Call, Watched, agree
from tests.support.kme_server import ScriptedKME, client_of, container, http, spellings
from tests.support.paths import DOCS
from tests.support.patience import PATIENCE, eventually

PEERS = [f"PEER-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kmes")


@pytest.fixture(scope="module")
def quick_kmes(directory: Path) -> Iterator[RunningPair]:
    with run_pair(
        directory, rate=4000, more_saes={"b": PEERS}, limits=Limits(max_key_per_request=20)
    ) as pair:
        yield pair


@pytest.fixture
def kmes(quick_kmes: RunningPair) -> Iterator[RunningPair]:
    """A link that makes many keys."""
    yield quick_kmes
    quick_kmes.faults("a").delay = 0


@contextmanager
def pooled(manager: KeyManager, **settings: Any) -> Iterator[tuple[KeyPool, Watched]]:
    watched = Watched(manager)
    pool = KeyPool(watched, **settings)
    try:
        yield pool, watched
    finally:
        pool.close()
    assert watched.closed
    assert watched.at_once <= 1  # the KME has one request at a time
    assert pool._thread is None or not pool._thread.is_alive()


class TestWarm:
    def test_keys_are_there_before_they_are_needed(self, kmes: RunningPair) -> None:
        slave = kmes.client("b")
        with pooled(kmes.client("a"), high_water=50, peers=["SAE-B"]) as (pool, watched):
            manager: KeyManager = pool  # for the type checker
            assert isinstance(manager, KeyManager)
            assert (pool.protocol, pool.name, pool.sae_id) == ("etsi-014", kmes.url_a, "SAE-A")
            eventually(lambda: pool.statistics.pooled == 50)
            assert watched.calls == [("status", "SAE-B", 0)] + [
                ("get_keys", "SAE-B", number) for number in (20, 20, 10)
            ]
            with watched.held():
                keys = pool.get_keys("SAE-B", 46, 256)
            assert {key.kms for key in keys} == {kmes.url_a}
            agree(keys, slave, "SAE-A")
            assert pool.statistics.pooled == 4  # which is not below the low mark
            agree(pool.get_keys("SAE-B"), slave, "SAE-A")
            eventually(lambda: pool.statistics.pooled == 50)
            counts = pool.statistics
            assert (counts.fetched, counts.delivered, counts.requests) == (97, 47, 6)
            assert repr(pool) == f"<KeyPool {kmes.url_a} 50 keys>"
        assert pool.statistics.pooled == 0
        slave.close()

    def test_more_keys_than_the_kme_gives_at_once(
        self, kmes: RunningPair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("kms_client.pool._MAX_REMEMBERED", 8)
        slave = kmes.client("b")
        with pooled(kmes.client("a"), low_water=1, high_water=1) as (pool, watched):
            agree(pool.get_keys("SAE-B", 45), slave, "SAE-A")
            assert watched.numbers[:3] == [20, 20, 6]
            assert len(pool._remembered) == 8
        slave.close()

    def test_what_is_not_pooled_goes_to_the_manager(self, kmes: RunningPair) -> None:
        other = kmes.client("b")
        with pooled(kmes.client("a")) as (pool, watched):
            [key] = pool.get_keys("SAE-B", 1, 512)
            assert key.size == 512
            assert pool.status("SAE-B").max_key_per_request == 20
            asked = other.get_keys("SAE-A", 2)
            agree(asked, pool, "SAE-B")
            assert [call for call, _, _ in watched.calls] == ["get_keys", "status", "get_keys_by_id"]
            for number, size in ((0, None), (1, 12)):
                with pytest.raises(ValueError, match="must be"):
                    pool.get_keys("SAE-B", number, size)
        other.close()

    def test_eight_threads_never_share_a_key(self, kmes: RunningPair) -> None:
        slave = kmes.client("b")
        got: list[QKDKey] = []
        with pooled(kmes.client("a"), high_water=40) as (pool, _):

            def take() -> list[QKDKey]:
                mine: list[QKDKey] = []
                for number in range(60):
                    mine += pool.get_keys("SAE-B", 1 + number % 3)
                return mine

            for call in [Call(take) for _ in range(8)]:
                assert call.join().error is None
                got += call.keys or []
            assert set(Counter(key.key_id for key in got).values()) == {1}
            assert len(got) == pool.statistics.delivered == 8 * 120
        for start in range(0, len(got), 100):
            agree(got[start : start + 100], slave, "SAE-A")
        slave.close()

    def test_a_key_out_of_a_warm_pool_takes_no_time(self, kmes: RunningPair) -> None:
        """Much less than a key from a KME that is some way off; benchmarks/key_pool.py has the figures."""
        direct = kmes.client("a")
        with pooled(kmes.client("a"), low_water=20, high_water=80, peers=["SAE-B"]) as (pool, _):
            eventually(lambda: pool.statistics.pooled == 80)
            kmes.faults("a").delay = 0.1
            times: dict[KeyManager, list[float]] = {pool: [], direct: []}
            for _ in range(20):
                for manager in (pool, pool, pool, direct):
                    begin = time.perf_counter()
                    manager.get_keys("SAE-B")
                    times[manager].append(time.perf_counter() - begin)
            assert statistics.median(times[pool]) < statistics.median(times[direct]) / 4
        direct.close()

    def test_arguments(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        for wrong in ({"low_water": 0}, {"low_water": 5, "high_water": 4}, {"max_age": 0}, {"timeout": -1},
                      {"idle_after": 0}, {"size": 12}, {"min_backoff": 0}):  # fmt: skip
            with pytest.raises(ValueError, match=r"water|more than 0|multiple of 8|delay"):
                KeyPool(a, peers=["B"], **wrong)  # type: ignore[arg-type]


class TestAge:
    def test_an_old_key_is_wiped_and_replaced(self) -> None:
        a, b = LocalKeyManager.pair("A", "B")
        with pooled(a, peers=["B"], high_water=4, max_age=0.2) as (pool, _):
            eventually(lambda: pool.statistics.pooled == 4)
            old = [key for _, key in pool._stocks["B"]._keys]
            eventually(lambda: all(key.used for key in old))
            eventually(lambda: pool.statistics.expired >= 12)
            agree(pool.get_keys("B"), b, "A")
            counts = pool.statistics
            assert counts.fetched == counts.delivered + counts.expired + counts.pooled

    def test_nothing_is_fetched_for_a_peer_that_nobody_asks_for(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        with pooled(a, high_water=4, max_age=0.2, idle_after=0.1) as (pool, watched):
            pool.get_keys("B")
            eventually(lambda: pool.statistics.pooled == 0)
            asked = len(watched.calls)
            pool.get_keys("B")
            eventually(lambda: len(watched.calls) > asked)
            time.sleep(0.5)  # nothing happens: there is nothing to wait for
            assert len(watched.calls) <= asked + 3
            assert pool.statistics.pooled == 0

    def test_a_peer_that_nobody_asks_for_is_forgotten(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        a.add("C", "k", b"x" * 32)
        with pooled(a, high_water=4, max_age=0.1, idle_after=0.1) as (pool, _):
            pool.get_keys("B")
            eventually(lambda: pool.statistics.pooled == 0)
            time.sleep(0.1)
            pool.get_keys("B")  # has the thread look around
            eventually(lambda: pool.statistics.peers == 0)


class TestFewKeys:
    def test_callers_wait_in_order_and_the_kme_is_not_hammered(self, directory: Path) -> None:
        with (
            run_pair(directory, rate=60, initial=0) as slow,
            pooled(slow.client("a"), low_water=1, high_water=1, timeout=PATIENCE) as (pool, watched),
        ):
            slave = slow.client("b")
            begin = time.monotonic()
            calls = []
            for number in range(1, 11):
                calls.append(Call(partial(pool.get_keys, "SAE-B", 1 + number % 3)))
                eventually(
                    lambda: pool.statistics.waiting + sum(call.ended > 0 for call in calls) == len(calls)
                )
            got = [key.key_id for call in calls for key in call.join().keys or []]
            seconds = time.monotonic() - begin
            assert got == watched.fetched[: len(got)]
            for call in calls:
                assert call.error is None
                agree(call.keys or [], slave, "SAE-A")
            # At most: a status and a request every tenth of a second, and as much again for a noisy machine.
            assert len(watched.calls) <= 2 * (seconds / 0.1) + 20
            slave.close()

    def test_the_deadline(self, directory: Path) -> None:
        with (
            run_pair(directory, rate=0, initial=2) as empty,
            pooled(empty.client("a"), timeout=2, max_backoff=0.3) as (pool, watched),
        ):
            assert len(pool.get_keys("SAE-B", 2)) == 2  # all that there are, though more were wanted
            begin = time.monotonic()
            with pytest.raises(
                NoKeysLeft, match=r"(waited|within) [23].* seconds.*not enough keys"
            ) as caught:
                pool.get_keys("SAE-B")
            seconds = time.monotonic() - begin
            # The last request may be so near the deadline that the next one would come too late.
            assert seconds >= 2 - 0.3
            assert caught.value.kms == empty.url_a
            assert caught.value.peer == "SAE-B"
            assert caught.value.status == 503
            assert pool.statistics.waiting == 0
            assert pool.statistics.possibly_lost == 0
            assert pool.statistics.breaker is BreakerState.CLOSED  # the KME is well
            assert len(watched.calls) <= 2 * (seconds / 0.1) + 20

    def test_the_deadline_while_the_kme_takes_its_time(self, kmes: RunningPair) -> None:
        with (
            pooled(kmes.client("a"), timeout=0.3) as (pool, watched),
            watched.held(),
            pytest.raises(
                KMSTimeout, match=r"waited \d+\.\d* seconds for 2 keys: the KME has not delivered enough"
            ),
        ):
            pool.get_keys("SAE-B", 2)

    def test_a_deadline_before_the_next_request(self, directory: Path) -> None:
        with (
            run_pair(directory, rate=0, initial=0) as empty,
            pooled(empty.client("a"), timeout=PATIENCE, min_backoff=600, max_backoff=600) as (pool, watched),
        ):
            for _ in range(3):
                begin = time.monotonic()
                with pytest.raises(NoKeysLeft, match=f"1 key cannot be had within {PATIENCE} seconds"):
                    pool.get_keys("SAE-B")
                assert time.monotonic() - begin < PATIENCE / 2
            assert len(watched.calls) == 2

    def test_one_peer_without_keys_does_not_hold_up_others(self) -> None:
        local = LocalKeyManager("A", peers=["empty", "full"])
        for number in range(100):
            local.add("full", f"k{number}", b"x" * 32)
        with pooled(local, timeout=PATIENCE) as (pool, _):
            waiting = Call(lambda: pool.get_keys("empty"))
            eventually(lambda: pool.statistics.failures)
            for _ in range(50):
                pool.get_keys("full")
            local.add("empty", "at last", b"x" * 32)
            assert [key.key_id for key in waiting.join().keys or []] == ["at last"]


class TestFairness:
    def test_peers_take_turns(self, kmes: RunningPair) -> None:
        kmes.faults("a").delay = 0.01
        greedy_ends = threading.Event()
        with pooled(kmes.client("a"), low_water=1, high_water=1, timeout=PATIENCE) as (pool, watched):

            def greedy() -> list[QKDKey]:
                while not greedy_ends.is_set():
                    pool.get_keys("SAE-B", 20)
                return []

            everybody = [Call(greedy) for _ in range(4)]
            eventually(lambda: len(watched.numbers) > 4)
            with watched.held():
                start = len(watched.calls)
                modest = [Call(partial(pool.get_keys, peer)) for peer in PEERS]
                eventually(lambda: pool.statistics.waiting >= len(PEERS) + 3)
            for call in modest:
                assert len(call.join().keys or []) == 1
            greedy_ends.set()
            for call in everybody:
                assert call.join().error is None
            turns = [peer for name, peer, _ in watched.calls[start:] if name == "get_keys"]
            first = [turns.index(peer) for peer in PEERS]
            # Between two turns of the greedy one, everybody who waits has a turn.
            assert turns[: max(first)].count("SAE-B") <= len(PEERS) // 2
        kmes.faults("a").delay = 0

    def test_fetching_ahead_comes_after_callers(self, kmes: RunningPair) -> None:
        with pooled(kmes.client("a"), low_water=20, high_water=20, timeout=PATIENCE, peers=PEERS) as (
            pool,
            watched,
        ):
            with watched.held():
                eventually(lambda: watched.calls)
                call = Call(lambda: pool.get_keys("SAE-B"))
                eventually(lambda: pool.statistics.waiting == 1)
            assert call.join().error is None
            asked = [peer for name, peer, _ in watched.calls if name == "get_keys"]
            assert asked.index("SAE-B") <= 1
            eventually(lambda: pool.statistics.pooled >= 20 * len(PEERS))


class TestTrouble:
    def test_a_kme_that_is_off(self, directory: Path) -> None:
        with (
            run_pair(directory, rate=0, initial=200) as pair,
            pooled(pair.client("a"), max_backoff=0.4) as (pool, watched),
        ):
            slave = pair.client("b")
            pool.get_keys("SAE-B")
            eventually(lambda: pool.statistics.pooled == 16)
            pair.stop_kme("a")
            agree(pool.get_keys("SAE-B", 16), slave, "SAE-A")  # what was fetched ahead is not touched by it
            eventually(lambda: pool.statistics.breaker is not BreakerState.CLOSED)
            waiting = [Call(lambda: pool.get_keys("SAE-B", 3)) for _ in range(3)]
            eventually(lambda: pool.statistics.waiting == 3)
            eventually(lambda: pool.statistics.failures >= 4)
            calls = watched.calls[-3:]
            assert calls == [("status", "SAE-B", 0)] * 3  # no keys are asked for meanwhile
            pair.start_kme("a")
            for call in waiting:
                agree(call.join().keys or [], slave, "SAE-A")
            assert pool.statistics.breaker is BreakerState.CLOSED
            assert pool.statistics.possibly_lost == 0
            slave.close()

    def test_a_kme_that_hangs(self, directory: Path) -> None:
        with (
            run_pair(directory, rate=0, initial=200) as pair,
            pooled(pair.client("a", read_timeout=1), timeout=3) as (pool, watched),
        ):
            pool.get_keys("SAE-B", 13)
            eventually(lambda: pool.statistics.pooled == 16)
            pair.faults("a").delay = 5
            pool.get_keys("SAE-B", 13)  # 13 more are asked for, and the answer does not come
            with pytest.raises(KMSTimeout, match=r"4 keys.*no complete answer within 1 seconds"):
                pool.get_keys("SAE-B", 4)
            requests = len(watched.numbers)
            assert pool.statistics.possibly_lost == watched.numbers[-1] > 1
            pair.faults("a").delay = 0
            eventually(lambda: pool.statistics.breaker is BreakerState.CLOSED)
            assert watched.numbers[requests] == 1  # the probe

    def test_a_refused_certificate_is_told_at_once(self, kmes: RunningPair) -> None:
        stranger = kmes.client("a", cert=kmes.pki.sae_b_cert, key=kmes.pki.sae_b_key)
        with pooled(stranger, timeout=PATIENCE, min_backoff=0.3) as (pool, watched):
            ends = threading.Barrier(4)
            watched.failing = lambda _: eventually(lambda: ends.n_waiting == 3)

            def take() -> list[QKDKey]:
                ends.wait()
                return pool.get_keys("SAE-B")

            begin = time.monotonic()
            waiting = [Call(lambda: pool.get_keys("SAE-B")) for _ in range(3)]
            eventually(lambda: pool.statistics.waiting == 3)
            watched.failing = lambda _: None
            threads = [Call(take) for _ in range(3)]
            for call in waiting:
                assert isinstance(call.join().error, KMSAuthenticationError)
                assert "HTTP status 401" in str(call.error)
            ends.wait()
            for call in threads:
                assert isinstance(call.join().error, KMSAuthenticationError)
            assert time.monotonic() - begin < PATIENCE / 2
            asked = len(watched.calls)
            time.sleep(0.5)
            assert len(watched.calls) == asked  # nobody asks, so the KME is not asked either

    def test_a_wrong_peer_is_told_at_once_and_others_are_served(self, kmes: RunningPair) -> None:
        with pooled(kmes.client("a"), timeout=PATIENCE) as (pool, watched):
            for _ in range(3):
                begin = time.monotonic()
                with pytest.raises(UnknownSAE, match="nobody"):
                    pool.get_keys("nobody")
                assert time.monotonic() - begin < PATIENCE / 2
            assert len(pool.get_keys("SAE-B")) == 1
            assert len([peer for _, peer, _ in watched.calls if peer == "nobody"]) <= 3

    def test_a_kme_of_another_ca(self, kmes: RunningPair) -> None:
        wrong = kmes.client("a", ca=kmes.pki.sae_a_cert)
        with pooled(wrong, timeout=30, min_backoff=60, max_backoff=60) as (pool, watched):
            for peer in ("SAE-B", "SAE-B", PEERS[0]):  # this concerns the KME, and so all peers
                with pytest.raises(KMSAuthenticationError, match="certificate was refused"):
                    pool.get_keys(peer)
            assert len(watched.calls) == 1
            assert pool.statistics.breaker is BreakerState.OPEN

    def test_a_size_that_the_kme_refuses(self, kmes: RunningPair) -> None:
        with (
            pooled(kmes.client("a"), size=8, timeout=30) as (pool, _),
            pytest.raises(KMSRequestError, match="size shall be from 64"),
        ):
            pool.get_keys("SAE-B")

    def test_a_kme_that_does_not_delete_delivered_keys(self, kmes: RunningPair) -> None:
        status = http(
            200,
            {"source_KME_ID": "A", "target_KME_ID": "B", "master_SAE_ID": "SAE-A", "slave_SAE_ID": "SAE-B",
             "key_size": 256, "stored_key_count": 9, "max_key_count": 9, "max_key_per_request": 1,
             "max_key_size": 256, "min_key_size": 256, "max_SAE_ID_count": 0},
        )  # fmt: skip
        again = http(200, container(("one", b"1" * 32)))
        pki = kmes.pki
        server = ScriptedKME(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), [status, again])
        try:
            client = client_of(pki, f"https://127.0.0.1:{server.port}")
            with pooled(client, low_water=1, high_water=1, timeout=30) as (pool, _):
                assert [key.key_id for key in pool.get_keys("SAE-B")] == ["one"]
                with pytest.raises(KMSProtocolError, match=r"a second time.*key ID one"):
                    pool.get_keys("SAE-B")
                assert pool.statistics.delivered == 1
        finally:
            server.close()

    def test_a_key_that_comes_a_second_time_is_wiped(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        came: list[QKDKey] = []

        class Repeating(Watched):
            def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
                came.extend(super().get_keys(peer_sae_id, number, size))
                if len(came) > number:
                    came.append(QKDKey(came[0].key_id, b"x" * 32))
                return came[-number:]

        with pooled(Repeating(a), low_water=1, high_water=1, timeout=30) as (pool, _):
            first, second = pool.get_keys("B"), pool.get_keys("B")
            eventually(lambda: pool.statistics.failures == 1)
            with pytest.raises(KMSProtocolError, match=rf"a second time.*key ID {came[0].key_id}"):
                pool.get_keys("B")
            assert [key.used for key in (*first, *second)] == [False, False]
            assert came[-1].key_id == first[0].key_id
            assert came[-1].used

    def test_a_kme_without_a_status_worth_the_name(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        with pooled(a, low_water=1, high_water=3) as (pool, watched):

            def failing(call: str) -> None:
                if call == "status":
                    raise KMSProtocolError("HTML")

            watched.failing = failing
            pool.get_keys("B")
            eventually(lambda: pool.statistics.pooled == 3)
            assert set(watched.numbers) == {1}

    def test_peers_of_a_kme_that_lives_do_not_wait_for_one_that_does_not(self) -> None:
        # As behind a FailoverKeyManager, where two peers are served by different KMEs.
        a, _ = LocalKeyManager.pair("A", "B")
        a.add("C", "k", b"x" * 32)
        with pooled(a, timeout=30, max_backoff=60, min_backoff=0.1) as (pool, watched):

            def failing(call: str) -> None:
                if watched.calls[-1][1] == "C":
                    raise KMSUnavailable("cannot connect")

            watched.failing = failing
            waiting = Call(lambda: pool.get_keys("C"))
            eventually(lambda: pool.statistics.failures)
            for _ in range(100):
                pool.get_keys("B")
            assert pool.statistics.failures < 12
            watched.failing = lambda _: None
            pool.close()
            assert isinstance(waiting.join().error, KMSUnavailable)


class TestTheThread:
    def test_an_error_of_another_kind_ends_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        a, b = LocalKeyManager.pair("A", "B")
        with pooled(a, timeout=30) as (pool, watched):

            def failing(call: str) -> None:
                if call == "get_keys":
                    raise TypeError("".join(["hu", "sh"]))

            watched.failing = failing
            with pytest.raises(KMSError, match=r"the key pool has failed \(TypeError\)"):
                pool.get_keys("B")
            watched.failing = lambda _: None
            eventually(lambda: served(pool))
            agree(pool.get_keys("B"), b, "A")
            assert len({thread for thread in threading.enumerate() if "key pool" in thread.name}) == 1
        assert "has failed with TypeError" in caplog.text
        assert "in failing" in caplog.text
        assert "hush" not in caplog.text

    def test_close_turns_callers_away_and_wipes(self, directory: Path) -> None:
        with run_pair(directory, rate=0, initial=16) as pair:
            watched = Watched(pair.client("a"))
            pool = KeyPool(watched, timeout=30, peers=["SAE-B"])
            eventually(lambda: pool.statistics.pooled == 16)
            keys = [key for _, key in pool._stocks["SAE-B"]._keys]
            waiting = Call(lambda: pool.get_keys("SAE-B", 100))
            eventually(lambda: pool.statistics.waiting == 1)
            pool.close()
            pool.close()
            assert all(key.used for key in keys)
            assert "this key pool is closed" in str(waiting.join().error)
            assert pool._thread is not None
            assert not pool._thread.is_alive()
            with pytest.raises(KMSUnavailable, match="closed"):
                pool.get_keys("SAE-B")
            assert watched.closed

    @pytest.mark.parametrize("where", ["status", "get_keys"])
    def test_keys_that_come_after_close_are_wiped(self, where: str) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        got: list[QKDKey] = []

        class Slow(Watched):
            def get_keys(self, *arguments: Any) -> list[QKDKey]:
                got.extend(super().get_keys(*arguments))
                return got[:]

        watched = Slow(a)
        under_way, go_on = threading.Event(), threading.Event()

        def failing(call: str) -> None:
            if call == where:
                under_way.set()
                go_on.wait()

        watched.failing = failing
        pool = KeyPool(watched, peers=["B"])
        under_way.wait()
        closing = threading.Thread(target=pool.close)
        closing.start()
        eventually(lambda: pool._closed)
        go_on.set()
        closing.join()
        assert all(key.used for key in got)
        assert len(got) == (16 if where == "get_keys" else 0)

    def test_a_caller_that_is_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        local = LocalKeyManager("A", peers=["B"])
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pooled(local, timeout=30) as (pool, _):

            def interrupt() -> None:
                eventually(lambda: pool.statistics.waiting)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                pool.get_keys("B")
            thread.join()
            assert pool.statistics.waiting == 0
        signal.signal(signal.SIGINT, before)

    def test_a_forked_child_has_keys_and_a_thread_of_its_own(self) -> None:
        """In a process of its own, which has no other threads."""
        program = """
import os
from kms_client import KeyPool, LocalKeyManager
manager, _ = LocalKeyManager.pair("A", "B")
pool = KeyPool(manager, peers=["B"])
first = pool.get_keys("B")[0]
held = [key for _, key in pool._stocks["B"]._keys]
pid = os.fork()
if pid == 0:
    ok = pool.statistics.pooled == pool.statistics.delivered == 0 and all(key.used for key in held)
    own = pool.get_keys("B")[0].key_id
    ok = ok and own not in [key.key_id for key in held] and pool._thread.is_alive()
    pool.close()
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert not any(key.used for key in held)
assert pool.get_keys("B")[0].key_id == held[0].key_id
pool.close()
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=PATIENCE)

    def test_what_a_child_does_after_the_fork(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        with pooled(a, peers=["B"]) as (pool, _):
            eventually(lambda: pool.statistics.pooled == 16)
            thread = pool._thread
            pool._closed = True  # the thread of this process ends, as a child has none
            with pool._lock:
                pool._news.notify()
            assert thread is not None
            thread.join()
            pool._closed = False
            held = [key for _, key in pool._stocks["B"]._keys]
            pool.forget()
            assert all(key.used for key in held)
            assert pool.statistics.fetched == 0
            assert len(pool.get_keys("B")) == 1
            eventually(lambda: pool.statistics.pooled >= 15)


def served(pool: KeyPool) -> bool:
    try:
        return len(pool.get_keys("B")) == 1
    except KMSError:
        return False


def test_no_key_is_logged(kmes: RunningPair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[Callable[[], object]] = []
    with pooled(kmes.client("a", read_timeout=1), timeout=3) as (pool, _):
        keys = pool.get_keys("SAE-B", 10)
        kmes.faults("a").delay = 5
        with pytest.raises(KMSTimeout) as caught:
            pool.get_keys("SAE-B", 100)
        kmes.faults("a").delay = 0
        told += [
            lambda: caplog.text,
            lambda: repr(pool),
            lambda: str(pool.statistics),
            lambda: str(caught.value),
        ]
        text = "\n".join(str(tell()) for tell in told)
    assert "no keys fetched ahead: no complete answer" in text
    for key in keys:
        with key.use() as secret:
            assert not any(spelling in text for spelling in spellings(bytes(secret)))


GUIDE = (DOCS / "howto-key-pool.md").read_text(encoding="utf-8")


def test_the_guide_lists_the_settings_as_they_are() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", GUIDE, re.MULTILINE)
    told = {
        name: value
        for names, values in rows
        for name, value in zip(re.findall(r"\w+", names), values.split(", "), strict=False)
    }
    parameters = inspect.signature(KeyPool).parameters
    for name, value in told.items():
        if name in parameters:
            default = parameters[name].default
            assert value == ("none" if default == () else f"{default:g}" + " s" * isinstance(default, float))
    assert set(parameters) - set(told) == {"manager", "clock", "jitter"}


def test_code_of_the_guide_compiles() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL):
        compile(block, "howto-key-pool.md", "exec")
    for name in re.findall(r"import Etsi014Client, (.+)", GUIDE)[0].split(", "):
        assert hasattr(kms_client, name)
