"""The `KeyManager` protocol: one interface for key management systems of every protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kms_client.keys import QKDKey

__all__ = ["KMSStatus", "KeyManager"]


@dataclass(frozen=True)
class KMSStatus:
    """A KMS's report about the keys shared with one peer (ETSI GS QKD 014 V1.1.1, clause 6.1).

    Sizes are in bits.
    """

    source_kme_id: str  # the KME that answered
    target_kme_id: str  # the KME of the peer
    master_sae_id: str  # the SAE that asked
    slave_sae_id: str  # the peer
    key_size: int  # of a key when no size is asked for
    stored_key_count: int  # keys that can be delivered now
    max_key_count: int  # keys that can be stored
    max_key_per_request: int
    max_key_size: int
    min_key_size: int
    max_sae_id_count: int  # additional slave SAEs; 0 where there is no multicast
    status_extension: Mapping[str, object] = field(default_factory=dict, hash=False)


@runtime_checkable
class KeyManager(Protocol):
    """One SAE's access to its KMS. Every method may be called from any thread.

    The master SAE calls `get_keys` and tells the slave SAE the key IDs; the slave calls `get_keys_by_id`.
    Every method except `close` raises a `KMSError` on failure; its class says what to do.
    """

    @property
    def protocol(self) -> str:
        """Name of the interface as used on the wire between peers: "etsi-014", "skip", "local"."""
        ...

    @property
    def name(self) -> str:
        """Display name of the KME: its URL."""
        ...

    @property
    def sae_id(self) -> str:
        """This program's own SAE ID."""
        ...

    def status(self, peer_sae_id: str) -> KMSStatus:
        """Return the state of the keys shared with `peer_sae_id`."""
        ...

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        """Return new keys shared with `peer_sae_id`, as their master.

        Args:
            peer_sae_id: SAE ID of the slave.
            number: how many, 1 or more.
            size: of each key in bits, a multiple of 8; None for this manager's own size.

        Returns:
            Exactly `number` keys, never fewer.

        Not idempotent: every call takes keys out of the KMS, and those of a lost answer are lost.
        """
        ...

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Return the keys with these IDs, as their slave.

        Args:
            peer_sae_id: SAE ID of the master, which told the IDs.
            key_ids: one or more IDs, all different.

        Returns:
            One key for each ID, in the order asked.

        Not idempotent: a key is delivered once, so that a lost answer is a lost key.
        """
        ...

    def close(self) -> None:
        """Close connections and wipe the keys held. Closing twice has no effect."""
        ...


def check_number_and_size(number: int, size: int | None) -> None:
    """Refuse a request that no KMS can answer.

    Raises:
        ValueError: `number` is below 1, or `size` is not a positive multiple of 8 bits.
    """
    if number < 1:
        raise ValueError(f"number of keys must be 1 or more, not {number}")
    if size is not None and (size < 8 or size % 8):
        raise ValueError(f"key size must be a positive multiple of 8 bits, not {size}")


def check_key_ids(key_ids: Sequence[str]) -> None:
    """Refuse a request that no KMS can answer.

    Raises:
        ValueError: no ID, an empty one, or the same one twice.
        TypeError: one string was given instead of a sequence of strings.
    """
    if isinstance(key_ids, str):
        raise TypeError("key_ids must be a sequence of key IDs, not one string")
    if not key_ids or not all(key_ids):
        raise ValueError("at least one key ID is needed, and none may be empty")
    if len(set(key_ids)) != len(key_ids):
        raise ValueError("the same key ID was asked for twice: a key is delivered once")
