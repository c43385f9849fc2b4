"""Errors of the classical channel."""

from __future__ import annotations

__all__ = ["AuthenticationFailed", "ChannelError", "ReserveEmpty", "SessionRefused"]


class ChannelError(Exception):
    """Base class: this session is over, and its unfinished work must be thrown away."""


class AuthenticationFailed(ChannelError):
    """A message was changed or is not from the peer: an attacker is in the middle, or a side is broken."""


class ReserveEmpty(ChannelError):
    """No one-time key is left for a message: a new session has to bootstrap."""


class SessionRefused(ChannelError):
    """This side must not start a session on these terms: the operator has to decide."""
