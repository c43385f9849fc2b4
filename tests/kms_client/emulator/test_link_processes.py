"""Both sides of a link with their KMEs, in one process and as the command: switches, attacks, strangers, figures."""

from __future__ import annotations

import asyncio
import json
import pkgutil
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kms_client import Etsi014Client
from kms_client.cli import main
from kms_client.emulator import Delivery, DemoPKI, ensure_demo_pki, qkd_channel, qkd_side, qkd_wire
from kms_client.emulator.link.authentication.reserve import ANCHOR_BYTES
from kms_client.emulator.link.party import Settings
from kms_client.emulator.link.photonics.parameters import DEFAULT
from kms_client.emulator.qkd_channel import AnchorFile
from kms_client.emulator.qkd_side import QKDSide
from tests.support.link_processes import BLOCK, SideProcess
from tests.support.patience import eventually, eventually_in_loop
from tests.support.ports import free_port

SETTINGS = Settings(block_bits=int(BLOCK), reserve=16)
HOST = "127.0.0.1"


@pytest.fixture
def pki(tmp_path: Path) -> DemoPKI:
    return ensure_demo_pki(tmp_path / "pki")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qkd_side, "_RETRY", 0.05)
    monkeypatch.setattr(qkd_side, "_PENALTY", 0.05)


class Sides:
    """Both sides; B can be replaced by a new one."""

    def __init__(self, pki: DemoPKI, **settings: Any) -> None:
        self.pki = pki
        self.settings = {"buffer": 100_000} | settings
        self.a = QKDSide("a", pki, SETTINGS, DEFAULT, **self.settings)
        self.b = QKDSide("b", pki, SETTINGS, DEFAULT, **self.settings)
        self.ports = 0, 0

    async def wait_for(self, text: str) -> None:
        """Until one of the sides has an event with this text."""
        await eventually_in_loop(lambda: text in str([figures["events"] for figures in self.figures]))

    async def start_b(self) -> None:
        await self.b.start(HOST, 0)
        self.b.connect((HOST, self.ports[0]), (HOST, self.ports[1]))

    async def new_b(self) -> None:
        await self.b.stop()
        self.b = QKDSide("b", self.pki, SETTINGS, DEFAULT, **self.settings)
        await self.start_b()

    @property
    def figures(self) -> list[dict[str, Any]]:
        return [side.figures.snapshot() for side in (self.a, self.b)]

    async def more_blocks(self, number: int = 1) -> None:
        kept = [side.figures.kept + number for side in (self.a, self.b)]
        await eventually_in_loop(
            lambda: [self.a.figures.kept >= kept[0], self.b.figures.kept >= kept[1]] == [True, True]
        )

    def agree(self) -> bool:
        return set(self.a.store.unassigned_ids()) == set(self.b.store.unassigned_ids())

    def client(self, side: str) -> Etsi014Client:
        kme = (self.a if side == "a" else self.b).kme
        stem = self.pki.directory / f"sae-{side}"
        return Etsi014Client(
            f"https://{HOST}:{kme.port}",
            sae_id=f"SAE-{side.upper()}",
            cert=stem.with_suffix(".pem"),
            key=stem.with_suffix(".key"),
            ca=self.pki.kms_ca,
        )


@asynccontextmanager
async def running(pki: DemoPKI, **settings: Any) -> AsyncIterator[Sides]:
    sides = Sides(pki, **settings)
    await sides.a.start(HOST, 0)
    try:
        sides.ports = await sides.a.listen(HOST)
        await sides.start_b()
        await sides.more_blocks()
        yield sides
    finally:
        await sides.b.stop()
        await sides.a.stop()


