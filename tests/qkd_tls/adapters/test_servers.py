"""gunicorn, uvicorn and hypercorn with a context, and that their loops never wait for a KMS."""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import Any

import hypercorn.asyncio
import pytest
import requests
import uvicorn

from qkd_tls import QKDContext, QKDInfo, aio
from qkd_tls.adapters.gunicorn import ssl_context_hook
from qkd_tls.adapters.hypercorn import QKDConfig
from qkd_tls.adapters.requests import QKDAdapter, qkd_info
from tests.support.ports import free_port
from tests.support.slow_kms import a_loop_that_turns
from tests.support.sockets import Lab


async def app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application that says hello."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = str(getattr(scope.get("state", {}).get("qkd"), "key_id", "hello")).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def fetch(lab: Lab, port: int) -> tuple[QKDInfo, str]:
    with requests.Session() as session:
        session.mount("https://", QKDAdapter(lab.client()))
        response = session.get(f"https://localhost:{port}/", timeout=20)
        return qkd_info(response), response.text


def test_uvicorn(slow_server: Lab) -> None:
    context = slow_server.server()
    config = uvicorn.Config(
        app,
        port=0,
        log_level="warning",
        ssl_context_factory=lambda _config, _default: context,
        loop="qkd_tls.aio:EventLoop",
        http="qkd_tls.adapters.uvicorn:QKDProtocol",
    )
    server = uvicorn.Server(config)

    async def main() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with a_loop_that_turns():
            info, text = await asyncio.to_thread(fetch, slow_server, port)
        # The application has seen what protects the connection.
        assert text == info.key_id
        server.should_exit = True
        await serving

    factory = config.get_loop_factory()
    assert factory is aio.EventLoop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def test_hypercorn(slow_server: Lab) -> None:
    port = free_port()
    config = QKDConfig(slow_server.server())
    config.bind = [f"127.0.0.1:{port}"]
    config.alpn_protocols = ["http/1.1"]

    async def main() -> None:
        over = asyncio.Event()
        trigger: Any = over.wait
        serving = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=trigger))
        await listening(port)
        async with a_loop_that_turns():
            info, text = await asyncio.to_thread(fetch, slow_server, port)
        assert info.protection == "hybrid"
        assert text == "hello"
        over.set()
        await serving

    with asyncio.Runner(loop_factory=aio.EventLoop) as runner:
        runner.run(main())


async def listening(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return


class TestGunicorn:
    """A real gunicorn is in tests/dropin."""

    def test_the_context_is_made_once_in_a_process(self) -> None:
        made: list[QKDContext] = []

        def make() -> QKDContext:
            made.append(QKDContext(ssl.PROTOCOL_TLS_SERVER, policy="off"))
            return made[-1]

        hook = ssl_context_hook(make)
        answers: list[QKDContext] = []
        threads = [threading.Thread(target=lambda: answers.append(hook(None, None))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert all(answer is made[0] for answer in answers)

    def test_again_in_a_child(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hook = ssl_context_hook(lambda: QKDContext(ssl.PROTOCOL_TLS_SERVER, policy="off"))
        before = hook(None, None)
        monkeypatch.setattr("os.getpid", lambda: 1)
        assert hook(None, None) is not before
