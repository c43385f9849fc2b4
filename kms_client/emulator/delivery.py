"""The part of a KME that is common to its interfaces: who asks, for whom, and which keys they get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from kms_client.emulator.kme_sync import PeerKME, PeerKMEDown
from kms_client.emulator.pki import SAE_URI_PREFIX
from kms_client.emulator.refusal import Refused
from kms_client.emulator.store import Delivery, KeyStore, NotASlave, NotFound, SAERole

__all__ = ["Faults", "KeyDelivery", "Limits"]


@dataclass(frozen=True)
class Limits:
    """The limits that the KME reports in its status; sizes in bits."""

    max_key_per_request: int = 128
    max_key_size: int = 4096
    min_key_size: int = 64
    max_sae_id_count: int = 4


@dataclass
class Faults:
    """Misbehaviour to switch on in tests."""

    delay: float = 0.0  # seconds before any answer
    answer_with: tuple[int, str] | None = None  # status and body of every answer instead of the real one
    corrupt_keys: bool = False  # deliver other keys to slaves than were delivered to masters


class KeyDelivery:
    """The delivery of keys to the SAEs of one KME; the other KME is told for whom they are.

    Args:
        kme_id: ID of the KME.
        peer_kme_id: ID of the KME at the other end of the link.
        sae_ids: SAEs of this KME.
        peer_sae_ids: SAEs of the other KME, with which the SAEs of this one can share keys.
        store: this end's keys.
        peer_kme: the other KME.
        limits: of requests.
        local_slaves: True if SAEs of this KME can share keys with each other, and with themselves; some
            programs that examine a KME have one certificate only.
        on_delivery: called with every delivery, after it was recorded in `store.deliveries`.
    """

    def __init__(
        self,
        kme_id: str,
        peer_kme_id: str,
        sae_ids: Iterable[str],
        peer_sae_ids: Iterable[str],
        store: KeyStore,
        peer_kme: PeerKME,
        *,
        limits: Limits = Limits(),
        local_slaves: bool = False,
        on_delivery: Callable[[Delivery], None] | None = None,
    ) -> None:
        """Start without any deliveries."""
        self.kme_id = kme_id
        self.peer_kme_id = peer_kme_id
        self.sae_ids = frozenset(sae_ids)
        self.peer_sae_ids = frozenset(peer_sae_ids) | (self.sae_ids if local_slaves else frozenset())
        self.store = store
        self.limits = limits
        self.faults = Faults()
        self._peer_kme = peer_kme
        self._on_delivery = on_delivery

    async def take(
        self, number: int, size: int, master: str, slaves: tuple[str, ...]
    ) -> list[tuple[str, bytearray]]:
        """Return new keys with their IDs, for `master`; the other KME knows who their slaves are.

        Raises:
            Refused: there are too few, or the link is down.
        """
        needed = number * self.store.parts_needed(size)
        if not self._peer_kme.up:
            raise self._link_down()
        if needed > self.store.available_count:
            raise Refused(
                503,
                f"not enough keys: {needed} of {self.store.key_size} bits needed,"
                f" {self.store.available_count} stored",
            )
        taken = [self.store.take(size, master, slaves) for _ in range(number)]
        try:
            await self._peer_kme.assign([assignment.without(self.sae_ids) for assignment, _ in taken])
        except PeerKMEDown:
            for _, secret in taken:
                _zero(secret)
            raise self._link_down() from None
        for assignment, secret in taken:
            self.store.keep(assignment.without(self.peer_sae_ids - self.sae_ids), secret)
        return [(assignment.key_id, secret) for assignment, secret in taken]

    def fetch(self, key_ids: Sequence[str], master: str, slave: str) -> list[bytearray]:
        """Return the keys with these IDs, for one of their slaves.

        Raises:
            Refused: one is not here (any more), or is not for this slave; none is taken.
        """
        try:
            secrets = self.store.fetch(key_ids, master, slave)
        except NotFound:
            raise Refused(400, "one or more keys specified are not found on KME") from None
        except NotASlave:
            raise Refused(401, f"SAE {slave} is not a slave of one or more of the keys") from None
        if self.faults.corrupt_keys:
            for secret in secrets:
                secret[0] ^= 1
        return secrets

    def delivered(self, key_id: str, secret: bytearray, sae_id: str, role: SAERole) -> None:
        """Record the delivery, and wipe the key."""
        _zero(secret)
        delivery = Delivery(key_id, sae_id, role)
        self.store.deliveries.append(delivery)
        if self._on_delivery is not None:
            self._on_delivery(delivery)

    def caller(self, request: web.Request) -> str:
        """Return the SAE that the client's certificate names."""
        assert request.transport is not None
        certificate = request.transport.get_extra_info("peercert") or {}
        known = self.sae_ids.intersection(_certificate_names(certificate))
        if len(known) != 1:
            raise Refused(401, f"the client certificate does not name one SAE registered with {self.kme_id}")
        return next(iter(known))

    def checked_peer(self, sae_id: str) -> str:
        """Return `sae_id`, if it is an SAE that keys can be shared with."""
        if sae_id not in self.peer_sae_ids:
            raise Refused(400, f"SAE not found: {self.kme_id} has no link to its KME")
        return sae_id

    def checked_size(self, size: object) -> int:
        """Return a size of keys in bits, if it is within the limits; None stands for the link's own."""
        if size is None:
            return self.store.key_size
        if not isinstance(size, int) or isinstance(size, bool) or size % 8:
            raise Refused(400, "size shall be a multiple of 8")
        smallest, largest = self.limits.min_key_size, self.limits.max_key_size
        if not smallest <= size <= largest:
            raise Refused(400, f"size shall be from {smallest} to {largest} bits")
        return size

    def _link_down(self) -> Refused:
        return Refused(503, f"the QKD link to {self.peer_kme_id} is down")


def _certificate_names(certificate: Mapping[str, Any]) -> set[str]:
    names = {value for rdn in certificate.get("subject", ()) for kind, value in rdn if kind == "commonName"}
    for kind, value in certificate.get("subjectAltName", ()):
        if kind in ("URI", "DNS"):
            names.add(
                unquote(value.removeprefix(SAE_URI_PREFIX)) if value.startswith(SAE_URI_PREFIX) else value
            )
    return names


def _zero(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
