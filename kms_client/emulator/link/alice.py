"""Alice: the transmitter, whose keys are the reference, and who decides where keys go."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import numpy as np

from kms_client.emulator.link.authentication.reserve import KEY_BYTES, KeyReserve
from kms_client.emulator.link.controls import Controls
from kms_client.emulator.link.figures import Figures
from kms_client.emulator.link.messages import (
    Aborted,
    Conversation,
    Doubt,
    Kind,
    LinkError,
    Ready,
    Reason,
    Share,
)
from kms_client.emulator.link.party import Offload, Party, Settings, Sink, inline
from kms_client.emulator.link.photonics.analytic import live_share
from kms_client.emulator.link.photonics.line import MAXIMUM_PULSES, Line, Photons, Sent
from kms_client.emulator.link.photonics.parameters import Optics
from kms_client.emulator.link.postprocessing.amplification import amplify, seed_length
from kms_client.emulator.link.postprocessing.cascade import ReconciliationError, Reference
from kms_client.emulator.link.postprocessing.verification import challenge
from kms_client.emulator.link.sifting import Tally, reply

__all__ = ["Alice", "described"]

_FRAME_SECONDS: Final = 0.1  # of pulses, unless there is hardly anything in them
_FRAMES_PER_BLOCK: Final = 4
_MOST_FRAMES: Final = 2000  # in a block, about: each is a part of one message
_FRAMES_AHEAD: Final = 4  # that Bob has not announced

_Frames = asyncio.Queue[tuple[int, Sent]]
_SendPhotons = Callable[[int, Photons], Awaitable[None]]


class Alice(Party):
    """The transmitter's side of the protocol.

    Args:
        line: transmitter and fibre; the changes of `controls` are made to it before each frame.
        controls: the switches.
        paced: True if pulses are sent no faster than the source's rate allows; else as fast as they can be
            computed.
    """

    def __init__(
        self,
        settings: Settings,
        sink: Sink,
        reserve: KeyReserve,
        capacity: int,
        figures: Figures,
        line: Line,
        controls: Controls,
        *,
        paced: bool = True,
        offload: Offload = inline,
        offload_optics: Offload = inline,
    ) -> None:
        """Start without doing anything."""
        super().__init__(settings, sink, reserve, capacity, figures, offload, offload_optics)
        self._line = line
        self._controls = controls
        self._paced = paced
        self._optics = line.optics
        self._ahead = asyncio.Semaphore(_FRAMES_AHEAD)
        self._apply_controls()

    async def run(self, conversation: Conversation, send_photons: _SendPhotons) -> None:
        """Run one session: make keys until it is cancelled or something fails.

        Raises:
            LinkError: Bob does not follow the protocol, or has other settings.
            Exception: an error of the channels.
        """
        await self._begin(conversation)
        frames: _Frames = asyncio.Queue()
        self._ahead = asyncio.Semaphore(_FRAMES_AHEAD)
        await self._side_by_side(
            self._transmit(frames, send_photons),
            self._blocks(
                conversation, lambda number, tally: self._block(conversation, frames, number, tally)
            ),
        )

    async def _begin(self, conversation: Conversation) -> None:
        """Agree on the settings, and on the last block of the last session."""
        _, body = await self._receive(conversation, Kind.READY)
        ready = Ready.from_bytes(body)
        if self.peer_instance in (None, ready.instance):
            # Bob has confirmed the block in doubt, so he holds its keys and stores the rest with this answer.
            self._sink.settle()
        else:
            self._sink.drop()
        self.peer_instance = ready.instance
        ours = self._ready()
        await conversation.send(ours.to_bytes(), last=True)
        self._check_ready(ready)
        self._open(ready, ours)

    # --- the quantum channel

    def _apply_controls(self) -> None:
        controls, optics = self._controls, self._optics
        self._line.optics = replace(
            optics.at(controls.length_km),
            eavesdropper=replace(
                optics.eavesdropper,
                intercept=controls.intercept,
                splitting=controls.splitting,
                extra_loss=controls.extra_loss_db,
            ),
        )
        self.figures.optics |= described(self._line.optics)

    def _frame_pulses(self) -> int:
        """Return the number of pulses in a frame: part of a block, so that optics and the rest overlap."""
        optics, source = self._line.optics, self.settings.source
        mean = float(np.dot(source.intensities, source.probabilities))
        expected = mean * optics.transmittance * optics.detector.efficiency * source.key_basis**2
        expected *= live_share(optics)
        block = self.settings.block_bits / max(expected, 1e-12)
        if self._paced:
            longest = max(_FRAME_SECONDS * source.pulse_rate, block / _MOST_FRAMES)
            pulses = min(block / _FRAMES_PER_BLOCK, longest)
        else:
            pulses = 1.1 * block
        return max(1, int(min(pulses, MAXIMUM_PULSES)))

    async def _transmit(self, frames: _Frames, send_photons: _SendPhotons) -> None:
        number = 0
        free = time.monotonic()  # when the source is done with the last frame
        while True:
            await self._ahead.acquire()
            await self._sink.wait_for_room()
            self._apply_controls()
            pulses = self._frame_pulses()
            begin = time.monotonic()
            sent, photons = await self._offload_optics(self._line.transmit, pulses)
            if self._paced:
                free = max(free, begin) + pulses / self.settings.source.pulse_rate
                await asyncio.sleep(max(0.0, free - time.monotonic()))
            frames.put_nowait((number, sent))
            await send_photons(number, photons)
            number += 1

    # --- blocks

    async def _block(self, conversation: Conversation, frames: _Frames, number: int, tally: Tally) -> None:
        await self._sift(conversation, frames, tally)
        self._check_qber(tally)
        bits = tally.key_bits()
        reference = await self._offload(Reference, bits, self._estimate(tally), self._orders(number))
        errors = await self._reconcile(conversation, reference)
        if errors > self.settings.qber_threshold * bits.size:
            raise Aborted(Reason.QBER, heard=True)
        share = self._share(self._length(tally, reference.leaked_bits))
        seed_bits = seed_length(bits.size, share.length)
        seed = np.frombuffer(os.urandom((seed_bits + 7) // 8), dtype=np.uint8)
        seed = np.unpackbits(seed, count=seed_bits)
        body = challenge(bits) + share.to_bytes() + np.packbits(seed).tobytes()
        await self._send(conversation, Kind.FINAL, body, last=True)
        secret = await self._offload(amplify, bits, seed, share.length)
        _, confirmed = await self._receive(conversation, Kind.CONFIRM)
        bits[:] = 0
        if confirmed != b"\x01":
            secret[:] = 0
            self.figures.residual_errors += 1
            self.figures.block(self._outcome(number, tally, reason=Reason.RESIDUAL_ERRORS.text))
            return
        refill, keys = self._cut(number, secret, share)
        # From here to the note of the block nothing waits: all of it is done, or none.
        self._sink.settle()
        self._sink.hold(keys.for_b)
        self._sink.offer(keys.for_a)
        self._doubt = Doubt(self._session, number)
        self.figures.block(
            self._outcome(number, tally, errors=errors, leaked=reference.leaked_bits, share=share)
        )
        try:
            await self._send(conversation, Kind.COMMITTED, last=True)
        finally:
            # Only the next message may use it; if this one is lost, the next session finds out.
            self._refill(refill, share)

    async def _sift(self, conversation: Conversation, frames: _Frames, tally: Tally) -> None:
        while tally.sifted < self.settings.block_bits:
            frame, sent = await frames.get()
            self._ahead.release()
            _, told = await self._receive(conversation, Kind.SIFT)
            answer, sifted = await self._offload(reply, frame, sent, told)
            tally.add(sifted)
            await self._send(conversation, Kind.SIFTED, answer, last=False)
            self.figures.sifted(sifted.key_bits.size, tally.sifted, self.settings.block_bits)

    async def _reconcile(self, conversation: Conversation, reference: Reference) -> int:
        """Answer Bob's questions; return the number of errors he has found."""
        while True:
            kind, body = await self._receive(conversation, Kind.QUESTION, Kind.DONE)
            if kind == Kind.DONE:
                try:
                    return int(struct.unpack(">I", body)[0])
                except struct.error:
                    raise LinkError("the other side does not say how many errors it has found") from None
            try:
                answer = await self._offload(reference.answer, body)
            except ReconciliationError:
                raise Aborted(Reason.RECONCILIATION) from None
            await self._send(conversation, Kind.ANSWER, answer, last=False)

    def _share(self, length: int) -> Share:
        """Return the share: fill up the reserve first, then the direction with fewer keys, if there is room.

        Raises Aborted if there is nothing to share out.
        """
        size = self.settings.key_size
        one_time = self._reserve.wanted(self.settings.reserve)
        material = self._reserve.material_size(one_time)
        if 8 * material > length:
            # A short block at first: what it gives goes to both directions alike.
            each = (length // 8 - self._reserve.material_size((0, 0))) // (2 * KEY_BYTES)
            if each < 1:
                raise Aborted(Reason.NOTHING_SECRET, heard=True)
            one_time = each, each
            material = self._reserve.material_size(one_time)
        keys = (length - 8 * material) // size
        if not material and not keys:
            raise Aborted(Reason.NOTHING_SECRET, heard=True)
        room_a, room_b = self._sink.room()
        fewer = max(self._capacity - self._peer_capacity, 0)  # Bob's store is the smaller one
        room_a, room_b = max(0, room_a - fewer), max(0, room_b - fewer)
        # The direction with more room gets more, until both have the same room.
        for_a = min(room_a, max(0, min(keys, (keys + room_a - room_b + 1) // 2)))
        for_b = min(room_b, keys - for_a)
        for_a = min(room_a, keys - for_b)
        return Share(length, material, *one_time, for_a, for_b)


def described(optics: Optics) -> dict[str, float]:
    """Return the optics in numbers, for operators."""
    source, detector = optics.source, optics.detector
    return {
        "pulse_rate_hz": source.pulse_rate,
        "signal_intensity": source.intensities[0],
        "length_km": optics.fibre.length,
        "attenuation_db_km": optics.fibre.attenuation,
        "loss_db": optics.fibre.loss,
        "extra_loss_db": optics.eavesdropper.extra_loss,
        "detector_efficiency": detector.efficiency,
        "dark_count": detector.dark_count,
        "dead_time_s": detector.dead_time,
        "misalignment": detector.misalignment,
    }
