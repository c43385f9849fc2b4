"""A WSGI application: /hello, /payload, /digest, /half (reads 100 bytes) and /seen (what that gave)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.support.dropin.harness import PAYLOAD, Notes, digest

__all__ = ["application", "notes"]

notes = Notes()


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    size = int(environ.get("CONTENT_LENGTH") or 0)
    body = b""
    match environ["PATH_INFO"]:
        case "/hello":
            body = b"hello"
        case "/payload":
            body = PAYLOAD
        case "/digest":
            body = digest(environ["wsgi.input"].read(size)).encode()
        case "/half":
            notes.of(lambda: environ["wsgi.input"].read(size))
        case "/seen":
            body = notes.get().encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
