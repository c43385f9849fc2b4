"""The link between two KME processes: both ends here, over real TLS, with connections cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kms_client.emulator import DemoPKI, OSRandomSource, write_demo_pki
from kms_client.emulator import kme_sync_tls as module
from kms_client.emulator.kme import server_context
from kms_client.emulator.kme_sync import PeerKMEDown
from kms_client.emulator.kme_sync_tls import ConnectingSync, ListeningSync, client_context
from kms_client.emulator.store import KeyStore
from tests.support.patience import PATIENCE, eventually_in_loop


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY", 0.02)
    monkeypatch.setattr(module, "_ACK_TIMEOUT", PATIENCE)


class Ends:
    """Both ends of a link and their stores."""

    def __init__(self, pki: DemoPKI, rate: float, initial: int, expected_b: str = "KME-B") -> None:
        self.store_a, self.store_b = KeyStore(256, 50), KeyStore(256, 50)
        self.context_a = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
        self.context_b = client_context(pki.kme_b_cert, pki.kme_b_key, pki.kms_ca)
        self.a = ListeningSync(self.store_a, OSRandomSource(rate), initial, expected_b, self.context_a)
        self.b = ConnectingSync(self.store_b, "KME-A", self.context_b)

    async def both_up(self) -> None:
        await eventually_in_loop(lambda: self.a.up and self.b.up)

    def agree(self) -> bool:
        return set(self.store_a.unassigned_ids()) == set(self.store_b.unassigned_ids())


@asynccontextmanager
async def joined(pki: DemoPKI, rate: float = 0, initial: int = 10) -> AsyncIterator[Ends]:
    ends = Ends(pki, rate, initial)
    port = await ends.a.start("127.0.0.1", 0)
    ends.b.start("127.0.0.1", port)
    await ends.both_up()
    await eventually_in_loop(
        lambda: ends.store_b.held_count >= initial and ends.store_b.available_count >= initial
    )
    yield ends
    await ends.b.stop()
    await ends.a.stop()


def test_keys_and_assignments_in_both_directions(pki: DemoPKI) -> None:
    async def test() -> None:
        async with joined(pki) as ends:
            for link, store, other in (
                (ends.a, ends.store_a, ends.store_b),
                (ends.b, ends.store_b, ends.store_a),
            ):
                assignment, secret = store.take(512, "M", ["S"])
                await link.assign([assignment])
                assert other.fetch([assignment.key_id], "M", "S") == [secret]
            assert ends.agree()

    asyncio.run(test())


def test_fills_at_the_rate_up_to_the_buffer(pki: DemoPKI) -> None:
    async def test() -> None:
        async with joined(pki, rate=2000, initial=0) as ends:
            await eventually_in_loop(lambda: ends.store_b.held_count == ends.store_b.available_count == 50)
            await asyncio.sleep(0.1)
            assert len(ends.store_a.unassigned_ids()) == 100

    asyncio.run(test())


def test_after_a_cut_both_drop_what_the_other_has_not(pki: DemoPKI) -> None:
    async def test() -> None:
        async with joined(pki) as ends:
            assert ends.a._writer is not None
            ends.a._writer.transport.abort()
            # Taken at one end while the link is down, so that its assignment was lost.
            ends.store_a.take(256, "M", ["S"])
            ends.store_b.take(256, "M", ["S"])
            assert not ends.agree()
            await eventually_in_loop(lambda: not ends.a.up)
            with pytest.raises(PeerKMEDown):
                await ends.a.assign([])
            await ends.both_up()
            await eventually_in_loop(ends.agree)
            assert len(ends.store_a.unassigned_ids()) == 18

    asyncio.run(test())


def test_a_second_connection_replaces_a_first_one(pki: DemoPKI) -> None:
    async def test() -> None:
        async with joined(pki) as ends:
            first = ends.a._writer
            port = ends.a._server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=ends.context_b)
            writer.write(
                json.dumps({"type": "sync", "key_ids": ends.store_b.unassigned_ids()}).encode() + b"\n"
            )
            await eventually_in_loop(lambda: ends.a.up and ends.a._writer is not first)
            await reader.readline()
            writer.transport.abort()
            await eventually_in_loop(lambda: not ends.a.up or ends.a._writer is not first)

    asyncio.run(test())


def test_an_assignment_that_the_other_end_refuses(pki: DemoPKI) -> None:
    async def test() -> None:
        async with joined(pki) as ends:
            assignment, _ = ends.store_a.take(256, "M", ["S"])
            ends.store_b._held.pop(assignment.key_id)
            with pytest.raises(PeerKMEDown):
                await ends.a.assign([assignment])

    asyncio.run(test())


@pytest.mark.parametrize("act", ["silent", "cut", "garbage", "odd"])
def test_a_peer_that_does_not_acknowledge(pki: DemoPKI, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ACK_TIMEOUT", 0.3)

    async def test() -> None:
        ends = Ends(pki, 0, 5)
        port = await ends.a.start("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=ends.context_b)
        writer.write(b'{"type": "sync", "key_ids": []}\n')
        await eventually_in_loop(lambda: ends.a.up and ends.store_a.available_count == 5)
        assignment, _ = ends.store_a.take(256, "M", ["S"])
        pending = asyncio.create_task(ends.a.assign([assignment]))
        await asyncio.sleep(0.02)
        if act == "cut":
            # One that was acknowledged a moment ago.
            ends.a._acks[0] = asyncio.get_running_loop().create_future()
            ends.a._acks[0].set_result(True)
            writer.transport.abort()
        elif act == "garbage":
            writer.write(b"not JSON\n")
        elif act == "odd":
            writer.write(b'{"type": "ack", "number": 99, "done": true}\n')  # nobody waits for it
        with pytest.raises(PeerKMEDown):
            await pending
        await eventually_in_loop(lambda: not ends.a.up)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.transport.abort()
        await ends.a.stop()

    asyncio.run(test())


def test_only_the_other_kme_may_join(pki: DemoPKI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def test() -> None:
        ends = Ends(pki, 0, 5)
        port = await ends.a.start("127.0.0.1", 0)
        context = ssl.create_default_context(cafile=str(pki.kms_ca))
        context.load_cert_chain(pki.sae_b_cert, pki.sae_b_key)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        writer.transport.abort()
        assert not ends.a.up
        assert ends.store_a.unassigned_ids() == []
        await ends.a.stop()

    asyncio.run(test())
    assert "refused a link: the certificate is not that of KME-B" in caplog.text


def test_side_b_waits_for_side_a(pki: DemoPKI, tmp_path: Path) -> None:
    async def test() -> None:
        ends = Ends(pki, 0, 1)
        port = await ends.a.start("127.0.0.1", 0)
        await ends.a.stop()
        ends.b.start("127.0.0.1", port)
        await asyncio.sleep(0.1)
        with pytest.raises(PeerKMEDown):
            await ends.b.assign([])
        await ends.a.start("127.0.0.1", port)
        await ends.both_up()
        await ends.a.stop()
        await eventually_in_loop(lambda: not ends.b.up)
        await ends.b.stop()

    asyncio.run(test())
