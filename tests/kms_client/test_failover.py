"""`FailoverKeyManager` on real KMEs: two links between two sites, whose KMEs are turned off, hang or refuse."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kms_client import (
    BreakerState,
    FailoverKeyManager,
    KeyManager,
    KeyPool,
    KMSAuthenticationError,
    KMSError,
    KMSOutsideSecureSite,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    LocalKeyManager,
    NoKeysLeft,
    QKDKey,
    UnknownKey,
    UnknownSAE,
)
from kms_client.emulator import Faults, RunningPair, ensure_demo_pki, run_pair
from kms_client.emulator.pair import SideName
from tests.support.key_managers import Call, Watched, agree
from tests.support.kme_server import client_of
from tests.support.patience import PATIENCE, eventually
from tests.support.ports import free_port
from tests.support.sizes import sized

SIDES: tuple[SideName, SideName] = ("a", "b")


@dataclass
class Site:
    """One site's clients of both KMEs."""

    first: Watched
    second: Watched
    both: FailoverKeyManager = field(init=False)


@dataclass
class Links:
    first: RunningPair
    second: RunningPair
    _made: list[FailoverKeyManager] = field(default_factory=list)

    def site(self, side: SideName, *, read_timeout: float = PATIENCE, **settings: object) -> Site:
        clients = [
            Watched(pair.client(side, read_timeout=read_timeout)) for pair in (self.first, self.second)
        ]
        site = Site(*clients)
        site.both = FailoverKeyManager(clients, **settings)  # type: ignore[arg-type]
        self._made.append(site.both)
        return site

    def close(self) -> None:
        for manager in self._made:
            manager.close()
        self._made.clear()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    directory: Path = tmp_path_factory.mktemp("kmes")
    with run_pair(directory, rate=200) as first, run_pair(directory, rate=200) as second:
        yield Links(first, second)


@pytest.fixture
def links(running: Links) -> Iterator[Links]:
    yield running
    running.close()
    for pair in (running.first, running.second):
        for side in SIDES:
            for name, value in vars(Faults()).items():
                setattr(pair.faults(side), name, value)


def breaker(site: Site) -> BreakerState:
    return site.both.health[0].breaker


