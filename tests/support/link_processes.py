"""Sides of a link as processes, their clients, and a cable between them that can be cut."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kms_client import Etsi014Client, KMSError, QKDKey
from kms_client.emulator import DemoPKI, ensure_demo_pki
from tests.support.patience import PATIENCE, eventually
from tests.support.ports import free_port

BLOCK = "300000"


class SideProcess:
    """`qkd-kme link --side ...`, which can be killed and started again at the same ports."""

    def __init__(self, side: str, directory: Path, *arguments: str) -> None:
        self.side = side
        self._directory = directory
        self._arguments = arguments
        names = ("--port", "--page-port", *(("--link-port", "--fibre-port") if side == "a" else ()))
        self._ports = [argument for name in names for argument in (name, str(free_port()))]
        self.ready: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kms_client", "link", "--json"),
                *("--side", self.side, "--dir", str(self._directory), "--block", BLOCK),
                *self._arguments,
                *self._ports,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready = json.loads(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return str(self.ready["kmes"][0]["url"])

    def kill(self) -> None:
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        code = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def client(self, pki: DemoPKI, **settings: Any) -> Etsi014Client:
        stem = pki.directory / f"sae-{self.side}"
        return Etsi014Client(
            self.url,
            sae_id=f"SAE-{self.side.upper()}",
            cert=stem.with_suffix(".pem"),
            key=stem.with_suffix(".key"),
            ca=pki.kms_ca,
            **settings,
        )


class Link:
    """Both sides, A's ports reached by B through a cable."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.pki = ensure_demo_pki(directory)
        self.a = SideProcess("a", directory, *arguments)
        self.cable = Cable(self.a.ready["fibre"])
        self.b = SideProcess(
            *("b", directory, "--link", self.a.ready["link"]),
            *("--fibre", f"127.0.0.1:{self.cable.port}"),
            *arguments,
        )

    @property
    def sides(self) -> dict[str, SideProcess]:
        return {"a": self.a, "b": self.b}


@contextmanager
def running_link(directory: Path, *arguments: str) -> Iterator[Link]:
    link = Link(directory, *arguments)
    try:
        yield link
    finally:
        link.b.stop()
        link.a.stop()
        link.cable.close()


class Cable:
    """Carries connections to `target`. Cut, it carries nothing and does not say so; torn, it ends them."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._target_port = int(port)
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.clear)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._whole.set)

    def tear(self) -> None:
        """End all connections that it carries now."""
        self._call(self._tear())

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    async def _tear(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        await self._tear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        other = None
        try:
            await self._whole.wait()
            other_reader, other = await asyncio.open_connection(self._host, self._target_port)
            self._writers.add(other)
            ways = [
                asyncio.create_task(self._carry(reader, other)),
                asyncio.create_task(self._carry(other_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, other):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 18):
            await self._whole.wait()
            writer.write(data)
            await writer.drain()


class Pairs:
    """Masters and slaves that fetch keys in both directions all the time, each with a client of its own.

    Attributes:
        masters: hash of each key that a master got, by ID.
        slaves: the same for slaves.
        refusals: errors, by role, class and status.
    """

    def __init__(self, link: Link) -> None:
        self.masters: dict[str, bytes] = {}
        self.slaves: dict[str, bytes] = {}
        self.refusals: Counter[str] = Counter()
        self.unexpected: list[BaseException] = []
        self._link = link
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(side,)) for side in "ab"]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for error in self.unexpected:
            raise error

    def wait_for_new(self, number: int) -> None:
        """Until as many more keys have reached slaves, in both directions together."""
        most = len(self.slaves) + number
        eventually(lambda: len(self.slaves) >= most or bool(self.unexpected), f"{number} more keys")

    def _run(self, side: str) -> None:
        pki = self._link.pki
        here, there = ("a", "b") if side == "a" else ("b", "a")
        master = self._link.sides[here].client(pki, read_timeout=PATIENCE)
        slave = self._link.sides[there].client(pki, read_timeout=PATIENCE)
        try:
            while not self._ended.is_set():
                for key in self._try("master", partial(master.get_keys, f"SAE-{there.upper()}")):
                    key_id = key.key_id
                    self.masters[key_id] = _hash(key)
                    for same in self._try(
                        "slave", partial(slave.get_keys_by_id, f"SAE-{here.upper()}", [key_id])
                    ):
                        self.slaves[key_id] = _hash(same)
        except BaseException as error:  # noqa: BLE001 - stop() raises it
            self.unexpected.append(error)
        finally:
            master.close()
            slave.close()

    def _try(self, role: str, fetch: Callable[[], list[QKDKey]]) -> list[QKDKey]:
        try:
            return fetch()
        except KMSError as error:
            self.refusals[f"{role}: {type(error).__name__}"] += 1
            self._ended.wait(0.02)
            return []


def _hash(key: QKDKey) -> bytes:
    with key.use() as secret:
        return hashlib.sha256(secret).digest()
