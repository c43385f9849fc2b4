"""`gunicorn` over hybrid connections. In `gunicorn.conf.py`::

    certfile, keyfile = "server.pem", "server.key"
    ssl_context = ssl_context_hook(make_context)
    post_worker_init = refuse_plain_http

`make_context()` makes the key manager and returns a server's `QKDContext`. An application reads
`environ["gunicorn.socket"].qkd`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import gunicorn.config

from qkd_tls.context import QKDContext

__all__ = ["refuse_plain_http", "ssl_context_hook"]

_hooks: Final[weakref.WeakSet[Callable[..., QKDContext]]] = weakref.WeakSet()


def ssl_context_hook(make: Callable[[], QKDContext]) -> Callable[[Any, Any], QKDContext]:
    """Return the function for gunicorn's setting `ssl_context`; gunicorn calls it for every connection.

    `make` is called once in each worker: with the first connection, after the fork, so that workers share no
    connections to the KME.

    gunicorn speaks TLS only if `certfile` is set, and plain HTTP otherwise; the context's own certificate is sent. A
    function for the setting `ssl_context` cannot notice that it is never called: `refuse_plain_http` does.

    A client's connections go to any worker, and each worker has its own associations: with several workers a
    client bootstraps more often. Workers wait for the KME in the thread that serves the connection.

    Raises RuntimeError if this version of gunicorn has no such setting, and would ignore it.
    """
    if "ssl_context" not in gunicorn.config.make_settings():
        raise RuntimeError(
            f"gunicorn {gunicorn.__version__} has no setting ssl_context, and would serve without the QKDContext."
            " Use gunicorn 21 or newer"
        )
    lock = threading.Lock()
    made: dict[int, QKDContext] = {}

    def hook(_config: Any, _default: Any) -> QKDContext:
        with lock:
            process = os.getpid()
            if process not in made:
                made[process] = make()
            return made[process]

    _hooks.add(hook)
    return hook


def refuse_plain_http(worker: Any) -> None:
    """Refuse to serve without the context: for gunicorn's setting `post_worker_init`.

    Raises RuntimeError, which ends gunicorn, if it would not speak TLS, or not with a function of `ssl_context_hook`.
    """
    if not worker.cfg.is_ssl:
        raise RuntimeError("gunicorn would serve plain HTTP: set certfile and keyfile beside ssl_context")
    if worker.cfg.ssl_context not in _hooks:
        raise RuntimeError(
            "gunicorn would serve without a QKDContext: set ssl_context to ssl_context_hook(...)"
        )
