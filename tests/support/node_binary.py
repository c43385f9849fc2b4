"""Where Node.js is: what the environment variable QKD_TLS_NODE names, then where `npm install node@26` puts it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.paths import ROOT

__all__ = ["node_binary"]

_INSTALLED = ROOT / "node_modules" / "node" / "bin" / "node"


def node_binary() -> str | None:
    """The binary, of whatever version; None where there is none."""
    for path in (os.environ.get("QKD_TLS_NODE"), str(_INSTALLED)):
        if path and Path(path).exists():
            return path
    return None
