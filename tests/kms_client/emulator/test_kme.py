"""The KME emulator: its three calls in both forms, its faults, both KMEs in one process."""

from __future__ import annotations

import base64
import logging
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from kms_client import (
    Etsi014Client,
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    QKDKey,
    UnknownKey,
    UnknownSAE,
)
from kms_client.emulator import Limits, OSRandomSource, RunningPair, add_sae, run_pair
from kms_client.emulator.delivery import _certificate_names
from kms_client.emulator.kme_sync import DirectSync, PeerKMEDown
from kms_client.emulator.store import Assignment, KeyStore, NotFound
from tests.support.patience import PATIENCE, eventually


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kmes")


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[RunningPair]:
    with run_pair(directory, more_saes={"b": ["SAE-B2", "SAE B/3"]}, rate=0, initial=500) as running:
        yield running


class Caller:
    """Plain requests, as any program sends them."""

    def __init__(self, url: str, cert: tuple[Path, Path], ca: Path) -> None:
        self._url = f"{url}/api/v1/keys/"
        self._settings: dict[str, Any] = {"cert": tuple(map(str, cert)), "verify": str(ca), "timeout": 5}

    def get(self, path: str) -> tuple[int, Any]:
        return self._answer(requests.get(self._url + path, **self._settings))

    def post(self, path: str, body: Any = None, *, data: bytes | None = None) -> tuple[int, Any]:
        return self._answer(requests.post(self._url + path, json=body, data=data, **self._settings))

    @staticmethod
    def _answer(response: requests.Response) -> tuple[int, Any]:
        assert response.headers["Content-Type"].startswith("application/json")
        return response.status_code, response.json()


@pytest.fixture(scope="module")
def sae_a(pair: RunningPair) -> Caller:
    return Caller(pair.url_a, (pair.pki.sae_a_cert, pair.pki.sae_a_key), pair.pki.kms_ca)


@pytest.fixture(scope="module")
def sae_b(pair: RunningPair) -> Caller:
    return Caller(pair.url_b, (pair.pki.sae_b_cert, pair.pki.sae_b_key), pair.pki.kms_ca)


@pytest.fixture(scope="module")
def sae_b2(pair: RunningPair) -> Caller:
    return Caller(pair.url_b, add_sae(pair.pki, "SAE-B2", "sae-b2"), pair.pki.kms_ca)


def ids(answer: Any) -> list[str]:
    return [key["key_ID"] for key in answer["keys"]]


class TestStatus:
    def test_every_member(self, sae_a: Caller) -> None:
        code, status = sae_a.get("SAE-B/status")
        assert code == 200
        assert 0 < status.pop("stored_key_count") <= 500
        assert status == {
            "source_KME_ID": "KME-A", "target_KME_ID": "KME-B", "master_SAE_ID": "SAE-A", "slave_SAE_ID": "SAE-B",
            "key_size": 256, "max_key_count": 2000, "max_key_per_request": 128, "max_key_size": 4096,
            "min_key_size": 64, "max_SAE_ID_count": 4,
        }  # fmt: skip

    def test_unknown_paths_and_methods(self, sae_a: Caller) -> None:
        assert sae_a.post("SAE-B/status")[0] == 405
        assert sae_a.get("SAE-B/nothing") == (404, {"message": "Not Found"})
        assert sae_a.get("nobody/status")[0] == 400


