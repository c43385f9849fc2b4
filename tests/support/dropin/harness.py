"""What all programs are measured with: two pairs of contexts, a scripted peer, and the columns of the table."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import random
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar

from kms_client import Etsi014Client
from kms_client.emulator import RunningPair
from qkd_tls import QKDInfo, create_default_context
from tests.support.patience import PATIENCE
from tests.support.sizes import sized
from tests.support.sockets import Authority, Identity

__all__ = [
    "COLUMNS",
    "DIGEST",
    "HALF",
    "LIMIT",
    "PATIENCE",
    "PAYLOAD",
    "BrokenOff",
    "Ends",
    "Notes",
    "Outcome",
    "Peer",
    "Program",
    "Sites",
    "digest",
    "drain",
    "end_cleanly",
    "kind_of",
    "outcome",
    "truncate",
]

T = TypeVar("T")

PAYLOAD: Final = random.Random(14).randbytes(sized(10_000_000, 1_000_000))
"""10 MB at full size, that cannot be compressed."""

HALF: Final = b"half"
"""What comes before a stream ends early."""

LIMIT: Final = 0.4
"""Seconds that programs are told to wait, where the peer falls silent."""

COLUMNS: Final = {
    "connects": "works",
    "up": "10 MB up",
    "down": "10 MB down",
    "timeout": "times out",
    "eof": "end of the stream",
    "truncation": "truncation",
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DIGEST: Final = digest(PAYLOAD)


# --- the two ends


@dataclass
class Sites:
    """Certificates, and the KMEs of both sites."""

    folder: Path
    kmes: RunningPair
    ca: Authority
    server: Identity
    client: Identity
    managers: dict[str, Etsi014Client]

    @classmethod
    def make(cls, folder: Path, kmes: RunningPair) -> Self:
        ca = Authority(folder)
        identities = ca.issue("server"), ca.issue("client", ["client.example"])
        for identity in identities:
            identity.key_file.chmod(0o600)
        return cls(folder, kmes, ca, *identities, {"client": kmes.client("a"), "server": kmes.client("b")})

    def close(self) -> None:
        for manager in self.managers.values():
            manager.close()

    def hybrid(self) -> Ends:
        """Our contexts on both ends."""
        client = create_default_context(cafile=self.ca.file, key_manager=self.managers["client"])
        server = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=self.managers["server"])
        self.server.load_into(server)
        return Ends(self, client, server, hybrid=True)

    def stock(self) -> Ends:
        """The standard library's contexts on both ends."""
        client = ssl.create_default_context(cafile=self.ca.file)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.server.load_into(server)
        return Ends(self, client, server, hybrid=False)


@dataclass
class Ends:
    """The contexts of one run, and what protected its connections."""

    sites: Sites
    client: Any
    server: Any
    hybrid: bool
    seen: list[str] = field(default_factory=list)

    def accept(self, raw: socket.socket) -> Any:
        """The server's TLS on an accepted connection."""
        return self.note(self.server.wrap_socket(raw, server_side=True))

    def connect(self, port: int) -> Any:
        """A client's TLS connection."""
        raw = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        return self.note(self.client.wrap_socket(raw, server_hostname="localhost"))

    def note(self, connection: Any) -> Any:
        """Remember what protects a socket, or whatever object of a program's has `qkd`."""
        if self.hybrid:
            info = connection.qkd
            assert isinstance(info, QKDInfo)
            self.seen.append(str(info.protection))
        return connection


# --- a scripted peer


class Peer:
    """A server on a free port; each connection is given to the handler, as plain TCP, in a thread of its own.

    A handler's OSErrors are part of the play. Others are raised by `close`.
    """

    def __init__(self, handler: Callable[[socket.socket], object]) -> None:
        self._handler = handler
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._workers: list[threading.Thread] = []
        self._errors: list[Exception] = []
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listening.accept()
            except OSError:
                return
            raw.settimeout(PATIENCE)
            worker = threading.Thread(target=self._serve, args=(raw,))
            self._workers.append(worker)
            worker.start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            self._handler(raw)
        except OSError:
            pass
        except Exception as error:  # noqa: BLE001 - raised by close()
            self._errors.append(error)
        finally:
            raw.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listening.close()
        for worker in self._workers:
            worker.join()
        if self._errors:
            raise self._errors[0]