def test_what_a_man_in_the_middle_does_is_detected_and_is_over_when_he_goes(
    pki: DemoPKI, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What he drops is noticed after that time. It is long against what a block takes.
    monkeypatch.setattr(qkd_channel, "_SILENCE", 3.0)

    async def test() -> None:
        async with running(pki) as sides:
            for attack in ("change", "replay", "reorder", "inject", "drop"):
                kept = sides.a.figures.kept, sides.b.figures.kept
                sides.a.controls.change({"middle": attack})
                await eventually_in_loop(lambda: "down" in (sides.a.figures.state, sides.b.figures.state))
                # A block that was just being ended may still have been.
                assert sides.a.figures.kept - kept[0] <= 1
                assert sides.b.figures.kept - kept[1] <= 1
                sides.a.controls.change({"middle": "off"})
                await sides.more_blocks()
            # Who notices first ends the session. A changed part may make no sense before its tag is looked at; what is
            # dropped is noticed by the silence.
            assert sum(figures["authentication"]["failures"] for figures in sides.figures) >= 1
            assert [figures["authentication"]["bootstraps"] for figures in sides.figures] == [1, 1]
            await eventually_in_loop(sides.agree)

    asyncio.run(test())


HEAVY = (
    *("alice.reply", "alice.Reference", "alice.amplify"),
    *("bob.announcement", "bob.take_reply", "bob.verify", "bob.amplify"),
)
"""What takes long."""


class Held:
    """A function that goes on only when it may."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.in_vain = False

    def __call__(self, *arguments: Any) -> Any:
        self.begun.set()
        self.in_vain |= not self.may_go_on.wait(qkd_channel._SILENCE / 2)
        return self._function(*arguments)


def test_the_kme_answers_at_once_while_blocks_are_made(pki: DemoPKI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is being computed goes on only after the KME has answered: in the event loop, it would go on in vain."""

    async def test() -> None:
        async with running(pki) as sides:
            client = sides.client("a")
            for name in HEAVY:
                path = f"kms_client.emulator.link.{name}"
                held = Held(pkgutil.resolve_name(path))
                with monkeypatch.context() as patched:
                    patched.setattr(path, held)
                    await eventually_in_loop(held.begun.is_set, name)
                    status = await asyncio.to_thread(client.status, "SAE-B")
                    held.may_go_on.set()
                assert not held.in_vain, name
                assert status.stored_key_count > 0
            await sides.more_blocks()
            client.close()

    asyncio.run(test())


def test_the_switches_act_and_are_told(pki: DemoPKI) -> None:
    async def test() -> None:
        seen: list[Delivery] = []
        async with running(pki, on_delivery=seen.append) as sides:
            sides.a.controls.change({"intercept": 1, "length_km": 10})
            await eventually_in_loop(lambda: sides.a.figures.aborted.total() >= 2)
            for figures in sides.figures:
                assert figures["blocks"]["last"]["reason"] == "QBER above the threshold"
            assert sides.a.figures.snapshot()["optics"]["length_km"] == 10
            sides.a.controls.change({"intercept": 0})
            await sides.more_blocks()
            sides.a.controls.change({"paused": True})
            await eventually_in_loop(lambda: sides.a.figures.state == sides.b.figures.state == "down")
            kept = sides.a.figures.kept
            # The KMEs reach each other all the same: what is stored is delivered.
            client = sides.client("a")
            [key] = await asyncio.to_thread(client.get_keys, "SAE-B")
            key.wipe()
            client.close()
            assert sides.a.figures.kept == kept
            sides.a.controls.change({"paused": False})
            await sides.more_blocks()
            [delivered] = sides.a.figures.snapshot()["deliveries"]
            assert (delivered["sae_id"], delivered["role"]) == ("SAE-A", "master")
            assert seen == [Delivery(delivered["key_id"], "SAE-A", "master")]
            texts = [event["text"] for event in sides.a.figures.snapshot()["events"]]
            assert "switch paused: True" in texts
            json.dumps(sides.figures)

    asyncio.run(test())


def test_a_side_that_starts_again_is_bound_to_what_both_knew(pki: DemoPKI) -> None:
    async def test() -> None:
        async with running(pki) as sides:
            await sides.more_blocks(2)
            await sides.new_b()
            await sides.more_blocks(2)
            texts = [event["text"] for event in sides.b.figures.snapshot()["events"]]
            assert any("bound to the keys made before" in text for text in texts)
            await eventually_in_loop(sides.agree)

    asyncio.run(test())


def test_a_shared_secret_instead_of_certificates(pki: DemoPKI) -> None:
    async def test() -> None:
        async with running(pki, secret=b"S" * 32) as sides:
            await sides.wait_for("bootstrap by pre-shared secret")
            for side in "ab":
                (pki.directory / f"link-{side}.anchor").unlink()
            await sides.a.stop()
            other = Sides(pki, secret=b"S" * 32)
            other.b = QKDSide("b", pki, SETTINGS, DEFAULT, secret=b"T" * 32)
            await other.a.start(HOST, 0)
            other.ports = await other.a.listen(HOST)
            await other.start_b()
            await other.wait_for("do both sides have the same secret?")
            assert other.a.figures.kept == 0
            await other.b.stop()
            await other.a.stop()

    asyncio.run(test())


def test_a_fault_of_the_program_is_not_hidden(
    pki: DemoPKI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with running(pki) as sides:

            def fail(*_: object) -> None:
                monkeypatch.undo()
                raise ZeroDivisionError

            monkeypatch.setattr("kms_client.emulator.link.alice.reply", fail)
            await sides.wait_for("a fault of this program: ZeroDivisionError")
            await sides.more_blocks()

    asyncio.run(test())
    assert "a session ended by a fault of this program" in caplog.text


def test_a_second_session_ends_the_first(pki: DemoPKI) -> None:
    async def test() -> None:
        async with running(pki) as sides:
            first = sides.a._session
            channels = [await qkd_wire.connect(HOST, sides.ports[1]) for _ in range(3)]
            await eventually_in_loop(lambda: sides.a._session is not first)
            assert first is not None
            await eventually_in_loop(first.done)
            for each in channels:
                each.abort()
            await sides.more_blocks()

    asyncio.run(test())


def test_a_full_store_pauses_production(pki: DemoPKI) -> None:
    async def test() -> None:
        async with running(pki, buffer=64) as sides:
            await eventually_in_loop(lambda: sides.a.figures.state == "full")
            await eventually_in_loop(sides.agree)
            a, b = (side.figures.snapshot() for side in (sides.a, sides.b))
            assert a["keys"] == b["keys"]
            assert a["keys"]["for_a"] == a["keys"]["for_b"] == 64
            assert a["keys"]["discarded"] > 0
            client = sides.client("a")
            assert (await asyncio.to_thread(client.status, "SAE-B")).stored_key_count == 64
            for key in await asyncio.to_thread(client.get_keys, "SAE-B", 10):
                key.wipe()
            client.close()
            await sides.more_blocks()
            assert sides.a.store.available_count == 64

    asyncio.run(test())


@pytest.mark.parametrize("rebootstrap", [False, True])
def test_a_side_that_has_lost_its_anchor_needs_the_operator(pki: DemoPKI, rebootstrap: bool) -> None:
    async def test() -> None:
        async with running(pki, rebootstrap=rebootstrap) as sides:
            await sides.more_blocks(2)
            anchor = pki.directory / "link-b.anchor"
            assert stat.S_IMODE(anchor.stat().st_mode) == 0o600
            await sides.b.stop()
            anchor.unlink()
            await sides.new_b()
            if rebootstrap:
                await sides.more_blocks(2)
                texts = [event["text"] for event in sides.a.figures.snapshot()["events"]]
                assert any(text.startswith("ATTENTION") for text in texts)
            else:
                await eventually_in_loop(lambda: "has lost the keys of the link" in sides.a.figures.note)
                assert sides.b.figures.kept == 0

    asyncio.run(test())


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: fibre\r\nUser-Agent: x\r\n\r\n",
        b"qkd-link/1 x" + bytes(16),
        b"qkd-link/1 f" + bytes(16),
        b"",
    ],
)
def test_strangers_on_the_fibre_do_no_harm(
    pki: DemoPKI, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qkd_wire, "_JOIN_TIMEOUT", 0.2)

    async def test() -> None:
        async with running(pki) as sides:
            reader, writer = await asyncio.open_connection(HOST, sides.ports[1])
            writer.write(said)
            if not said:
                writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await sides.more_blocks()
            assert sides.a.figures.state == "running"

    asyncio.run(test())