class TestGetKeys:
    def test_the_preferred_kme_serves(self, links: Links) -> None:
        a, b = links.site("a"), links.site("b")
        manager: KeyManager = a.both  # for the type checker
        assert isinstance(manager, KeyManager)
        assert (a.both.protocol, a.both.sae_id) == ("etsi-014", "SAE-A")
        assert a.both.name == f"{links.first.url_a}, {links.second.url_a}"
        assert repr(a.both) == f"<FailoverKeyManager {a.both.name}>"
        assert a.both.status("SAE-B").source_kme_id == "KME-A"
        keys = a.both.get_keys("SAE-B", 3)
        assert [key.size for key in a.both.get_keys("SAE-B", 1, 512)] == [512]
        assert (
            {key.kms for key in keys} == {a.both.served_by(key.key_id) for key in keys} == {links.first.url_a}
        )
        agree(keys, b.both, "SAE-A")
        assert b.both.served_by(keys[0].key_id) == links.first.url_b
        assert b.both.served_by("another") is None
        assert a.second.calls == b.second.calls == []
        first, second = a.both.health
        assert (first.name, first.breaker, first.served, first.failures) == (
            links.first.url_a, BreakerState.CLOSED, 4, 0
        )  # fmt: skip
        assert (second.served, second.last_error) == (0, "")

    def test_a_kme_that_is_off_is_left_alone_for_a_while(self, links: Links) -> None:
        now = 0.0
        a, b = links.site("a", clock=lambda: now), links.site("b")
        links.first.stop_kme("a")
        try:
            for _ in range(5):
                keys = a.both.get_keys("SAE-B")
                assert a.both.served_by(keys[0].key_id) == links.second.url_a
                agree(keys, b.both, "SAE-A")
            assert len(a.first.calls) == 3
            # The other side asks where this peer's last key was.
            assert len(b.first.calls) == 1
            assert breaker(a) is BreakerState.OPEN
            assert a.both.health[0].failures == 3
            assert "Connection refused" in a.both.health[0].last_error
        finally:
            links.first.start_kme("a")
        now = PATIENCE
        assert breaker(a) is BreakerState.HALF_OPEN
        keys = a.both.get_keys("SAE-B")
        assert a.both.served_by(keys[0].key_id) == links.first.url_a
        assert breaker(a) is BreakerState.CLOSED
        assert sum(member.possibly_lost for member in a.both.health) == 0

    @pytest.mark.parametrize("threads", [8])
    def test_one_probe_while_others_go_on(self, links: Links, threads: int) -> None:
        a = links.site("a", read_timeout=1, threshold=1, min_backoff=0.01, max_backoff=0.01)
        links.first.faults("a").delay = 5
        a.both.get_keys("SAE-B")
        eventually(lambda: a.both.health[0].breaker is BreakerState.HALF_OPEN)
        a.first.at_once = 0
        for call in [Call(lambda: a.both.get_keys("SAE-B")) for _ in range(threads)]:
            assert call.join().error is None
        assert a.first.at_once == 1

    def test_keys_of_an_answer_that_does_not_come_are_counted(self, links: Links) -> None:
        a, b = links.site("a", read_timeout=1), links.site("b")
        links.first.faults("a").delay = 5
        keys = a.both.get_keys("SAE-B", 7)
        agree(keys, b.both, "SAE-A")
        first, second = a.both.health
        assert (first.possibly_lost, first.failures, second.served) == (7, 1, 7)
        assert "no complete answer within" in first.last_error
        assert len(a.first.calls) == 1  # never twice

    @pytest.mark.parametrize(
        ("answer", "lost"),
        [((503, '{"message": "link down"}'), 0), ((400, '{"message": "no"}'), 0), ((401, ""), 0),
         ((500, "<html>"), 2), ((200, "<html>"), 2), ((200, '{"keys": []}'), 0)],
    )  # fmt: skip
    def test_every_failure_leads_to_the_next_kme(
        self, links: Links, answer: tuple[int, str], lost: int
    ) -> None:
        a = links.site("a")
        links.first.faults("a").answer_with = answer
        assert len(a.both.get_keys("SAE-B", 2)) == 2
        assert a.both.health[0].possibly_lost == lost
        assert a.both.health[0].failures == 1

    def test_all_fail(self, links: Links) -> None:
        a = links.site("a", threshold=1, min_backoff=60, max_backoff=60)
        links.first.faults("a").answer_with = 503, '{"message": "link down"}'
        links.second.faults("a").answer_with = 401, ""
        with pytest.raises(KMSUnavailable) as caught:
            a.both.get_keys("SAE-B")
        assert str(caught.value) == (
            f"none of 2 KMEs has given keys: {links.first.url_a}: the KME cannot serve: link down (HTTP status 503);"
            f" {links.second.url_a}: the KME refused without saying why (HTTP status 401)"
            " (peer SAE SAE-B; HTTP status 503)."
            " Check that the KME runs and is reachable, then try again."
            " Check the CA, the certificates of the KME and of this SAE, and their validity."
        )
        assert not caught.value.keys_may_be_lost
        with pytest.raises(KMSUnavailable) as caught:
            a.both.get_keys("SAE-B")
        assert "not asked for" in str(caught.value)
        assert "seconds more after 1 failures, the last of them: the KME cannot serve: link down" in str(
            caught.value
        )
        assert len(a.first.calls) == len(a.second.calls) == 1
        with pytest.raises(KMSUnavailable, match="has given status"):
            a.both.status("SAE-B")

    def test_impossible_arguments(self, links: Links) -> None:
        a = links.site("a")
        for number, size in ((0, None), (1, 12)):
            with pytest.raises(ValueError, match="must be"):
                a.both.get_keys("SAE-B", number, size)
        with pytest.raises(ValueError, match="cannot be an SAE ID"):
            a.both.get_keys("..")
        with pytest.raises(TypeError, match="not one string"):
            a.both.get_keys_by_id("SAE-B", "k")


