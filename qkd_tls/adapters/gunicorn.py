"""`gunicorn` over hybrid connections. In `gunicorn.conf.py`::

    certfile, keyfile = "server.pem", "server.key"
    ssl_context = ssl_context_hook(make_context)

`make_context()` makes the key manager and returns a server's `QKDContext`. An application reads
`environ["gunicorn.socket"].qkd`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from qkd_tls.context import QKDContext

__all__ = ["ssl_context_hook"]


def ssl_context_hook(make: Callable[[], QKDContext]) -> Callable[[Any, Any], QKDContext]:
    """Return the function for gunicorn's setting `ssl_context`; gunicorn calls it for every connection.

    `make` is called once in each worker: with the first connection, after the fork, so that workers share no
    connections to the KME. gunicorn speaks TLS only if `certfile` is set; the context's own certificate is
    sent.

    A client's connections go to any worker, and each worker has its own associations: with several workers a
    client bootstraps more often. Workers wait for the KME in the thread that serves the connection.
    """
    lock = threading.Lock()
    made: dict[int, QKDContext] = {}

    def hook(_config: Any, _default: Any) -> QKDContext:
        with lock:
            process = os.getpid()
            if process not in made:
                made[process] = make()
            return made[process]

    return hook
