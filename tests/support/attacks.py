"""What the attacks share: a man in the middle who sees records, ClientHellos taken apart, key managers that count."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from kms_client import KeyManager, KMSStatus, QKDKey
from qkd_tls import QKDContext, QKDInfo
from qkd_tls.hybrid import KDF
from qkd_tls.openssl import TLSConnection, TLSContext, TLSSettings
from qkd_tls.psk import PSK
from tests.support.sockets import TIMEOUT, Lab, Seen, Server, connect

SNI, GROUPS, ALPN, PSK_EXTENSION, VERSIONS, KEY_SHARE = 0, 10, 16, 41, 43, 51
"""Numbers of TLS extensions."""

QKD_ALPN = b"\x09qkd-tls/1"


class Counting:
    """A key manager that passes everything on, and counts the requests and the keys."""

    def __init__(self, manager: KeyManager) -> None:
        self._manager = manager
        self.name, self.sae_id, self.protocol = manager.name, manager.sae_id, manager.protocol
        self.requests = 0
        self.key_ids: list[str] = []

    def status(self, peer_sae_id: str) -> KMSStatus:
        return self._manager.status(peer_sae_id)

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        self.requests += 1
        return self._noted(self._manager.get_keys(peer_sae_id, number, size))

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        self.requests += 1
        return self._noted(self._manager.get_keys_by_id(peer_sae_id, key_ids))

    def _noted(self, keys: list[QKDKey]) -> list[QKDKey]:
        self.key_ids += [key.key_id for key in keys]
        return keys

    def close(self) -> None: ...


class Inventing:
    """An attacker without QKD keys: it has a key for every ID, made up."""

    protocol = "etsi-014"
    name = "Mallory's KMS"

    def __init__(self, sae_id: str) -> None:
        self.sae_id = sae_id

    def status(self, peer_sae_id: str) -> KMSStatus:
        raise AssertionError("nobody asks for it")

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        return [QKDKey(f"made-up-{os.urandom(8).hex()}", os.urandom(32)) for _ in range(number)]

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        return [QKDKey(key_id, os.urandom(32)) for key_id in key_ids]

    def close(self) -> None: ...


@dataclass
class Outcome:
    """How one connection ended, at both ends."""

    client: BaseException | QKDInfo
    server: Seen | None
    warnings: list[str] = field(default_factory=list)

    @property
    def client_error(self) -> BaseException:
        assert isinstance(self.client, BaseException), f"the client was let in: {self.client}"
        return self.client

    @property
    def client_info(self) -> QKDInfo:
        if isinstance(self.client, BaseException):
            raise self.client
        return self.client

    @property
    def server_error(self) -> BaseException:
        assert self.server is not None
        assert self.server.error is not None, f"the server let it in: {self.server}"
        return self.server.error


class Site:
    """A client and a server, with counting key managers before their real KMEs."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.kme_a, self.kme_b = Counting(lab.manager("client")), Counting(lab.manager("server"))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self, **settings: Any) -> QKDContext:
        settings.setdefault("key_manager", self.kme_a)
        return self.lab.client(**settings)

    def serve(self, context: QKDContext | None = None, *, mutual: bool = False, **settings: Any) -> Server:
        """A server, stopped at the end of the test."""
        if context is None:
            settings.setdefault("key_manager", self.kme_b)
            context = self.lab.server(mutual=mutual, **settings)
        return self._stack.enter_context(Server(context))

    def middle(self, server: Server, change: Change | None = None) -> Middle:
        """A man in the middle before this server, stopped at the end of the test."""
        return self._stack.enter_context(Middle(server.address, change))

    def echo(self) -> Echo:
        """A mirror: every byte goes back to its sender."""
        return self._stack.enter_context(Echo())

    @property
    def requests(self) -> tuple[int, int]:
        """To KME A and to KME B so far."""
        return self.kme_a.requests, self.kme_b.requests


def attempt(
    address: tuple[str, int],
    client: QKDContext,
    server: Server | None = None,
    hostname: str | None = "localhost",
) -> Outcome:
    """Try to connect; where it works, one exchange of data is made, too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with connect(address, client, hostname) as sock:
                sock.sendall(b"secret")
                assert sock.recv(100) == b"secret"
                assert sock.qkd is not None
                result: BaseException | QKDInfo = sock.qkd
        except OSError as error:
            result = error
    return Outcome(
        result, server.seen() if server else None, [warning.category.__name__ for warning in caught]
    )


# --- on the path

Change = Callable[[str, int, bytes], bytes]
"""From the sender ("client" or "server"), the record's number in that direction and the record to what is sent on.

