"""A request that a KME refuses, on any interface."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

__all__ = ["Refused", "query_integer"]


class Refused(Exception):
    """An error answer: HTTP status, message and, in ETSI GS QKD 014, details (clause 6.4)."""

    def __init__(self, status: int, message: str, *details: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.details = details


def query_integer(request: web.Request, name: str) -> int | None:
    """Return a number in the query; None if it is absent.

    Raises:
        Refused: it is not a number.
    """
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refused(400, f"{name} shall be an integer")
    return int(text)
