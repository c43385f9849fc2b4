"""Switches of an emulated link: the fibre, the eavesdropper on it, the man in the middle, and the plug.

They belong to side A, whose process emulates the fibre. They act on the next frame or message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["MIDDLE", "Controls"]

MIDDLE: Final = ("off", "change", "drop", "replay", "reorder", "inject")

_LIMITS: Final = {  # name: smallest and largest value
    "length_km": (0.0, 500.0),
    "extra_loss_db": (0.0, 100.0),
    "intercept": (0.0, 1.0),
    "splitting": (0.0, 1.0),
}


class Controls:
    """The switches, by name.

    Attributes:
        length_km: of the fibre, 0 to 500.
        extra_loss_db: that an eavesdropper causes, 0 to 100.
        intercept: fraction of the pulses that an eavesdropper measures and sends again, 0 to 1.
        splitting: fraction of the pulses with several photons from which an eavesdropper keeps one, 0 to 1.
        middle: the action of a man in the middle on the classical channel, one of `MIDDLE`.
        paused: True if the link is cut: fibre and classical channel.
        on_change: called after each change with the names of the changed switches and their new values.
    """

    def __init__(self, length_km: float = 0.0) -> None:
        """Switch everything off, on a fibre of this length."""
        self.length_km = length_km
        self.extra_loss_db = 0.0
        self.intercept = 0.0
        self.splitting = 0.0
        self.middle = "off"
        self.paused = False
        self.on_change: Callable[[dict[str, Any]], None] = lambda changed: None

    def snapshot(self) -> dict[str, Any]:
        """Return all values by name; JSON-able."""
        return {
            "length_km": self.length_km,
            "extra_loss_db": self.extra_loss_db,
            "intercept": self.intercept,
            "splitting": self.splitting,
            "middle": self.middle,
            "paused": self.paused,
        }

    def change(self, values: Mapping[str, object]) -> None:
        """Set some switches; all or none.

        Raises:
            ValueError: there is no such switch, or it cannot have that value.
        """
        checked = {name: _checked(name, value) for name, value in values.items()}
        before = self.snapshot()
        changed = {name: value for name, value in checked.items() if before[name] != value}
        for name, value in changed.items():
            setattr(self, name, value)
        if changed:
            self.on_change(changed)


def _checked(name: str, value: object) -> float | str | bool:
    if name in _LIMITS:
        smallest, largest = _LIMITS[name]
        # Not a number is not between any two.
        if isinstance(value, bool) or not isinstance(value, int | float) or not smallest <= value <= largest:
            raise ValueError(f"{name} is a number from {smallest:g} to {largest:g}, not {value!r}")
        return float(value)
    if name == "middle":
        if not isinstance(value, str) or value not in MIDDLE:
            raise ValueError(f"middle is one of {', '.join(MIDDLE)}, not {value!r}")
        return value
    if name == "paused":
        if not isinstance(value, bool):
            raise ValueError(f"paused is true or false, not {value!r}")
        return value
    raise ValueError(f"there is no switch {name!r}")
