"""One KME's end of a QKD link: the keys it holds, and the SAEs to which it has delivered keys.

Every key is made for one direction, that is for the one KME whose SAEs may be its masters. So the two ends
never pick the same key at the same time. The life of a key:

- at the master's end: available -> taken (gone);
- at the slave's end: held -> assigned to a master and its slaves -> fetched by each slave (gone).

Not thread-safe: one event loop owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["Assignment", "Delivery", "KeyStore", "NotASlave", "NotFound", "SAERole"]

SAERole = Literal["master", "slave"]


class Delivery(NamedTuple):
    """A key was delivered to an SAE."""

    key_id: str
    sae_id: str
    role: SAERole


class Assignment(NamedTuple):
    """A message from the master's KME to the slaves' KME before a key is delivered.

    A key of another size than the link makes is composed of several of its keys, or cut: its bits are the
    first `size` bits of its `parts` in order. Its ID is that of its first part.
    """

    key_id: str
    parts: tuple[str, ...]
    size: int  # bits
    master_sae_id: str
    slave_sae_ids: tuple[str, ...]

    def without(self, sae_ids: Collection[str]) -> Assignment:
        """Return the same assignment with fewer slaves, perhaps none."""
        return self._replace(slave_sae_ids=tuple(sae for sae in self.slave_sae_ids if sae not in sae_ids))


class NotFound(Exception):
    """A key is not here (any more)."""


class NotASlave(Exception):
    """The SAE is not one of those to which a key was assigned."""


@dataclass
class _Assigned:
    secret: bytearray = field(repr=False)
    master_sae_id: str
    slave_sae_ids: tuple[str, ...]
    waiting: set[str]  # slaves that have not fetched it yet


class KeyStore:
    """One end's keys.

    Args:
        key_size: of every key the link makes, in bits.
        max_key_count: keys of each direction; also of assigned keys. The oldest of these are dropped first,
            because a slave may never ask for them.
    """

    def __init__(self, key_size: int, max_key_count: int) -> None:
        """Start empty."""
        self.key_size = key_size
        self.max_key_count = max_key_count
        self.deliveries: list[Delivery] = []
        # Keys that are about to be stored at both ends; `keep_only` lets them be.
        self.in_doubt: set[str] = set()
        self._available: OrderedDict[str, bytearray] = OrderedDict()
        self._held: OrderedDict[str, bytearray] = OrderedDict()
        self._assigned: OrderedDict[str, _Assigned] = OrderedDict()

    @property
    def available_count(self) -> int:
        """Keys that masters at this end can get."""
        return len(self._available)

    @property
    def held_count(self) -> int:
        """Keys that masters at the other end can get."""
        return len(self._held)

    def parts_needed(self, size: int) -> int:
        """Return the number of the link's keys that a key of `size` bits takes."""
        return -(-size // self.key_size)

    def put(self, key_id: str, secret: bytearray, *, available: bool) -> None:
        """Store a key the link has made, for masters at this end (`available`) or at the other end."""
        (self._available if available else self._held)[key_id] = secret

    def take(
        self, size: int, master_sae_id: str, slave_sae_ids: Iterable[str]
    ) -> tuple[Assignment, bytearray]:
        """Take the oldest available keys for one key of `size` bits.

        Raises:
            NotFound: there are too few; none is taken.
        """
        needed = self.parts_needed(size)
        if needed > len(self._available):
            raise NotFound
        parts = [self._available.popitem(last=False) for _ in range(needed)]
        ids = tuple(key_id for key_id, _ in parts)
        secret = _join([part for _, part in parts], size)
        return Assignment(ids[0], ids, size, master_sae_id, tuple(slave_sae_ids)), secret

    def assign(self, assignment: Assignment) -> None:
        """Reserve held keys for the slaves of an assignment; without slaves, give them up.

        Raises:
            NotFound: a part is not held here.
        """
        if any(part not in self._held for part in assignment.parts):
            raise NotFound
        self._reserve(assignment, _join([self._held.pop(part) for part in assignment.parts], assignment.size))

    def keep(self, assignment: Assignment, secret: bytearray) -> None:
        """Reserve a copy of a key that was taken at this end, for slaves at this end, if there are any."""
        self._reserve(assignment, bytearray(secret))

    def _reserve(self, assignment: Assignment, secret: bytearray) -> None:
        if not assignment.slave_sae_ids:
            _zero(secret)
            return
        if len(self._assigned) >= self.max_key_count:
            _zero(self._assigned.popitem(last=False)[1].secret)
        self._assigned[assignment.key_id] = _Assigned(
            secret, assignment.master_sae_id, assignment.slave_sae_ids, set(assignment.slave_sae_ids)
        )

    def fetch(self, key_ids: Sequence[str], master_sae_id: str, slave_sae_id: str) -> list[bytearray]:
        """Return the keys with these IDs, for one of their slaves, which can fetch each once.

        Raises:
            NotFound: one is not assigned by that master, or was fetched already; none is delivered.
            NotASlave: one was assigned to other SAEs only; none is delivered.
        """
        for key_id in key_ids:
            assigned = self._assigned.get(key_id)
            if assigned is None or assigned.master_sae_id != master_sae_id:
                raise NotFound
            if slave_sae_id not in assigned.slave_sae_ids:
                raise NotASlave
            if slave_sae_id not in assigned.waiting:
                raise NotFound
        secrets = []
        for key_id in key_ids:
            assigned = self._assigned[key_id]
            assigned.waiting.discard(slave_sae_id)
            if assigned.waiting:
                secrets.append(bytearray(assigned.secret))
            else:
                secrets.append(self._assigned.pop(key_id).secret)
        return secrets

    def unassigned_ids(self) -> list[str]:
        """Return the IDs of keys that both ends must have: neither taken here nor assigned by the other."""
        return [*self._available, *self._held]

    def keep_only(self, key_ids: Iterable[str], told: Iterable[str] | None = None) -> int:
        """Drop unassigned keys the other end does not have; return how many.

        Args:
            key_ids: IDs of the keys that the other end has.
            told: IDs of the keys that this end had when it told the other; younger ones, which the other may
                not know yet, stay. None for all.
        """
        known = set(key_ids) | self.in_doubt
        candidates = self.unassigned_ids() if told is None else told
        return self.drop(key_id for key_id in candidates if key_id not in known)

    def drop(self, key_ids: Iterable[str]) -> int:
        """Drop these keys, if they are not taken or assigned yet; return how many."""
        dropped = 0
        for key_id in tuple(key_ids):
            secret = self._available.pop(key_id, None) or self._held.pop(key_id, None)
            if secret is not None:
                _zero(secret)
                dropped += 1
        return dropped


def _join(parts: list[bytearray], size: int) -> bytearray:
    joined = bytearray().join(parts)
    secret = joined[: size // 8]
    for used in (*parts, joined):
        _zero(used)
    return secret


def _zero(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
