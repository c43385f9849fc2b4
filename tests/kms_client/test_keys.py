"""QKDKey, the errors, the in-process KMS: everything without a network."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import pkgutil
import threading

import pytest

import kms_client
from kms_client import (
    KeyAlreadyUsed,
    KeyManager,
    KMSError,
    KMSRequestError,
    KMSStatus,
    KMSTimeout,
    KMSUnavailable,
    LocalKeyManager,
    NoKeysLeft,
    QKDKey,
    UnknownKey,
    UnknownSAE,
)

pytestmark = pytest.mark.pure


class TestQKDKey:
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_copies_the_secret_and_gives_it_once(self, kind: type) -> None:
        given = bytearray(range(32))
        key = QKDKey("id", kind(given), kms="https://kme")
        given[:] = bytes(32)
        assert (key.key_id, key.size, key.kms, key.used) == ("id", 256, "https://kme", False)
        with key.use() as secret:
            assert isinstance(secret, bytearray)
            assert secret == bytes(range(32))
            assert key.used
        assert secret == bytes(32)
        with pytest.raises(KeyAlreadyUsed, match="key ID id") as caught, key.use():
            pass
        assert caught.value.key_ids == ("id",)
        assert key.size == 256

    def test_is_wiped_when_its_use_fails(self) -> None:
        key = QKDKey("id", b"secret")
        with pytest.raises(RuntimeError), key.use() as secret:
            raise RuntimeError
        assert secret == bytes(6)

    def test_an_unentered_use_uses_nothing(self) -> None:
        key = QKDKey("id", b"secret")
        key.use()
        assert not key.used

    def test_wipe(self) -> None:
        key = QKDKey("id", b"secret")
        key.wipe()
        key.wipe()
        assert key.used
        with pytest.raises(KeyAlreadyUsed), key.use():
            pass

    def test_wiping_a_key_in_use_leaves_it_to_its_user(self) -> None:
        key = QKDKey("id", b"secret")
        with key.use() as secret:
            key.wipe()
            assert secret == b"secret"
        assert secret == bytes(6)

    def test_is_wiped_when_let_go(self) -> None:
        key = QKDKey("id", b"secret")
        held = key._unused[0]
        del key
        gc.collect()
        assert held == bytes(6)

    def test_one_of_many_threads_gets_it(self) -> None:
        for _ in range(50):
            key = QKDKey("id", b"secret")
            start = threading.Barrier(4)
            outcomes: list[str] = []

            def use(key: QKDKey = key, start: threading.Barrier = start, out: list[str] = outcomes) -> None:
                start.wait()
                try:
                    with key.use() as secret:
                        out.append(secret.decode())
                except KeyAlreadyUsed:
                    out.append("refused")

            threads = [threading.Thread(target=use) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(outcomes) == ["refused"] * 3 + ["secret"]

    def test_repr_is_redacted(self) -> None:
        key = QKDKey("my-id\n", b"secret")
        assert repr(key) == "<QKDKey id=my-id? 48 bits unused>"
        key.wipe()
        assert str(key) == "<QKDKey id=my-id? 48 bits used>"

    def test_cannot_be_copied(self) -> None:
        key = QKDKey("id", b"secret")
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                attempt(key)
        with pytest.raises(AttributeError):
            key.extra = 1  # type: ignore[attr-defined]
        assert key != QKDKey("id", b"secret")
        assert len({key, key}) == 1

    def test_refuses_nothing(self) -> None:
        with pytest.raises(ValueError, match="needs an ID"):
            QKDKey("", b"secret")
        with pytest.raises(ValueError, match="needs a secret"):
            QKDKey("id", b"")


class TestErrors:
    def test_says_what_where_and_what_to_do(self) -> None:
        error = UnknownKey("no such key", kms="https://kme", peer="SAE-B", key_ids=["1", "2"], status=400)
        assert str(error) == (
            "no such key (KMS https://kme; peer SAE SAE-B; key ID 1, 2; HTTP status 400). "
            "A key is delivered once only: ask the master SAE for a new key."
        )

    def test_without_details(self) -> None:
        assert str(KMSError("it broke")) == "it broke"
        assert str(KMSError("it broke", hint="Mend it.")) == "it broke. Mend it."

    def test_foreign_text_stays_on_its_line_and_short(self) -> None:
        error = KMSError("it broke", peer="x" * 1000, key_ids=["a\nb", *map(str, range(9))])
        assert str(error) == f"it broke (peer SAE {'x' * 117}...; key ID a?b, 0, 1, 2 and 6 more)"
        assert len(error.key_ids) == 10

    def test_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(NoKeysLeft("none", kms="k", status=503)))
        assert isinstance(error, NoKeysLeft)
        assert str(error) == str(NoKeysLeft("none", kms="k", status=503))

    @pytest.mark.parametrize(
        ("kind", "base"),
        [(KMSTimeout, KMSUnavailable), (NoKeysLeft, KMSUnavailable), (UnknownKey, KMSRequestError),
         (UnknownSAE, KMSRequestError), (KeyAlreadyUsed, KMSError)],
    )  # fmt: skip
    def test_kinds(self, kind: type, base: type) -> None:
        assert issubclass(kind, base)

    def test_every_kind_says_what_to_do(self) -> None:
        exported = [getattr(kms_client, name) for name in kms_client.__all__]
        kinds = [item for item in exported if isinstance(item, type)]
        errors = [kind for kind in kinds if issubclass(kind, KMSError) and kind is not KMSError]
        assert len(errors) == 10
        assert all(error.default_hint for error in errors)


class TestLocalKeyManager:
    def test_keys_pushed_in_by_a_device(self) -> None:
        manager = LocalKeyManager("A", peers=["B"])
        with pytest.raises(NoKeysLeft, match="1 keys of 256 bits were asked for, 0 are left"):
            manager.get_keys("B")
        for number in range(3):
            manager.add("B", f"k{number}", bytes([number]) * 32)
        manager.add("B", "short", b"s" * 16)
        assert [key.key_id for key in manager.get_keys("B", 2)] == ["k0", "k1"]
        with pytest.raises(NoKeysLeft, match="2 keys of 256 bits were asked for, 1 are left"):
            manager.get_keys("B", 2)
        assert [key.key_id for key in manager.get_keys("B", 2, None)] == ["k2", "short"]
        assert manager.delivered == 4
        with pytest.raises(NoKeysLeft, match="1 keys were asked for"):
            manager.get_keys("B", size=None)

    def test_a_key_is_delivered_once_by_either_call(self) -> None:
        manager = LocalKeyManager("A")
        manager.add("B", "k1", b"1" * 32)
        manager.add("B", "k2", b"2" * 32)
        with pytest.raises(UnknownKey, match="key ID nope"):
            manager.get_keys_by_id("B", ["k2", "nope"])
        assert [key.key_id for key in manager.get_keys_by_id("B", ["k2"])] == ["k2"]
        assert [key.key_id for key in manager.get_keys("B")] == ["k1"]
        for key_id in ("k1", "k2"):
            with pytest.raises(UnknownKey):
                manager.get_keys_by_id("B", [key_id])

    def test_keys_of_one_direction(self) -> None:
        manager = LocalKeyManager("A")
        manager.add("B", "ours", b"1" * 32, master_sae_id="A")
        manager.add("B", "theirs", b"2" * 32, master_sae_id="B")
        with pytest.raises(UnknownKey):
            manager.get_keys_by_id("B", ["ours"])
        assert [key.key_id for key in manager.get_keys("B")] == ["ours"]
        with pytest.raises(NoKeysLeft):
            manager.get_keys("B")
        assert [key.key_id for key in manager.get_keys_by_id("B", ["theirs"])] == ["theirs"]
        with pytest.raises(ValueError, match="must be A or B, not C"):
            manager.add("B", "x", b"1", master_sae_id="C")

    def test_refusals(self) -> None:
        manager = LocalKeyManager("A", peers=["B"])
        manager.add("B", "k", b"1")
        with pytest.raises(ValueError, match="stored already"):
            manager.add("B", "k", b"1")
        for call in (manager.status, manager.get_keys, lambda peer: manager.get_keys_by_id(peer, ["k"])):
            with pytest.raises(UnknownSAE, match="peer SAE C"):
                call("C")
        for number, size in ((0, None), (1, 0), (1, 12), (-1, 256)):
            with pytest.raises(ValueError, match="must be"):
                manager.get_keys("B", number, size)
        for key_ids in ([], [""], ["k", "k"]):
            with pytest.raises(ValueError, match="key ID"):
                manager.get_keys_by_id("B", key_ids)
        with pytest.raises(TypeError, match="not one string"):
            manager.get_keys_by_id("B", "k")

    def test_the_oldest_keys_are_dropped_when_full(self) -> None:
        manager = LocalKeyManager("A", max_key_count=2)
        for number in range(4):
            manager.add("B", f"k{number}", b"x" * 32)
        assert manager.dropped == 2
        assert [key.key_id for key in manager.get_keys("B", 2)] == ["k2", "k3"]

    def test_close_wipes(self) -> None:
        manager = LocalKeyManager("A")
        manager.add("B", "k", b"secret")
        key = manager._pools["B"].as_master["k"]
        manager.close()
        manager.close()
        assert key.used
        for call in (
            lambda: manager.get_keys("B"),
            lambda: manager.status("B"),
            lambda: manager.add("B", "k", b"x"),
        ):
            with pytest.raises(KMSUnavailable, match="closed"):
                call()

    def test_status(self) -> None:
        manager = LocalKeyManager("A")
        manager.add("B", "k", b"x" * 32)
        status = manager.status("B")
        assert isinstance(status, KMSStatus)
        assert (status.master_sae_id, status.slave_sae_id, status.stored_key_count) == ("A", "B", 1)
        assert hash(status)

    def test_pair_makes_keys_on_demand(self) -> None:
        a, b = LocalKeyManager.pair("A", "B", key_size=128)
        manager: KeyManager = a  # for the type checker
        assert isinstance(manager, KeyManager)
        assert a.status("B").stored_key_count > 0
        for master, slave, number, size, bits in ((a, b, 1, 256, 256), (b, a, 3, None, 128)):
            ours = master.get_keys(slave.sae_id, number, size)
            theirs = slave.get_keys_by_id(master.sae_id, [key.key_id for key in ours])
            for one, other in zip(ours, theirs, strict=True):
                with one.use() as secret, other.use() as same:
                    assert secret == same
                    assert len(secret) * 8 == bits
        with pytest.raises(UnknownSAE):
            a.get_keys("C")

    def test_pair_takes_its_bits_from_the_source(self) -> None:
        a, _ = LocalKeyManager.pair("A", "B", source=lambda size: b"z" * size)
        with a.get_keys("B")[0].use() as secret:
            assert secret == b"z" * 32

    def test_eight_threads_never_share_a_key(self) -> None:
        a, b = LocalKeyManager.pair("A", "B")
        got: list[str] = []

        def work() -> None:
            for _ in range(100):
                key = a.get_keys("B")[0]
                b.get_keys_by_id("A", [key.key_id])
                got.append(key.key_id)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(got)) == len(got) == a.delivered == b.delivered == 800


def test_every_module_says_what_is_public() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(kms_client.__path__, "kms_client.")
        if not module.name.endswith("__main__")
    ]
    for name in ["kms_client", *names]:
        module = importlib.import_module(name)
        assert sorted(module.__all__) == sorted(set(module.__all__))
        assert all(hasattr(module, public) for public in module.__all__)
