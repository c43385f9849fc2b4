"""Servers of WSGI applications beside gunicorn's threads: gevent, Werkzeug and cheroot."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any, ClassVar

import cheroot.errors
import cheroot.wsgi
from cheroot.ssl.builtin import BuiltinSSLAdapter
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.support.dropin import wsgi_site
from tests.support.dropin.harness import LIMIT, PATIENCE, Program
from tests.support.dropin.programs.http_servers import (
    Gunicorn,
    HTTPServerProgram,
    description,
    free_port,
    serve_in_thread,
)
from tests.support.paths import ROOT

__all__ = ["PROGRAMS"]


# --- gevent


class GunicornGevent(Gunicorn):
    name = "gunicorn -k gevent"
    workers = "gevent"


class OwnProcess(HTTPServerProgram):
    """A server of own_process.py."""

    server: ClassVar[str]

    def start(self) -> None:
        self.port, listening = free_port(self)
        process = subprocess.Popen(
            [
                sys.executable,
                *("-m", "tests.support.dropin.own_process", self.server),
                json.dumps({**description(self.ends), "listening": str(listening)}),
            ],
            cwd=ROOT,
            pass_fds=[listening],
        )

        def stop() -> None:
            process.terminate()
            process.wait(PATIENCE)

        self.stack.callback(stop)


class PyWSGI(OwnProcess):
    name = "gevent.pywsgi"
    distribution = "gevent"
    server = "pywsgi"
    how = "WSGIServer(address, app, ssl_context=context)  # after monkey.patch_all()"


# --- Werkzeug


class Handler(WSGIRequestHandler):
    timeout = LIMIT

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


class WerkzeugThreads(HTTPServerProgram):
    name = "Werkzeug, threads"
    distribution = "Werkzeug"
    how = "make_server(host, port, app, threaded=True, ssl_context=context)"

    def start(self) -> None:
        server = make_server(
            "127.0.0.1",
            0,
            wsgi_site.application,
            threaded=True,
            request_handler=Handler,
            ssl_context=self.ends.server,
        )
        self.port = server.server_port
        serve_in_thread(self, server)


class WerkzeugProcesses(OwnProcess):
    name = "Werkzeug, processes"
    distribution = "Werkzeug"
    server = "werkzeug"
    how = "make_server(host, port, app, processes=4, ssl_context=context)"


# --- cheroot


class Cheroot(HTTPServerProgram):
    name = distribution = "cheroot"
    how = "server.ssl_adapter.context = context"

    def start(self) -> None:
        identity = self.ends.sites.server
        server: Any = cheroot.wsgi.Server(("127.0.0.1", 0), wsgi_site.application, timeout=LIMIT)  # type: ignore[arg-type]
        server.ssl_adapter = BuiltinSSLAdapter(str(identity.cert_file), str(identity.key_file))
        server.ssl_adapter.context = self.ends.server
        server.error_log = lambda *_, **__: None
        server.prepare()
        self.port = server.bind_addr[1]
        thread = threading.Thread(target=server.serve)
        thread.start()

        def stop() -> None:
            server.stop()
            thread.join()

        self.stack.callback(stop)


PROGRAMS: list[type[Program]] = [GunicornGevent, PyWSGI, WerkzeugThreads, WerkzeugProcesses, Cheroot]
