"""An ASGI application: /hello, /payload, /digest, /half (reads 100 bytes) and /seen (what that gave)."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.dropin.harness import PAYLOAD, digest

__all__ = ["Site"]


class Site:
    def __init__(self) -> None:
        self._seen: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        match scope["path"]:
            case "/hello":
                body = b"hello"
            case "/payload":
                body = PAYLOAD
            case "/digest":
                received, _ = await self._read(receive)
                body = digest(received).encode()
            case "/half":
                received, end = await self._read(receive)
                await self._seen.put(f"{received.decode()}, {end}")
            case "/seen":
                body = (await self._seen.get()).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _read(self, receive: Any) -> tuple[bytes, str]:
        """The body as far as it comes, and the message that ended it."""
        parts: list[bytes] = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts), message["type"]
