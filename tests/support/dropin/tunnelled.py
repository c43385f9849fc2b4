"""Programs whose TLS is not Python's, or that have none: between them and their server stand two tunnels."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.dropin.harness import PATIENCE, Ends, Peer, Program, drain
from tests.support.requirements import debian
from tests.support.tunnels import Process, tunnel
from tests.support.tunnels import Sites as TunnelSites

__all__ = ["Relay", "TunnelledProgram", "binary", "end_plainly", "reset", "server_tunnel", "service"]


class Relay:
    """Passes TCP on to a server. In place of its next answer it can fall silent, end the stream or reset it."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._instead: Callable[[socket.socket], None] | None = None
        self._connections = self._from = 0
        self._peer = Peer(self._pass_on)
        self.port = self._peer.port

    def do_instead_of_an_answer(
        self, action: Callable[[socket.socket], None], *, when_new: bool = False
    ) -> None:
        """When the program sends something next over its last connection, or a new one, do this with it, once.

        Earlier connections may still be saying goodbye.
        """
        self._from = self._connections + when_new
        self._instead = action

    def _pass_on(self, near: socket.socket) -> None:
        self._connections += 1
        number = self._connections
        with socket.create_connection(("127.0.0.1", self._target), timeout=PATIENCE) as far:
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answering = threading.Thread(target=self._answer, args=(far, near))
            answering.start()
            with contextlib.suppress(OSError):
                self._ask(number, near, far)
                far.shutdown(socket.SHUT_WR)
            answering.join()

    def _ask(self, number: int, near: socket.socket, far: socket.socket) -> None:
        while data := near.recv(1 << 16):
            if self._instead is not None and number >= self._from:
                action, self._instead = self._instead, None
                action(near)
                far.shutdown(socket.SHUT_RDWR)
                return
            far.sendall(data)

    def _answer(self, far: socket.socket, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 16):
                near.sendall(data)
            near.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._peer.close()


def end_plainly(sock: socket.socket) -> None:
    """End the TCP stream, and wait for the other side to do so."""
    sock.shutdown(socket.SHUT_WR)
    drain(sock)


def reset(sock: socket.socket) -> None:
    """Reset the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(sock.detach())


# --- tunnels


def _sites(ends: Ends) -> TunnelSites:
    sites = ends.sites
    return TunnelSites(sites.folder, sites.kmes, sites.ca, sites.server, sites.client)


def server_tunnel(program: Program, target: int, tls: str = "") -> int:
    """A server's half, which passes on to a port; its own port."""
    return _start(program, "server", target, tls)


def _start(program: Program, mode: str, target: int, tls: str = "") -> int:
    folder = Path(program.stack.enter_context(tempfile.TemporaryDirectory()))
    config = _sites(program.ends).config(mode, tunnel(mode, ("127.0.0.1", target)), tls=tls)
    process = program.stack.enter_context(Process(folder / f"{mode}.toml", config))
    port = process.address()[1]

    def note() -> None:
        # The connections have ended, and their lines are written when the process is done.
        process.stop()
        for line in process.audit_file.read_text().splitlines():
            program.ends.seen.append(str(json.loads(line)["protection"]))

    program.stack.callback(note)
    return port


class TunnelledProgram(Program):
    """Reaches its server through two tunnels; the other run is over plain TCP."""

    role = "client, through the tunnel"
    how = ""

    def start(self) -> None:
        self.relay = Relay(self.server())
        self.stack.callback(self.relay.close)
        self.port = self.route(self.relay.port)

    def route(self, target: int) -> int:
        """Where the program connects to in order to reach a port."""
        if not self.ends.hybrid:
            return target
        return _start(self, "client", server_tunnel(self, target))

    def server(self) -> int:
        """Start the program's server; its port."""
        raise NotImplementedError

    def interrupted(self) -> object:
        """Connect, and then ask the server something, which is interrupted."""
        raise NotImplementedError

    def instead_of_an_answer(self, action: Callable[[socket.socket], None]) -> Callable[[], None]:
        return lambda: self.relay.do_instead_of_an_answer(action)

    interrupt: Callable[[], None]
    """For `interrupted`, to be called between the two."""

    def timeout(self) -> object:
        self.interrupt = self.instead_of_an_answer(drain)
        return self.interrupted()

    def eof(self) -> object:
        self.interrupt = self.instead_of_an_answer(end_plainly)
        return self.interrupted()

    def truncation(self) -> object:
        self.interrupt = self.instead_of_an_answer(reset)
        return self.interrupted()


# --- real servers


def binary(name: str, package: str) -> str:
    """A program of the system's. Raises Missing."""
    places = os.pathsep.join(
        [
            os.environ.get("PATH", os.defpath),
            "/usr/sbin",
            *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
        ]
    )
    found = shutil.which(name, path=places)
    if found is None:
        raise debian(package, name).missing()
    return found


def version_of(program: str, *arguments: str) -> str:
    """The first word with a digit that a program says of its version."""
    text = subprocess.run([program, *arguments], capture_output=True, text=True, check=False).stdout
    return next(word.removeprefix("v=") for word in text.split() if any(map(str.isdigit, word)))


def service(
    program: Program, command: list[str], port: int, *, stop_by: signal.Signals = signal.SIGTERM, **popen: Any
) -> None:
    """Start a server and wait until it accepts connections."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **popen,
    )

    def stop() -> None:
        # Its children too; they are all in a session of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stop_by)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)

    program.stack.callback(stop)
    deadline = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, f"{command[0]} has ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        assert time.monotonic() < deadline, f"{command[0]} does not listen"
        time.sleep(0.02)


def free_port() -> int:
    """For servers that cannot be given a socket."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port
