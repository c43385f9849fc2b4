"""WSGI servers that want a process of their own: one that forks, and one that replaces parts of the standard library.

`python -m tests.support.dropin.own_process NAME DESCRIPTION`, a description as `gunicorn_context.make` takes it with
the file descriptor of a listening socket.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["NAMES"]


def _pywsgi(listening: int, description: dict[str, str]) -> None:
    from gevent import monkey  # type: ignore[import-untyped]

    # Before all other imports.
    monkey.patch_all()

    import gevent
    import gevent.pywsgi  # type: ignore[import-untyped]

    from tests.support.dropin.gunicorn_context import make
    from tests.support.dropin.harness import LIMIT
    from tests.support.dropin.wsgi_site import application

    def limited(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/half":
            return application(environ, start_response)
        with gevent.Timeout(LIMIT, TimeoutError):
            return application(environ, start_response)

    gevent.pywsgi.WSGIServer(
        socket.socket(fileno=listening), limited, ssl_context=make(description), log=None, error_log=None
    ).serve_forever()


class _BetweenProcesses:
    """A queue whose `put` has put when it returns: a process that ends at once loses what its threads have not."""

    def __init__(self) -> None:
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)

    def put(self, text: str) -> None:
        self._writer.send(text)

    def get(self, timeout: float) -> str:
        if not self._reader.poll(timeout):
            raise queue.Empty
        return str(self._reader.recv())


def _werkzeug(listening: int, description: dict[str, str]) -> None:
    from werkzeug.serving import make_server

    from tests.support.dropin import wsgi_site
    from tests.support.dropin.gunicorn_context import make
    from tests.support.dropin.harness import Notes
    from tests.support.dropin.programs.web_servers import Handler

    # Each connection is a process.
    wsgi_site.notes = Notes(_BetweenProcesses())
    make_server(
        "127.0.0.1",
        0,
        wsgi_site.application,
        processes=4,
        request_handler=Handler,
        ssl_context=make(description),
        fd=listening,
    ).serve_forever()


NAMES = {"pywsgi": _pywsgi, "werkzeug": _werkzeug}

if __name__ == "__main__":
    _, name, text = sys.argv
    description = json.loads(text)
    NAMES[name](int(description.pop("listening")), description)