class TestKeys:
    @pytest.mark.parametrize(
        ("query", "body", "number", "size"),
        [("", None, 1, 256), ("?number=2", {"number": 2}, 2, 256), ("?size=512", {"size": 512}, 1, 512),
         ("?number=3&size=64", {"number": 3, "size": 64, "extension_optional": [{"x": 1}]}, 3, 64),
         ("?size=520", {"number": None, "size": 520, "unknown": 1}, 1, 520)],
    )  # fmt: skip
    def test_both_forms(
        self, sae_a: Caller, sae_b: Caller, query: str, body: Any, number: int, size: int
    ) -> None:
        for code, answer in (sae_a.get("SAE-B/enc_keys" + query), sae_a.post("SAE-B/enc_keys", body)):
            assert code == 200
            assert len(answer["keys"]) == number
            assert {len(base64.b64decode(key["key"])) * 8 for key in answer["keys"]} == {size}
            key_ids = [{"key_ID": key_id, "key_ID_extension": None} for key_id in ids(answer)]
            assert sae_b.post("SAE-A/dec_keys", {"key_IDs": key_ids}) == (200, answer)

    def test_get_with_one_key_id(self, sae_a: Caller, sae_b: Caller) -> None:
        _, answer = sae_b.get("SAE-A/enc_keys")
        path = f"SAE-B/dec_keys?key_ID={ids(answer)[0]}"
        assert sae_a.get(path) == (200, answer)
        assert sae_a.get(path) == (400, {"message": "one or more keys specified are not found on KME"})
        assert sae_a.get("SAE-B/dec_keys")[0] == 400
        assert sae_a.get("SAE-B/dec_keys?key_ID=1&key_ID=2")[0] == 400

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"number": 0}, "number shall be an integer from 1 to 128"),
            ({"number": 129}, "number shall be an integer from 1 to 128"),
            ({"number": "1"}, "number shall be an integer from 1 to 128"),
            ({"number": True}, "number shall be an integer from 1 to 128"),
            ({"size": 100}, "size shall be a multiple of 8"),
            ({"size": "256"}, "size shall be a multiple of 8"),
            ({"size": 56}, "size shall be from 64 to 4096 bits"),
            ({"size": 4104}, "size shall be from 64 to 4096 bits"),
            ({"additional_slave_SAE_IDs": "SAE-B2"}, "additional_slave_SAE_IDs shall be a list of SAE IDs"),
            ({"additional_slave_SAE_IDs": [1]}, "additional_slave_SAE_IDs shall be a list of SAE IDs"),
            ({"additional_slave_SAE_IDs": ["x"]}, "SAE not found: one or more of additional_slave_SAE_IDs"),
            ({"additional_slave_SAE_IDs": ["x"] * 5}, "at most 4 additional_slave_SAE_IDs are supported"),
            ({"extension_mandatory": {}}, "extension_mandatory shall be a list of objects"),
            ({"extension_optional": [1]}, "extension_optional shall be a list of objects"),
            ([], "the request body is not a JSON object"),
        ],
    )
    def test_refused_key_requests(self, sae_a: Caller, body: Any, message: str) -> None:
        assert sae_a.post("SAE-B/enc_keys", body) == (400, {"message": message})

    def test_refused_extensions_are_named(self, sae_a: Caller) -> None:
        assert sae_a.post("SAE-B/enc_keys", {"extension_mandatory": [{"route": 1}]}) == (
            400,
            {
                "message": "not all extension_mandatory parameters are supported",
                "details": [{"extension_mandatory_unsupported": "route"}],
            },
        )

    @pytest.mark.parametrize("query", ["number=x", "number=-1", "size=", "size=1e3", "number=1234567890"])
    def test_refused_queries(self, sae_a: Caller, query: str) -> None:
        code, answer = sae_a.get(f"SAE-B/enc_keys?{query}")
        assert (code, answer["message"][-10:]) == (400, "an integer")

    @pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 10_000, b"null"])
    def test_refused_bodies(self, sae_a: Caller, data: bytes) -> None:
        for call in ("enc_keys", "dec_keys"):
            assert sae_a.post(f"SAE-B/{call}", data=data) == (
                400,
                {"message": "the request body is not a JSON object"},
            )

    @pytest.mark.parametrize(
        "key_ids", [None, [], "x", [1], [{}], [{"key_ID": 1}], [{"key_ID": "x"}, {"key_ID": "x"}]]
    )
    def test_refused_key_ids(self, sae_b: Caller, key_ids: Any) -> None:
        assert sae_b.post("SAE-A/dec_keys", {"key_IDs": key_ids})[0] == 400

    def test_one_unknown_id_delivers_none(self, sae_a: Caller, sae_b: Caller) -> None:
        _, answer = sae_a.get("SAE-B/enc_keys")
        [key_id] = ids(answer)
        code, _ = sae_b.post("SAE-A/dec_keys", {"key_IDs": [{"key_ID": key_id}, {"key_ID": "unknown"}]})
        assert code == 400
        assert sae_b.post("SAE-A/dec_keys", {"key_IDs": [{"key_ID": key_id}]}) == (200, answer)

    def test_a_key_that_no_master_asked_for_cannot_be_fetched(self, pair: RunningPair, sae_b: Caller) -> None:
        unassigned = pair._pair.kmes["b"].store.unassigned_ids()[-1]
        assert sae_b.get(f"SAE-A/dec_keys?key_ID={unassigned}")[0] == 400

    def test_several_slaves_get_each_key_once(self, sae_a: Caller, sae_b: Caller, sae_b2: Caller) -> None:
        code, answer = sae_a.post(
            "SAE-B/enc_keys", {"additional_slave_SAE_IDs": ["SAE-B2", "SAE-B", "SAE-B2"]}
        )
        assert code == 200
        path = f"SAE-A/dec_keys?key_ID={ids(answer)[0]}"
        assert sae_b.get(path) == (200, answer)
        assert sae_b.get(path)[0] == 400
        assert sae_b2.get(path) == (200, answer)
        assert sae_b2.get(path)[0] == 400

    def test_an_sae_not_named_as_slave_is_refused(self, sae_a: Caller, sae_b: Caller, sae_b2: Caller) -> None:
        _, answer = sae_a.get("SAE-B2/enc_keys")
        path = f"SAE-A/dec_keys?key_ID={ids(answer)[0]}"
        assert sae_b.get(path)[0] == 401
        assert sae_b2.get(path) == (200, answer)

    def test_a_certificate_of_no_registered_sae(self, pair: RunningPair) -> None:
        stranger = Caller(pair.url_a, add_sae(pair.pki, "STRANGER", "stranger"), pair.pki.kms_ca)
        neighbour = Caller(pair.url_a, (pair.pki.sae_b_cert, pair.pki.sae_b_key), pair.pki.kms_ca)
        for caller in (stranger, neighbour):
            for path in ("SAE-B/status", "SAE-B/enc_keys", "SAE-B/dec_keys?key_ID=1"):
                code, answer = caller.get(path)
                assert (code, "does not name one SAE" in answer["message"]) == (401, True)

    def test_an_odd_sae_id(self, pair: RunningPair, sae_a: Caller) -> None:
        odd = Caller(pair.url_b, add_sae(pair.pki, "SAE B/3", "sae-b3"), pair.pki.kms_ca)
        _, answer = sae_a.get("SAE%20B%2F3/enc_keys")
        assert odd.get(f"SAE-A/dec_keys?key_ID={ids(answer)[0]}") == (200, answer)

    def test_no_certificate_no_connection(self, pair: RunningPair) -> None:
        with pytest.raises(requests.ConnectionError):
            requests.get(
                f"{pair.url_a}/api/v1/keys/SAE-B/status", verify=str(pair.pki.kms_ca), timeout=PATIENCE
            )


