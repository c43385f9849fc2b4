"""One script for two connections, the standard library's and ours, which have to stay in step.

A script has the peer's writes, how much of them has come, and the calls of the side under test. After each call both
connections are compared: the call's result or error, where the bytes are that nothing has decrypted yet, and what has
been sent. The peer's records are made with the secrets of its key log, so that it can say whatever TLS 1.3 allows, and
some things that it does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import ssl
import termios
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from hypothesis import strategies as st

from qkd_tls import QKDContext
from tests.support import objects
from tests.support.record_layer import (
    ALERT,
    CLOSE_NOTIFY,
    DATA,
    HANDSHAKE,
    KEY_UPDATE,
    KEY_UPDATE_REQUESTED,
    KeyLog,
    Opener,
    Sealer,
    new_session_ticket,
    split_records,
)
from tests.support.sockets import Lab

__all__ = [
    "Contexts",
    "Mode",
    "OutOfStep",
    "OverMemory",
    "OverSocket",
    "Run",
    "Script",
    "Side",
    "compare",
    "our_contexts",
    "scripts",
    "stock_contexts",
]

Mode: TypeAlias = Literal["blocking", "non-blocking", "object"]
Side: TypeAlias = Literal["client", "server"]

SHORT: Final = 0.02
"""Seconds that a blocking call waits for what does not come."""
LONG: Final = 2.0
"""The same in a second run, if the first one may have differed because the machine was busy."""

CONNECTIONS: Final = 50
"""How many connections use one association."""

_OTHER: Final[dict[Side, Side]] = {"client": "server", "server": "client"}
# Of the messages of a handshake, Finished comes last: 4 + 48 bytes, in a record of its own.
_FINISHED_RECORD: Final = 5 + 4 + 48 + 1 + 16

# --- the differences that the documentation tells of

CLOSING: Final = frozenset({"close", "shutdown"})
"""Calls at which ours sends close_notify, and the standard library nothing.

Behind them only results are compared: `close` of ours discards what has come, so that the system does not reset the
connection. Behind `shutdown`, a socket of the standard library is plain, which ours never becomes unasked: the script
ends.
"""

FAILURES: Final = frozenset({"SSLError", "SSLEOFError"})
"""Errors that end a connection.

The two have OpenSSLs of different versions. Of a fatal alert only that it is sent is compared, and after a failure only
whether a call fails, and what stays unread. What `do_handshake` says then is not compared: the standard library's tells
of an earlier call's error number.
"""

FATAL: Final = b"\x02"

# Tickets that a server sends are left out: ours, if it sends any, are of no use to anyone, for no connection is ever
# resumed without a fresh QKD key.


# --- scripts


@dataclass(frozen=True)
class Say:
    """The peer writes; it has not come yet."""

    what: str
    size: int = 0


@dataclass(frozen=True)
class Arrive:
    """So many whole records come, and a piece of the next one, in one segment."""

    records: int
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """A call of the side under test."""

    name: str
    size: int = 0


Step: TypeAlias = Say | Arrive | Call


@dataclass(frozen=True)
class Script:
    """A connection's life from the last flight of its handshake on."""

    path: Literal["bootstrap", "associated"]
    early: tuple[Say, ...]
    """What the peer writes right behind its last flight."""
    with_finished: Arrive
    """How much of it comes in one segment with Finished."""
    cut: int
    """How many bytes of Finished come later than what is before them."""
    first: Call
    """The call that completes the handshake."""
    steps: tuple[Step, ...]
    suppress_ragged_eofs: bool = True


