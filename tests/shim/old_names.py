"""The modules under the names of the first version, for scripts that were written for it.

`make test` puts this folder on the path of its environment, and has this module imported when Python starts. Nothing of
the project uses it. It is not in the wheel. To be deleted with the last of these
scripts, together with the line of the Makefile.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

__all__ = ["install"]

_ROOT: Final = Path(__file__).resolve().parents[2]

_LINK: Final = "kms_client.emulator.link"
_TESTS: Final = "tests.support"

# An old name, and the modules that have its content now.
_MODULES: Final = {
    "kms_client.emulator.stream_link": ["kms_client.emulator.kme_sync_tls"],
    "kms_client.stock": ["kms_client.pool_stock"],
    "qkd_link": [_LINK],
    "qkd_link.party": [f"{_LINK}.messages", f"{_LINK}.party"],
    "qkd_tls.config": ["qkd_tls.configuration.tables"],
    "qkd_tls.configured": ["qkd_tls.configuration.key_managers", "qkd_tls.configuration.contexts"],
    "qkd_tls.fetch": ["qkd_tls.endpoint"],
    "qkd_tls.stock_psk": ["qkd_tls.psk_export"],
    "adapter_support": [f"{_TESTS}.slow_kms"],
    "attack_support": [f"{_TESTS}.attacks"],
    "cli_support": [f"{_TESTS}.commands"],
    "doctor_support": [f"{_TESTS}.misbehaving_kme"],
    "kms_support": [f"{_TESTS}.kme_server"],
    "link_memory": [f"{_TESTS}.link_memory"],
    "link_optics": [f"{_TESTS}.link_optics"],
    "link_processes": [f"{_TESTS}.link_processes"],
    "link_session_support": [f"{_TESTS}.link_session"],
    "memory": [f"{_TESTS}.memory"],
    "node_binary": [f"{_TESTS}.node_binary"],
    "object_support": [f"{_TESTS}.objects"],
    "pool_support": [f"{_TESTS}.key_managers"],
    "scenarios": [f"{_TESTS}.scenarios"],
    "socket_support": [f"{_TESTS}.sockets"],
    "tunnel_support": [f"{_TESTS}.tunnels"],
    "two_sites": ["tests.conftest"],
}


class _Loader(importlib.abc.Loader):
    def __init__(self, modules: list[str]) -> None:
        self._modules = modules

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module with what several have, or put the one that has everything in its place."""
        if str(_ROOT) not in sys.path:
            sys.path.append(str(_ROOT))
        found = [importlib.import_module(name) for name in self._modules]
        for one in found:
            vars(module).update({name: value for name, value in vars(one).items() if name[:2] != "__"})
        if len(found) == 1:
            sys.modules[module.__name__] = found[0]
        _no_cache_any_more()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, *, link: bool) -> None:
        self._link = link

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find an old name."""
        if name.partition(".")[0] == "qkd_link" and name not in _MODULES and self._link:
            modules = [_LINK + name.removeprefix("qkd_link")]
        elif name in _MODULES and self._link == name.startswith("qkd_link"):
            modules = _MODULES[name]
        else:
            return None
        return importlib.machinery.ModuleSpec(name, _Loader(modules))


def _no_cache_any_more() -> None:
    """Let scripts look at a cache that is gone."""
    openssl = sys.modules.get("qkd_tls.openssl")
    if openssl is not None and not hasattr(openssl._alpn_names, "cache_info"):
        openssl._alpn_names.cache_info = lambda: "none"
        openssl._alpn_names.cache_clear = lambda: None


def install() -> None:
    """Find old names from now on, after all others; but those of the link before its files are found a second time."""
    sys.meta_path.insert(0, _Finder(link=True))
    sys.meta_path.append(_Finder(link=False))


install()