class TestPair:
    def test_client_both_ways(self, pair: RunningPair) -> None:
        a, b = pair.client("a"), pair.client("b")
        for master, slave in ((a, b), (b, a)):
            for number, size in ((1, None), (5, 512)):
                agree(master, slave, number, size)
        with pytest.raises(UnknownKey):
            b.get_keys_by_id("SAE-A", ["no-such-key"])
        with pytest.raises(UnknownSAE):
            a.get_keys("nobody")
        stranger = pair.client("a", cert=pair.pki.sae_b_cert, key=pair.pki.sae_b_key)
        with pytest.raises(KMSAuthenticationError, match="401"):
            stranger.get_keys("SAE-B")
        for client in (a, b, stranger):
            client.close()

    def test_eight_threads_and_no_key_twice(self, pair: RunningPair) -> None:
        a, b = pair.client("a"), pair.client("b")
        before = len(pair.deliveries)
        errors: list[KMSError] = []

        def work(master: Etsi014Client, slave: Etsi014Client) -> None:
            try:
                for _ in range(10):
                    agree(master, slave)
            except KMSError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(a, b) if n % 2 else (b, a)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(pair.deliveries) - before == 160
        assert set(Counter(pair.deliveries).values()) == {1}
        assert set(Counter((d.key_id, d.role) for d in pair.deliveries if d.sae_id != "SAE-B2").values()) == {
            1
        }
        assert len(a._https._idle) <= 8
        a.close()
        b.close()

    def test_a_kme_turned_off_and_on(self, pair: RunningPair) -> None:
        a, b = pair.client("a"), pair.client("b")
        agree(a, b)
        pair.stop_kme("b")
        with pytest.raises(KMSUnavailable, match="the QKD link to KME-B is down"):
            a.get_keys("SAE-B")
        with pytest.raises(KMSUnavailable, match="Connection refused"):
            b.get_keys("SAE-A")
        pair.stop_kme("b")
        pair.start_kme("b")
        agree(a, b)
        agree(b, a)
        a.close()
        b.close()

    def test_faults(self, pair: RunningPair) -> None:
        impatient, a, b = pair.client("a", read_timeout=0.3), pair.client("a"), pair.client("b")
        faults = pair.faults("a")
        faults.delay = 1
        with pytest.raises(KMSTimeout):
            impatient.get_keys("SAE-B")
        impatient.close()
        faults.delay = 0.01
        faults.answer_with = (200, "garbage")
        with pytest.raises(KMSProtocolError):
            a.get_keys("SAE-B")
        faults.answer_with = (503, '{"message": "out of keys"}')
        with pytest.raises(NoKeysLeft):
            a.get_keys("SAE-B")
        faults.answer_with = None
        pair.faults("b").corrupt_keys = True
        with pytest.raises(AssertionError):
            agree(a, b)
        pair.faults("b").corrupt_keys = False
        agree(a, b)
        a.close()
        b.close()

    def test_buffers_fill_at_the_rate_and_run_dry(self, directory: Path) -> None:
        with run_pair(
            directory, rate=200, initial=0, buffer=20, limits=Limits(max_key_per_request=50)
        ) as pair:
            a = pair.client("a")
            with pytest.raises(NoKeysLeft, match=r"not enough keys: 50 of 256 bits needed, \d+ stored"):
                a.get_keys("SAE-B", 50)
            eventually(lambda: pair.stored("a") >= 20 and pair.stored("b") >= 20)
            assert len(a.get_keys("SAE-B", 20)) == 20
            a.close()

    def test_logs_hold_no_keys(self, pair: RunningPair, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        a = pair.client("a")
        with a.get_keys("SAE-B")[0].use() as secret:
            written = base64.b64encode(secret).decode(), secret.hex()
        assert caplog.text
        assert not any(text in caplog.text for text in written)
        a.close()

    def test_a_temporary_directory_goes_with_its_keys(self) -> None:
        with run_pair(source=OSRandomSource(key_size=128), initial=1, sae_a="Alice", sae_b="Bob") as pair:
            directory = pair.pki.directory
            assert directory.parent == Path(tempfile.gettempdir())
            client = pair.client("a", size=None)
            assert client.get_keys("Bob")[0].size == 128
            client.close()
        assert not directory.exists()

    def test_a_port_in_use_is_said_and_leaves_nothing_running(
        self, directory: Path, pair: RunningPair
    ) -> None:
        import asyncio

        from kms_client.emulator import KMEPair

        async def start_twice() -> None:
            other = KMEPair(pair.pki, OSRandomSource())
            taken = int(pair.url_b.rpartition(":")[2])
            with pytest.raises(OSError, match="in use"):
                await other.start(port_b=taken)
            assert other.kmes["a"]._runner is None
            await other.stop()

        asyncio.run(start_twice())


def agree(master: Etsi014Client, slave: Etsi014Client, number: int = 1, size: int | None = None) -> None:
    """Fetch keys at both ends and compare them."""
    ours = master.get_keys(slave.sae_id, number, size)
    theirs = slave.get_keys_by_id(master.sae_id, [key.key_id for key in ours])
    assert [key.key_id for key in ours] == [key.key_id for key in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert same(one, other)


def same(one: QKDKey, other: QKDKey) -> bool:
    with one.use() as secret, other.use() as twin:
        return secret == twin


class TestStore:
    def test_assigned_keys_that_nobody_fetches_do_not_pile_up(self) -> None:
        store = KeyStore(256, max_key_count=2)
        for number in range(3):
            store.put(f"k{number}", bytearray(32), available=False)
            store.assign(Assignment(f"k{number}", (f"k{number}",), 256, "M", ("S",)))
        with pytest.raises(NotFound):
            store.fetch(["k0"], "M", "S")
        assert len(store.fetch(["k1", "k2"], "M", "S")) == 2

    def test_too_few(self) -> None:
        store = KeyStore(256, 2)
        store.put("k", bytearray(32), available=True)
        with pytest.raises(NotFound):
            store.take(512, "M", ["S"])
        assert store.available_count == 1
        with pytest.raises(NotFound):
            store.assign(Assignment("k", ("k",), 256, "M", ("S",)))

    def test_wiped_on_the_way(self) -> None:
        store = KeyStore(256, 2)
        secret = bytearray(b"x" * 32)
        store.put("k", secret, available=True)
        _, taken = store.take(128, "M", ["S"])
        assert taken == b"x" * 16
        assert secret == bytes(32)
        held = bytearray(b"y" * 32)
        store.put("h", held, available=False)
        assert store.keep_only([]) == 1
        assert held == bytes(32)


class TestDirectSync:
    def test_the_other_end_down_or_without_the_key(self) -> None:
        import asyncio

        async def check() -> None:
            stores = KeyStore(256, 5), KeyStore(256, 5)
            link = DirectSync(OSRandomSource(), *stores)
            await link.put(2)
            assignment, _ = stores[0].take(256, "M", ["S"])
            link.end_a.up = False
            with pytest.raises(PeerKMEDown):
                await link.end_a.assign([assignment])
            await link.put(2)
            assert stores[0].available_count == 0
            link.end_a.up = True
            stores[1].keep_only([])
            with pytest.raises(PeerKMEDown):
                await link.end_a.assign([assignment])

        asyncio.run(check())

    def test_keys_whose_assignment_failed_are_not_delivered(self, pair: RunningPair) -> None:
        a = pair.client("a")
        before = len(pair.deliveries)
        gone = pair._pair.kmes["b"].store
        held, gone._held = gone._held, type(gone._held)()
        with pytest.raises(KMSUnavailable, match="link to KME-B is down"):
            a.get_keys("SAE-B", 2)
        gone._held = held
        assert len(pair.deliveries) == before
        a.close()


class TestIdentity:
    @pytest.mark.parametrize(
        ("certificate", "names"),
        [
            ({}, set()),
            ({"subject": ((("commonName", "A"),), (("organizationName", "O"),))}, {"A"}),
            ({"subjectAltName": (("URI", "urn:sae:A%20B"), ("IP Address", "1.2.3.4"))}, {"A B"}),
            ({"subjectAltName": (("URI", "sae://A"), ("DNS", "a.example"))}, {"sae://A", "a.example"}),
        ],
    )
    def test_names_in_a_certificate(self, certificate: Any, names: set[str]) -> None:
        assert _certificate_names(certificate) == names


class TestSource:
    def test_the_rate_is_kept_over_many_small_steps(self) -> None:
        source = OSRandomSource(rate=100)
        assert sum(source.due(0.001) for _ in range(1000)) in (99, 100)
        assert source.key_size == 256
        assert len(source.make()) == 32

    @pytest.mark.parametrize("arguments", [{"rate": -1}, {"key_size": 12}, {"key_size": 0}])
    def test_impossible(self, arguments: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="must be"):
            OSRandomSource(**arguments)


@pytest.mark.parametrize("missing", ["aiohttp", "numpy"])
def test_without_a_package_that_it_needs_the_import_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; import kms_client; import kms_client.emulator"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith("install them with: pip install aiohttp numpy\n")