def test_two_of_a_kind_are_no_session(pki: DemoPKI) -> None:
    async def test() -> None:
        async with running(pki) as sides:
            streams = [await asyncio.open_connection(HOST, sides.ports[1]) for _ in range(2)]
            for _, writer in streams:
                writer.write(b"qkd-link/1 f" + bytes(16))
            for reader, writer in streams:
                assert await reader.read() == b""
                writer.close()
            await sides.more_blocks()

    asyncio.run(test())


def test_garbage_on_the_fibre_ends_the_session_and_the_next_goes_on(
    pki: DemoPKI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(pki) as sides:
            send = qkd_wire.FibreConnection.send

            async def garbage(fibre: qkd_wire.FibreConnection, number: int, photons: Any) -> None:
                monkeypatch.undo()
                fibre._writer.write(b"\xff" * 8)
                await send(fibre, number, photons)

            monkeypatch.setattr(qkd_wire.FibreConnection, "send", garbage)
            sides.a.controls.change({"paused": True})
            sides.a.controls.change({"paused": False})
            await eventually_in_loop(
                lambda: "a frame of photons has 4294967295 bytes" in str(sides.figures[1]["events"])
            )
            await sides.more_blocks()

    asyncio.run(test())


def test_side_b_waits_for_side_a(pki: DemoPKI) -> None:
    async def test() -> None:
        port = free_port()
        side = QKDSide("b", pki, SETTINGS, DEFAULT)
        await side.start(HOST, 0)
        side.connect((HOST, port), (HOST, port))
        await eventually_in_loop(
            lambda: side.figures.note == "no connection to side A: ConnectionRefusedError"
        )
        await side.stop()

    asyncio.run(test())


# --- the anchor's file


def test_an_anchor_is_kept_and_forgotten(tmp_path: Path) -> None:
    file = AnchorFile(tmp_path / "anchor")
    reserve = file.reserve()
    assert reserve.anchor is None
    material = bytes(range(ANCHOR_BYTES))
    reserve.put(material, (0, 0))
    again = file.reserve()
    assert (again.anchor, again.proven) == (material, False)
    reserve.prove()
    assert file.reserve().proven
    file.keep(None, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"anchor": "00", "proven": true}', '{"anchor": 1, "proven": 1}']
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "anchor"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no anchor of a link"):
        AnchorFile(path).reserve()


# --- the command


def test_both_sides_in_one_process(tmp_path: Path) -> None:
    pki = ensure_demo_pki(tmp_path)
    command = [sys.executable, "-m", "kms_client", "link", "--dir", str(tmp_path), "--block", BLOCK]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        try:
            clients = []
            for kme, side in zip(ready["kmes"], "ab", strict=True):
                named = SideProcess.__new__(SideProcess)
                named.side, named.ready = side, {"kmes": [kme]}
                clients.append(named.client(pki))
            eventually(lambda: clients[0].status("SAE-B").stored_key_count)
            [key] = clients[0].get_keys("SAE-B")
            [same] = clients[1].get_keys_by_id("SAE-A", [key.key_id])
            with key.use() as ours, same.use() as theirs:
                assert ours == theirs
            for client in clients:
                client.close()
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--side", "b"], "side b needs --link HOST:PORT and --fibre HOST:PORT"),
        (["--side", "b", "--link", "h:1"], "side b needs"),
        (["--side", "a", "--fibre", "h:1"], "side b needs"),
        (["--link", "h:1", "--fibre", "h:1"], "side b needs"),
        (["--block", "5"], "a block has 100 to"),
        (["--max-qber", "0.6"], "threshold"),
        (["--length", "-1"], "length"),
    ],
)
def test_impossible_arguments(
    pki: DemoPKI, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["link", "--dir", str(pki.directory), *arguments]) == 1
    assert text in capsys.readouterr().err
