"""Both KMEs of a link in one process, for tests and experiments."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from kms_client.emulator.delivery import Faults, Limits
from kms_client.emulator.kme import KME, server_context
from kms_client.emulator.kme_sync import DirectSync
from kms_client.emulator.pki import KME_ID_A, KME_ID_B, DemoPKI, ensure_demo_pki
from kms_client.emulator.source import KeySource, OSRandomSource
from kms_client.emulator.store import Delivery, KeyStore
from kms_client.etsi014 import Etsi014Client
from kms_client.skip import SkipClient

__all__ = ["KMEPair", "RunningPair", "SideName", "run_pair"]

SideName = Literal["a", "b"]
_T = TypeVar("_T")


class KMEPair:
    """Two KMEs and the link between them, on the running event loop.

    Args:
        pki: their certificates and the SAE IDs.
        source: of the keys.
        buffer: keys stored of each direction.
        initial: keys of each direction at the start; None for a full buffer.
        more_saes: IDs of further SAEs, as {"a": [...], "b": [...]}.
        limits: of requests.
        local_slaves: True if SAEs of one KME can share keys with each other, and with themselves.
        on_delivery: called with every delivery.
    """

    def __init__(
        self,
        pki: DemoPKI,
        source: KeySource,
        *,
        buffer: int = 2000,
        initial: int | None = None,
        more_saes: dict[SideName, Iterable[str]] | None = None,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        local_slaves: bool = False,
        on_delivery: Callable[[Delivery], None] | None = None,
    ) -> None:
        """Serve with `start`."""
        more = more_saes or {}
        saes_a, saes_b = [pki.sae_a, *more.get("a", ())], [pki.sae_b, *more.get("b", ())]
        stores = KeyStore(source.key_size, buffer), KeyStore(source.key_size, buffer)
        self._sync = DirectSync(source, *stores)
        self._initial = buffer if initial is None else initial
        self.kmes: dict[SideName, KME] = {
            "a": KME(
                KME_ID_A,
                KME_ID_B,
                saes_a,
                saes_b,
                stores[0],
                self._sync.end_a,
                limits=limits,
                local_slaves=local_slaves,
                on_delivery=on_delivery,
            ),
            "b": KME(
                KME_ID_B,
                KME_ID_A,
                saes_b,
                saes_a,
                stores[1],
                self._sync.end_b,
                limits=limits,
                local_slaves=local_slaves,
                on_delivery=on_delivery,
            ),
        }
        self._contexts = {
            "a": server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca),
            "b": server_context(pki.kme_b_cert, pki.kme_b_key, pki.kms_ca),
        }
        self._running: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port_a: int = 0, port_b: int = 0) -> None:
        """Fill the buffers and listen on both ports."""
        await self._sync.put(2 * self._initial)
        await self.start_kme("a", host, port_a)
        try:
            await self.start_kme("b", host, port_b)
        except BaseException:
            await self.stop_kme("a")
            raise
        self._running = asyncio.create_task(self._sync.run())

    async def stop(self) -> None:
        """Stop both KMEs and the link."""
        if self._running is not None:
            self._running.cancel()
        for side in self.kmes:
            await self.stop_kme(side)

    async def start_kme(self, side: SideName, host: str = "127.0.0.1", port: int | None = None) -> None:
        """Start one KME, on its last port if none is given."""
        kme = self.kmes[side]
        await kme.start(host, kme.port if port is None else port, self._contexts[side])
        self._set_up(side, True)

    async def stop_kme(self, side: SideName) -> None:
        """Stop one KME. It keeps its keys; meanwhile the other answers that the link is down."""
        self._set_up(side, False)
        await self.kmes[side].stop()

    def _set_up(self, side: SideName, up: bool) -> None:
        end_at_the_other = self._sync.end_b if side == "a" else self._sync.end_a
        end_at_the_other.up = up


class RunningPair:
    """A `KMEPair` that runs in a thread of its own; see `run_pair`.

    Attributes:
        pki: the certificates.
        url_a: URL of side A's KME.
        url_b: URL of side B's KME.
    """

    def __init__(self, pki: DemoPKI, pair: KMEPair, loop: asyncio.AbstractEventLoop) -> None:
        """Start both KMEs on the loop, which runs in another thread."""
        self.pki = pki
        self._pair = pair
        self._loop = loop
        self._call(pair.start())
        self.url_a = f"https://127.0.0.1:{pair.kmes['a'].port}"
        self.url_b = f"https://127.0.0.1:{pair.kmes['b'].port}"

    @property
    def deliveries(self) -> list[Delivery]:
        """The deliveries of both KMEs so far, each in its order: first A's, then B's."""
        return [*self._pair.kmes["a"].store.deliveries, *self._pair.kmes["b"].store.deliveries]

    def faults(self, side: SideName) -> Faults:
        """Return the switches for misbehaviour of one KME; they act on the next request."""
        return self._pair.kmes[side].faults

    def stored(self, side: SideName) -> int:
        """Return the number of keys that masters at this side can get now."""
        return self._pair.kmes[side].store.available_count

    def stop_kme(self, side: SideName) -> None:
        """Turn one KME off: its port refuses connections. Its keys are kept."""
        self._call(self._pair.stop_kme(side))

    def start_kme(self, side: SideName) -> None:
        """Turn one KME on again, on the same port."""
        self._call(self._pair.start_kme(side))

    def client(self, side: SideName, **settings: Any) -> Etsi014Client:
        """Return a new client of one KME with its SAE's certificate; `settings` as of `Etsi014Client`."""
        return Etsi014Client(self._url(side), **{**self._credentials(side), **settings})

    def skip_client(self, side: SideName, **settings: Any) -> SkipClient:
        """Return a new SKIP client of one KME, likewise; `settings` as of `SkipClient`."""
        return SkipClient(self._url(side), **{**self._credentials(side), **settings})

    def _url(self, side: SideName) -> str:
        return self.url_a if side == "a" else self.url_b

    def _credentials(self, side: SideName) -> dict[str, Any]:
        pki = self.pki
        if side == "a":
            return {"sae_id": pki.sae_a, "cert": pki.sae_a_cert, "key": pki.sae_a_key, "ca": pki.kms_ca}
        return {"sae_id": pki.sae_b, "cert": pki.sae_b_cert, "key": pki.sae_b_key, "ca": pki.kms_ca}

    def close(self) -> None:
        """Stop both KMEs."""
        self._call(self._pair.stop())

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@contextmanager
def run_pair(
    directory: Path | str | None = None,
    *,
    rate: float = 1000.0,
    key_size: int = 256,
    buffer: int = 2000,
    initial: int | None = None,
    sae_a: str = "SAE-A",
    sae_b: str = "SAE-B",
    more_saes: dict[SideName, Iterable[str]] | None = None,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    local_slaves: bool = False,
    source: KeySource | None = None,
) -> Iterator[RunningPair]:
    """Run a pair of KMEs on free ports of 127.0.0.1, in a background thread, during a `with` block.

    Args:
        directory: of the demo PKI, written if absent; None for a temporary one.
        rate: keys a second, of both directions together.
        key_size: in bits.
        buffer: keys stored of each direction.
        initial: keys of each direction at the start; None for a full buffer.
        sae_a: SAE ID of side A.
        sae_b: SAE ID of side B.
        more_saes: IDs of further SAEs, as {"a": [...], "b": [...]}; `add_sae` gives them certificates.
        limits: of requests.
        local_slaves: True if SAEs of one KME can share keys with each other, and with themselves.
        source: of the keys, instead of the operating system's generator with `rate` and `key_size`.
    """
    with ExitStack() as stack:
        if directory is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="qkd-kme-"))
        pki = ensure_demo_pki(directory, sae_a, sae_b)
        pair = KMEPair(
            pki,
            source or OSRandomSource(rate, key_size),
            buffer=buffer,
            initial=initial,
            more_saes=more_saes,
            limits=limits,
            local_slaves=local_slaves,
        )
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="qkd-kme", daemon=True)
        thread.start()
        stack.callback(_end, loop, thread)
        running = RunningPair(pki, pair, loop)
        stack.callback(running.close)
        yield running


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    # Requests that a fault holds up outlive their KME.
    loop.run_until_complete(_cancel_all())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _cancel_all() -> None:
    held_up = asyncio.all_tasks() - {asyncio.current_task()}
    for task in held_up:
        task.cancel()
    await asyncio.gather(*held_up, return_exceptions=True)
