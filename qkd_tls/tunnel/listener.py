"""The accepting side of one tunnel, with at most its limit of connections at once."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterable
from typing import Any, Final

from qkd_tls.context import QKDContext
from qkd_tls.tunnel.connection import Connection, Reporting
from qkd_tls.tunnel.settings import TunnelSettings

__all__ = ["Tunnel"]

_log: Final = logging.getLogger("qkd_tls.tunnel")
_AT_ONCE: Final = 32
"""Connections accepted before others have their turn."""
_PAUSE: Final = 0.5
"""Seconds to pause if the system has no more files for this process."""
_OUT_OF_FILES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Tunnel:
    """One `[[tunnel]]` at work. At the limit it stops accepting; further clients wait in the backlog."""

    def __init__(self, name: str, reporting: Reporting) -> None:
        self.name = name
        self.connections: dict[Connection, asyncio.Task[None]] = {}
        self._reporting = reporting
        self._settings: TunnelSettings | None = None
        self._context: QKDContext | None = None
        self._sockets: tuple[socket.socket, ...] = ()
        self._accepting = False
        self._loop = asyncio.get_running_loop()

    def serve(self, settings: TunnelSettings, context: QKDContext, sockets: Iterable[socket.socket]) -> None:
        """Accept from these sockets from now on, with these settings. Open connections keep theirs."""
        self.stop()
        self._settings, self._context, self._sockets = settings, context, tuple(sockets)
        self._reporting.metrics.active.labels(self.name).set(len(self.connections))
        self._accept_again()

    def stop(self) -> None:
        """Stop accepting. The sockets stay open."""
        self._pause()
        self._sockets = ()

    @property
    def addresses(self) -> list[Any]:
        """The addresses it listens on, like `getsockname`."""
        return [sock.getsockname() for sock in self._sockets]

    def _pause(self) -> None:
        self._accepting = False
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())

    def _accept_again(self) -> None:
        settings = self._settings
        assert settings is not None
        if not self._accepting and len(self.connections) < settings.limits.max_connections:
            self._accepting = True
            for sock in self._sockets:
                self._loop.add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, listening: socket.socket) -> None:
        settings, context = self._settings, self._context
        assert settings is not None
        assert context is not None
        for _ in range(_AT_ONCE):
            if len(self.connections) >= settings.limits.max_connections:
                self._reporting.metrics.limit_reached.labels(self.name).inc()
                self._pause()
                return
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_FILES:
                    raise
                _log.error(
                    "%s: cannot accept: %s; raise LimitNOFILE or lower max_connections", self.name, error
                )
                self._pause()
                self._loop.call_later(_PAUSE, self._accept_again)
                return
            connection = Connection(settings, context, accepted, address, self._reporting)
            task = self._loop.create_task(connection.run())
            self.connections[connection] = task
            self._reporting.metrics.active.labels(self.name).set(len(self.connections))
            task.add_done_callback(lambda _, ended=connection: self._ended(ended))  # type: ignore[misc]

    def _ended(self, connection: Connection) -> None:
        del self.connections[connection]
        self._reporting.metrics.active.labels(self.name).set(len(self.connections))
        if self._sockets:
            self._accept_again()
