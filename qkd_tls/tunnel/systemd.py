"""The interface to systemd: sockets that are open already, and `sd_notify`.

Without systemd's environment variables there are no sockets, and nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

__all__ = ["Notifier", "activated_sockets"]

_FIRST_FD: Final = 3


def activated_sockets(environment: MutableMapping[str, str]) -> dict[str, list[socket.socket]]:
    """Return the sockets that systemd has opened, by name (sd_listen_fds_with_names(3)).

    Sockets without a name are under "unknown". The variables are removed, so that no child takes the sockets
    for its own. Raises ValueError if they make no sense.
    """
    pid, count, names = (environment.pop(f"LISTEN_{what}", None) for what in ("PID", "FDS", "FDNAMES"))
    if count is None or pid != str(os.getpid()):
        return {}
    number = int(count)
    labels = names.split(":") if names else ["unknown"] * number
    if len(labels) != number:
        raise ValueError(f"LISTEN_FDNAMES has {len(labels)} names for {number} sockets")
    sockets: dict[str, list[socket.socket]] = {}
    for fd, label in enumerate(labels, _FIRST_FD):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(
                f"socket {label!r} is no listening stream socket: use ListenStream= with Accept=no"
            )
        sock.setblocking(False)
        sockets.setdefault(label, []).append(sock)
    return sockets


class Notifier:
    """A notifier of the service's state to systemd (sd_notify(3)). A failure to notify stops no service."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", None)
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        interval = environment.pop("WATCHDOG_USEC", None)
        if environment.pop("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            interval = None
        self.watchdog_interval = int(interval) / 2e6 if interval and interval.isdigit() else None
        """Seconds between two signs of life; None if systemd wants none."""

    def ready(self, status: str) -> None:
        """Tell systemd that the service has started or reloaded."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Tell systemd that the service reads its configuration again."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=Reloading")

    def stopping(self, status: str) -> None:
        """Tell systemd that the service takes no more connections."""
        self._send("STOPPING=1", f"STATUS={status}")

    def alive(self) -> None:
        """Send a sign of life."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                return
