"""One side of an emulated QKD link: the party that makes keys, and the KME that delivers them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar, TypeVarTuple

import numpy as np

from kms_client.emulator.kme import KME, server_context
from kms_client.emulator.kme_sync_tls import ConnectingSync, ListeningSync, client_context
from kms_client.emulator.link.alice import Alice, described
from kms_client.emulator.link.authentication.authenticators import SharedSecret
from kms_client.emulator.link.authentication.errors import AuthenticationFailed, ChannelError
from kms_client.emulator.link.authentication.reserve import Direction
from kms_client.emulator.link.authentication.session import Rebootstrap
from kms_client.emulator.link.bob import Bob
from kms_client.emulator.link.controls import Controls
from kms_client.emulator.link.figures import Figures
from kms_client.emulator.link.messages import LinkError
from kms_client.emulator.link.party import Offload, SecretKey, Settings
from kms_client.emulator.link.photonics.line import Line
from kms_client.emulator.link.photonics.parameters import Optics
from kms_client.emulator.link.photonics.receiver import Receiver
from kms_client.emulator.pair import SideName
from kms_client.emulator.pki import KME_ID_A, KME_ID_B, DemoPKI
from kms_client.emulator.qkd_channel import AnchorFile, Authentication, certificates
from kms_client.emulator.qkd_wire import Channels, FibreConnection, FibreListener, connect
from kms_client.emulator.store import Delivery, KeyStore

__all__ = ["SIDES", "QKDSide", "StoreSink"]

_log = logging.getLogger("kms_client.emulator")

SIDES: Final[tuple[SideName, SideName]] = ("a", "b")

_FULL: Final = 16  # production pauses while there is room for less than this part of the store
_LOOK: Final = 0.05  # seconds between looks at a full store
_RETRY: Final = 0.25  # seconds between attempts to connect
_PENALTY: Final = 1.0  # seconds after a session that has failed
_TICK: Final = 1.0  # seconds between points of the history

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class StoreSink:
    """A sink that puts the keys of the link into a KME's store.

    Args:
        store: of this side's KME.
        side: "a" or "b".
        figures: for operators.
    """

    def __init__(self, store: KeyStore, side: str, figures: Figures) -> None:
        """Store nothing yet."""
        self._store = store
        self._side = side
        self._figures = figures

    def counts(self) -> tuple[int, int]:
        """Return the numbers of keys stored for masters at A and for masters at B."""
        here, there = self._store.available_count, self._store.held_count
        return (here, there) if self._side == "a" else (there, here)

    def room(self) -> tuple[int, int]:
        """Return the numbers of further keys that there is room for."""
        for_a, for_b = self.counts()
        most = self._store.max_key_count
        return max(0, most - for_a), max(0, most - for_b)

    async def wait_for_room(self) -> None:
        """Return when there is room for enough keys to be worth making; meanwhile the state is ``full``."""
        least = max(1, self._store.max_key_count // _FULL)
        while max(self.room()) < least:
            self._figures.set_state("full", "production pauses until keys are fetched")
            await asyncio.sleep(_LOOK)
        self._figures.set_state("running")

    def hold(self, keys: list[SecretKey]) -> None:
        """Store keys for masters at the other side."""
        self._put(keys, available=False)

    def offer(self, keys: list[SecretKey]) -> None:
        """Store keys for masters at this side."""
        self._put(keys, available=True)

    def settle(self) -> None:
        """Settle the keys in doubt: the other side has them, too."""
        self._store.in_doubt.clear()

    def drop(self) -> None:
        """Drop the keys in doubt: the other side does not have them."""
        self._store.drop(self._store.in_doubt)
        self._store.in_doubt.clear()

    def _put(self, keys: list[SecretKey], *, available: bool) -> None:
        for key_id, secret in keys:
            self._store.in_doubt.add(key_id)
            self._store.put(key_id, secret, available=available)


class QKDSide:
    """One side: its party, its KME, and the connections to the other side.

    Side A has the transmitter, the fibre and the switches, and listens; side B has the receiver, and connects.

    Args:
        side: "a" or "b".
        pki: certificates of KMEs and SAEs.
        settings: of the protocol; the same on both sides.
        optics: of the link; the same on both sides, except for the changes made by the switches.
        buffer: keys stored of each direction.
        local_slaves: see `KME`.
        on_delivery: called with every delivery.
        secret: shared by both sides, which authenticate with it at first instead of the KMEs' certificates.
        rebootstrap: True if a peer that has lost the keys of the link may start anew without them.
        paced: True if pulses are sent no faster than the source's rate.
    """

    def __init__(
        self,
        side: SideName,
        pki: DemoPKI,
        settings: Settings,
        optics: Optics,
        *,
        buffer: int = 2000,
        local_slaves: bool = False,
        on_delivery: Callable[[Delivery], None] | None = None,
        secret: bytes | None = None,
        rebootstrap: bool = False,
        paced: bool = True,
    ) -> None:
        """Run it with `start`."""
        is_a = side == "a"
        kme_id, peer_kme_id = (KME_ID_A, KME_ID_B) if is_a else (KME_ID_B, KME_ID_A)
        sae, peer_sae = (pki.sae_a, pki.sae_b) if is_a else (pki.sae_b, pki.sae_a)
        cert, key = (pki.kme_a_cert, pki.kme_a_key) if is_a else (pki.kme_b_cert, pki.kme_b_key)
        self.side = side
        self.store = KeyStore(settings.key_size, buffer)
        self.controls = Controls(optics.fibre.length)
        self.controls.on_change = self._on_change
        self.figures = Figures(
            side,
            controls=self.controls if is_a else None,
            stored=lambda: self._sink.counts(),
            capacity=buffer,
            names={"kme_id": kme_id, "peer_kme_id": peer_kme_id},
        )
        self._sink = StoreSink(self.store, side, self.figures)
        self._authentication = Authentication(
            Direction.A_TO_B if is_a else Direction.B_TO_A,
            f"{KME_ID_A} {KME_ID_B}",
            certificates(cert, key, pki.kms_ca, peer_kme_id) if secret is None else SharedSecret(secret),
            AnchorFile(pki.directory / f"link-{side}.anchor").reserve(),
            target=settings.reserve,
            rebootstrap=Rebootstrap.ALLOWED if rebootstrap else Rebootstrap.FORBIDDEN,
            on_event=self.figures.event,
        )
        self.figures.authentication = self._authentication.figures
        self._context = server_context(cert, key, pki.kms_ca)
        self._sync: ListeningSync | ConnectingSync
        if is_a:
            self._sync = ListeningSync(self.store, None, 0, peer_kme_id, self._context)
        else:
            self._sync = ConnectingSync(self.store, peer_kme_id, client_context(cert, key, pki.kms_ca))
        self.kme = KME(
            kme_id,
            peer_kme_id,
            [sae],
            [peer_sae],
            self.store,
            self._sync,
            local_slaves=local_slaves,
            on_delivery=self._delivered,
        )
        self._on_delivery = on_delivery
        # One thread each: what a cancelled session still computes is done before the next one begins.
        self._executors = [ThreadPoolExecutor(1, thread_name_prefix=f"qkd-link-{side}") for _ in range(2)]
        offload, offload_optics = (_compute_in(executor) for executor in self._executors)
        common = settings, self._sink, self._authentication.reserve, buffer, self.figures
        rng = np.random.default_rng()
        self.party: Alice | Bob
        if is_a:
            self.party = Alice(
                *common,
                Line(optics, rng),
                self.controls,
                paced=paced,
                offload=offload,
                offload_optics=offload_optics,
            )
        else:
            self.party = Bob(
                *common,
                Receiver(optics.detector, optics.source, rng),
                offload=offload,
                offload_optics=offload_optics,
            )
        self.figures.optics = {
            **described(optics),
            "block_bits": settings.block_bits,
            "max_qber": settings.qber_threshold,
        }
        self._fibre = FibreListener(self._session_at_a)
        self._session: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # --- start and stop

    async def start(self, host: str, port: int) -> None:
        """Start the KME, and the listeners of side A; then see `kme.port`."""
        await self.kme.start(host, port, self._context)
        self._tasks.append(asyncio.create_task(self._tick()))

    async def listen(self, host: str, link_port: int = 0, fibre_port: int = 0) -> tuple[int, int]:
        """Listen for side B, at side A; return the ports of link and fibre, which are free ones for 0."""
        assert isinstance(self._sync, ListeningSync)
        self.figures.set_state("down", "waiting for side B")
        return await self._sync.start(host, link_port), await self._fibre.start(host, fibre_port)

    def connect(self, link: tuple[str, int], fibre: tuple[str, int]) -> None:
        """Connect side B to side A, again and again."""
        assert isinstance(self._sync, ConnectingSync)
        self._sync.start(*link)
        self._tasks.append(asyncio.create_task(self._connect(*fibre)))

    async def stop(self) -> None:
        """Stop everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end_session()
        if self.side == "a":
            await self._fibre.stop()
        await self._sync.stop()
        await self.kme.stop()
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)

    # --- sessions

    async def _session_at_a(self, channels: Channels) -> None:
        # Side B came back, perhaps before the loss of its last connections was noticed here.
        await self._end_session()
        if not self.controls.paused:
            await self._run_session(channels)

    async def _connect(self, host: str, port: int) -> None:
        while True:
            try:
                channels = await connect(host, port)
            except OSError as error:
                self.figures.set_state("down", f"no connection to side A: {type(error).__name__}")
            else:
                await self._run_session(channels)
            await asyncio.sleep(_RETRY)

    async def _run_session(self, channels: Channels) -> None:
        session = self._session = asyncio.create_task(self._talk(channels))
        try:
            await asyncio.wait((session,))
            if not session.cancelled() and (error := session.exception()) is not None:
                self.figures.set_state("down", f"a fault of this program: {type(error).__name__}")
                _log.error("a session ended by a fault of this program", exc_info=error)
        finally:
            session.cancel()
            await asyncio.wait((session,))
            channels.abort()

    async def _end_session(self) -> None:
        # Another one may have begun meanwhile.
        while self._session is not None and not self._session.done():
            self._session.cancel()
            await asyncio.wait((self._session,))

    async def _talk(self, channels: Channels) -> None:
        try:
            conversation = await self._authentication.begin(
                channels.classical, (lambda: self.controls.middle) if self.side == "a" else None
            )
            self.figures.set_state("running")
            fibre = FibreConnection(channels.fibre)
            if isinstance(self.party, Alice):
                await self.party.run(conversation, fibre.send)
            else:
                await self.party.run(conversation, fibre.receive)
        except TimeoutError:
            self.figures.set_state("down", "the other side says nothing")
        except (OSError, EOFError):
            self.figures.set_state("down", "the connection to the other side has ended")
        except (ChannelError, LinkError, ValueError) as error:
            if isinstance(error, AuthenticationFailed):
                self._authentication.failures += 1
            self.figures.set_state("down", str(error))
            # Whoever causes this does not get to do it all the time.
            await asyncio.sleep(_PENALTY)

    # --- for operators

    def _on_change(self, changed: dict[str, Any]) -> None:
        for name, value in changed.items():
            self.figures.event(f"switch {name}: {value}")
        if changed.get("paused") and self._session is not None:
            self._session.cancel()
            self.figures.set_state("down", "cut by the switch")

    def _delivered(self, delivery: Delivery) -> None:
        self.figures.delivery(*delivery)
        if self._on_delivery is not None:
            self._on_delivery(delivery)

    async def _tick(self) -> None:
        while True:
            self.figures.tick()
            await asyncio.sleep(_TICK)


def _compute_in(executor: ThreadPoolExecutor) -> Offload:
    async def compute(function: Callable[[*_Ts], _T], *arguments: *_Ts) -> _T:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)

    return compute
