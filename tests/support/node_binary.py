"""Where Node.js is: what the environment variable QKD_TLS_NODE names, then where `npm install node@26` puts it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.paths import ROOT

__all__ = ["HOW_TO_HAVE_IT", "node_binary"]

HOW_TO_HAVE_IT = "set QKD_TLS_NODE to its binary, or run `npm install node@26` in the repository"

_INSTALLED = ROOT / "node_modules" / "node" / "bin" / "node"


def node_binary() -> str | None:
    """The binary, of whatever version; None where there is none."""
    for path in (os.environ.get("QKD_TLS_NODE"), str(_INSTALLED)):
        if path and Path(path).exists():
            return path
    return None
