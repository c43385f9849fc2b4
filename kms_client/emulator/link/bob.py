"""Bob: the receiver, who corrects his block and stores keys for his masters when Alice has stored hers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np

from kms_client.emulator.link.authentication.reserve import KeyReserve
from kms_client.emulator.link.figures import Block, Figures
from kms_client.emulator.link.messages import (
    NO_DOUBT,
    SHARE_BYTES,
    Aborted,
    Conversation,
    Doubt,
    Kind,
    LinkError,
    Ready,
    Reason,
    Share,
)
from kms_client.emulator.link.party import Offload, Party, SecretKey, Settings, Sink, inline
from kms_client.emulator.link.photonics.line import Photons
from kms_client.emulator.link.photonics.receiver import Clicks, Receiver
from kms_client.emulator.link.postprocessing.amplification import amplify, seed_length
from kms_client.emulator.link.postprocessing.cascade import Corrector, ReconciliationError
from kms_client.emulator.link.postprocessing.verification import CHALLENGE_BYTES, ResidualErrors, verify
from kms_client.emulator.link.sifting import Tally, announcement, take_reply

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
        reserve: KeyReserve,
        capacity: int,
        figures: Figures,
        receiver: Receiver,
        *,
        offload: Offload = inline,
        offload_optics: Offload = inline,
    ) -> None:
        """Start without doing anything."""
        super().__init__(settings, sink, reserve, capacity, figures, offload, offload_optics)
        self._receiver = receiver
        # The keys for masters here, and what is to be reported, until Alice has stored the block.
        self._waiting: tuple[list[SecretKey], Block | None] = [], None

    async def run(self, conversation: Conversation, receive_photons: _ReceivePhotons) -> None:
        """Run one session: make keys until it is cancelled or something fails.

        Raises:
            LinkError: Alice does not follow the protocol, or has other settings.
            Exception: an error of the channels.
        """
        await self._begin(conversation)
        detections: _Detections = asyncio.Queue(_FRAMES_AHEAD)
        await self._side_by_side(
            self._detect(detections, receive_photons),
            self._blocks(
                conversation, lambda number, tally: self._block(conversation, detections, number, tally)
            ),
        )

    async def _begin(self, conversation: Conversation) -> None:
        """Agree on the settings, and on the last block of the last session."""
        ours = self._ready()
        await conversation.send(ours.to_bytes(), last=True)
        _, body = await self._receive(conversation, Kind.READY)
        ready = Ready.from_bytes(body)
        if self._doubt != NO_DOUBT:
            if ready.doubt == self._doubt:
                self._commit()
            else:
                self._give_up()
        self.peer_instance = ready.instance
        self._check_ready(ready)
        self._open(ours, ready)

    def _commit(self) -> None:
        """Settle the block that this side waits for: Alice has stored it."""
        keys, outcome = self._waiting
        assert outcome is not None
        self._sink.offer(keys)
        self._sink.settle()
        self.figures.block(outcome)
        self._waiting = [], None
        self._doubt = NO_DOUBT

    def _give_up(self) -> None:
        """Drop the block that this side waits for: Alice has not stored it."""
        for _, secret in self._waiting[0]:
            secret[:] = bytes(len(secret))
        self._sink.drop()
        self._waiting = [], None
        self._doubt = NO_DOUBT

    async def _detect(self, detections: _Detections, receive_photons: _ReceivePhotons) -> None:
        while True:
            frame, photons = await receive_photons()
            await detections.put((frame, await self._offload_optics(self._receiver.detect, photons)))

    # --- blocks

    async def _block(
        self, conversation: Conversation, detections: _Detections, number: int, tally: Tally
    ) -> None:
        await self._sift(conversation, detections, tally)
        self._check_qber(tally)
        corrector = await self._offload(
            Corrector,
            tally.key_bits(),
            self._estimate(tally),
            self._orders(number),
        )
        await self._correct(conversation, corrector)
        bits, leaked, errors = corrector.bits, corrector.leaked_bits, corrector.corrected
        try:
            await self._send(conversation, Kind.DONE, struct.pack(">I", errors), last=True)
            _, body = await self._receive(conversation, Kind.FINAL)
        except Aborted as aborted:
            # This side's message has ended already.
            self.figures.block(
                self._outcome(number, tally, reason=aborted.reason.text, errors=errors, leaked=leaked)
            )
            return
        told, share, seed = self._parse_final(body, bits.size)
        if share.length > self._length(tally, leaked) or share.bits(self.settings.key_size) > share.length:
            raise LinkError("the other side wants to make more key than is secret")
        if share.material != self._reserve.material_size(share.one_time):
            raise LinkError("the reserves of one-time keys are not the same on both sides")
        try:
            await self._offload(verify, bits, told)
        except ResidualErrors:
            await self._send(conversation, Kind.CONFIRM, b"\x00", last=True)
            self.figures.residual_errors += 1
            self.figures.block(
                self._outcome(number, tally, reason=Reason.RESIDUAL_ERRORS.text, errors=errors, leaked=leaked)
            )
            return
        secret = await self._offload(amplify, bits, seed, share.length)
        bits[:] = 0
        refill, keys = self._cut(number, secret, share)
        self._sink.hold(keys.for_a)
        self._waiting = (
            keys.for_b,
            self._outcome(number, tally, errors=errors, leaked=leaked, share=share),
        )
        self._doubt = Doubt(self._session, number)
        await self._send(conversation, Kind.CONFIRM, b"\x01", last=True)
        await self._receive(conversation, Kind.COMMITTED)
        self._commit()
        self._refill(refill, share)

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
        """Return the challenge, the share and the seed."""
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
