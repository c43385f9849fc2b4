"""A connection, a fork, and what both processes do with it then: run as a program, which takes scripts line by line.

This process is the peer, made of the secrets of the key log, and the relay: it sees each record on the wire, and opens
it with the one next sequence number. A record that does not open was sent under a nonce that another process had used,
or would use. For each script it forks a parent, which makes the connection and forks a child; both take orders over
pipes, one at a time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from tests.support.in_step import Arrive, Call, Contexts, OverMemory, Run, Script, Side, our_contexts
from tests.support.patience import PATIENCE
from tests.support.record_layer import (
    ALERT,
    CLOSE_NOTIFY,
    DATA,
    HANDSHAKE,
    KEY_UPDATE_REQUESTED,
    Opener,
    Sealer,
)
from tests.support.sockets import Authority, local_lab

__all__ = ["ENDS", "LEAVING_IT_ALONE", "OVER_MEMORY", "OVER_SOCKET"]

ENDS: Final = frozenset({"close", "collect", "exit", "sys.exit", "shutdown", "unwrap"})
"""Orders after which a process does nothing more with the connection."""
ENDS_BOTH: Final = frozenset({"shutdown", "unwrap"})
OVER_SOCKET: Final = ("send", "receive", "pending", *sorted(ENDS))
OVER_MEMORY: Final = ("send", "receive", "pending", "collect", "exit", "sys.exit", "unwrap")
LEAVING_IT_ALONE: Final = ("collect", "exit", "sys.exit")
"""Orders that neither send nor receive, over sockets and memory."""
_TIMEOUT: Final = 10
"""Seconds. Whatever the connection may have is there already."""
_LEAVING: Final = frozenset({"exit", "sys.exit"})
_SENDING: Final = frozenset({"send", "unwrap", "shutdown"})


# --- in the processes that share the connection


class _Worker:
    """Does what it is told with its copy of the connection."""

    def __init__(self, run: Run, orders: socket.socket) -> None:
        self._run: Run | None = run
        self._orders = orders.makefile("rw")

    def obey(self) -> NoReturn:
        for line in self._orders:
            order = json.loads(line)
            if order["do"] == "exit":
                os._exit(0)
            if order["do"] == "sys.exit":
                sys.exit(0)
            if order["do"] == "collect":
                self._run = None
                gc.collect()
            self.answer(self._do(order))
        # The script has ended without an order to end: the peer does not look any more.
        os._exit(0)

    def answer(self, answer: dict[str, Any]) -> None:
        self._orders.write(json.dumps(answer) + "\n")
        self._orders.flush()

    def _do(self, order: dict[str, Any]) -> dict[str, Any]:
        run = self._run
        if run is None:
            return {}
        memory = run.transport if isinstance(run.transport, OverMemory) else None
        if memory is not None:
            memory.incoming.write(bytes.fromhex(order.get("ciphertext", "")))
        answer: dict[str, Any] = {}
        try:
            match order["do"]:
                case "handshake":
                    answer["behind"] = run.hand_over().hex()
                    return answer
                case "send":
                    (run.tls.write if memory is not None else run.tls.sendall)(order["data"].encode())
                case "receive":
                    answer["data"] = run.tls.read(1000).decode()
                case "shutdown":
                    run.tls.shutdown(socket.SHUT_RDWR)
                case name:
                    getattr(run.tls, name)()
        except OSError as error:
            answer["error"] = repr(error)
        if memory is not None:
            answer["ciphertext"] = memory.outgoing.read().hex()
        return answer


# --- in the peer


class _Process:
    """The peer's view of one of the two processes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._near, self.far = socket.socketpair()
        self._file = self._near.makefile("rw")
        self._near.settimeout(PATIENCE)
        # A plain descriptor, which stays open until the process has ended.
        self._end, self.life = os.pipe()

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self._file.write(json.dumps({"do": do, **details}) + "\n")
            self._file.flush()
        if do in _LEAVING:
            self.wait()
            return {}
        return self.told()

    def told(self) -> dict[str, Any]:
        answer = self._file.readline()
        assert answer, f"the {self.name} has ended"
        return cast(dict[str, Any], json.loads(answer))

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        assert os.read(self._end, 1) == b""

    def leave_to_others(self) -> None:
        self.far.close()
        os.close(self.life)

    def close(self) -> None:
        self._file.close()
        self._near.close()
        os.close(self._end)


