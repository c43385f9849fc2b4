"""The start of a session: the peer's identity, the keys that both still have, and the authentication.

Both sides send a hello at once: versions, the link's name, the KME IDs, a fresh nonce, the state of their
reserve. Nothing of it is believed yet. Both work out from the two hellos how to go on, and send a proof over
both:

========== =========================================== ====================================================
mode       when                                        proof
========== =========================================== ====================================================
resume     both have enough keys of the same reserve   one-time tag, with the next key that neither has used
bound      not so, but both have the same anchor       the bootstrap's, and HMAC-SHA-384 under the anchor
bootstrap  not so                                      the bootstrap's: certificates or a pre-shared secret
========== =========================================== ====================================================

A side that knows that the peer has held the anchor does not go back to plain ``bootstrap`` by itself: an
attacker who has stolen the peer's signing keys in the meantime could use that. `Rebootstrap` says what it
does instead.

A hello that was changed on its way makes the proofs wrong. An attacker who changes it can spend one-time
keys, a bounded number for each attempt, until the reserve is dry; the mode is ``bound`` then, for which
signing keys are not enough.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

from kms_client.emulator.link.authentication.authenticators import (
    Authenticator,
    SharedSecret,
    Together,
    check_one_time_tag,
    one_time_tag,
)
from kms_client.emulator.link.authentication.channel import ClassicalChannel
from kms_client.emulator.link.authentication.errors import (
    AuthenticationFailed,
    ChannelError,
    ReserveEmpty,
    SessionRefused,
)
from kms_client.emulator.link.authentication.reserve import Direction, KeyReserve

__all__ = ["LARGEST_GAP", "Mode", "Rebootstrap", "Session"]

LARGEST_GAP: Final = 64  # between the two sides' next keys: a longer one is not resumed over
_NONCE_BYTES: Final = 32
_ID_BYTES: Final = 16  # of an anchor's public name
_LARGEST_FRAME: Final = 1 << 17
_MAGIC: Final = b"qkd-link/1"


class Mode(Enum):
    """The authentication that a session starts with."""

    RESUME = "resume"
    BOUND = "bound"
    BOOTSTRAP = "bootstrap"


class Rebootstrap(Enum):
    """The reaction to a peer that has forgotten the keys of an earlier bootstrap, or claims so."""

    FORBIDDEN = "forbidden"
    """Refuse: the operator has to examine it, and make this side forget, too. The default."""
    ALLOWED = "allowed"
    """Trust the bootstrap's authentication again, and say so in an event."""


class _Hello(NamedTuple):
    side: Direction
    nonce: bytes
    origin: bytes
    anchor_id: bytes
    next: tuple[int, int]
    end: tuple[int, int]
    minimum: int


_STATE: Final = struct.Struct("!5Q")


