"""Associations: the state that two sides keep after a bootstrap, and its stores.

An association lives in the memory of one process and is wiped when it ends. It ends with its lifetime, with the
peer's certificate, after `MAX_CONNECTIONS` connections (both sides remember the spent key IDs, which must not grow
for ever), or with the process; the next connection then is a bootstrap again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.hmac import HMAC

from kms_client import QKDKey, wipe_keys
from kms_client.forks import forget_in_children
from qkd_tls.hybrid import KDF, PSKIdentity, association_id, derive_psk, encode_identity, tag_hmac
from qkd_tls.psk import PSK

__all__ = ["MAX_CONNECTIONS", "Association", "AssociationEnded", "AssociationStore", "KeySpent"]

MAX_CONNECTIONS = 1000
"""Connections that one association serves before the next bootstrap."""


class KeySpent(ValueError):
    """A key ID that has been used in this association before."""


class AssociationEnded(ValueError):
    """An association whose secret has been wiped in the meantime."""


@dataclass(eq=False)
class Association:
    """One bootstrap's outcome. `expires_at` is in Unix seconds, `secret` is the association secret (48 bytes)."""

    secret: bytearray = field(repr=False)
    client_sae_id: str
    server_sae_id: str
    server_name: str | None
    expires_at: float
    peer_certificate: bytes | None = field(default=None, repr=False)
    kem: str | None = None
    _announced: OrderedDict[str, QKDKey] = field(default_factory=OrderedDict, repr=False)
    _spent: set[str] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _closed: bool = False
    id: bytes = field(init=False)
    """The association ID: 16 bytes, public."""
    _tagger: HMAC | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.id = association_id(self.secret)
        self._tagger = tag_hmac(self.secret)

    def verify_tag(self, identity: PSKIdentity) -> None:
        """Raise ValueError unless the identity was made by a holder of the association secret."""
        with self._lock:
            identity.verify_tag(self._open_tagger())

    def psk(self, key: QKDKey, kdf: KDF, *, identity: bytes | None = None, announced: bool = False) -> PSK:
        """Use up a QKD key: mix it with the association secret, under the client's identity or a new one.

        Raises AssociationEnded (the key is still unused then), kms_client.KeyAlreadyUsed, and ValueError for a key of
        less than 256 bits.
        """
        key_id = key.key_id
        with self._lock:
            tagger = self._open_tagger()
            self._spent.add(key_id)
            if identity is None:
                identity = encode_identity(kdf, self.id, tagger, key_id)
            with key.use() as secret:
                derived = derive_psk(
                    secret, self.secret, identity, self.client_sae_id, self.server_sae_id, kdf
                )
        return PSK(identity, derived, kdf, key_id, announced, key.kms)

    def _open_tagger(self) -> HMAC:
        # A wiped secret must never be mixed: zeros would stand in for X25519 and ML-KEM.
        if self._tagger is None:
            raise AssociationEnded("the association has ended")
        return self._tagger

    def announce(self, keys: list[QKDKey]) -> None:
        """Keep keys for later connections. An association that has ended wipes them at once."""
        with self._lock:
            if not self._closed:
                self._announced.update((key.key_id, key) for key in keys)
                return
        wipe_keys(keys)

    @property
    def announced(self) -> int:
        """The number of announced keys left."""
        return len(self._announced)

    def take_announced(self) -> QKDKey | None:
        """Remove and return the oldest announced key of a client, or None."""
        with self._lock:
            return self._announced.popitem(last=False)[1] if self._announced else None

    def spend(self, key_id: str) -> QKDKey | None:
        """Mark a key ID as used; return its key if it was announced. Raises KeySpent the second time."""
        with self._lock:
            if key_id in self._spent:
                raise KeySpent(f"key {key_id} has been used before in this association")
            self._spent.add(key_id)
            return self._announced.pop(key_id, None)

    def usable(self, now: float) -> bool:
        """Return whether it may serve another connection at Unix time `now`."""
        return not self._closed and now < self.expires_at and len(self._spent) < MAX_CONNECTIONS

    def close(self) -> None:
        """Wipe the secrets and the keys left."""
        with self._lock:
            self._closed = True
            wipe_keys(self._announced.values())
            self._announced.clear()
            self.secret[:] = bytes(len(self.secret))
            self._tagger = None


class AssociationStore:
    """The associations of one context; safe for threads. A forked child starts with none.

    A server finds them by ID, a client by scope: everything that must be equal for reuse (server name, trust
    store, client certificate, peer SAE). At most `capacity` are kept; the least recently used is dropped
    first.
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._by_id: OrderedDict[bytes, Association] = OrderedDict()
        self._by_scope: dict[Hashable, list[Association]] = {}
        self._scope_of: dict[bytes, Hashable] = {}
        forget_in_children(self)

    def forget(self) -> None:
        """Start afresh in a forked child: its parent goes on with the associations and their announced keys."""
        # Another thread of the parent may have held the lock.
        self._lock = threading.Lock()
        self._by_id, self._by_scope, self._scope_of = OrderedDict(), {}, {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, association: Association, scope: Hashable = None) -> None:
        """Remember an association."""
        with self._lock:
            if scope is not None:
                siblings = self._by_scope.setdefault(scope, [])
                # Threads that started together make one each: those with announced keys are kept until these are used.
                for sibling in [other for other in siblings if not other.announced]:
                    self._drop(sibling)
                self._by_scope.setdefault(scope, []).append(association)
                self._scope_of[association.id] = scope
            self._by_id[association.id] = association
            while len(self._by_id) > self._capacity:
                self._drop(next(iter(self._by_id.values())))

    def by_id(self, association_id: bytes, now: float) -> Association | None:
        """Return the usable association of an ID that a server was sent, at Unix time `now`."""
        with self._lock:
            association = self._by_id.get(association_id)
            if association is None:
                return None
            if not association.usable(now):
                self._drop(association)
                return None
            self._by_id.move_to_end(association_id)
            return association

    def by_scope(self, scope: Hashable, now: float) -> Association | None:
        """Return a usable association of a client's scope at Unix time `now`, preferring announced keys."""
        with self._lock:
            found = None
            for association in self._by_scope.get(scope, ())[:]:
                if not association.usable(now):
                    self._drop(association)
                elif found is None or not found.announced:
                    found = association
            return found

    def discard(self, association: Association) -> None:
        """Forget an association and wipe it."""
        with self._lock:
            self._drop(association)

    def clear(self) -> None:
        """Forget all associations."""
        with self._lock:
            for association in list(self._by_id.values()):
                self._drop(association)

    def _drop(self, association: Association) -> None:
        if self._by_id.get(association.id) is association:
            del self._by_id[association.id]
            scope = self._scope_of.pop(association.id, None)
            if scope is not None:
                self._by_scope[scope].remove(association)
                if not self._by_scope[scope]:
                    del self._by_scope[scope]
        association.close()
