"""How much the largest tests do.

With QKD_TLS_FULL=1 in the environment, as `.ci/run` sets it, they run at full size: thousands of connections, every
offset of every flight. Without it they do a fraction of that, so that `make test` is quick; they check the same.
"""

from __future__ import annotations

import os
from typing import Final, TypeVar

__all__ = ["FULL", "sized"]

FULL: Final = os.environ.get("QKD_TLS_FULL") == "1"


Number = TypeVar("Number", int, float)


def sized(full: Number, fraction: Number) -> Number:
    """Return the number for a run at full size, or the one for every day."""
    return full if FULL else fraction
