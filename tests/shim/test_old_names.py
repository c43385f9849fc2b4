"""Each old name leads to the module of today, and is the same module."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.shim.old_names import _MODULES


@pytest.mark.parametrize("module", sorted({module for modules in _MODULES.values() for module in modules}))
def test_the_modules_exist(module: str) -> None:
    importlib.import_module(module)


def test_old_names_find_them() -> None:
    code = """
import old_names, attack_support, socket_support, qkd_link.party, qkd_link.authentication.session, qkd_tls.configured
import kms_client.emulator.link.authentication.session as session
from tests.support import attacks, sockets
assert attack_support is attacks and socket_support is sockets and qkd_link.authentication.session is session
qkd_link.party.Kind, qkd_link.party.Settings, qkd_tls.configured.KMESettings, qkd_tls.configured.load_context
"""
    path = [str(folder) for folder in (importlib.import_module("tests.shim").__path__)]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], check=True, timeout=60
    )
