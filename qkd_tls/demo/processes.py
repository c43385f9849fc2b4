"""The processes of the demo, started, read and stopped by their own process IDs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

__all__ = ["DemoError", "Process", "Processes", "wait_for"]

_START_TIMEOUT: Final = 30.0  # seconds
_STOP_TIMEOUT: Final = 5.0  # seconds
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_T = TypeVar("_T")


class DemoError(Exception):
    """A demo that cannot go on; the text names the step and quotes the process's last output."""


class Process:
    """A process `python -m module arguments...`. It prints JSON, one object a line, into a file."""

    def __init__(self, name: str, directory: Path, module: str, *arguments: str) -> None:
        self.name = name
        self._output, self._errors = directory / f"{name}.out", directory / f"{name}.err"
        with open(self._output, "wb") as output, open(self._errors, "wb") as errors:
            # `-m` looks into the working directory for modules: the temporary one holds none.
            self._process = subprocess.Popen(  # noqa: S603 - our own modules
                [sys.executable, "-m", module, *arguments],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                preexec_fn=_listen,
            )

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The JSON objects printed so far."""
        lines = self._output.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def first_report(self) -> dict[str, Any]:
        """Wait for the first report. Raises DemoError if the process ends instead or takes too long."""

        def first() -> dict[str, Any] | None:
            ended = self._process.poll() is not None
            reports = self.reports
            if ended and not reports:
                raise self._failed(f"ended with exit code {self._process.returncode}")
            return reports[0] if reports else None

        return wait_for(f"{self.name} to start", first)

    def finish(self) -> list[dict[str, Any]]:
        """Wait for its end; return its reports. Raises DemoError if it fails or takes too long."""
        try:
            code = self._process.wait(_START_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not end within {_START_TIMEOUT:.0f} seconds") from None
        if code != 0:
            raise self._failed(f"ended with exit code {code}")
        return self.reports

    def stop(self) -> None:
        """End the process if it still runs, and wait for its end."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _failed(self, what: str) -> DemoError:
        last = self._errors.read_text("utf-8", "replace").strip()[-2000:]
        return DemoError(f"{self.name} {what}" + (f"; it wrote:\n{last}" if last else ""))


class Processes:
    """All processes of one run; the end of a `with` block stops those that still run, last one first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Process] = []

    def start(self, name: str, module: str, *arguments: str) -> Process:
        """Start a process that writes to files called `name` in the directory."""
        with _hold_signals():
            process = Process(name, self._directory, module, *arguments)
            self._started.append(process)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _hold_signals():
            for process in reversed(self._started):
                process.stop()


@contextmanager
def _hold_signals() -> Iterator[None]:
    """Hold signals that would end this program and leave behind a process being started or stopped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen() -> None:
    """Unblock, in a new process, the signals that its parent holds."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def wait_for(what: str, attempt: Callable[[], _T | None]) -> _T:
    """Try until a result is not None. Raises DemoError after half a minute."""
    deadline = time.monotonic() + _START_TIMEOUT
    while True:
        result = attempt()
        if result is not None:
            return result
        if time.monotonic() > deadline:
            raise DemoError(f"waited {_START_TIMEOUT:.0f} seconds for {what}")
        time.sleep(0.02)