_SIZES = st.one_of(
    st.sampled_from([0, 1, 2, 100, 1000, 16383, 16384, 16385, 32768, 70000]), st.integers(0, 70000)
)
_RECORDS = st.one_of(st.sampled_from([1, 2, 100, 16383, 16384]), st.integers(0, 16384))
_SAYS = st.one_of(
    st.builds(Say, st.just("data"), _RECORDS),
    st.builds(Say, st.just("data"), _RECORDS),
    st.builds(Say, st.sampled_from(["key update", "key update requested", "ticket", "close_notify", "end"])),
    st.builds(Say, st.just("plaintext"), st.integers(1, 100)),
)
_ARRIVALS = st.one_of(
    st.builds(Arrive, st.integers(0, 3), st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 16406))),
    st.just(Arrive(100)),
)
_READS = st.builds(Call, st.sampled_from(["recv", "read", "recv_into", "read into"]), _SIZES)
_WRITES = st.builds(Call, st.sampled_from(["send", "write", "sendall"]), _SIZES)
_SOCKET_CALLS = st.one_of(
    _READS,
    _READS,
    _WRITES,
    st.builds(Call, st.sampled_from(["do_handshake", "pending", "unwrap", "shutdown", "close"])),
)
_OBJECT_READS = st.builds(Call, st.sampled_from(["read", "read into"]), _SIZES)
_OBJECT_WRITES = st.builds(Call, st.just("write"), _SIZES)
_OBJECT_CALLS = st.one_of(
    _OBJECT_READS,
    _OBJECT_READS,
    _OBJECT_WRITES,
    st.builds(Call, st.sampled_from(["do_handshake", "pending", "unwrap"])),
)


def scripts(mode: Mode) -> st.SearchStrategy[Script]:
    """Scripts for sockets or objects."""
    reads, calls = (_OBJECT_READS, _OBJECT_CALLS) if mode == "object" else (_READS, _SOCKET_CALLS)
    return st.builds(
        Script,
        path=st.sampled_from(["bootstrap", "associated"]),
        early=st.lists(_SAYS, max_size=3).map(tuple),
        with_finished=_ARRIVALS,
        cut=st.one_of(st.just(0), st.integers(0, _FINISHED_RECORD)),
        first=st.one_of(
            st.just(Call("do_handshake")),
            st.just(Call("do_handshake")),
            reads.filter(lambda read: read.size > 0),
        ),
        steps=st.lists(st.one_of(_SAYS, _ARRIVALS, calls, calls), max_size=12).map(tuple),
        suppress_ragged_eofs=st.booleans(),
    )


# --- contexts


@dataclass
class Contexts:
    """A client's and a server's context with key logs; `ours` has associations."""

    client: ssl.SSLContext
    server: ssl.SSLContext
    logs: dict[Side, KeyLog]
    _left: int = 0
    """How many connections the association is still used for."""

    def context(self, side: Side) -> ssl.SSLContext:
        return self.client if side == "client" else self.server

    def prepare(self, path: str) -> int:
        """Make the next connection take this path; return how many TLS handshakes that takes."""
        if isinstance(self.client, QKDContext):
            if path == "bootstrap":
                self.client.forget_associations()
                self._left = 0
                return 2
            if not self._left:
                self.client.forget_associations()
                objects.shake_hands(*objects.sides(self.client, self.server))
                self._left = CONNECTIONS
            self._left -= 1
        return 1


def stock_contexts(lab: Lab, folder: Path) -> Contexts:
    client, server = lab.stock_client(), lab.stock_server()
    for context in (client, server):
        # Ours tells a truncation apart from an end (docs/dropin.md); so can the standard library.
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return _logged(client, server, folder, "stock")


def our_contexts(lab: Lab, folder: Path) -> Contexts:
    return _logged(lab.client(), lab.server(), folder, "ours")


def _logged(client: ssl.SSLContext, server: ssl.SSLContext, folder: Path, name: str) -> Contexts:
    logs: dict[Side, KeyLog] = {}
    for side, context in (("client", client), ("server", server)):
        file = folder / f"{name}-{side}"
        logs[side] = KeyLog(file)  # type: ignore[index]
        context.keylog_filename = str(file)
    return Contexts(client, server, logs)


# --- transports


