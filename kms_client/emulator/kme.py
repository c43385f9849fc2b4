"""One KME: ETSI GS QKD 014 and SKIP, over HTTPS with mutual TLS.

The caller's SAE ID is taken from its client certificate: of the SAN's URIs (`urn:sae:` and the
percent-encoded ID, or the ID itself), its DNS names and the subject's common name, exactly one must be a
registered SAE.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from kms_client.emulator.delivery import KeyDelivery
from kms_client.emulator.etsi014 import Etsi014Interface
from kms_client.emulator.refusal import Refused
from kms_client.emulator.skip import SkipInterface

__all__ = ["KME", "server_context"]

_STOP_TIMEOUT = 0.2  # seconds that requests under way get when the KME stops


class KME(KeyDelivery):
    """One KME on one port: both interfaces, from the same keys. Serve with `start`."""

    port: int = 0
    _runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """Listen on `host` and `port` (a free one for 0; then see the attribute `port`)."""
        app = web.Application(middlewares=[self._answer_errors, self._misbehave])
        Etsi014Interface(self).add_routes(app.router)
        SkipInterface(self).add_routes(app.router)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_STOP_TIMEOUT)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=context, reuse_address=True).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and close all connections; keys and port are kept for the next `start`."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            server = runner.server
            kept_alive = [] if server is None else [handler.transport for handler in server.connections]
            await runner.cleanup()
            for transport in kept_alive:
                if transport is not None:
                    # Closing TLS waits for the client's close_notify, which an idle client never sends.
                    transport.abort()
            await asyncio.sleep(0)

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refused as refusal:
            body: dict[str, Any] = {"message": str(refusal)}
            if refusal.details:
                body["details"] = refusal.details
            return web.json_response(body, status=refusal.status)
        except web.HTTPException as error:  # no such path, wrong method, body too large
            return web.json_response({"message": error.reason}, status=error.status, headers=_allow(error))

    @web.middleware
    async def _misbehave(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self.faults.delay:
            await asyncio.sleep(self.faults.delay)
        if self.faults.answer_with is not None:
            status, text = self.faults.answer_with
            return web.Response(status=status, text=text, content_type="application/json")
        return await handler(request)


def server_context(cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """Return TLS settings for a KME: its certificate, and a client certificate of the CA required."""
    # Not create_default_context: it writes the keys of the connection to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)
    return context


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
