"""The tunnel process: starts, reloads, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from qkd_tls.configuration import ConfigError
from qkd_tls.tunnel.address import TCP, Address, Unix
from qkd_tls.tunnel.audit import AuditLog
from qkd_tls.tunnel.connection import Reporting
from qkd_tls.tunnel.contexts import Contexts
from qkd_tls.tunnel.dial import listen
from qkd_tls.tunnel.health import Health
from qkd_tls.tunnel.listener import Tunnel
from qkd_tls.tunnel.metrics import Metrics
from qkd_tls.tunnel.settings import TunnelFile, load
from qkd_tls.tunnel.systemd import Notifier, activated_sockets

__all__ = ["Service"]

_log: Final = logging.getLogger("qkd_tls.tunnel")

_Listening: TypeAlias = dict[tuple[Address, str], list[socket.socket]]


class Service:
    """All tunnels of one file. `run` returns after a signal and the drain that follows it.

    SIGHUP reloads. SIGTERM and SIGINT drain; the second one ends at once.
    """

    def __init__(self, file: Path, environment: MutableMapping[str, str] = os.environ) -> None:
        self._file, self._environment = file, environment
        self._metrics = Metrics()
        self._settings: TunnelFile | None = None
        self._contexts = Contexts()
        self._reporting = Reporting(self._metrics, AuditLog("off"))
        self._tunnels: dict[str, Tunnel] = {}
        self._leaving: list[Tunnel] = []
        self._listening: _Listening = {}
        self._activated: dict[str, list[socket.socket]] = {}
        self._health = Health(self._metrics, self._state)
        self._health_address: TCP | Unix | None = None
        self._draining = False

    async def run(self) -> int:
        """Serve; return the exit code. Raises ConfigError if the file cannot be used."""
        loop = asyncio.get_running_loop()
        try:
            self._activated = activated_sockets(self._environment)
        except (ValueError, OSError) as error:
            raise ConfigError(self._file, "", "", f"systemd's sockets cannot be used: {error}") from None
        notifier = self._notifier = Notifier(self._environment)
        _raise_limit_of_files()
        # From here on a signal is never lost, however early it comes.
        stop: asyncio.Event = asyncio.Event()
        at_once: asyncio.Event = asyncio.Event()
        reload: asyncio.Event = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: at_once.set() if stop.is_set() else stop.set())
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        try:
            await self._apply()
            self._say_where()
            notifier.ready(self._status())
            watchdog = self._feed_watchdog(loop)
            while not stop.is_set():
                await _first_of(stop, reload)
                if reload.is_set() and not stop.is_set():
                    reload.clear()
                    await self._reload()
            await self._drain(at_once)
            watchdog()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            self._close()
        return 0

    # --- configuration

    async def _apply(self) -> None:
        """Read the file and apply it; if it has any mistake, raise ConfigError and change nothing."""
        settings = load(self._file)
        with contextlib.ExitStack() as undo:
            contexts = Contexts.make(settings, self._metrics, self._contexts)
            undo.callback(contexts.replaced_by, self._contexts)
            audit = _open_audit(settings)
            undo.callback(audit.close)
            listening = self._open_sockets(settings, undo)
            health = settings.service.health
            if health is not None and health != self._health_address:
                # The new one is opened first: the old one goes on if that fails.
                try:
                    sockets = listen(health, {})
                except OSError as error:
                    raise _cannot_listen(settings.file, "[service]", "health", health, error) from None
            else:
                sockets = []
            undo.pop_all()
        self._retire_contexts(contexts)
        self._reporting.audit.close()
        self._reporting.audit = audit
        self._settings = settings
        if health != self._health_address:
            self._health.close()
            _forget_path(self._health_address)
            self._health_address = health
            await self._health.serve(sockets)
        self._use(settings, listening)

    def _open_sockets(self, settings: TunnelFile, undo: contextlib.ExitStack) -> _Listening:
        listening: _Listening = {}
        for tunnel in settings.tunnels:
            key = tunnel.socket_key
            if key in self._listening:
                listening[key] = self._listening[key]
                continue
            try:
                listening[key] = listen(tunnel.listen, self._activated, socket_mode=tunnel.socket_mode)
            except OSError as error:
                table = f"[[tunnel]] {tunnel.name!r}"
                raise _cannot_listen(settings.file, table, "listen", tunnel.listen, error) from None
            undo.callback(self._close_sockets, tunnel.listen, listening[key])
        return listening

    def _use(self, settings: TunnelFile, listening: _Listening) -> None:
        # All stop first: two tunnels may have exchanged their addresses.
        for tunnel in self._tunnels.values():
            tunnel.stop()
        names = {tunnel.name for tunnel in settings.tunnels}
        self._leaving = [tunnel for tunnel in self._leaving if tunnel.connections]
        for name in set(self._tunnels) - names:
            self._leaving.append(self._tunnels.pop(name))
        for key, sockets in self._listening.items():
            if key not in listening:
                self._close_sockets(key[0], sockets)
        self._listening = listening
        for entry in settings.tunnels:
            tunnel = (
                self._tunnels.get(entry.name) or self._back(entry.name) or Tunnel(entry.name, self._reporting)
            )
            self._tunnels[entry.name] = tunnel
            tunnel.serve(entry, self._contexts.tls[entry.tls], listening[entry.socket_key])

    def _back(self, name: str) -> Tunnel | None:
        """Return a tunnel that an earlier reload has removed, and whose connections still count."""
        for tunnel in self._leaving:
            if tunnel.name == name:
                self._leaving.remove(tunnel)
                return tunnel
        return None

    def _retire_contexts(self, contexts: Contexts) -> None:
        """Replace the contexts; handshakes under way keep the old ones, for their longest time limit."""
        old, self._contexts = self._contexts, contexts
        if self._settings is not None:
            longest = max(tunnel.limits.handshake_timeout for tunnel in self._settings.tunnels)
            asyncio.get_running_loop().call_later(longest, lambda: old.replaced_by(self._contexts))

    def _close_sockets(self, address: Address, sockets: list[socket.socket]) -> None:
        # systemd's sockets stay open: they cannot be opened again.
        if not any(sockets is own for own in self._activated.values()):
            for sock in sockets:
                sock.close()
            _forget_path(address)

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            await self._apply()
        except ConfigError as error:
            _log.error("not reloaded, the old configuration stays: %s", error)
            self._metrics.reloads.labels("failed").inc()
            self._notifier.ready(f"{self._status()}; the last reload failed: {error}")
        else:
            _log.info("reloaded %s", self._file)
            self._metrics.reloads.labels("ok").inc()
            self._say_where()
            self._notifier.ready(self._status())

    # --- state

    def _all_tunnels(self) -> list[Tunnel]:
        return [*self._tunnels.values(), *self._leaving]

    def _status(self) -> str:
        return f"{len(self._tunnels)} tunnels from {self._file}"

    def _state(self) -> tuple[bool, dict[str, Any]]:
        return not self._draining, {
            "state": "draining" if self._draining else "ready",
            "tunnels": {
                tunnel.name: {
                    "connections": len(tunnel.connections),
                    "listens": [list(each) if isinstance(each, tuple) else each for each in tunnel.addresses],
                }
                for tunnel in self._all_tunnels()
            },
        }

    def _say_where(self) -> None:
        for tunnel in self._tunnels.values():
            for address in tunnel.addresses:
                shown = TCP(address[0], address[1]) if isinstance(address, tuple) else f"unix:{address}"
                _log.info("%s: listens on %s", tunnel.name, shown)

    def _feed_watchdog(self, loop: asyncio.AbstractEventLoop) -> Any:
        interval = self._notifier.watchdog_interval
        if interval is None:
            return lambda: None
        timer: asyncio.TimerHandle

        def feed() -> None:
            nonlocal timer
            self._notifier.alive()
            timer = loop.call_later(interval, feed)

        feed()
        return lambda: timer.cancel()

    # --- the end

    async def _drain(self, at_once: asyncio.Event) -> None:
        assert self._settings is not None
        self._draining = True
        timeout = self._settings.service.drain_timeout
        for tunnel in self._all_tunnels():
            tunnel.stop()
        for (address, _), sockets in self._listening.items():
            self._close_sockets(address, sockets)
        self._listening = {}
        tasks = [task for tunnel in self._all_tunnels() for task in tunnel.connections.values()]
        _log.info("stopping: %d connections may go on for %g seconds", len(tasks), timeout)
        self._notifier.stopping(f"Draining {len(tasks)} connections")
        if tasks:
            ended = asyncio.ensure_future(asyncio.wait(tasks, timeout=timeout))
            signalled = asyncio.ensure_future(at_once.wait())
            await asyncio.wait([ended, signalled], return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            signalled.cancel()
            left = [each for tunnel in self._all_tunnels() for each in tunnel.connections]
            if left:
                _log.warning("resets %d connections that have not ended", len(left))
            for connection in left:
                connection.abort("shutdown")
            await asyncio.wait(tasks)
        _log.info("stopped")

    def _close(self) -> None:
        for (address, _), sockets in self._listening.items():
            self._close_sockets(address, sockets)
        for sockets in self._activated.values():
            for sock in sockets:
                sock.close()
        self._health.close()
        _forget_path(self._health_address)
        self._contexts.replaced_by(Contexts())
        self._reporting.audit.close()


def _open_audit(settings: TunnelFile) -> AuditLog:
    try:
        return AuditLog(settings.service.audit)
    except OSError as error:
        raise ConfigError(
            settings.file, "[service]", "audit", f"cannot open {settings.service.audit}: {error.strerror}"
        ) from None


def _cannot_listen(file: Path, table: str, key: str, address: Address, error: OSError) -> ConfigError:
    return ConfigError(file, table, key, f"cannot listen on {address}: {error.strerror or error}")


def _forget_path(address: Address | None) -> None:
    if isinstance(address, Unix):
        with contextlib.suppress(OSError):
            address.path.unlink()


def _raise_limit_of_files() -> None:
    """Raise the limit of open files: a connection needs two, and many systems start a process with 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
