"""Runs CPython's own Lib/test/test_ssl.py on QKDContext, QKDSocket and QKDObject; a program of its own.

    python run_test_ssl.py RESULTS [TEST...]

Inside that module and its HTTPS server alone, the name `ssl` means the standard library's module with our classes in
it. Each context has the KMS of its side of one link and the policy `require`: whatever connects is hybrid. RESULTS gets
a line of JSON for each test, see `Recorder`.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import json
import ssl
import sys
import time
import unittest
import warnings
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, Self, TextIO

from kms_client import LocalKeyManager
from qkd_tls import QKDContext, QKDInfo, QKDSocket, create_default_context
from qkd_tls.endpoint import Endpoint, EndpointEngine
from qkd_tls.info import Protection
from qkd_tls.sslobject import QKDObject

__all__ = ["main"]

LONGEST: Final = 60
"""Seconds after which a test is taken to hang: the program prints the stacks of all threads and ends."""

CLIENT_KMS, SERVER_KMS = LocalKeyManager.pair("SAE-A", "SAE-B")

counts: Final[Counter[str]] = Counter()
"""Since the start: how often a test has used a class of ours, and sides of connections by role and protection."""


class ContextUnderTest(QKDContext):
    """A QKDContext that is made as the tests make theirs: from a protocol alone."""

    def __new__(cls, protocol: int = ssl.PROTOCOL_TLS, *_: Any, **__: Any) -> Self:
        return super().__new__(cls, protocol)

    def __init__(self, protocol: int = ssl.PROTOCOL_TLS, **_: Any) -> None:
        server = protocol == ssl.PROTOCOL_TLS_SERVER
        super().__init__(protocol, key_manager=SERVER_KMS if server else CLIENT_KMS)


def default_context(purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH, **arguments: Any) -> QKDContext:
    server = purpose == ssl.Purpose.CLIENT_AUTH
    return create_default_context(purpose, key_manager=SERVER_KMS if server else CLIENT_KMS, **arguments)


class SSLWithOurClasses(ModuleType):
    """Stands for the module `ssl` in CPython's tests."""

    OURS: Final[dict[str, Any]] = {
        "SSLContext": ContextUnderTest,
        "SSLSocket": QKDSocket,
        "SSLObject": QKDObject,
        "create_default_context": default_context,
    }

    def __getattr__(self, name: str) -> Any:
        if name in self.OURS:
            counts["ours"] += 1
            return self.OURS[name]
        return getattr(ssl, name)


def count_connections() -> None:
    """Count every connection of the process, however it is made."""
    establish = Endpoint._establish

    def counted(self: Endpoint, engine: EndpointEngine, info: QKDInfo) -> None:
        counts[f"{'server' if self.server_side else 'client'} {info.protection}"] += 1
        establish(self, engine, info)

    Endpoint._establish = counted  # type: ignore[method-assign]


class Recorder(unittest.TestResult):
    """Writes for each test a JSON object.

    ``test`` (class and name), ``outcome`` (pass, fail or skip), ``reason``, ``source`` (its Python text), ``ours``
    (how often it has used a class of ours), ``client`` and ``server`` (hybrid connections), ``other`` (sides of
    connections that were not hybrid), ``seconds``.
    """

    def __init__(self, results: TextIO) -> None:
        super().__init__()
        self._results = results
        self._begin()

    def _begin(self) -> None:
        self._outcome, self._reason = "pass", ""
        self._before, self._start = counts.copy(), time.monotonic()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        self._begin()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        new = counts - self._before
        ours, client, server = (
            new.pop(what, 0)
            for what in ("ours", f"client {Protection.HYBRID}", f"server {Protection.HYBRID}")
        )
        method: Callable[..., object] = getattr(type(test), test._testMethodName)
        line = {
            "test": f"{type(test).__name__}.{test._testMethodName}",
            "outcome": self._outcome,
            "reason": self._reason,
            "source": inspect.getsource(inspect.unwrap(method)),
            "ours": ours,
            "client": client,
            "server": server,
            "other": new.total(),
            "seconds": round(time.monotonic() - self._start, 3),
        }
        self._results.write(json.dumps(line) + "\n")
        self._results.flush()
        # CPython 3.12.1 starts no test that it skips.
        self._begin()

    def addError(self, test: Any, err: Any) -> None:
        self._outcome, self._reason = "fail", self._exc_info_to_string(err, test)  # type: ignore[attr-defined]

    def addFailure(self, test: Any, err: Any) -> None:
        self.addError(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addError(test, err)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._outcome, self._reason = "skip", reason


def main() -> None:
    results, *names = sys.argv[1:]
    with warnings.catch_warnings():
        # The tests import modules that are deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        support: Any = importlib.import_module("test.support")
        # All but "network": no peers beyond this machine.
        support.use_resources = ["cpu", "walltime"]
        tests: Any = importlib.import_module("test.test_ssl")
        servers: Any = importlib.import_module("test.ssl_servers")
    for module in (tests, servers):
        module.ssl = SSLWithOurClasses("ssl")
    count_connections()
    loader = unittest.TestLoader()
    suite = loader.loadTestsFromNames(names, tests) if names else loader.loadTestsFromModule(tests)
    with open(results, "w", encoding="utf-8") as file:
        suite.run(Recorder(file))


if __name__ == "__main__":
    main()
