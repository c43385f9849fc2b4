"""A KMS in the same process, for a program in the same physical unit as its QKD device.

Keys cross no interface that could be intercepted between the device's driver and the program: the driver
calls `LocalKeyManager.add`.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kms_client.errors import KMSUnavailable, NoKeysLeft, UnknownKey, UnknownSAE
from kms_client.keys import QKDKey
from kms_client.manager import KMSStatus, check_key_ids, check_number_and_size

__all__ = ["LocalKeyManager"]


class _Pool:
    """The keys shared with one peer. A key of no fixed direction is in both dictionaries."""

    def __init__(self) -> None:
        # Ordered dictionaries pop their oldest entry in constant time; plain ones do not.
        self.as_master: OrderedDict[str, QKDKey] = OrderedDict()
        self.as_slave: OrderedDict[str, QKDKey] = OrderedDict()

    def take(self, key_id: str) -> QKDKey:
        as_slave = self.as_slave.pop(key_id, None)
        return self.as_master.pop(key_id) if as_slave is None else self.as_master.pop(key_id, as_slave)


class LocalKeyManager:
    """A `KeyManager` whose keys are pushed in by the driver of a QKD device in this process.

    Args:
        sae_id: this program's SAE ID.
        peers: SAE IDs with which keys are shared; `add` adds to them.
        name: for display.
        max_key_count: keys kept for each peer and direction; beyond it the oldest are dropped and wiped, so
            that keys that a peer requested and never used cannot fill the memory.

    Attributes:
        delivered: number of keys handed out.
        dropped: number of keys dropped because the store was full.

    A delivered key is no longer held here in any form. Every method may be called from any thread.
    """

    protocol = "local"

    def __init__(
        self,
        sae_id: str,
        *,
        peers: Iterable[str] = (),
        name: str = "local",
        max_key_count: int = 10_000,
    ) -> None:
        """Start with no keys."""
        self.name = name
        self.sae_id = sae_id
        self.delivered = 0
        self.dropped = 0
        self._max_key_count = max_key_count
        self._pools = {peer: _Pool() for peer in peers}
        self._make: Callable[[int, int], None] | None = None
        self._key_size = 256
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def pair(
        cls,
        sae_a: str,
        sae_b: str,
        *,
        source: Callable[[int], bytes | bytearray] = os.urandom,
        key_size: int = 256,
    ) -> tuple[LocalKeyManager, LocalKeyManager]:
        """Make two managers at the ends of a link that makes keys on demand; for experiments.

        Args:
            sae_a: SAE ID of the first manager.
            sae_b: SAE ID of the second.
            source: gives that many random bytes.
            key_size: in bits, if `get_keys` is called with size None.
        """
        check_number_and_size(1, key_size)
        a = cls(sae_a, peers=[sae_b], name=f"local {sae_a}")
        b = cls(sae_b, peers=[sae_a], name=f"local {sae_b}")
        for master, slave in ((a, b), (b, a)):
            master._key_size = key_size
            master._make = _maker(master, slave, source)
        return a, b

    def add(
        self,
        peer_sae_id: str,
        key_id: str,
        secret: bytes | bytearray | memoryview,
        *,
        master_sae_id: str | None = None,
    ) -> None:
        """Store a key that the device has made; the device at the other end stores the same.

        Args:
            peer_sae_id: SAE ID at the other end.
            key_id: unique among the keys shared with that peer.
            secret: copied; the caller wipes its own.
            master_sae_id: the one of the two SAEs that may give this key out by `get_keys`; the other gets it
                by ID only. With None either may: if both ends start connections, they can then pick the same
                key at the same time, and one of them is refused with `UnknownKey`.

        Raises:
            ValueError: the ID is stored already, or `master_sae_id` is neither end.
            KMSUnavailable: the manager is closed.
        """
        if master_sae_id not in (None, self.sae_id, peer_sae_id):
            raise ValueError(f"master_sae_id must be {self.sae_id} or {peer_sae_id}, not {master_sae_id}")
        key = QKDKey(key_id, secret, kms=self.name)
        with self._lock:
            self._check_open()
            pool = self._pools.setdefault(peer_sae_id, _Pool())
            if key_id in pool.as_master or key_id in pool.as_slave:
                raise ValueError(f"key ID {key_id} is stored already")
            if master_sae_id != peer_sae_id:
                self._store(pool, pool.as_master, key)
            if master_sae_id != self.sae_id:
                self._store(pool, pool.as_slave, key)

    def status(self, peer_sae_id: str) -> KMSStatus:
        """Return the state of the keys shared with `peer_sae_id`; sizes in bits.

        Raises:
            UnknownSAE: no key was ever added for that peer.
            KMSUnavailable: the manager is closed.
        """
        with self._lock:
            stored = len(self._pool(peer_sae_id).as_master)
        on_demand = self._make is not None
        return KMSStatus(
            source_kme_id=self.name,
            target_kme_id=peer_sae_id,
            master_sae_id=self.sae_id,
            slave_sae_id=peer_sae_id,
            key_size=self._key_size,
            stored_key_count=self._max_key_count if on_demand else stored,
            max_key_count=self._max_key_count,
            max_key_per_request=self._max_key_count,
            max_key_size=1 << 16,
            min_key_size=8,
            max_sae_id_count=0,
        )

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        """Return the `number` oldest keys of `size` bits (of any size with None) shared with `peer_sae_id`.

        Raises:
            NoKeysLeft: there are fewer; none is taken.
            UnknownSAE: no key was ever added for that peer.
            KMSUnavailable: the manager is closed.
            ValueError: `number` or `size` is impossible.
        """
        check_number_and_size(number, size)
        if self._make is not None and peer_sae_id in self._pools:
            size = size or self._key_size
            self._make(number, size)
        with self._lock:
            pool = self._pool(peer_sae_id)
            found: list[str] = []
            for key_id, key in pool.as_master.items():
                if size is None or key.size == size:
                    found.append(key_id)
                    if len(found) == number:
                        break
            else:
                sort = "keys" if size is None else f"keys of {size} bits"
                raise NoKeysLeft(
                    f"{number} {sort} were asked for, {len(found)} are left", kms=self.name, peer=peer_sae_id
                )
            return self._deliver(pool, found)

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Return the keys with these IDs, compared exactly, in the order asked.

        Raises:
            UnknownKey: one or more are not here (any more); none is taken.
            UnknownSAE: no key was ever added for that peer.
            KMSUnavailable: the manager is closed.
            ValueError: no ID, an empty one, or the same one twice.
        """
        check_key_ids(key_ids)
        with self._lock:
            pool = self._pool(peer_sae_id)
            missing = [key_id for key_id in key_ids if key_id not in pool.as_slave]
            if missing:
                raise UnknownKey("no such key", kms=self.name, peer=peer_sae_id, key_ids=missing)
            return self._deliver(pool, key_ids)

    def close(self) -> None:
        """Wipe and forget every key."""
        with self._lock:
            self._closed = True
            for pool in self._pools.values():
                for key in (*pool.as_master.values(), *pool.as_slave.values()):
                    key.wipe()
            self._pools.clear()

    # Below, the lock is held.

    def _check_open(self) -> None:
        if self._closed:
            raise KMSUnavailable(
                "this key manager is closed", kms=self.name, hint="Make a new LocalKeyManager."
            )

    def _pool(self, peer_sae_id: str) -> _Pool:
        self._check_open()
        try:
            return self._pools[peer_sae_id]
        except KeyError:
            raise UnknownSAE("no keys are shared with this SAE", kms=self.name, peer=peer_sae_id) from None

    def _store(self, pool: _Pool, keys: OrderedDict[str, QKDKey], key: QKDKey) -> None:
        if len(keys) >= self._max_key_count:
            pool.take(next(iter(keys))).wipe()
            self.dropped += 1
        keys[key.key_id] = key

    def _deliver(self, pool: _Pool, key_ids: Sequence[str]) -> list[QKDKey]:
        self.delivered += len(key_ids)
        return [pool.take(key_id) for key_id in key_ids]


def _maker(
    master: LocalKeyManager, slave: LocalKeyManager, source: Callable[[int], bytes | bytearray]
) -> Callable[[int, int], None]:
    """Return a function that stores new keys at the slave first, so that it knows every delivered key."""

    def make(number: int, size: int) -> None:
        for _ in range(number):
            key_id = str(uuid.uuid4())
            secret = source(size // 8)
            slave.add(master.sae_id, key_id, secret, master_sae_id=master.sae_id)
            master.add(slave.sae_id, key_id, secret, master_sae_id=master.sae_id)

    return make
