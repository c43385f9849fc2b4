"""The functions that the command line calls."""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings
from pathlib import Path

from qkd_tls.configuration import ConfigError
from qkd_tls.errors import ClassicalGroupWarning, QKDFallbackWarning

__all__ = ["check", "run"]


def run(path: Path | str) -> int:
    """Serve the tunnels of a configuration file until SIGTERM or SIGINT; return the exit code.

    0 after a drain, 2 if the file cannot be used; errors and the log are written to stderr.
    """
    path = Path(path)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("qkd_tls.tunnel")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        _import_metrics(path)
        from qkd_tls.tunnel.service import Service

        with warnings.catch_warnings():
            # The log and the audit line say so for each connection.
            warnings.simplefilter("ignore", QKDFallbackWarning)
            warnings.simplefilter("ignore", ClassicalGroupWarning)
            return asyncio.run(Service(path).run())
    except ConfigError as error:
        log.error("%s", error)
        return 2
    finally:
        log.removeHandler(handler)


def check(path: Path | str) -> None:
    """Check a configuration file and the certificates and keys that it names, without listening or connecting.

    Raises qkd_tls.configuration.ConfigError.
    """
    path = Path(path)
    _import_metrics(path)
    from qkd_tls.tunnel.contexts import Contexts
    from qkd_tls.tunnel.metrics import Metrics
    from qkd_tls.tunnel.settings import load

    Contexts.make(load(path), Metrics()).replaced_by(Contexts())


def _import_metrics(path: Path) -> None:
    """Raise ConfigError if the extra is not installed."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise ConfigError(
            path, "", "", "the tunnel needs prometheus-client; install it with: pip install prometheus-client"
        ) from None
