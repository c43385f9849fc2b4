"""The TLS contexts and key managers of a configuration; those that a reload does not change are kept.

A context that is kept keeps its associations: after a reload the next connections need no bootstrap.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkd_tls.config import ConfigError
from qkd_tls.context import QKDContext
from qkd_tls.tunnel.kme import CountedKeyManager
from qkd_tls.tunnel.metrics import Metrics
from qkd_tls.tunnel.settings import Settings

__all__ = ["Contexts"]


@dataclass
class Contexts:
    """Contexts by name of their table, and key managers by name of theirs."""

    tls: dict[str, QKDContext] = field(default_factory=dict)
    kmes: dict[str, CountedKeyManager] = field(default_factory=dict)
    _made_of: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def make(cls, settings: Settings, metrics: Metrics, before: Contexts | None = None) -> Contexts:
        """What the settings say. Raises ConfigError."""
        before = before or cls()
        new = cls()
        try:
            for name, kme in settings.kmes.items():
                if new._same("kme", name, (kme, _digests(kme.files)), before):
                    new.kmes[name] = before.kmes[name]
                else:
                    new.kmes[name] = CountedKeyManager(kme.client(), name, metrics)
            for name, tls in settings.tls.items():
                manager = new.kmes[tls.kme] if tls.kme is not None else None
                if new._same("tls", name, (tls, _digests(tls.files), manager), before):
                    new.tls[name] = before.tls[name]
                    continue
                try:
                    new.tls[name] = tls.context(manager)
                except (ValueError, OSError) as error:
                    text = error.args[-1] if isinstance(error, ssl.SSLError) else error
                    raise ConfigError(settings.file, f"[tls.{name}]", "", str(text)) from None
        except BaseException:
            new.replaced_by(before)
            raise
        return new

    def _same(self, kind: str, name: str, made_of: Any, before: Contexts) -> bool:
        self._made_of[kind, name] = made_of
        return bool(before._made_of.get((kind, name)) == made_of)

    def replaced_by(self, other: Contexts) -> None:
        """Close what the other ones do not use: wipes associations and announced keys."""
        kept: list[object] = [*other.tls.values(), *other.kmes.values()]
        for context in self.tls.values():
            if not any(context is one for one in kept):
                context.forget_associations()
        for manager in self.kmes.values():
            if not any(manager is one for one in kept):
                manager.close()


def _digests(files: Iterable[Path]) -> list[bytes]:
    # A renewed certificate has the same name, and may have the same size and time.
    return [hashlib.sha256(path.read_bytes()).digest() for path in files]