class _Peer:
    """The peer of the connection, and a model of which process may do what."""

    def __init__(self, contexts: Contexts, script: dict[str, Any], far: socket.socket) -> None:
        self._shaking: str = script["handshake"]
        self._memory, self._side = bool(script["memory"]), cast(Side, script["side"])
        self._other: Side = "server" if self._side == "client" else "client"
        self._log, self._far = contexts.logs[self._other], far
        self._log.next_connection()
        self._unread: list[tuple[str, str]] = []
        """Text that the peer has sent, and its ciphertext."""
        self._sends: str | None = None
        self._receives: str | None = None
        self._number = 0
        self._got: list[str] = []

    def established(self, behind: str) -> None:
        """Begin after the handshake, which sends and receives: behind a fork, that is of one process."""
        shaking = self._shaking
        if shaking != "before":
            self._sends = self._receives = shaking
        self._sealer = Sealer(self._log.secrets(self._other)[-1])
        self._opener = Opener(self._log.secrets(self._side)[-1])
        self._look(bytes.fromhex(behind))

    def step(self, process: _Process, do: str) -> None:
        """Have it done, and compare with what it may do."""
        if do == "peer sends":
            self._number += 1
            self._put((DATA, f"from the peer {self._number}"))
            return
        if do == "peer asks for a KeyUpdate":
            self._number += 1
            self._put((HANDSHAKE, KEY_UPDATE_REQUESTED), (DATA, f"with the new keys {self._number}"))
            return
        name = process.name
        if do == "receive":
            self._receive(process)
            return
        if do in _SENDING and self._sends is None:
            self._sends = name
        mine = self._sends == name
        details = {}
        if do == "send":
            self._number += 1
            details["data"] = f"from the {name} {self._number}"
        if do == "unwrap":
            # It waits for the peer's.
            closing = self._sealer.seal(ALERT, CLOSE_NOTIFY)
            details["ciphertext"] = "".join(ciphertext for _, ciphertext in self._unread) + closing.hex()
            self._send(closing)
        before = len(self._got)
        answer = process.ask(do, **details)
        sent = self._look(self._taken(answer))
        if not mine:
            assert not sent, (
                f"{do} in the {name} has sent {sent}, though it had not sent anything since the fork"
            )
            if do in {"send", "unwrap"}:
                assert _refused(answer), (
                    f"{do} in the {name} raised no OSError, though the other process sends"
                )
        elif do == "send":
            assert "error" not in answer, f"send in the {name} failed: {answer}"
            assert self._got[before:] == [details["data"]], self._got[before:]

    def _receive(self, process: _Process) -> None:
        if not self._unread:
            return
        if self._receives is None:
            self._receives = process.name
        (text, ciphertext), *rest = self._unread
        if self._receives == process.name:
            self._unread = rest
            details = {"ciphertext": ciphertext}
        else:
            # An object of the other process would be given nothing that it could read.
            details = {}
        answer = process.ask("receive", **details)
        sent = self._look(self._taken(answer))
        assert self._sends == process.name or not sent, f"receive in the {process.name} has sent {sent}"
        if self._receives == process.name:
            assert answer.get("data") == text, f"receive in the {process.name}: {answer} instead of {text!r}"
        else:
            assert _refused(answer), (
                f"receive in the {process.name} raised no OSError, though the other one receives"
            )

    def _put(self, *records: tuple[int, str | bytes]) -> None:
        ciphertext = b"".join(
            self._sealer.seal(kind, content.encode() if isinstance(content, str) else content)
            for kind, content in records
        )
        text = records[-1][1]
        assert isinstance(text, str)
        self._unread.append((text, ciphertext.hex()))
        self._send(ciphertext)

    def _send(self, ciphertext: bytes) -> None:
        if not self._memory:
            with contextlib.suppress(OSError):
                self._far.sendall(ciphertext)

    def _taken(self, answer: dict[str, Any]) -> bytes:
        if self._memory:
            return bytes.fromhex(answer.get("ciphertext", ""))
        taken = b""
        # Both processes may have gone, and left data unread.
        with contextlib.suppress(OSError):
            while data := self._far.recv(1 << 16):
                taken += data
        return taken

    def _look(self, stream: bytes) -> list[tuple[int, bytes]]:
        """Open what was sent: CannotDecrypt means that a nonce came twice, or was left out."""
        opened = list(self._opener.open(stream))
        assert not self._opener.rest, "a piece of a record"
        self._got += [content.decode() for kind, content in opened if kind == DATA]
        assert all(kind != ALERT or content == CLOSE_NOTIFY for kind, content in opened), opened
        return opened


def _refused(answer: dict[str, Any]) -> bool:
    return "error" in answer and "SSLWant" not in answer["error"]


def _run(contexts: Contexts, script: dict[str, Any]) -> None:
    ends = socket.socketpair()
    peer = _Peer(contexts, script, ends[1])
    processes = {name: _Process(name) for name in ("parent", "child")}
    if os.fork() == 0:
        _be_parent(contexts, script, ends, processes)
    for process in processes.values():
        process.leave_to_others()
    ends[0].close()
    ends[1].setblocking(False)
    try:
        if script["handshake"] == "before":
            answer = processes["parent"].told()
        else:
            answer = processes[script["handshake"]].ask("handshake")
        peer.established(answer["behind"])
        ended = set()
        for who, do in script["steps"]:
            if who not in ended:
                peer.step(processes[who], do)
            if do in ENDS:
                ended.add(who)
            if do in ENDS_BOTH:
                break
    finally:
        for process in processes.values():
            # Whatever they do at their end is none of the peer's any more.
            process.dismiss()
        for process in processes.values():
            process.wait()
            process.close()
        ends[1].close()
        os.wait()


def _be_parent(
    contexts: Contexts,
    script: dict[str, Any],
    ends: tuple[socket.socket, socket.socket],
    processes: dict[str, _Process],
) -> NoReturn:
    for process in processes.values():
        process.close()
    run = Run(
        contexts,
        "object" if script["memory"] else "blocking",
        script["side"],
        Script(script["path"], (), Arrive(0), 0, Call("do_handshake"), ()),
        _TIMEOUT,
        ends,
    )
    before = script["handshake"] == "before"
    behind = run.hand_over().hex() if before else None
    name = "parent" if os.fork() else "child"
    processes["child" if name == "parent" else "parent"].leave_to_others()
    worker = _Worker(run, processes[name].far)
    if behind is not None and name == "parent":
        worker.answer({"behind": behind})
    del run
    worker.obey()


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line


def main() -> NoReturn:
    folder = Path(tempfile.mkdtemp())
    authority = Authority(folder)
    identity = authority.issue()
    contexts = our_contexts(local_lab(authority, identity, identity), folder)
    mother = os.getpid()
    for line in _lines():
        try:
            _run(contexts, json.loads(line))
            result = ""
        except Exception:  # noqa: BLE001 - told to the test
            result = traceback.format_exc()
        if os.getpid() != mother:
            sys.stderr.write(result)
            os._exit(1)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    raise SystemExit(0)


if __name__ == "__main__":
    main()
