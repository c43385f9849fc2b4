"""Threads for calls of a key manager, whose answers are delivered in the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, TypeAlias

from kms_client import KeyManager, KMSError, KMSUnavailable, QKDKey, wipe_keys
from kms_client.forks import forget_in_children
from qkd_tls.aio.turns import Turns
from qkd_tls.endpoint import KeyRequest, fetch_keys

__all__ = ["MAX_KMS_REQUESTS", "FetchResult", "ask_in_thread"]

MAX_KMS_REQUESTS: Final = 64
"""Requests to key managers under way at once in this process, each in its own thread; further ones wait."""

FetchResult: TypeAlias = list[QKDKey] | KMSError
"""The result of `fetch_keys`."""

_log: Final = logging.getLogger("qkd_tls")


class _Threads:
    """The threads of this process, which start with the first request."""

    def __init__(self) -> None:
        self.executor: ThreadPoolExecutor | None = None
        forget_in_children(self)

    def forget(self) -> None:
        """Start afresh in a forked child: threads do not survive a fork."""
        self.executor = None

    def submit(self, request: KeyRequest, manager: KeyManager) -> Future[FetchResult]:
        """Call the key manager in a thread."""
        if self.executor is None:
            self.executor = ThreadPoolExecutor(MAX_KMS_REQUESTS, thread_name_prefix="qkd-tls-kms")
        return self.executor.submit(_fetch, request, manager)


_threads: Final = _Threads()


def ask_in_thread(
    loop: asyncio.AbstractEventLoop,
    manager: KeyManager,
    request: KeyRequest,
    deliver: Callable[[FetchResult], None],
) -> None:
    """Call the key manager in a thread, then `deliver` in a turn of the loop; wipe the keys if the loop is closed."""

    def hand_over(done: Future[FetchResult]) -> None:
        result = done.result()
        try:
            # In its turn: with the keys the handshake goes on, and many answers may come at once.
            loop.call_soon_threadsafe(turns.queue, partial(deliver, result))
        except RuntimeError:
            wipe_keys([] if isinstance(result, KMSError) else result)

    turns = Turns.of(loop)
    # One at a time: many threads that begin together take the interpreter from the loop.
    turn = loop.create_future()
    turn.add_done_callback(lambda _: _threads.submit(request, manager).add_done_callback(hand_over))
    turns.queue(turn)


def _fetch(request: KeyRequest, manager: KeyManager) -> FetchResult:
    try:
        return fetch_keys(request, manager)
    except BaseException as error:  # noqa: BLE001
        # A fault of the key manager's must not leave the connection hanging; the traceback is for who maintains it.
        _log.exception("the key manager %s failed", manager.name)
        return KMSUnavailable(
            f"the key manager failed with {type(error).__name__}",
            kms=manager.name,
            peer=request.peer_sae_id,
            hint="see the traceback in the log of this program",
        )