class TestGetKeysByID:
    def test_a_key_is_asked_from_every_kme(self, links: Links) -> None:
        b = links.site("b")
        second = links.second.client("a")
        for asked in (1, 1):  # the first KME once only: then the second is known to be this peer's
            agree(second.get_keys("SAE-B", 2), b.both, "SAE-A")
            assert len(b.first.calls) == asked
        with pytest.raises(UnknownKey) as caught:
            b.both.get_keys_by_id("SAE-A", ["nowhere"])
        assert links.first.url_b in str(caught.value)
        assert links.second.url_b in str(caught.value)
        assert caught.value.key_ids == ("nowhere",)
        assert not caught.value.keys_may_be_lost
        # To know no key is no failure of a KME.
        assert [member.failures for member in b.both.health] == [0, 0]
        second.close()

    def test_keys_of_several_kmes_in_one_request(self, links: Links) -> None:
        b = links.site("b")
        clients = [pair.client("a") for pair in (links.first, links.second)]
        mixed = [key for _ in range(3) for client in clients for key in client.get_keys("SAE-B")]
        agree(mixed, b.both, "SAE-A")
        assert {b.both.served_by(key.key_id) for key in mixed} == {links.first.url_b, links.second.url_b}
        for client in clients:
            client.close()

    def test_one_of_several_is_known_to_none(self, links: Links) -> None:
        b = links.site("b")
        client = links.first.client("a")
        [key] = client.get_keys("SAE-B")
        with pytest.raises(UnknownKey, match="none of 2 KMEs has given key") as caught:
            b.both.get_keys_by_id("SAE-A", [key.key_id, "nowhere"])
        assert caught.value.key_ids == ("nowhere",)
        assert caught.value.keys_may_be_lost  # the other was delivered, and has been wiped
        client.close()

    def test_a_kme_that_may_have_delivered_is_not_asked_again(self, links: Links) -> None:
        a, b = links.site("a"), links.site("b", read_timeout=1)
        keys = a.both.get_keys("SAE-B", 2)
        links.first.faults("b").delay = 5
        with pytest.raises(KMSTimeout) as caught:
            b.both.get_keys_by_id("SAE-A", [key.key_id for key in keys])
        assert caught.value.keys_may_be_lost
        assert "no complete answer within" in str(caught.value)
        assert f"{links.second.url_b}: the KME refused: one or more keys" in str(caught.value)
        assert len(b.first.calls) == len(b.second.calls) == 1
        assert b.both.health[0].possibly_lost == 2

    def test_a_kme_that_is_left_alone_is_asked_last(self, links: Links) -> None:
        a, b = links.site("a"), links.site("b", threshold=1, min_backoff=60, max_backoff=60)
        links.first.faults("b").answer_with = 503, ""
        with pytest.raises(KMSUnavailable, match="HTTP status 503"):
            b.both.get_keys_by_id("SAE-A", ["nowhere"])
        assert breaker(b) is BreakerState.OPEN
        links.first.faults("b").answer_with = None
        agree(a.both.get_keys("SAE-B"), b.both, "SAE-A")
        assert [len(b.first.calls), len(b.second.calls)] == [2, 2]
        assert breaker(b) is BreakerState.CLOSED

    def test_an_absent_kme_may_have_the_key_that_others_do_not_know(self, links: Links) -> None:
        third = LocalKeyManager("SAE-B", peers=["SAE-A"])
        clients = [Watched(pair.client("b")) for pair in (links.first, links.second)]
        away = Watched(third)

        def failing(_: str) -> None:
            raise KMSUnavailable("cannot connect", kms="away")

        away.failing = failing
        both = FailoverKeyManager([*clients, away], protocol="etsi-014")
        with pytest.raises(KMSUnavailable, match="none of 3 KMEs has given keys"):
            both.get_keys_by_id("SAE-A", ["one", "two"])
        both.close()


