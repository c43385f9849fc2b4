"""Several KMEs of one site as one `KeyManager`.

Failures after which the next KME may be asked:

- `get_keys`: all of them. If the KME refused, or was not reached, no key was taken. If the request was sent
  and no complete answer came (`KMSError.keys_may_be_lost`), the KME may have taken keys out of its store that
  neither SAE has now. They protect nothing, and other keys serve as well: the next KME is asked, and the keys
  are counted as possibly lost.
- `get_keys_by_id`: all of them, too. A KME that does not know an ID loses nothing by being asked. But no KME is asked
  again for a key that it may have delivered: it would say that it has no such key, and hide the loss.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kms_client.breaker import Breaker, BreakerState
from kms_client.errors import (
    KMSAuthenticationError,
    KMSError,
    KMSOutsideSecureSite,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    UnknownKey,
    UnknownSAE,
    shown,
)
from kms_client.forks import forget_in_children
from kms_client.keys import QKDKey, wipe_keys
from kms_client.manager import KeyManager, KMSStatus, check_key_ids, check_number_and_size

__all__ = ["FailoverKeyManager", "MemberHealth"]

_T = TypeVar("_T")

# Of several failures the one that leaves most hope gives the common error its class.
_KINDS: Final = (
    NoKeysLeft,
    KMSTimeout,
    KMSUnavailable,
    KMSAuthenticationError,
    KMSOutsideSecureSite,
    KMSProtocolError,
    UnknownKey,
    UnknownSAE,
    KMSRequestError,
    KMSError,
)


@dataclass(frozen=True)
class MemberHealth:
    """The health of one KME of a `FailoverKeyManager`, for metrics; no secrets."""

    name: str
    breaker: BreakerState
    served: int
    """Keys that it delivered."""
    failures: int
    """Requests that it failed, or refused for another reason than having no such key."""
    possibly_lost: int
    """Keys of failed requests, of which the KME may have delivered some."""
    last_error: str
    """Its last failure and the hint; "" if it never failed."""


@dataclass(eq=False)
class _Member:
    manager: KeyManager
    peers: frozenset[str] | None  # None: all
    breaker: Breaker
    served: int = 0
    failures: int = 0
    possibly_lost: int = 0
    last_error: KMSError | None = None

    @property
    def name(self) -> str:
        return self.manager.name


class FailoverKeyManager:
    """A `KeyManager` that asks several others, in order of preference.

    Args:
        members: the KMEs of this site, the preferred one first; closed with this manager. All know this program by the
            same SAE ID, and no two have the same name.
        peers: for a member's name, the SAE IDs that it has a link to; a member that is not named may have links to all.
        size: of a key in bits if `get_keys` is not told; None for each member's own.
        protocol: name of the interface on the wire between peers. Needed if members speak several: giving it
            declares that all members deliver the same keys under the same IDs, whatever they speak.
        threshold: failures in a row after which a member is left alone for a while.
        min_backoff: seconds that it is left alone the first time; doubled each further time.
        max_backoff: seconds, at most.
        max_records: keys whose serving member is remembered.
        clock: monotonic, in seconds.
        jitter: see `Breaker`.

    Raises:
        ValueError: the members do not fit together.

    `get_keys` and `status` ask the members that are not left alone, until one delivers. `get_keys_by_id` asks
    all: an SAE that was told a key ID has reason to believe that a KME of this site has the key. Members that
    are left alone come last then, the one that knew this peer's last key comes first. The module's docstring
    lists the failures that count as lost keys.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        members: Sequence[KeyManager],
        *,
        peers: Mapping[str, Collection[str]] | None = None,
        size: int | None = 256,
        protocol: str | None = None,
        threshold: int = 3,
        min_backoff: float = 0.2,
        max_backoff: float = 15.0,
        max_records: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        check_number_and_size(1, size)
        peers = peers or {}
        names = [member.name for member in members]
        if not members or len(set(names)) < len(names):
            raise ValueError(f"one or more members of different names are needed, not {names}")
        if unknown := set(peers) - set(names):
            raise ValueError(f"peers names no members: {', '.join(sorted(unknown))}")
        if len(sae_ids := {member.sae_id for member in members}) > 1:
            raise ValueError(f"all members must know this program by one SAE ID, not {sorted(sae_ids)}")
        if protocol is None and len(protocols := {member.protocol for member in members}) > 1:
            raise ValueError(
                f"the members speak {', '.join(sorted(protocols))}: if all deliver the same keys under the same IDs,"
                " say which of these is told to peers (protocol=...)"
            )
        self.protocol = protocol or members[0].protocol
        self.name = ", ".join(names)
        self.sae_id = members[0].sae_id
        self._size = size
        self._clock = clock
        self._max_records = max_records
        self._members = [
            _Member(
                member,
                frozenset(peers[member.name]) if member.name in peers else None,
                Breaker(threshold, min_backoff, max_backoff, jitter=jitter),
            )
            for member in members
        ]
        self._served_by: OrderedDict[str, str] = OrderedDict()
        self._knew_last: OrderedDict[str, _Member] = OrderedDict()  # for a peer's SAE ID
        self._lock = threading.Lock()
        forget_in_children(self)

    def forget(self) -> None:
        """Start afresh in a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def status(self, peer_sae_id: str) -> KMSStatus:
        """Return the status of the first member that gives one.

        Raises:
            KMSError: of the kind that leaves most hope; the text has the answer of each member.
        """
        attempt = _Attempt(self, peer_sae_id, "status")
        for member in self._in_order(peer_sae_id):
            status = attempt.ask(member, lambda manager: manager.status(peer_sae_id))
            if status is not None:
                return status
        raise attempt.failure()

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = None) -> list[QKDKey]:
        """Return new keys from the first member that delivers them; all of them from the same.

        Raises:
            KMSError: of the kind that leaves most hope; the text has the answer of each member.
            ValueError: `number` or `size` is impossible.
        """
        size = self._size if size is None else size
        check_number_and_size(number, size)
        attempt = _Attempt(self, peer_sae_id, "keys", number)
        for member in self._in_order(peer_sae_id):
            keys = attempt.ask(member, lambda manager: manager.get_keys(peer_sae_id, number, size))
            if keys is not None:
                self._record(member, keys)
                return keys
        raise attempt.failure()

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Return the keys with these IDs, from the members that know them.

        Members are asked for all keys at once. If two or more do not know some of them, those are asked for
        one key after the other: the peer may have got the keys from several KMEs.

        Raises:
            UnknownKey: every member was asked, and no member knows one of the keys; others that were
                delivered are wiped.
            KMSError: of the kind that leaves most hope; the text has the answer of each member.
            ValueError: no ID, an empty one, or the same one twice.
        """
        check_key_ids(key_ids)
        attempt = _Attempt(self, peer_sae_id, "keys", len(key_ids), key_ids)
        order = self._in_order(peer_sae_id, by_id=True)
        ignorant = []
        for member in order:
            keys = attempt.ask(
                member, lambda manager: manager.get_keys_by_id(peer_sae_id, key_ids), anyway=True
            )
            if keys is not None:
                self._record(member, keys, peer_sae_id)
                return keys
            if attempt.not_known:
                ignorant.append(member)
        # Not where a KME may have delivered them all: the others' keys would be of no use.
        if len(key_ids) > 1 and len(ignorant) > 1 and not any(e.keys_may_be_lost for _, e in attempt.errors):
            return self._one_by_one(attempt, ignorant)
        raise attempt.failure()

    def _one_by_one(self, together: _Attempt, members: Sequence[_Member]) -> list[QKDKey]:
        found: list[QKDKey] = []
        for key_id in together.key_ids:
            attempt = _Attempt(self, together.peer, "key", 1, [key_id])
            keys = self._single(attempt, members)
            if keys is None:
                wipe_keys(found)
                # A member that could not be asked for all may be the one that has this key.
                unknown = all(isinstance(error, UnknownKey) for _, error in together.errors)
                error = (attempt if unknown else together).failure()
                error.keys_may_be_lost = error.keys_may_be_lost or bool(found)
                raise error
            found += keys
        return found

    def _single(self, attempt: _Attempt, members: Sequence[_Member]) -> list[QKDKey] | None:
        for member in members:
            keys = attempt.ask(
                member, lambda manager: manager.get_keys_by_id(attempt.peer, attempt.key_ids), anyway=True
            )
            if keys is not None:
                self._record(member, keys, attempt.peer)
                return keys
        return None

    def served_by(self, key_id: str) -> str | None:
        """Return the name of the member that delivered this key; None if that is not known (any more)."""
        with self._lock:
            return self._served_by.get(key_id)

    @property
    def health(self) -> tuple[MemberHealth, ...]:
        """The health of each member, in order of preference."""
        with self._lock:
            now = self._clock()
            return tuple(
                MemberHealth(
                    member.name,
                    member.breaker.state(now),
                    member.served,
                    member.failures,
                    member.possibly_lost,
                    str(member.last_error or ""),
                )
                for member in self._members
            )

    def close(self) -> None:
        """Close all members."""
        for member in self._members:
            member.manager.close()

    def __repr__(self) -> str:
        """Show the members."""
        return f"<FailoverKeyManager {self.name}>"

    def _in_order(self, peer: str, *, by_id: bool = False) -> list[_Member]:
        members = [member for member in self._members if member.peers is None or peer in member.peers]
        if by_id:
            with self._lock:
                now, last = self._clock(), self._knew_last.get(peer)
                left_alone = {member: member.breaker.state(now) is BreakerState.OPEN for member in members}
            # Sorting is stable: beyond that, the order of preference.
            members.sort(key=lambda member: (left_alone[member], member is not last))
        return members

    def _record(self, member: _Member, keys: Sequence[QKDKey], by_id_for: str | None = None) -> None:
        with self._lock:
            member.served += len(keys)
            if by_id_for is not None:
                _remember(self._knew_last, by_id_for, member, self._max_records)
            for key in keys:
                _remember(self._served_by, key.key_id, member.name, self._max_records)


