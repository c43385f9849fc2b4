"""HTTP servers, and servers of the standard library, against a client that can also fall silent, end and be cut."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import queue
import socket
import socketserver
import subprocess
import sys
import threading
import xmlrpc.client
import xmlrpc.server
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import aiohttp.web
import hypercorn.asyncio
import uvicorn

from tests.support.dropin import wsgi_site
from tests.support.dropin.harness import (
    DIGEST,
    HALF,
    LIMIT,
    PATIENCE,
    PAYLOAD,
    Ends,
    Notes,
    Program,
    digest,
    drain,
    end_cleanly,
    truncate,
)
from tests.support.dropin.programs.asgi_site import Site
from tests.support.paths import ROOT

__all__ = ["PROGRAMS"]


class HTTPServerProgram(Program):
    """A server whose site answers /hello, /payload, /digest, /half (reads 100 bytes) and /seen (what that gave)."""

    role = "server"
    port: int

    def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        with self.ends.connect(self.port) as tls:
            tls.sendall(
                f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            )
            tls.sendall(body)
            return answer(tls)

    def connects(self) -> object:
        return self.call("GET", "/hello") == b"hello"

    def up(self) -> object:
        return self.call("POST", "/digest", PAYLOAD) == DIGEST.encode()

    def down(self) -> object:
        return digest(self.call("GET", "/payload")) == DIGEST

    def half_a_request(self) -> Any:
        tls = self.ends.connect(self.port)
        tls.sendall(b"POST /half HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" + HALF)
        return tls

    def seen(self) -> object:
        """What the application had from half a request."""
        return self.call("GET", "/seen")

    def eof(self) -> object:
        end_cleanly(self.half_a_request())
        return self.seen()

    def truncation(self) -> object:
        truncate(self.half_a_request())
        return self.seen()

    def timeout(self) -> object:
        """The application waits for the rest of a body."""
        with self.half_a_request() as tls:
            # Until the server gives up.
            drain(tls)
        return self.seen()


class IdleTimeout(HTTPServerProgram):
    """Servers that limit how long a kept connection may be idle."""

    def timeout(self) -> object:
        with self.ends.connect(self.port) as tls:
            tls.sendall(b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(tls) == b"hello"
            return "closes" if tls.recv(1) == b"" else "speaks"


def answer(tls: Any) -> bytes:
    with http.client.HTTPResponse(tls) as response:
        response.begin()
        return response.read()


def serve_in_thread(program: Program, server: socketserver.BaseServer) -> None:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    program.stack.callback(stop)


def run_in_thread(program: Program, serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run a server's coroutine in a loop of its own, until the event."""
    running: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def main() -> None:
        event = asyncio.Event()
        running.put((asyncio.get_running_loop(), event))
        await serve(event)

    thread = threading.Thread(target=lambda: program.run(main()))
    thread.start()
    loop, event = running.get(timeout=PATIENCE)

    def stop() -> None:
        # Where the server has failed, its loop is closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)
        thread.join()

    program.stack.callback(stop)


# --- the standard library's


class Quiet:
    """Clients that break off are part of the play."""

    daemon_threads = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class HTTPServerModule(HTTPServerProgram):
    name = "http.server"
    how = (
        "server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)"
    )

    def start(self) -> None:
        notes = Notes()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = LIMIT

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/seen":
                    self.answer(notes.get().encode())
                else:
                    self.answer({"/hello": b"hello", "/payload": PAYLOAD}[self.path])

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                if self.path == "/digest":
                    self.connection.settimeout(PATIENCE)
                    self.answer(digest(self.rfile.read(size)).encode())
                else:
                    notes.of(lambda: self.rfile.read(size))
                    self.close_connection = True

            def answer(self, body: bytes) -> None:
                self.connection.settimeout(PATIENCE)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

        class Server(Quiet, ThreadingHTTPServer):
            pass

        server = Server(("127.0.0.1", 0), Handler)
        self.port = server.server_port
        server.socket = self.ends.server.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        serve_in_thread(self, server)


class WSGIRef(HTTPServerProgram):
    name = "wsgiref"
    how = HTTPServerModule.how

    def start(self) -> None:
        class Handler(WSGIRequestHandler):
            timeout = LIMIT

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def get_stderr(self) -> Any:
                return io.StringIO()

        class Server(Quiet, socketserver.ThreadingMixIn, WSGIServer):
            pass

        server = Server(("127.0.0.1", 0), Handler)
        server.set_app(wsgi_site.application)
        self.port = server.server_port
        server.socket = self.ends.server.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        serve_in_thread(self, server)