def drain(sock: Any) -> None:
    """Say nothing more, until the other side has gone."""
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


def end_cleanly(tls: Any) -> None:
    """Send close_notify, then end the TCP stream, and wait for the other side to do so."""
    tls.settimeout(0)
    try:
        rest = tls.unwrap()
    except OSError:
        # close_notify is out; the peer's is not waited for.
        rest = tls
    _end_tcp(rest)


def truncate(tls: Any) -> None:
    """End the TCP stream without close_notify, and wait for the other side to end it."""
    _end_tcp(tls)


def _end_tcp(sock: Any) -> None:
    with socket.socket(fileno=sock.detach()) as raw:
        raw.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            raw.shutdown(socket.SHUT_WR)
        drain(raw)


# --- a program, and what came out


BrokenOff: TypeAlias = Literal["silent", "end", "cut"]
"""How a peer breaks off its answer."""


class Program:
    """One program in one role, started for one run. Subclasses say what each column means for it.

    `connects`, `up` and `down` return True where all went well. `timeout`, `eof` and `truncation` return or raise
    whatever the program does: the run with the standard library's contexts tells what is right.
    """

    name: ClassVar[str]
    role: ClassVar[str] = "client"
    how: ClassVar[str]
    """How it gets the context, as one line of code; empty where it needs none."""
    distribution: ClassVar[str | None] = None
    """On the package index; None for the standard library."""
    notes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Column: what a reader should know."""
    deviations: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Column: why it is not as with the standard library."""

    without: ClassVar[frozenset[str]] = frozenset()
    """Columns that its protocol has nothing for."""

    loop_factory: ClassVar[type[asyncio.AbstractEventLoop] | None] = None
    """The class of its event loop, for programs on asyncio; None for asyncio's own."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.stack = contextlib.ExitStack()

    @classmethod
    def version(cls) -> str:
        if cls.distribution is None:
            return f"Python {sys.version_info.major}.{sys.version_info.minor}"
        return metadata.version(cls.distribution)

    def start(self) -> None:
        """Start what the program needs; what is to be stopped goes to `stack`."""

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in an event loop of the program's kind."""
        with asyncio.Runner(loop_factory=self.loop_factory) as runner:
            return runner.run(coroutine)

    def peer(self, handler: Callable[[socket.socket], object]) -> int:
        """A scripted peer for this run; its port."""
        peer = Peer(handler)
        self.stack.callback(peer.close)
        return peer.port

    def __enter__(self) -> Self:
        with self.stack:
            self.start()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def connects(self) -> object:
        raise NotImplementedError

    def up(self) -> object:
        raise NotImplementedError

    def down(self) -> object:
        raise NotImplementedError

    def timeout(self) -> object:
        return self.broken_off("silent", LIMIT)

    def eof(self) -> object:
        return self.broken_off("end")

    def truncation(self) -> object:
        return self.broken_off("cut")

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        """Ask the peer, which falls `silent` in the middle of its answer, makes an `end` of it, or is `cut` off."""
        raise NotImplementedError


def kind_of(error: BaseException) -> str:
    """An exception's class as programs name it."""
    module, name = type(error).__module__, type(error).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


@dataclass(frozen=True)
class Outcome:
    """What a program returned or raised, in words; and after how many seconds."""

    text: str
    seconds: float
    trace: str = ""
    """For who has to find out why; the exception itself would keep connections open."""


def outcome(action: Callable[[], object]) -> Outcome:
    start = time.monotonic()
    try:
        value = action()
    except Exception as error:  # noqa: BLE001 - that is what is measured
        return Outcome(kind_of(error), time.monotonic() - start, traceback.format_exc())
    text = value.decode() if isinstance(value, bytes) else str(value)
    return Outcome(text, time.monotonic() - start)


class Notes:
    """What a server's application has seen, for the test; in a queue that processes share, where there are several."""

    def __init__(self, shared: Any = None) -> None:
        self._queue = shared or queue.Queue()

    def of(self, read: Callable[[], object]) -> None:
        """Note what reading gives."""
        self._queue.put(outcome(read).text)

    def put(self, text: str) -> None:
        self._queue.put(text)

    def get(self) -> str:
        return str(self._queue.get(timeout=PATIENCE))
