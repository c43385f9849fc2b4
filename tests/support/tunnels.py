"""What the tests of the tunnel share: certificates, KMEs, tunnel processes, and plain peers at both ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kms_client.emulator import RunningPair
from tests.support.patience import PATIENCE, eventually
from tests.support.sockets import Authority, Identity

TIMEOUT = PATIENCE

Address = tuple[str, int]


@dataclass
class Sites:
    """Everything that a tunnel's configuration names, for both sites."""

    folder: Path
    kmes: RunningPair
    ca: Authority
    server: Identity
    client: Identity

    @classmethod
    def make(cls, folder: Path, kmes: RunningPair) -> Sites:
        ca = Authority(folder)
        identities = [ca.issue("server"), ca.issue("client", ["client.example"])]
        for identity in identities:
            identity.key_file.chmod(0o600)
        return cls(folder, kmes, ca, *identities)

    def kme(self, side: str) -> str:
        pki = self.kmes.pki
        url, sae_id, cert, key = (
            (self.kmes.url_a, pki.sae_a, pki.sae_a_cert, pki.sae_a_key)
            if side == "client"
            else (self.kmes.url_b, pki.sae_b, pki.sae_b_cert, pki.sae_b_key)
        )
        return f'[kme.site]\nurl = "{url}"\nsae_id = "{sae_id}"\ncert = "{cert}"\nkey = "{key}"\nca = "{pki.kms_ca}"\n'

    def tls(self, side: str, more: str = "", identity: Identity | None = None) -> str:
        identity = identity or (self.client if side == "client" else self.server)
        peer = 'peer_sae_id = "SAE-B"\n' if side == "client" else ""
        return (
            f'[tls.main]\nkme = "site"\nca = "{self.ca.file}"\ncertificate = "{identity.cert_file}"\n'
            f'key = "{identity.key_file}"\n{peer}{more}\n'
        )

    def config(
        self, side: str, tunnels: str, *, service: str = "", tls: str = "", identity: Identity | None = None
    ) -> str:
        return f"[service]\n{service}\n{self.kme(side)}\n{self.tls(side, tls, identity)}\n{tunnels}"


def tunnel(
    mode: str, connect: Address | str, *, name: str = "t", listen: str = "127.0.0.1:0", more: str = ""
) -> str:
    """A `[[tunnel]]`."""
    target = connect if isinstance(connect, str) else f"{connect[0]}:{connect[1]}"
    server_name = 'server_name = "localhost"\n' if mode == "client" and "server_name" not in more else ""
    return (
        f'[[tunnel]]\nname = "{name}"\nmode = "{mode}"\nlisten = "{listen}"\nconnect = "{target}"\n'
        f'tls = "main"\n{server_name}{more}\n'
    )


class Process:
    """A tunnel process. Its log is kept and can be waited for; its audit lines are in a file."""

    def __init__(self, file: Path, config: str, **popen: Any) -> None:
        self.file = file
        self.audit_file = file.with_suffix(".audit")
        self.write(config)
        self.log: list[str] = []
        self._changed = threading.Condition()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "qkd_tls.tunnel", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **popen,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def write(self, config: str) -> None:
        """Replace the configuration file; audit lines go to `audit_file`."""
        if "audit =" not in config:
            config = config.replace("[service]\n", f'[service]\naudit = "{self.audit_file}"\n')
        self.file.write_text(config)

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._changed:
                self.log.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, pattern: str, *, after: int = 0) -> re.Match[str]:
        """The first log line that matches, from the line numbered `after` on."""
        deadline = time.monotonic() + TIMEOUT
        with self._changed:
            while True:
                for line in self.log[after:]:
                    if match := re.search(pattern, line):
                        return match
                left = deadline - time.monotonic()
                assert left > 0, f"no {pattern!r} in {self.log}"
                assert self._reader.is_alive(), f"ended without {pattern!r}: {self.log}"
                self._changed.wait(min(left, 1))

    def address(self, name: str = "t", *, after: int = 0) -> Address:
        match = self.wait_for(rf"{name}: listens on (127\.0\.0\.1):(\d+)", after=after)
        return match[1], int(match[2])

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def reload(self, config: str | None = None, expect: str = "reloaded") -> None:
        if config is not None:
            self.write(config)
        seen = len(self.log)
        self.signal(signal.SIGHUP)
        self.wait_for(expect, after=seen)

    def wait(self) -> int:
        code = self.popen.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code

    def stop(self) -> int:
        """End now, without a drain."""
        if self.popen.poll() is None:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                self.wait_for("stopp")
            if self.popen.poll() is None:
                self.signal(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise

    def audit(self, number: int = 1) -> list[dict[str, Any]]:
        """The audit lines, once there are so many."""

        def lines() -> list[dict[str, Any]]:
            if not self.audit_file.exists():
                return []
            text = self.audit_file.read_text()
            return [json.loads(line) for line in text.splitlines()] if text.endswith("\n") else []

        found: list[dict[str, Any]] = eventually(
            lambda: (found := lines()) and len(found) >= number and found
        )
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Backend:
    """A plain server. Each connection is given to the test through `accept`, or to a handler in a thread."""

    def __init__(
        self, handler: Callable[[socket.socket], object] | None = None, path: Path | None = None
    ) -> None:
        self._listening = (
            socket.create_server(("127.0.0.1", 0), backlog=1024)
            if path is None
            else socket.socket(socket.AF_UNIX)
        )
        if path is not None:
            self._listening.bind(str(path))
            self._listening.listen()
        self.address: Any = self._listening.getsockname()
        self._handler = handler
        self._accepted: queue.Queue[socket.socket] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        workers = []
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                break
            sock.settimeout(TIMEOUT)
            if self._handler is None:
                self._accepted.put(sock)
            else:
                workers.append(threading.Thread(target=self._handle, args=(sock,)))
                workers[-1].start()
        for worker in workers:
            worker.join(TIMEOUT)

    def _handle(self, sock: socket.socket) -> None:
        assert self._handler is not None
        with sock, contextlib.suppress(OSError):
            self._handler(sock)

    def accept(self) -> socket.socket:
        return self._accepted.get(timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(TIMEOUT)
        while not self._accepted.empty():
            self._accepted.get().close()


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 16):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def dial(address: Any) -> socket.socket:
    if isinstance(address, str | Path):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(str(address))
        return sock
    return socket.create_connection(address, timeout=TIMEOUT)


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < size:
        chunk = sock.recv(min(1 << 16, size - len(data)))
        assert chunk, f"the connection ended after {len(data)} of {size} bytes"
        data += chunk
    return data


def receive_all(sock: socket.socket) -> bytes:
    """Everything until a clean end."""
    chunks = []
    while chunk := sock.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


@contextlib.contextmanager
def both_tunnels(
    sites: Sites,
    folder: Path,
    backend: Any,
    *,
    client: str = "",
    server: str = "",
    client_service: str = "",
    server_service: str = "",
    client_tls: str = "",
    server_tls: str = "",
) -> Iterator[tuple[Process, Process]]:
    """A client tunnel and a server tunnel before a backend, each a process; `client` and `server` are more settings."""
    with (
        Process(
            folder / "server.toml",
            sites.config(
                "server", tunnel("server", backend, more=server), service=server_service, tls=server_tls
            ),
        ) as server_process,
        Process(
            folder / "client.toml",
            sites.config(
                "client",
                tunnel("client", server_process.address(), more=client),
                service=client_service,
                tls=client_tls,
            ),
        ) as client_process,
    ):
        client_process.address()
        yield client_process, server_process


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}