class SocketServer(Program):
    name = "socketserver"
    role = "server"
    how = HTTPServerModule.how

    def start(self) -> None:
        self.observed = notes = Notes()

        class Handler(socketserver.StreamRequestHandler):
            timeout = LIMIT

            def handle(self) -> None:
                match self.rfile.readline():
                    case b"hello\n":
                        self.wfile.write(b"hello\n")
                    case b"up\n":
                        self.connection.settimeout(PATIENCE)
                        self.wfile.write(digest(self.rfile.read(len(PAYLOAD))).encode() + b"\n")
                    case b"down\n":
                        self.wfile.write(PAYLOAD)
                    case b"half\n":
                        notes.of(lambda: self.rfile.read(100))

        class Server(Quiet, socketserver.ThreadingTCPServer):
            pass

        server = Server(("127.0.0.1", 0), Handler)
        self.port = server.server_address[1]
        server.socket = self.ends.server.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        serve_in_thread(self, server)

    def call(self, line: bytes, body: bytes = b"") -> bytes:
        with self.ends.connect(self.port) as tls, tls.makefile("rb") as file:
            tls.sendall(line + b"\n" + body)
            return bytes(file.read())

    def connects(self) -> object:
        return self.call(b"hello") == b"hello\n"

    def up(self) -> object:
        return self.call(b"up", PAYLOAD) == f"{DIGEST}\n".encode()

    def down(self) -> object:
        return digest(self.call(b"down")) == DIGEST

    def half(self) -> Any:
        tls = self.ends.connect(self.port)
        tls.sendall(b"half\n" + HALF)
        return tls

    def timeout(self) -> object:
        with self.half():
            return self.observed.get()

    def eof(self) -> object:
        end_cleanly(self.half())
        return self.observed.get()

    def truncation(self) -> object:
        truncate(self.half())
        return self.observed.get()


class XMLRPCServer(HTTPServerProgram):
    name = "xmlrpc.server"
    how = HTTPServerModule.how

    def start(self) -> None:
        self.observed = notes = Notes()

        class Handler(xmlrpc.server.SimpleXMLRPCRequestHandler):
            timeout = LIMIT

            def do_POST(self) -> None:
                if self.path == "/RPC2":
                    self.connection.settimeout(PATIENCE)
                    super().do_POST()
                else:
                    notes.of(lambda: self.rfile.read(100))

        class Server(Quiet, socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
            pass

        server = Server(("127.0.0.1", 0), Handler, logRequests=False)
        self.port = server.server_address[1]
        server.register_function(lambda: "hello", "hello")
        server.register_function(lambda value: digest(value.data), "digest")
        server.register_function(lambda: xmlrpc.client.Binary(PAYLOAD), "payload")
        server.socket = self.ends.server.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        serve_in_thread(self, server)

    def remote(self, method: str, *arguments: Any) -> Any:
        body = xmlrpc.client.dumps(arguments, method).encode()
        (result,), _ = xmlrpc.client.loads(self.call("POST", "/RPC2", body))
        return result

    def connects(self) -> object:
        return self.remote("hello") == "hello"

    def up(self) -> object:
        return self.remote("digest", xmlrpc.client.Binary(PAYLOAD)) == DIGEST

    def down(self) -> object:
        result: Any = self.remote("payload")
        return digest(result.data) == DIGEST

    def seen(self) -> object:
        return self.observed.get()


# --- others


class Gunicorn(IdleTimeout):
    name = distribution = "gunicorn"
    how = "def ssl_context(config, default): return context  # in its configuration file"
    notes: ClassVar[Mapping[str, str]] = {"timeout": "`keepalive` is in whole seconds."}

    workers = "gthread"

    def start(self) -> None:
        folder = self.ends.sites.folder
        self.port, listening = free_port(self)
        config = folder / "gunicorn.conf.py"
        config.write_text(
            "from tests.support.dropin.gunicorn_context import make\n"
            f"def ssl_context(config, default):\n    return make({description(self.ends)!r})\n"
            f"certfile, keyfile = {str(self.ends.sites.server.cert_file)!r}, {str(self.ends.sites.server.key_file)!r}\n"
            f"worker_class, threads, workers, keepalive = {self.workers!r}, 4, 1, 1\n"
            "bind = 'fd://' + " + repr(str(listening)) + "\nloglevel = 'error'\ngraceful_timeout = 1\n"
            "control_socket_disable = True\n"
        )
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "gunicorn",
                "-c",
                str(config),
                "tests.support.dropin.wsgi_site:application",
            ],
            cwd=ROOT,
            pass_fds=[listening],
        )

        def stop() -> None:
            process.terminate()
            process.wait(PATIENCE)

        self.stack.callback(stop)