def _remember(records: OrderedDict[str, _T], name: str, value: _T, most: int) -> None:
    records[name] = value
    records.move_to_end(name)
    if len(records) > most:
        records.popitem(last=False)


@dataclass
class _Attempt:
    """One call, and the members' answers to it."""

    of: FailoverKeyManager
    peer: str
    what: str
    number: int = 0  # of keys
    key_ids: Sequence[str] = ()
    errors: list[tuple[_Member, KMSError]] = field(default_factory=list)

    @property
    def not_known(self) -> bool:
        """True if the last member does not know a key, and has not delivered the others."""
        error = self.errors[-1][1]
        return isinstance(error, UnknownKey) and not error.keys_may_be_lost

    def ask(self, member: _Member, request: Callable[[KeyManager], _T], *, anyway: bool = False) -> _T | None:
        """Return the member's answer; None if it fails, or is left alone and not to be asked `anyway`."""
        lock, clock = self.of._lock, self.of._clock
        with lock:
            now = clock()
            if not member.breaker.acquire(now) and not anyway:
                self.errors.append((member, _left_alone(member, now)))
                return None
        try:
            answer = request(member.manager)
        except KMSError as error:
            with lock:
                self._failed(member, error, clock())
            return None
        except BaseException:
            with lock:
                member.breaker.released()
            raise
        with lock:
            member.breaker.succeeded()
        return answer

    def _failed(self, member: _Member, error: KMSError, now: float) -> None:
        self.errors.append((member, error))
        member.possibly_lost += self.number * error.keys_may_be_lost
        if isinstance(error, (NoKeysLeft, KMSRequestError)):
            member.breaker.succeeded()  # the KME is well
        else:
            member.breaker.failed(now)
        if not isinstance(error, UnknownKey):
            member.failures += 1
            member.last_error = error

    def failure(self) -> KMSError:
        """Return one error for all of them."""
        if not self.errors:
            return UnknownSAE(
                "no KME here has a link to this SAE",
                kms=self.of.name,
                peer=self.peer,
                key_ids=self.key_ids,
                hint="Check the peer's SAE ID, and which peers the KMEs of this site are said to serve.",
            )
        if len(self.errors) == 1:
            return self.errors[0][1]
        kind, error = next(
            (kind, error) for kind in _KINDS for _, error in self.errors if isinstance(error, kind)
        )
        said = "; ".join(
            f"{shown(member.name)}: {error.message}"
            + (f" (HTTP status {error.status})" if error.status is not None else "")
            for member, error in self.errors
        )
        return kind(
            f"none of {len(self.errors)} KMEs has given {self.what}: {said}",
            peer=self.peer,
            key_ids=self.key_ids,
            status=error.status,
            hint=" ".join(dict.fromkeys(error.hint for _, error in self.errors if error.hint)),
            keys_may_be_lost=any(error.keys_may_be_lost for _, error in self.errors),
        )


def _left_alone(member: _Member, now: float) -> KMSUnavailable:
    error = member.last_error
    assert error is not None
    pause = member.breaker.retry_at - now
    when = f"for {pause:.2g} seconds more" if pause > 0 else "while another request tries it out"
    return KMSUnavailable(
        f"not asked {when} after {member.breaker.failures} failures, the last of them: {error.message}",
        kms=member.name,
        status=error.status,
        hint=error.hint,
    )
