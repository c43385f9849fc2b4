"""Bob: the receiver, who corrects his block and stores keys for his masters when Alice has stored hers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np

from .figures import Figures
from .party import (
    NO_DOUBT,
    SHARE_BYTES,
    Aborted,
    Conversation,
    Doubt,
    Kind,
    LinkError,
    Offload,
    Party,
    Ready,
    Reason,
    Reserve,
    SecretKey,
    Settings,
    Share,
    Sink,
    inline,
)
from .photonics.line import Photons
from .photonics.receiver import Clicks, Receiver
from .postprocessing.amplification import amplify, seed_length
from .postprocessing.cascade import Corrector, ReconciliationError
from .postprocessing.verification import CHALLENGE_BYTES, ResidualErrors, verify
from .sifting import Tally, announcement, take_reply

__all__ = ["Bob"]

_FRAMES_AHEAD: Final = 4  # detected, but not announced

_Detections = asyncio.Queue[tuple[int, Clicks]]
_ReceivePhotons = Callable[[], Awaitable[tuple[int, Photons]]]


class Bob(Party):
    """The receiver's side of the protocol.

    Args:
        receiver: the detectors.
    """

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        reserve: Reserve,
        capacity: int,
        figures: Figures,
        receiver: Receiver,
        *,
        offload: Offload = inline,
    ) -> None:
        """Do nothing yet."""
        super().__init__(settings, sink, reserve, capacity, figures, offload)
        self._receiver = receiver
        self._waiting: tuple[bytearray, list[SecretKey]] = bytearray(), []  # until Alice has stored the block

    async def run(self, conversation: Conversation, receive_photons: _ReceivePhotons) -> None:
        """One session: make keys until it is cancelled or something fails.

        Raises:
            LinkError: Alice does not follow the protocol, or has other settings.
            Exception: whatever the channels raise.
        """
        await self._begin(conversation)
        detections: _Detections = asyncio.Queue(_FRAMES_AHEAD)
        detecting = asyncio.create_task(self._detect(detections, receive_photons))
        blocks = asyncio.create_task(self._blocks(conversation, detections))
        try:
            await asyncio.wait((detecting, blocks), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (detecting, blocks):
                task.cancel()
            results = await asyncio.gather(detecting, blocks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _begin(self, conversation: Conversation) -> None:
        """Agree on the settings, and on the last block of the last session."""
        await conversation.send(self._ready().to_bytes(), last=True)
        _, body = await self._receive(conversation, Kind.READY)
        ready = Ready.from_bytes(body)
        if self._doubt != NO_DOUBT:
            if ready.doubt == self._doubt:
                self._commit()
            else:
                self._give_up()
        self.peer_instance = ready.instance
        self._check_ready(ready)

    def _commit(self) -> None:
        """Alice has stored the block that this side waits for."""
        refill, keys = self._waiting
        self._reserve.put(refill)
        self._sink.offer(keys)
        self._sink.settle()
        self._waiting = bytearray(), []
        self._doubt = NO_DOUBT

    def _give_up(self) -> None:
        """Alice has not stored it."""
        refill, keys = self._waiting
        for secret in (refill, *(key.secret for key in keys)):
            secret[:] = bytes(len(secret))
        self._sink.drop()
        self._waiting = bytearray(), []
        self._doubt = NO_DOUBT

    async def _detect(self, detections: _Detections, receive_photons: _ReceivePhotons) -> None:
        while True:
            frame, photons = await receive_photons()
            await detections.put((frame, await self._offload(self._receiver.detect, photons)))

    # --- blocks

    async def _blocks(self, conversation: Conversation, detections: _Detections) -> None:
        number = 0
        while True:
            number += 1
            tally = Tally()
            try:
                await self._block(conversation, detections, number, tally)
            except Aborted as aborted:
                await self._end(conversation, aborted)
                self._report(number, tally, reason=aborted.reason.text)

    async def _block(
        self, conversation: Conversation, detections: _Detections, number: int, tally: Tally
    ) -> None:
        await self._sift(conversation, detections, tally)
        self._check_qber(tally)
        corrector = await self._offload(
            Corrector,
            tally.key_bits(),
            self._estimate(tally),
            self._orders(conversation.session, number),
        )
        await self._correct(conversation, corrector)
        bits, leaked, errors = corrector.bits, corrector.leaked_bits, corrector.corrected
        try:
            await self._send(conversation, Kind.DONE, struct.pack(">I", errors), last=True)
            _, body = await self._receive(conversation, Kind.FINAL)
        except Aborted as aborted:
            # This side's message has ended already.
            self._report(number, tally, reason=aborted.reason.text, errors=errors, leaked=leaked)
            return
        told, share, seed = self._parse_final(body, bits.size)
        if share.length > self._length(tally, leaked) or share.bits(self.settings.key_size) > share.length:
            raise LinkError("the other side wants to make more key than is secret")
        try:
            await self._offload(verify, bits, told)
        except ResidualErrors:
            await self._send(conversation, Kind.CONFIRM, b"\x00", last=True)
            self.figures.residual_errors += 1
            self._report(number, tally, reason=Reason.RESIDUAL_ERRORS.text, errors=errors, leaked=leaked)
            return
        secret = await self._offload(amplify, bits, seed, share.length)
        bits[:] = 0
        refill, keys = self._cut(conversation.session, number, secret, share)
        self._sink.hold(keys.for_a)
        self._waiting = refill, keys.for_b
        self._doubt = Doubt(conversation.session, number)
        await self._send(conversation, Kind.CONFIRM, b"\x01", last=True)
        await self._receive(conversation, Kind.COMMITTED)
        self._commit()
        self._report(number, tally, errors=errors, leaked=leaked, share=share)

    async def _sift(self, conversation: Conversation, detections: _Detections, tally: Tally) -> None:
        while tally.sifted < self.settings.block_bits:
            frame, clicks = await detections.get()
            told = await self._offload(announcement, frame, clicks)
            await self._send(conversation, Kind.SIFT, told, last=False)
            _, answer = await self._receive(conversation, Kind.SIFTED)
            sifted = await self._offload(take_reply, frame, clicks, answer)
            tally.add(sifted)
            self.figures.sifted(sifted.key_bits.size, tally.sifted, self.settings.block_bits)

    async def _correct(self, conversation: Conversation, corrector: Corrector) -> None:
        while True:
            question = await self._offload(corrector.next_question)
            if question is None:
                return
            await self._send(conversation, Kind.QUESTION, question, last=False)
            _, answer = await self._receive(conversation, Kind.ANSWER)
            try:
                await self._offload(corrector.take, answer)
            except ReconciliationError:
                raise Aborted(Reason.RECONCILIATION) from None

    def _parse_final(
        self, body: bytes, size: int
    ) -> tuple[bytes, Share, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        """The challenge, the share and the seed."""
        head = CHALLENGE_BYTES + SHARE_BYTES
        if len(body) < head:
            raise LinkError(f"a final message has at least {head} bytes, not {len(body)}")
        share = Share.from_bytes(body[CHALLENGE_BYTES:head])
        if share.length > size:
            raise LinkError("the other side wants to make more key than is secret")
        seed_bits = seed_length(size, share.length)
        if len(body) != head + (seed_bits + 7) // 8:
            raise LinkError("the seed of the other side has not the right length")
        seed = np.unpackbits(np.frombuffer(body[head:], dtype=np.uint8), count=seed_bits)
        return body[:CHALLENGE_BYTES], share, seed