class OverSocket:
    """The connection under test on one end of a pair of sockets."""

    def __init__(
        self,
        context: ssl.SSLContext,
        side: Side,
        suppress_ragged_eofs: bool,
        ends: tuple[socket.socket, socket.socket] | None = None,
    ) -> None:
        near, self.far = ends or socket.socketpair()
        near.setblocking(False)
        for end in (near, self.far):
            # Room for all that a script can send.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.far.setblocking(False)
        self.tls: Any = context.wrap_socket(
            near,
            server_side=side == "server",
            server_hostname=None if side == "server" else "localhost",
            do_handshake_on_connect=False,
            suppress_ragged_eofs=suppress_ragged_eofs,
        )

    def set_timeout(self, seconds: float) -> None:
        self.tls.settimeout(seconds)

    def put(self, data: bytes) -> None:
        # Closed at the other end already, perhaps.
        with contextlib.suppress(OSError):
            assert self.far.send(data) == len(data)

    def put_end(self) -> None:
        with contextlib.suppress(OSError):
            self.far.shutdown(socket.SHUT_WR)

    def take(self) -> bytes:
        taken = b""
        with contextlib.suppress(OSError):
            while data := self.far.recv(1 << 20):
                taken += data
        return taken

    def state(self) -> dict[str, Any]:
        """Where undecrypted bytes are, as programs see it."""
        descriptor = self.tls.fileno()
        if descriptor < 0:
            return {"open": False}
        unread = bytearray(4)
        fcntl.ioctl(descriptor, termios.FIONREAD, unread)
        return {
            "open": True,
            "readable by select": bool(select.select([self.tls], [], [], 0)[0]),
            "bytes in the descriptor": int.from_bytes(unread, "little"),
            "pending": self.tls.pending(),
        }

    def close(self) -> None:
        self.tls.close()
        self.far.close()


class OverMemory:
    def __init__(self, context: ssl.SSLContext, side: Side) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: Any = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=side == "server",
            server_hostname=None if side == "server" else "localhost",
        )

    def set_timeout(self, seconds: float) -> None:
        """Nothing ever waits."""

    def put(self, data: bytes) -> None:
        if data:
            self.incoming.write(data)

    def put_end(self) -> None:
        self.incoming.write_eof()

    def take(self) -> bytes:
        return self.outgoing.read()

    def state(self) -> dict[str, Any]:
        return {
            "incoming.pending": self.incoming.pending,
            "incoming.eof": self.incoming.eof,
            "pending": self.tls.pending(),
        }

    def close(self) -> None: ...


# --- one connection


