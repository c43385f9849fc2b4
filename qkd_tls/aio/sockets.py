"""A non-blocking `QKDSocket`, for programs that move the data themselves."""

from __future__ import annotations

import asyncio
import ssl
from socket import socket as Socket

from qkd_tls.aio.handshakes import LoopDriver
from qkd_tls.aio.turns import Turns
from qkd_tls.context import QKDContext
from qkd_tls.endpoint import KeysWanted, driver_in_charge
from qkd_tls.socket import QKDSocket

__all__ = ["wrap_socket"]


async def wrap_socket(
    sock: Socket,
    context: QKDContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    handshake_timeout: float = 60.0,
) -> QKDSocket:
    """Take over a connected TCP socket and shake hands; for programs that move the data themselves.

    Args:
        handshake_timeout: seconds for the whole handshake, including the KMS.

    Returns:
        A non-blocking socket, for `loop.add_reader` and `loop.add_writer`. Mind its `pending()`.

    Raises the errors of `QKDContext.wrap_socket`; the socket is then closed.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    driver = _SocketDriver(loop)
    token = driver_in_charge.set(driver)
    try:
        tls = context.wrap_socket(
            sock, server_side=server_side, server_hostname=server_hostname, do_handshake_on_connect=False
        )
    finally:
        driver_in_charge.reset(token)
    try:
        async with asyncio.timeout(handshake_timeout):
            await driver.shake_hands(tls)
    except TimeoutError:
        tls.close()
        raise TimeoutError(f"The handshake operation timed out after {handshake_timeout:g} seconds") from None
    except BaseException:
        tls.close()
        raise
    return tls


class _SocketDriver(LoopDriver):
    """The driver of a `QKDSocket`'s handshake; the loop watches the file descriptor."""

    _waiting: asyncio.Future[None]

    async def shake_hands(self, tls: QKDSocket) -> None:
        """Return when the handshake is complete."""
        while True:
            self._waiting = self._loop.create_future()
            await Turns.of(self._loop).wait()
            try:
                tls.do_handshake()
                return
            except KeysWanted:
                await self._waiting
            except ssl.SSLWantReadError:
                self._loop.add_reader(tls, self._go_on)
                try:
                    await self._waiting
                finally:
                    self._loop.remove_reader(tls)
            except ssl.SSLWantWriteError:
                self._loop.add_writer(tls, self._go_on)
                try:
                    await self._waiting
                finally:
                    self._loop.remove_writer(tls)

    def _go_on(self) -> None:
        if not self._waiting.done():
            self._waiting.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self._waiting.done():
            self._waiting.set_exception(error)
