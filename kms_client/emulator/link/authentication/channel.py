"""The authenticated classical channel of a session: messages in, bytes out, and back; no I/O.

A message goes out in one or more parts. Parts are handed on as they come, provisionally; the last one carries
one proof over all parts of the message with their order and number, the session, the direction and the
message's number. Until a part with ``final`` has come, nothing that was received since the one before may
have consequences outside the current block.

On the wire (numbers big-endian)::

    kind 1 byte | message number 8 | part number 4 | payload size 4 | proof size 4 | payload | proof

``kind`` is 1 for a part that others follow, 2 for a last part with the bootstrap's proof, 3 for one with a one-time
tag; the proof is then the key's number (8) and the tag (16).

A message that comes with a one-time tag ends the time of the bootstrap's proofs in its direction: none is taken after.
Everything that is not as expected ends the channel.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

from kms_client.emulator.link.authentication.authenticators import (
    TAG_BYTES,
    Authenticator,
    check_one_time_tag,
    forgery_bound,
    one_time_tag,
)
from kms_client.emulator.link.authentication.errors import AuthenticationFailed, ChannelError, ReserveEmpty
from kms_client.emulator.link.authentication.reserve import Direction, KeyReserve

__all__ = ["HEADER", "LARGEST_MESSAGE", "LARGEST_PART", "MOST_PARTS", "ClassicalChannel", "Received"]

LARGEST_PART: Final = 1 << 24  # bytes of payload
LARGEST_MESSAGE: Final = 1 << 26  # bytes of all its parts
MOST_PARTS: Final = 1 << 16
_LARGEST_PROOF: Final = 1 << 16
_LAST_NUMBER: Final = (1 << 64) - 1

HEADER: Final = struct.Struct("!BQIII")
_PART, _BOOTSTRAP, _ONE_TIME = 1, 2, 3


class Received(NamedTuple):
    """A part of a message.

    Attributes:
        payload: its bytes.
        final: True if it is the last one, which authenticates all parts of the message.
    """

    payload: bytes
    final: bool


class ClassicalChannel:
    """One side's end of a session's channel; made by `kms_client.emulator.link.authentication.session.Session`.

    Args:
        session: public bytes that name the session and the link; equal on both sides, never used twice.
        sends: the direction in which this side sends.
        reserve: the one-time keys.
        bootstrap: authenticates messages until there are keys; None in a session that was resumed with one-time keys.

    Attributes:
        sent: messages sealed.
        received: messages received and found authentic.
        forgery_bound: an upper bound of the probability that at least one of the messages received with a
            one-time tag was forged; see
            `kms_client.emulator.link.authentication.authenticators.forgery_bound`.
    """

    def __init__(
        self, session: bytes, sends: Direction, reserve: KeyReserve, bootstrap: Authenticator | None
    ) -> None:
        self.sent = 0
        self.received = 0
        self.forgery_bound = 0.0
        self._session = session
        self._sends = sends
        self._reserve = reserve
        self._bootstrap = {sends: bootstrap, sends.opposite: bootstrap}
        self._out: list[bytes] = []  # parts of the message under way, each way
        self._in: list[bytes] = []
        self._buffer = bytearray()
        self._failure: ChannelError | None = None

    @property
    def session_id(self) -> bytes:
        """16 public bytes, equal on both sides, never used before, for names of the session's keys."""
        return hashlib.sha256(self._session).digest()[:16]

    @property
    def one_time(self) -> bool:
        """True if messages have one-time tags in both directions by now."""
        return not any(self._bootstrap.values())

    # --- sending

    def seal_part(self, payload: bytes) -> bytes:
        """Return bytes for the peer: a part of a message that others follow.

        Raises:
            ChannelError: the channel has ended.
            ValueError: the part or the message is too large.
        """
        self._check_open()
        _check_size(self._out, payload)
        header = HEADER.pack(_PART, self.sent, len(self._out), len(payload), 0)
        self._out.append(bytes(payload))
        return header + payload

    def seal(self, payload: bytes) -> bytes:
        """Return bytes for the peer: a message, or the last part of the one under way, with its proof.

        Raises:
            ReserveEmpty: no one-time key is left; start a new session.
            ChannelError: the channel has ended.
            ValueError: the part or the message is too large.
        """
        self._check_open()
        _check_size(self._out, payload)
        number, parts = self.sent, [*self._out, bytes(payload)]
        if number == _LAST_NUMBER:
            raise self._end(ChannelError("there are no message numbers left: start a new session"))
        text = self._text(self._sends, number, parts)
        bootstrap = self._bootstrap[self._sends]
        if bootstrap is not None and self._reserve.available(self._sends):
            bootstrap = self._bootstrap[self._sends] = None
        if bootstrap is not None:
            kind, proof = _BOOTSTRAP, bootstrap.sign(text)
        else:
            key_number = self._reserve.next(self._sends)
            try:
                key = self._reserve.take(self._sends)
            except ReserveEmpty as error:
                raise self._end(error) from None
            kind, proof = _ONE_TIME, key_number.to_bytes(8, "big") + one_time_tag(key, text)
        self._out = []
        self.sent += 1
        return HEADER.pack(kind, number, len(parts) - 1, len(payload), len(proof)) + payload + proof

    # --- receiving

    def receive_data(self, data: bytes) -> list[Received]:
        """Return the parts that are complete now; `data` are bytes of the peer, in any slices.

        Raises:
            AuthenticationFailed: something was changed, left out, repeated, moved, inserted, reflected, or comes from
                another session. The parts since the last ``final`` must be thrown away. The channel has ended.
        """
        self._check_open()
        self._buffer += data
        found = []
        try:
            while (one := self._next()) is not None:
                found.append(one)
        except ChannelError as error:
            raise self._end(error) from None
        return found

    def preload(self, data: bytes) -> None:
        """Keep bytes that came with the end of the session's start; the next `receive_data` looks at them."""
        self._buffer += data

    def _next(self) -> Received | None:
        if len(self._buffer) < HEADER.size:
            return None
        kind, number, part, size, proof_size = HEADER.unpack_from(self._buffer)
        self._check_header(kind, number, part, size, proof_size)
        end = HEADER.size + size
        if len(self._buffer) < end + proof_size:
            return None
        payload, proof = bytes(self._buffer[HEADER.size : end]), bytes(self._buffer[end : end + proof_size])
        del self._buffer[: end + proof_size]
        self._in.append(payload)
        if kind == _PART:
            return Received(payload, final=False)
        self._verify(kind, self._text(self._sends.opposite, number, self._in), proof)
        self._in = []
        self.received += 1
        return Received(payload, final=True)

    def _check_header(self, kind: int, number: int, part: int, size: int, proof_size: int) -> None:
        if number != self.received or part != len(self._in):
            raise self._failed(
                f"message {number}, part {part} came: something was left out, repeated, moved or inserted"
            )
        if kind not in (_PART, _BOOTSTRAP, _ONE_TIME) or proof_size > (
            0 if kind == _PART else _LARGEST_PROOF
        ):
            raise self._failed(f"no such frame: kind {kind}, a proof of {proof_size} bytes")
        if kind == _BOOTSTRAP and self._bootstrap[self._sends.opposite] is None:
            raise self._failed("it has the bootstrap's proof, when one-time tags are due")
        if kind == _ONE_TIME and proof_size != 8 + TAG_BYTES:
            raise self._failed(f"a one-time tag of {proof_size} bytes")
        try:
            _check_size(self._in, size)
        except ValueError as error:
            raise self._failed(str(error)) from None

    def _verify(self, kind: int, text: bytes, proof: bytes) -> None:
        direction = self._sends.opposite
        bootstrap = self._bootstrap[direction]
        try:
            if kind == _BOOTSTRAP:
                assert bootstrap is not None  # or the header would have been refused
                bootstrap.verify(text, proof)
                return
            number, due = int.from_bytes(proof[:8], "big"), self._reserve.next(direction)
            if number != due:
                raise AuthenticationFailed(f"one-time key {number} was used where {due} is due")
            check_one_time_tag(self._reserve.take(direction, number), text, proof[8:])
        except (AuthenticationFailed, ReserveEmpty) as error:
            raise self._failed(str(error)) from None
        self._bootstrap[direction] = None
        self.forgery_bound += forgery_bound(len(text))
        self._reserve.prove()

    # --- both

    def _text(self, direction: Direction, number: int, parts: list[bytes]) -> bytes:
        """Return the subject of a proof; no two messages have the same."""
        head = struct.pack("!BQII", direction, number, len(parts), len(self._session)) + self._session
        return b"".join([head, *(len(part).to_bytes(4, "big") + part for part in parts)])

    def _failed(self, what: str) -> AuthenticationFailed:
        return AuthenticationFailed(
            f"message {self.received} {self._sends.opposite.name}, part {len(self._in)}, is not authentic: {what}. "
            "Throw the block away and start a new session; if this goes on, look for who is on the classical channel"
        )

    def _check_open(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def _end(self, error: ChannelError) -> ChannelError:
        self._failure = error
        self._buffer.clear()
        self._in, self._out = [], []
        return error


def _check_size(before: list[bytes], more: bytes | int) -> None:
    size = more if isinstance(more, int) else len(more)
    if size > LARGEST_PART or size + sum(map(len, before)) > LARGEST_MESSAGE or len(before) >= MOST_PARTS:
        raise ValueError(
            f"a part has up to {LARGEST_PART} bytes, a message up to {LARGEST_MESSAGE} in {MOST_PARTS} parts: "
            f"{size} bytes as part {len(before)} are too many"
        )