@dataclass
class Run:
    """One of the two connections."""

    contexts: Contexts
    mode: Mode
    side: Side
    script: Script
    timeout: float
    ends: tuple[socket.socket, socket.socket] | None = None
    """The sockets of the side under test and of its peer, if they are made already."""
    truncated: bool = False
    """True if the stream has ended, however it did."""
    received: bytes = b""
    """What the side under test has read."""
    _queue: list[bytes] = field(default_factory=list)
    """The peer's records, and pieces of them, that have not come yet; empty for the end of the stream."""
    _said: int = 0
    _ended: bool = False
    _opener: Opener | None = None
    _plain: bool = False
    _closed_by_peer: bool = False
    _sealed_behind_the_end: bool = False
    """Whether the peer goes on with TLS where this side may be plain: it reads records then, sealed with other keys."""

    def __post_init__(self) -> None:
        self._handshakes = self.contexts.prepare(self.script.path)
        context = self.contexts.context(self.side)
        self._transport = (
            OverMemory(context, self.side)
            if self.mode == "object"
            else OverSocket(context, self.side, self.script.suppress_ragged_eofs, self.ends)
        )

    def close(self) -> None:
        self._transport.close()

    # --- the handshake

    def up_to_the_last_flight(self) -> None:
        """Shake hands; stop when the peer's last flight has come together with the script's early data."""
        peer_side = _OTHER[self.side]
        log = self.contexts.logs[peer_side]
        log.next_connection()
        self._peer = objects.Side(
            self.contexts.context(peer_side),
            server_side=peer_side == "server",
            server_hostname=None if peer_side == "server" else "localhost",
        )
        for _ in range(20):
            self._want_read(self._transport.tls.do_handshake)
            self._peer.incoming.write(self._transport.take())
            complete = self._want_read(self._peer.tls.do_handshake)
            flight = self._peer.outgoing.read()
            if complete if peer_side == "client" else len(log.secrets("server")) == self._handshakes:
                break
            self._transport.put(flight)
        else:
            raise AssertionError("the handshake hangs")
        # The handshake is over when the peer's Finished has come.
        self._sealer = Sealer(log.secrets(peer_side)[-1])
        for say in self.script.early:
            self.say(say)
        if self.script.cut:
            self._transport.put(flight[: -self.script.cut])
            self._want_read(self._transport.tls.do_handshake)
            flight = flight[-self.script.cut :]
        early, end = self._next(self.script.with_finished)
        self._transport.put(flight + early)
        if end:
            self.truncated = True
            self._transport.put_end()
        self._transport.set_timeout(0.0 if self.mode == "non-blocking" else self.timeout)

    @staticmethod
    def _want_read(step: Any) -> bool:
        try:
            step()
        except ssl.SSLWantReadError:
            return False
        return True

    # --- steps

    def say(self, say: Say) -> None:
        """Let the peer write."""
        if self._ended:
            return
        if say.what == "end":
            self._ended = True
            self._queue.append(b"")
            return
        if say.what == "plaintext":
            self._queue.append(b"p" * say.size)
            return
        content_type, content = {
            "data": (DATA, b""),
            "key update": (HANDSHAKE, KEY_UPDATE),
            "key update requested": (HANDSHAKE, KEY_UPDATE_REQUESTED),
            "ticket": (HANDSHAKE, new_session_ticket()),
            "close_notify": (ALERT, CLOSE_NOTIFY),
        }[say.what]
        if say.what == "data":
            # Each place of the stream has a value of its own, nearly.
            content = bytes((self._said + i) * 7 % 251 for i in range(say.size))
            self._said += say.size
        self._sealed_behind_the_end = self._sealed_behind_the_end or self._closed_by_peer
        self._closed_by_peer = self._closed_by_peer or say.what == "close_notify"
        self._queue.append(self._sealer.seal(content_type, content))

    def arrive(self, arrival: Arrive) -> None:
        data, end = self._next(arrival)
        self._transport.put(data)
        if end:
            self.truncated = True
            self._transport.put_end()

    def _next(self, arrival: Arrive) -> tuple[bytes, bool]:
        taken = self._queue[: arrival.records]
        del self._queue[: arrival.records]
        if arrival.offset and self._queue and len(self._queue[0]) > 1:
            piece = self._queue[0][: min(arrival.offset, len(self._queue[0]) - 1)]
            self._queue[0] = self._queue[0][len(piece) :]
            taken.append(piece)
        return b"".join(taken), b"" in taken

    def call(self, call: Call) -> dict[str, Any]:
        """Call; return what can be told of the connection afterwards."""
        outcome = self._outcome(call)
        state = self._transport.state()
        sent = self._sent()
        if call.name == "unwrap" and isinstance(outcome, str):
            self._plain = True
        return {"outcome": outcome, **state, "sent": sent}

    def _outcome(self, call: Call) -> Any:
        try:
            return self._do(call)
        except Exception as error:  # noqa: BLE001 - compared
            # Ours may be subclasses.
            kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ in ("builtins", "ssl"))
            number = getattr(error, "errno", None)
            return kind, None if number is None else int(number)

    def _do(self, call: Call) -> Any:
        tls, data = self._transport.tls, b"s" * call.size
        match call.name:
            case "recv" | "read":
                read: bytes = self._comparable(getattr(tls, call.name)(call.size))
                self.received += read
                return read
            case "recv_into" | "read into":
                buffer = bytearray(call.size)
                size: int = tls.recv_into(buffer) if call.name == "recv_into" else tls.read(call.size, buffer)
                buffer[:size] = self._comparable(bytes(buffer[:size]))
                self.received += buffer[:size]
                return size, bytes(buffer)
            case "send" | "write" | "sendall":
                return getattr(tls, call.name)(data)
            case "unwrap":
                unwrapped = tls.unwrap()
                return "itself" if unwrapped is tls else type(unwrapped).__name__
            case "shutdown":
                return tls.shutdown(socket.SHUT_WR)
            case _:
                return getattr(tls, call.name)()

    def _comparable(self, read: bytes) -> bytes:
        return bytes(len(read)) if self._plain and self._sealed_behind_the_end else read

    def _sent(self) -> list[tuple[int, bytes]]:
        """What has left the side under test: the records' types and contents."""
        stream = self._transport.take()
        if not stream:
            return []
        if self._plain:
            return [(0, stream)]
        if self._opener is None:
            after = self._behind_finished(stream)
            if after is None:
                return [(0, stream)]
            # A server logs the client's secret when the client's Finished has come.
            self._opener = Opener(self.contexts.logs[_OTHER[self.side]].secrets(self.side)[-1])
            stream = after
        return [_known(*record) for record in self._opener.open(stream) if not _is_ticket(*record)]

    def _behind_finished(self, stream: bytes) -> bytes | None:
        """Give the client's Finished to the server; return what comes behind, None if there is no Finished."""
        if self.side == "server":
            return stream
        records, rest = split_records(stream)
        number = next((i for i, record in enumerate(records, 1) if record[0] == DATA), 0)
        if not number:
            return None
        self._peer.incoming.write(b"".join(records[:number]))
        self._peer.tls.do_handshake()
        return b"".join(records[number:]) + rest

    def hand_over(self) -> bytes:
        """Complete the handshake; return what the side under test has sent behind it."""
        self.up_to_the_last_flight()
        self.tls.do_handshake()
        return self._behind_finished(self._transport.take()) or b""

    @property
    def tls(self) -> Any:
        return self._transport.tls

    @property
    def transport(self) -> OverSocket | OverMemory:
        return self._transport