`Cut` ends the connection in both directions; nothing at all drops the record.
"""


class Cut(Exception):
    """The man in the middle cuts the line."""


class Middle:
    """A man in the middle: passes on TLS records, changed as he likes, and keeps what he saw."""

    def __init__(self, target: tuple[str, int], change: Change | None = None) -> None:
        self.target = target
        self.change: Change = change or (lambda _sender, _number, record: record)
        self.seen: list[dict[str, list[bytes]]] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(TIMEOUT)
        assert not any(thread.is_alive() for thread in self._threads), "the man in the middle hangs"

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(self.target, timeout=TIMEOUT)
            near.settimeout(TIMEOUT)
            seen: dict[str, list[bytes]] = {"client": [], "server": []}
            self.seen.append(seen)
            thread = threading.Thread(target=self._relay_both, args=(near, far, seen))
            self._threads.append(thread)
            thread.start()

    def _relay_both(self, near: socket.socket, far: socket.socket, seen: dict[str, list[bytes]]) -> None:
        back = threading.Thread(target=self._relay, args=("server", far, near, seen["server"]))
        with near, far:
            back.start()
            self._relay("client", near, far, seen["client"])
            back.join(TIMEOUT)

    def _relay(self, sender: str, source: socket.socket, sink: socket.socket, seen: list[bytes]) -> None:
        try:
            for number, record in enumerate(records_from(source)):
                seen.append(record)
                sink.sendall(self.change(sender, number, record))
            sink.shutdown(socket.SHUT_WR)
        except Cut:
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The receiver has gone; what it said last is on its way in the other direction.
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while source.recv(1 << 16):
                    pass


class Echo:
    """Sends back whatever it gets, on one connection."""

    def __init__(self) -> None:
        self.bytes = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()[:2]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "the mirror hangs"

    def _serve(self) -> None:
        sock, _ = self._listening.accept()
        with sock, contextlib.suppress(OSError):
            sock.settimeout(TIMEOUT)
            while data := sock.recv(1 << 16):
                self.bytes += len(data)
                sock.sendall(data)


def records_from(sock: socket.socket) -> Iterator[bytes]:
    """The TLS records on a socket, until its end."""
    with sock.makefile("rb") as stream:
        while len(header := stream.read(5)) == 5:
            body = stream.read(int.from_bytes(header[3:], "big"))
            yield header + body


def first_hello(change: Callable[[bytes], bytes]) -> Change:
    """Change the client's first record only."""
    return lambda sender, number, record: change(record) if sender == "client" and number == 0 else record


# --- ClientHellos


def extensions(record: bytes) -> tuple[bytes, dict[int, bytes]]:
    """A ClientHello's part before its extensions, and these in their order."""
    message = record[5:]
    position = 4 + 2 + 32
    position += 1 + message[position]
    position += 2 + int.from_bytes(message[position : position + 2], "big")
    position += 1 + message[position]
    start, found = message[4:position], {}
    position += 2
    while position < len(message):
        kind, size = struct.unpack_from(">HH", message, position)
        found[kind] = message[position + 4 : position + 4 + size]
        position += 4 + size
    return start, found


def with_extensions(record: bytes, **changed: bytes | None) -> bytes:
    """The same ClientHello with these extensions (`x16=...`) replaced, or left out where None."""
    start, found = extensions(record)
    for name, value in changed.items():
        kind = int(name[1:])
        if value is None:
            del found[kind]
        else:
            found[kind] = value
    block = b"".join(struct.pack(">HH", kind, len(value)) + value for kind, value in found.items())
    body = start + len(block).to_bytes(2, "big") + block
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return record[:3] + len(message).to_bytes(2, "big") + message


def identity_in(record: bytes) -> bytes:
    """The PSK identity in a ClientHello."""
    psk = extensions(record)[1][PSK_EXTENSION]
    return psk[4 : 4 + int.from_bytes(psk[2:4], "big")]


def forged_connection(
    lab: Lab, identity: bytes, hostname: str = "localhost", psk: bytes = bytes(48)
) -> TLSConnection:
    """A TLS stack that offers a PSK under any identity, as an attacker's would."""
    settings = TLSSettings(server_side=False, trusted=(lab.ca.der,))
    return TLSConnection(
        TLSContext(settings),
        server_hostname=hostname,
        alpn=("qkd-tls/1",),
        psk=PSK(identity, bytearray(psk), KDF.SHA384, "", False, ""),
    )


def hand_shake(connection: TLSConnection, sock: socket.socket) -> None:
    """Bring a handshake to its end over a socket."""
    while not connection.handshake():
        sock.sendall(connection.take())
        data = sock.recv(1 << 16)
        assert data, "the server has hung up"
        connection.feed(data)
    sock.sendall(connection.take())


def in_background(step: Callable[[], Any]) -> Callable[[], Any]:
    """Run something in a thread; the result is a function that waits for what it gave."""
    result: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: result.put(step())).start()
    return lambda: result.get(timeout=TIMEOUT)
