"""The TLS contexts and key managers of a configuration; a reload keeps those that it does not change.

A context that is kept keeps its associations: after a reload the next connections need no bootstrap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kms_client import KeyManager
from qkd_tls.configuration import KeyManagerSettings, TLSFiles
from qkd_tls.context import QKDContext
from qkd_tls.tunnel.kme import CountedKeyManager
from qkd_tls.tunnel.metrics import Metrics
from qkd_tls.tunnel.settings import TunnelFile

__all__ = ["Contexts"]


_Digests = tuple[bytes, ...]


@dataclass
class Contexts:
    """Contexts by name of their table, and key managers by their settings and files."""

    tls: dict[str, QKDContext] = field(default_factory=dict)
    managers: dict[tuple[KeyManagerSettings, _Digests], KeyManager] = field(default_factory=dict)
    _made_of: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, settings: TunnelFile, metrics: Metrics, before: Contexts | None = None) -> Contexts:
        """Make the contexts of the settings. Raises ConfigError."""
        before = before or cls()
        new = cls()
        try:
            for name, tls in settings.tls.items():
                manager = new._manager(tls, metrics, before)
                made_of = tls, _digests(tls.files), manager
                new._made_of[name] = made_of
                if before._made_of.get(name) == made_of:
                    new.tls[name] = before.tls[name]
                else:
                    new.tls[name] = tls.context(manager, QKDContext)
        except BaseException:
            new.replaced_by(before)
            raise
        return new

    def _manager(self, tls: TLSFiles, metrics: Metrics, before: Contexts) -> KeyManager | None:
        if tls.source is None:
            return None
        made_of = tls.source, _digests(tls.source.files)
        for managers in (self.managers, before.managers):
            if made_of in managers:
                self.managers[made_of] = managers[made_of]
                return managers[made_of]
        manager = tls.key_manager(lambda kme, client: CountedKeyManager(client, kme.name, metrics))
        assert manager is not None
        self.managers[made_of] = manager
        return manager

    def replaced_by(self, other: Contexts) -> None:
        """Close everything that `other` does not use, and wipe its associations and announced keys."""
        kept: list[object] = [*other.tls.values(), *other.managers.values()]
        for context in self.tls.values():
            if not any(context is one for one in kept):
                context.forget_associations()
        for manager in self.managers.values():
            if not any(manager is one for one in kept):
                manager.close()


def _digests(files: Iterable[Path]) -> _Digests:
    # A renewed certificate has the same name, and may have the same size and time.
    return tuple(hashlib.sha256(path.read_bytes()).digest() for path in files)