def _is_ticket(content_type: int, content: bytes) -> bool:
    return content_type == HANDSHAKE and content[:1] == b"\x04"


def _known(content_type: int, content: bytes) -> tuple[int, bytes]:
    return content_type, FATAL if content_type == ALERT and content[:1] == FATAL else content


# --- both


class OutOfStep(AssertionError):
    """The two connections differ."""


def compare(stock: Contexts, ours: Contexts, mode: Mode, side: Side, script: Script) -> None:
    """Run the script with both; raise OutOfStep where they part."""
    try:
        _compare(stock, ours, mode, side, script, SHORT)
    except OutOfStep:
        if mode != "blocking":
            raise
        # On a busy machine a short time may be over before a call had its turn.
        _compare(stock, ours, mode, side, script, LONG)


def _compare(stock: Contexts, ours: Contexts, mode: Mode, side: Side, script: Script, timeout: float) -> None:
    with (
        contextlib.closing(Run(stock, mode, side, script, timeout)) as expected,
        contextlib.closing(Run(ours, mode, side, script, timeout)) as found,
    ):
        for run in (expected, found):
            run.up_to_the_last_flight()
        closed = failed = unwrapped = False
        for number, step in enumerate((script.first, *script.steps)):
            if isinstance(step, Call):
                if unwrapped and step.name == "do_handshake":
                    # Of a connection that has ended: an error of the system's there, and nothing here.
                    continue
                unwrapped = unwrapped or step.name == "unwrap"
                closed = closed or step.name in CLOSING
                results = expected.call(step), found.call(step)
                if differences := list(
                    _differences(*results, closed=closed, failed=failed, shaking=step.name == "do_handshake")
                ):
                    raise OutOfStep(f"after step {number}, {step}: " + "; ".join(differences))
                if step.name == "shutdown":
                    break
                outcome = results[0]["outcome"]
                # A read may say that there is no more, where the stream was cut off.
                failed = (
                    failed
                    or _failure(outcome)
                    or (expected.truncated and step.size > 0 and _nothing(outcome))
                )
                continue
            for run in (expected, found):
                run.say(step) if isinstance(step, Say) else run.arrive(step)
        assert expected.received == found.received


def _differences(
    expected: dict[str, Any], found: dict[str, Any], *, closed: bool, failed: bool, shaking: bool
) -> Iterator[str]:
    for what in sorted(expected.keys() | found.keys()):
        one, other = expected.get(what), found.get(what)
        if closed:
            if what == "sent":
                other = [record for record in found["sent"] if record != (ALERT, CLOSE_NOTIFY)]
            elif what not in ("outcome", "open"):
                continue
        if what == "outcome" and failed and (shaking or (_nothing(one) and _nothing(other))):
            continue
        if what == "pending" and (failed or _failure(expected["outcome"])):
            continue
        if one != other:
            yield f"{what} is {_short(one)} with the standard library, and {_short(other)} with ours"


def _failure(outcome: Any) -> bool:
    return isinstance(outcome, tuple) and outcome[0] in FAILURES


def _nothing(outcome: Any) -> bool:
    """Whether a call fails or reads nothing, which `suppress_ragged_eofs` makes of some failures."""
    return _failure(outcome) or outcome in (b"", 0) or (isinstance(outcome, tuple) and outcome[0] == 0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:60]}... ({len(text)} characters)"