def description(ends: Ends) -> dict[str, str]:
    """What a server's context is made of in another process."""
    sites = ends.sites
    pki = sites.kmes.pki
    return {
        "hybrid": "yes" if ends.hybrid else "",
        "cert": str(sites.server.cert_file),
        "key": str(sites.server.key_file),
        "kme": sites.kmes.url_b,
        "sae_id": pki.sae_b,
        "kme_cert": str(pki.sae_b_cert),
        "kme_key": str(pki.sae_b_key),
        "kme_ca": str(pki.kms_ca),
    }


def free_port(program: Program) -> tuple[int, int]:
    """A listening socket for another process: its port and file descriptor."""
    listening = socket.create_server(("127.0.0.1", 0))
    program.stack.callback(listening.close)
    return listening.getsockname()[1], listening.fileno()


class Uvicorn(IdleTimeout):
    name = distribution = "uvicorn"
    how = "config.load(); config.ssl = context"

    def start(self) -> None:
        config = uvicorn.Config(
            Site(),
            log_level="critical",
            timeout_keep_alive=LIMIT,  # type: ignore[arg-type]
            lifespan="off",
        )
        config.load()
        config.ssl = self.ends.server
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]

        async def serve(ended: asyncio.Event) -> None:
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve([listening]))
            await ended.wait()
            server.should_exit = server.force_exit = True
            await serving
            listening.close()

        run_in_thread(self, serve)


class Hypercorn(IdleTimeout):
    name = distribution = "hypercorn"
    how = "class HybridConfig(hypercorn.Config): create_ssl_context = lambda self: context"

    def start(self) -> None:
        self.port = run_hypercorn(self, "http/1.1", keep_alive_timeout=LIMIT)


def run_hypercorn(program: Program, protocol: str, **settings: Any) -> int:
    """Run hypercorn with the server's context, which agrees to one protocol; its port."""
    context = program.ends.server
    context.set_alpn_protocols([protocol])

    class HybridConfig(hypercorn.Config):
        ssl_enabled = True

        def create_ssl_context(self) -> Any:
            return context

    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    config = HybridConfig.from_mapping(
        settings, bind=[f"fd://{listening.detach()}"], graceful_timeout=0.2, shutdown_timeout=0.2
    )
    config.accesslog = config.errorlog = None

    async def serve(ended: asyncio.Event) -> None:
        site: Any = Site()
        await hypercorn.asyncio.serve(site, config, shutdown_trigger=ended.wait, mode="asgi")

    run_in_thread(program, serve)
    return port


class AIOHTTPServer(IdleTimeout):
    name = "aiohttp, server"
    distribution = "aiohttp"
    how = "web.SockSite(runner, sock, ssl_context=context)"

    def start(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]

        async def serve(ended: asyncio.Event) -> None:
            seen: asyncio.Queue[str] = asyncio.Queue()

            async def half(request: aiohttp.web.Request) -> aiohttp.web.Response:
                try:
                    text = (await request.read()).decode()
                except BaseException as error:
                    await seen.put(type(error).__name__)
                    raise
                await seen.put(text)
                return aiohttp.web.Response()

            def reply(body: Callable[[aiohttp.web.Request], Awaitable[bytes]]) -> Any:
                async def handle(request: aiohttp.web.Request) -> aiohttp.web.Response:
                    return aiohttp.web.Response(body=await body(request))

                return handle

            async def hello(_: Any) -> bytes:
                return b"hello"

            async def payload(_: Any) -> bytes:
                return PAYLOAD

            async def digest_of(request: aiohttp.web.Request) -> bytes:
                return digest(await request.read()).encode()

            async def last(_: Any) -> bytes:
                return (await seen.get()).encode()

            app = aiohttp.web.Application(client_max_size=20_000_000)
            app.router.add_get("/hello", reply(hello))
            app.router.add_get("/payload", reply(payload))
            app.router.add_get("/seen", reply(last))
            app.router.add_post("/digest", reply(digest_of))
            app.router.add_post("/half", half)
            runner = aiohttp.web.AppRunner(app, keepalive_timeout=LIMIT, handler_cancellation=True)
            await runner.setup()
            await aiohttp.web.SockSite(runner, listening, ssl_context=self.ends.server).start()
            await ended.wait()
            await runner.cleanup()

        run_in_thread(self, serve)


PROGRAMS: list[type[Program]] = [
    HTTPServerModule,
    WSGIRef,
    SocketServer,
    XMLRPCServer,
    AIOHTTPServer,
    Gunicorn,
    Uvicorn,
    Hypercorn,
]