class Session:
    """One side's start of a session, without input or output: bytes in, bytes out, then there is a `channel`.

    Send what `start` and each `receive_data` return. A connection that ends before there is a channel is tried again
    with a new `Session` over the same reserve; so is one that ends later.

    Args:
        sends: `Direction.A_TO_B` at side A (Alice), `Direction.B_TO_A` at side B (Bob).
        link: names the link and both KMEs, A first; equal on both sides, and different from every other link.
        reserve: outlives the sessions.
        bootstrap: `Certificates`, `SharedSecret`, or both `Together`.
        rebootstrap: the reaction to a peer that has forgotten.
        minimum_keys: one-time keys in each direction below which resuming is not worthwhile; at least 2.
        on_event: called with a sentence for the operator.

    Attributes:
        channel: once both sides have proven themselves.
        mode: once the peer's hello is there.
    """

    def __init__(
        self,
        sends: Direction,
        link: str,
        reserve: KeyReserve,
        bootstrap: Authenticator,
        *,
        rebootstrap: Rebootstrap = Rebootstrap.FORBIDDEN,
        minimum_keys: int = 16,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.channel: ClassicalChannel | None = None
        self.mode: Mode | None = None
        self._sends = sends
        self._link = link.encode()
        self._reserve = reserve
        self._bootstrap = bootstrap
        self._rebootstrap = rebootstrap
        self._minimum = max(2, minimum_keys)
        self._event = on_event
        self._own = b""
        self._hello: _Hello | None = None
        self._peer: _Hello | None = None
        self._transcript = b""
        self._authenticator: Authenticator | None = None
        self._indices = (0, 0)
        self._buffer = bytearray()
        self._failure: ChannelError | None = None

    def start(self) -> bytes:
        """Return this side's hello."""
        lanes = tuple(Direction)
        self._hello = _Hello(
            self._sends,
            os.urandom(_NONCE_BYTES),
            self._reserve.origin.ljust(_NONCE_BYTES, b"\0"),
            self._anchor_id(),
            (self._reserve.next(lanes[0]), self._reserve.next(lanes[1])),
            (self._reserve.end(lanes[0]), self._reserve.end(lanes[1])),
            self._minimum,
        )
        self._own = self._encode(self._hello)
        return _frame(self._own)

    def receive_data(self, data: bytes) -> bytes:
        """Take bytes of the peer, in any slices; return the bytes to send now.

        Bytes that follow the peer's proof belong to the channel: it already has them, call its
        ``receive_data(b"")``.

        Raises:
            AuthenticationFailed: the peer is not the one it should be, or an attacker is in the middle.
            SessionRefused: the peer has forgotten the keys, and `Rebootstrap.FORBIDDEN` holds.
        """
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        assert self._hello is not None, "start() comes first"
        assert self.channel is None, "the channel receives now"
        self._buffer += data
        answer = b""
        try:
            while self.channel is None and (body := self._next()) is not None:
                if self._peer is None:
                    answer += self._meet(body)
                else:
                    self._finish(body)
        except ChannelError as error:
            self._failure = error
            raise
        return answer

    # --- hello

    def _anchor_id(self) -> bytes:
        anchor = self._reserve.anchor
        if anchor is None:
            return bytes(_ID_BYTES)
        return hmac.digest(anchor, b"qkd-link anchor id", "sha384")[:_ID_BYTES]

    def _encode(self, hello: _Hello) -> bytes:
        return b"".join(
            [
                _MAGIC,
                bytes([hello.side]),
                hello.nonce,
                hello.origin,
                hello.anchor_id,
                _STATE.pack(*hello.next, *hello.end, hello.minimum),
                self._link,
            ]
        )

    def _decode(self, body: bytes) -> _Hello:
        fixed = len(_MAGIC) + 1 + 2 * _NONCE_BYTES + _ID_BYTES + _STATE.size
        if len(body) < fixed or not body.startswith(_MAGIC):
            raise self._failed("it is no hello of qkd-link/1")
        if body[fixed:] != self._link:
            raise self._failed(
                f"the peer is on another link than {self._link.decode()!r}: check the settings"
            )
        side, rest = body[len(_MAGIC)], body[len(_MAGIC) + 1 : fixed]
        if side != self._sends.opposite:
            raise self._failed("it says that it is this side: reflected, or both run as the same side")
        nonce, origin, anchor_id = (
            rest[:_NONCE_BYTES],
            rest[_NONCE_BYTES : 2 * _NONCE_BYTES],
            rest[2 * _NONCE_BYTES : -_STATE.size],
        )
        next_a, next_b, end_a, end_b, minimum = _STATE.unpack(rest[-_STATE.size :])
        return _Hello(
            self._sends.opposite, nonce, origin, anchor_id, (next_a, next_b), (end_a, end_b), minimum
        )

    def _meet(self, body: bytes) -> bytes:
        """Handle the peer's hello: agree on the mode, and prove this side."""
        peer, own = self._decode(body), self._hello
        assert own is not None
        self._peer = peer
        hellos = (self._own, body) if self._sends is Direction.A_TO_B else (body, self._own)
        self._transcript = b"".join(_frame(hello) for hello in hellos)
        self.mode = self._choose(own, peer)
        text = self._text(self._sends)
        if self.mode is Mode.RESUME:
            self._event("both sides have one-time keys: the session is resumed with them")
            key = self._reserve.take(self._sends, self._indices[self._sends])
            return _frame(one_time_tag(key, text))
        self._authenticator = self._bootstrap
        if self.mode is Mode.BOUND:
            anchor = self._reserve.anchor
            assert anchor is not None  # of the same name as the peer's
            self._authenticator = Together(self._bootstrap, SharedSecret(anchor, "earlier key of the link"))
            self._event(
                "the reserve of one-time keys is dry or lost: bootstrap anew, bound to the keys made before "
                f"({self._bootstrap.name})"
            )
        elif self._reserve.proven:
            self._refuse_or_say()
        else:
            self._event(f"bootstrap by {self._bootstrap.name}")
        return _frame(self._authenticator.sign(text))

    def _choose(self, own: _Hello, peer: _Hello) -> Mode:
        same_anchor = own.anchor_id == peer.anchor_id != bytes(_ID_BYTES)
        starts = tuple(max(pair) for pair in zip(own.next, peer.next, strict=True))
        ends = tuple(min(pair) for pair in zip(own.end, peer.end, strict=True))
        gaps = [abs(mine - theirs) for mine, theirs in zip(own.next, peer.next, strict=True)]
        self._indices = (starts[0], starts[1])
        left = min(end - start for start, end in zip(starts, ends, strict=True))
        enough = left >= max(own.minimum, peer.minimum) and max(gaps) <= LARGEST_GAP
        if same_anchor and own.origin == peer.origin and enough:
            return Mode.RESUME
        return Mode.BOUND if same_anchor else Mode.BOOTSTRAP

    def _refuse_or_say(self) -> None:
        if self._rebootstrap is Rebootstrap.FORBIDDEN:
            raise SessionRefused(
                f"the peer on {self._link.decode()!r} says that it has lost the keys of the link. It may be somebody "
                "else, with stolen signing keys. If the peer has really lost them, restart this side without its "
                "keys, or allow a new bootstrap"
            )
        self._event(
            f"ATTENTION: the peer has lost the keys of the link, or is somebody else: bootstrap by "
            f"{self._bootstrap.name} alone, as the operator has allowed"
        )

    # --- proof

    def _text(self, direction: Direction) -> bytes:
        assert self.mode is not None
        return b"proof" + bytes([direction]) + self.mode.value.encode() + b":" + self._transcript

    def _finish(self, proof: bytes) -> None:
        """Handle the peer's proof."""
        assert self._peer is not None
        assert self._hello is not None
        receives = self._sends.opposite
        text = self._text(receives)
        try:
            if self._authenticator is not None:
                self._authenticator.verify(text, proof)
            else:
                check_one_time_tag(self._reserve.take(receives, self._indices[receives]), text, proof)
        except (AuthenticationFailed, ReserveEmpty) as error:
            raise self._failed(str(error)) from None
        if self.mode is Mode.RESUME:
            for direction in Direction:
                self._reserve.truncate(direction, self._peer.end[direction])
            self._reserve.prove()
        else:
            nonces = sorted((self._hello, self._peer))
            origin = hmac.digest(nonces[0].nonce, nonces[1].nonce, "sha256")
            self._reserve.restart(origin, forget_anchor=self.mode is Mode.BOOTSTRAP)
            if self.mode is Mode.BOUND:
                self._reserve.prove()
        self.channel = ClassicalChannel(self._transcript, self._sends, self._reserve, self._authenticator)
        self.channel.preload(bytes(self._buffer))
        self._buffer.clear()

    def _next(self) -> bytes | None:
        if len(self._buffer) < 4:
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        if size > _LARGEST_FRAME:
            raise self._failed(f"{size} bytes are too many")
        if len(self._buffer) < 4 + size:
            return None
        body = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        return body

    def _failed(self, what: str) -> AuthenticationFailed:
        frame = "hello" if self._peer is None else "proof"
        return AuthenticationFailed(
            f"the {frame} {self._sends.opposite.name} is not authentic: {what}. Start a new session; if this goes on, "
            "look for who is on the classical channel, and whether both sides have the same settings"
        )


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body