KINDS: list[tuple[type[KMSError], type[KMSError], type[KMSError]]] = [
    (KMSUnavailable, NoKeysLeft, NoKeysLeft),
    (KMSUnavailable, KMSTimeout, KMSTimeout),
    (KMSAuthenticationError, KMSUnavailable, KMSUnavailable),
    (UnknownKey, KMSUnavailable, KMSUnavailable),
    (UnknownKey, KMSAuthenticationError, KMSAuthenticationError),
    (UnknownKey, KMSProtocolError, KMSProtocolError),
    (KMSProtocolError, KMSOutsideSecureSite, KMSOutsideSecureSite),
    (KMSOutsideSecureSite, KMSAuthenticationError, KMSAuthenticationError),
    (UnknownSAE, UnknownKey, UnknownKey),
    (KMSRequestError, UnknownSAE, UnknownSAE),
    (KMSError, KMSRequestError, KMSRequestError),
]


class TestMembers:
    @pytest.mark.parametrize(("one", "other", "common"), KINDS)
    def test_the_common_error(
        self, one: type[KMSError], other: type[KMSError], common: type[KMSError]
    ) -> None:
        for kinds in ((one, other), (other, one)):
            members = [failing_with(kind("so it was"), kind.__name__) for kind in kinds]
            with pytest.raises(common) as caught:
                FailoverKeyManager(members).get_keys("B")
            assert type(caught.value) is common
            assert caught.value.keys_may_be_lost is any(kind.default_keys_may_be_lost for kind in kinds)

    def test_a_single_member_speaks_for_itself(self) -> None:
        error = KMSAuthenticationError("so it was", kms="one")
        with pytest.raises(KMSAuthenticationError) as caught:
            FailoverKeyManager([failing_with(error, "one")]).get_keys("B")
        assert caught.value is error

    def test_which_peers_a_member_has_a_link_to(self) -> None:
        ab, ac = (Watched(LocalKeyManager.pair("A", peer)[0], f"to {peer}") for peer in ("B", "C"))
        manager = FailoverKeyManager([ab, ac], peers={"to B": ["B"], "to C": ["C"]})
        assert manager.served_by(manager.get_keys("C")[0].key_id) == "to C"
        assert ab.calls == []
        for call in (manager.status, manager.get_keys, lambda peer: manager.get_keys_by_id(peer, ["k"])):
            with pytest.raises(UnknownSAE, match="no KME here has a link to this SAE"):
                call("D")
        manager.close()
        assert ab.closed
        assert ac.closed

    def test_members_that_do_not_fit_together(self) -> None:
        a, b = LocalKeyManager.pair("A", "B")
        other = Watched(a, "other")
        with pytest.raises(ValueError, match="of different names"):
            FailoverKeyManager([])
        with pytest.raises(ValueError, match="of different names"):
            FailoverKeyManager([a, Watched(a)])
        with pytest.raises(ValueError, match=r"one SAE ID, not \['A', 'B'\]"):
            FailoverKeyManager([a, b])
        with pytest.raises(ValueError, match="multiple of 8"):
            FailoverKeyManager([a], size=12)
        with pytest.raises(ValueError, match="peers names no members: nobody"):
            FailoverKeyManager([a, other], peers={"nobody": ["B"]})
        other.protocol = "etsi-014"
        with pytest.raises(ValueError, match="the members speak etsi-014, local"):
            FailoverKeyManager([a, other])
        assert FailoverKeyManager([a, other], protocol="etsi-014").protocol == "etsi-014"

    def test_an_error_of_another_kind_is_the_callers(self) -> None:
        broken = failing_with(KMSUnavailable("down"), "broken")
        manager = FailoverKeyManager([broken], threshold=1, min_backoff=0.01, max_backoff=0.01)
        with pytest.raises(KMSUnavailable, match="down"):
            manager.get_keys("B")

        def failing(_: str) -> None:
            raise ZeroDivisionError

        broken.failing = failing
        for _ in range(2):  # the probe is given back
            eventually(lambda: manager.health[0].breaker is BreakerState.HALF_OPEN)
            with pytest.raises(ZeroDivisionError):
                manager.get_keys("B")

    def test_a_probe_under_way(self) -> None:
        broken = failing_with(KMSUnavailable("down"), "broken")
        manager = FailoverKeyManager([broken], threshold=1, min_backoff=0.01, max_backoff=0.01)
        with pytest.raises(KMSUnavailable, match="down"):
            manager.get_keys("B")
        eventually(lambda: manager.health[0].breaker is BreakerState.HALF_OPEN)
        go_on = threading.Event()
        broken.failing = lambda _: go_on.wait()
        probe = Call(lambda: manager.get_keys("B"))
        eventually(lambda: broken._under_way)
        with pytest.raises(
            KMSUnavailable, match="not asked while another request tries it out after 1 failures"
        ):
            manager.get_keys("B")
        go_on.set()
        assert probe.join().error is None

    def test_records_are_bounded(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        manager = FailoverKeyManager([a], max_records=3)
        ids = [key.key_id for _ in range(2) for key in manager.get_keys("B", 2)]
        assert [manager.served_by(key_id) for key_id in ids] == [None, "local A", "local A", "local A"]

    def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B")
        manager = FailoverKeyManager([a])
        manager._lock.acquire()  # as another thread of the parent may have at the fork
        manager.forget()
        assert len(manager.get_keys("B")) == 1


def failing_with(error: KMSError, name: str) -> Watched:
    a, _ = LocalKeyManager.pair("A", "B")
    member = Watched(a, name)

    def failing(_: str) -> None:
        raise error

    member.failing = failing
    return member


def test_a_pool_of_several_kmes(links: Links) -> None:
    a, b = links.site("a"), links.site("b")
    pool = KeyPool(a.both)
    assert pool.name == a.both.name
    links.first.faults("a").answer_with = 503, ""
    agree(pool.get_keys("SAE-B", 5), b.both, "SAE-A")
    links.first.faults("a").answer_with = None
    eventually(lambda: pool.statistics.pooled == 16)
    # Of both KMEs, in one request of the other side.
    agree(pool.get_keys("SAE-B", 40), b.both, "SAE-A")
    assert {member.served > 0 for member in a.both.health} == {True}
    pool.close()


# --- a KME killed every second


KEYS_ARE_LONGER = 2500  # bytes, than what a KME sends in a TLS handshake or as its status


class KMEProcess:
    """`qkd-kme serve`, killed as by a power cut and started again on the same ports."""

    def __init__(self, side: SideName, directory: Path, record: Path, link: str = "") -> None:
        self.record = record
        # fmt: off
        self._command = [sys.executable, "-m", "kms_client", "serve", "--side", side, "--json",
                         "--dir", str(directory), "--record", str(record), "--buffer", "1000", "--rate", "4000",
                         "--port", str(free_port()), "--link-port", str(free_port())]
        # fmt: on
        if link:
            self._command += ["--link", link]
        self.start()
        self.url: str = self.ready["kmes"][0]["url"]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def delivered(self, role: str) -> list[str]:
        """IDs of the keys that it has delivered to masters or slaves, in order."""
        entries = [json.loads(line) for line in self.record.read_text().splitlines() if line.endswith("}")]
        return [entry["key_id"] for entry in entries if entry["role"] == role]


class Cable:
    """Leads from a port of its own to a KME, and can be cut just when the next answer with keys comes.

    Attributes:
        cut: set to have that answer lost.
        lost: set when that has happened.
    """

    def __init__(self, url: str) -> None:
        self._to = int(url.rpartition(":")[2])
        self.cut, self.lost = threading.Event(), threading.Event()
        self._port = free_port()
        self.plug_in()
        self.url = f"https://127.0.0.1:{self._port}"

    def plug_in(self) -> None:
        """Accept connections, again after `unplug`."""
        self.cut.clear()
        self.lost.clear()
        self._listening = socket.create_server(("127.0.0.1", self._port))
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def unplug(self) -> None:
        """Refuse connections, as the port of a program that is gone does, and end those that there are."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    client, _ = self._listening.accept()
                except OSError:
                    break
                kme = socket.create_connection(("127.0.0.1", self._to))
                for one, other, answers in ((client, kme, False), (kme, client, True)):
                    thread = threading.Thread(target=self._lead, args=(one, other, answers))
                    thread.start()
                    stack.callback(thread.join)
                    stack.enter_context(one)
                    stack.callback(hang_up, one)

    def _lead(self, one: socket.socket, other: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if answers and len(data) > KEYS_ARE_LONGER and self.cut.is_set():
                    self.lost.set()
                    break
                other.sendall(data)
        hang_up(one)
        hang_up(other)


def hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


# ssl.SSLSocket forgets to close itself where the connection is reset before its handshake has begun (CPython 3.11).
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.slow
def test_ten_thousand_keys_while_a_kme_is_killed_every_second(tmp_path: Path) -> None:
    """Two links. KME A of the first, the preferred one, is killed as soon as an answer of its has been cut off.

    Ten thousand at full size.
    """
    batch, threads = 2, 5
    least, least_kills = sized(10_000, 1_000), 3
    pki = ensure_demo_pki(tmp_path, "SAE-A", "SAE-B")
    with contextlib.ExitStack() as stack:

        def kme(side: SideName, number: int, link: str = "") -> KMEProcess:
            process = KMEProcess(side, tmp_path, tmp_path / f"{side}{number}", link)
            stack.callback(process.kill)
            return process

        kmes_a = [kme("a", number) for number in (1, 2)]
        kmes_b = [kme("b", number, kmes_a[number - 1].ready["link"]) for number in (1, 2)]
        cable = Cable(kmes_a[0].url)
        stack.callback(cable.unplug)
        urls_a = [cable.url, kmes_a[1].url]
        a = [Watched(client_of(pki, url)) for url in urls_a]
        b = [
            client_of(pki, kme.url, sae_id="SAE-B", cert=pki.sae_b_cert, key=pki.sae_b_key) for kme in kmes_b
        ]
        for client in a:
            eventually(lambda client=client: stored(client))  # type: ignore[misc]
        settings: dict[str, Any] = {"min_backoff": 0.05, "max_backoff": 0.2, "max_records": 1_000_000}
        both_a, both_b = FailoverKeyManager(a, **settings), FailoverKeyManager(b, **settings)
        pool = KeyPool(both_a, low_water=30, high_water=60, timeout=30, peers=["SAE-B"])
        stack.callback(pool.close)
        stack.callback(both_b.close)
        done, kills = threading.Event(), 0

        def take() -> list[QKDKey]:
            mine: list[QKDKey] = []
            while len(mine) < least // threads or kills < least_kills:
                keys = pool.get_keys("SAE-B", batch)
                mine += keys
                agree(keys, both_b, "SAE-A")
            return mine

        calls = [Call(take) for _ in range(threads)]
        while any(call.ended == 0 for call in calls):
            done.wait(sized(1.0, 0.2))
            cable.cut.set()
            # Until nobody asks for keys any more.
            while not cable.lost.wait(0.1) and any(call.ended == 0 for call in calls):
                pass
            cable.unplug()
            kmes_a[0].kill()
            kmes_a[0].start()
            cable.plug_in()
            kills += 1
        handed_out = [key.key_id for call in calls for key in call.join().keys or []]
        assert [call.error for call in calls] == [None] * threads
        statistics, (first, second) = pool.statistics, both_a.health

    print(f"{kills} kills", statistics, first, second, sep="\n")
    assert kills >= least_kills
    assert len(handed_out) >= least
    # Each handed out once; `agree` has compared them all; each was fetched by the other side once.
    assert len(handed_out) == len(set(handed_out))
    assert sorted(kmes_b[0].delivered("slave") + kmes_b[1].delivered("slave")) == sorted(handed_out)
    # Both KMEs have served, and it is known which one.
    served = Counter(both_a.served_by(key_id) for key_id in handed_out)
    assert set(served) == set(urls_a)
    # A key that a KME delivered is lost only where an answer was cut, and then it is counted.
    delivered = [kme.delivered("master") for kme in kmes_a]
    lost = [set(ids) - set(client.fetched) for ids, client in zip(delivered, a, strict=True)]
    assert 0 < len(lost[0]) <= first.possibly_lost
    assert len(lost[1]) == second.possibly_lost == 0
    assert first.served + second.served == statistics.fetched == sum(len(client.fetched) for client in a)
    assert statistics.fetched == statistics.delivered + statistics.expired + statistics.pooled
    assert statistics.delivered == len(handed_out)


def stored(client: Watched) -> int:
    try:
        return client.status("SAE-B").stored_key_count
    except KMSUnavailable:
        return 0
