"""What can go wrong on the classical channel."""

from __future__ import annotations

__all__ = ["AuthenticationFailed", "ChannelError", "ReserveEmpty", "SessionRefused"]


class ChannelError(Exception):
    """Base class: this session is over, whatever it was in the middle of must be thrown away."""


class AuthenticationFailed(ChannelError):
    """A message is not what the peer sent, or not from the peer: somebody is in the middle, or a side is broken."""


class ReserveEmpty(ChannelError):
    """There is no one-time key left for a message: a new session has to bootstrap."""


class SessionRefused(ChannelError):
    """This side must not start a session on these terms: the operator has to decide."""
