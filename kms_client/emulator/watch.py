"""The page that shows an emulated link, over HTTP on this host.

There is no login: the server listens on loopback only, answers only requests that name this host (so that no
web page elsewhere can reach it under a name of its own), and accepts changes only as JSON, which forms of
other pages cannot send. The page shows key IDs, never keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from json import JSONDecodeError
from typing import Final

from aiohttp import web

from kms_client.emulator.link.figures import Figures

__all__ = ["WatchPage"]

_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}

_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_MAX_BODY: Final = 10_000  # bytes


class WatchPage:
    """The server of the page.

    Args:
        sides: the figures of the sides that run in this process, A's first. The switches belong to the first.
    """

    def __init__(self, sides: Sequence[Figures]) -> None:
        """Serve with `start`."""
        self._sides = sides
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on `port`, a free one for 0; then see the attribute `url`.

        Raises:
            ValueError: `host` is not a loopback address.
        """
        if not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"the page has no login and is for loopback only, not for {host}")
        app = web.Application(middlewares=[_guard], client_max_size=_MAX_BODY)
        for path in _FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/figures", self._figures)
        app.router.add_post("/controls", self._controls)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, reuse_address=True).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{runner.addresses[0][1]}/"

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _figures(self, request: web.Request) -> web.Response:
        return web.json_response({"sides": [side.snapshot() for side in self._sides]})

    async def _controls(self, request: web.Request) -> web.Response:
        controls = self._sides[0].controls
        if controls is None:
            return _refused(409, "the switches are at side A")
        if request.content_type != "application/json":
            return _refused(415, "the switches are set by a JSON object")
        try:
            values = await request.json()
            if not isinstance(values, dict):
                raise ValueError("the switches are set by a JSON object")
            controls.change(values)
        except (JSONDecodeError, UnicodeDecodeError, RecursionError):
            return _refused(400, "this is not JSON")
        except ValueError as error:
            return _refused(400, str(error))
        return web.json_response(controls.snapshot())


async def _file(request: web.Request) -> web.Response:
    name, kind = _FILES[request.path]
    return web.Response(
        body=(files(__package__) / "page" / name).read_bytes(), content_type=kind, charset="utf-8"
    )


@web.middleware
async def _guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if not _names_this_host(request.host):
        answer: web.StreamResponse = _refused(421, "this is not a page of that host")
    elif request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        answer = _refused(403, "another page may not use this one")
    else:
        try:
            answer = await handler(request)
        except web.HTTPException as error:  # no such path, wrong method, body too large
            answer = _refused(error.status, error.reason)
    answer.headers.update(_HEADERS)
    return answer


def _names_this_host(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _refused(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)
