"""A key manager whose requests are counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kms_client import KeyManager, KMSStatus, QKDKey
from qkd_tls.tunnel.metrics import Metrics

__all__ = ["CountedKeyManager"]

_T = TypeVar("_T")


class CountedKeyManager:
    """A key manager that passes every call on to another; `name` is the configuration's, in the metrics."""

    def __init__(self, manager: KeyManager, label: str, metrics: Metrics) -> None:
        self._manager, self._label, self._metrics = manager, label, metrics

    @property
    def protocol(self) -> str:
        """See `KeyManager`."""
        return self._manager.protocol

    @property
    def name(self) -> str:
        """See `KeyManager`."""
        return self._manager.name

    @property
    def sae_id(self) -> str:
        """See `KeyManager`."""
        return self._manager.sae_id

    def status(self, peer_sae_id: str) -> KMSStatus:
        """See `KeyManager`."""
        return self._counted("status", lambda: self._manager.status(peer_sae_id))

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = None) -> list[QKDKey]:
        """See `KeyManager`."""
        return self._counted("get_keys", lambda: self._manager.get_keys(peer_sae_id, number, size))

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """See `KeyManager`."""
        return self._counted("get_keys_by_id", lambda: self._manager.get_keys_by_id(peer_sae_id, key_ids))

    def close(self) -> None:
        """See `KeyManager`."""
        self._manager.close()

    def _counted(self, operation: str, call: Callable[[], _T]) -> _T:
        start = time.monotonic()
        outcome = "ok"
        try:
            return call()
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            self._metrics.kme_requests.labels(self._label, operation, outcome).inc()
            self._metrics.kme_seconds.labels(self._label, operation).observe(time.monotonic() - start)
