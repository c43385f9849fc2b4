"""What the tests of the pool and of failover share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kms_client import KeyManager, KMSError, KMSStatus, QKDKey
from tests.support.patience import PATIENCE


class Watched:
    """A key manager that notes what a real one is asked for.

    Attributes:
        calls: (name of the call, peer, number of keys), in order.
        fetched: IDs of the keys that `get_keys` gave, in order.
        at_once: most calls that were under way at the same time.
        failing: called before each call with its name; may raise.
    """

    def __init__(self, manager: KeyManager, name: str = "") -> None:
        self._manager = manager
        self.protocol, self.name, self.sae_id = manager.protocol, name or manager.name, manager.sae_id
        self.calls: list[tuple[str, str, int]] = []
        self.fetched: list[str] = []
        self.at_once = self._under_way = 0
        self.closed = False
        self.failing: Callable[[str], object] = lambda _: None
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let calls wait until the block ends."""
        self._may_go_on.clear()
        try:
            yield
        finally:
            self._may_go_on.set()

    @property
    def numbers(self) -> list[int]:
        """How many keys were asked for each time."""
        return [number for call, _, number in self.calls if call == "get_keys"]

    def status(self, peer_sae_id: str) -> KMSStatus:
        with self._noted("status", peer_sae_id, 0):
            return self._manager.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        with self._noted("get_keys", peer_sae_id, number):
            keys = self._manager.get_keys(peer_sae_id, number, size)
            self.fetched += [key.key_id for key in keys]
            return keys

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        with self._noted("get_keys_by_id", peer_sae_id, len(key_ids)):
            return self._manager.get_keys_by_id(peer_sae_id, key_ids)

    def close(self) -> None:
        self.closed = True
        self._manager.close()

    @contextmanager
    def _noted(self, call: str, peer: str, number: int) -> Iterator[None]:
        with self._lock:
            self.calls.append((call, peer, number))
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        try:
            assert self._may_go_on.wait(2 * PATIENCE)
            self.failing(call)
            yield
        finally:
            with self._lock:
                self._under_way -= 1


class Call:
    """A call in a thread of its own: its result or its error, and when it ended."""

    def __init__(self, function: Callable[[], list[QKDKey]]) -> None:
        self.keys: list[QKDKey] | None = None
        self.error: KMSError | None = None
        self.ended = 0.0
        self._function = function
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.keys = self._function()
        except KMSError as error:
            self.error = error
        self.ended = time.monotonic()

    def join(self) -> Call:
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive()
        return self


def agree(ours: Sequence[QKDKey], slave: KeyManager, master_sae_id: str) -> None:
    """The other side gets the same secrets under the same IDs."""
    theirs = slave.get_keys_by_id(master_sae_id, [key.key_id for key in ours])
    assert [key.key_id for key in ours] == [key.key_id for key in theirs]
    for one, other in zip(ours, theirs, strict=True):
        with one.use() as secret, other.use() as twin:
            assert secret == twin
