"""Runs `qkd-tls`: in this process where it ends by itself, else as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

from kms_client.emulator import RunningPair
from qkd_tls.cli import main
from tests.support.patience import PATIENCE

TIMEOUT = PATIENCE

ECHO = b"hello\n"

# Where the tests were started in the background, SIGINT is ignored in all children: as from a terminal, it is not here.
PROGRAM = [
    sys.executable,
    "-c",
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from qkd_tls.cli import main; sys.exit(main())",
]


@dataclass(frozen=True)
class Site:
    """One side: the environment variables that say which KME and which files are its own."""

    environment: dict[str, str]

    @classmethod
    def of(cls, pair: RunningPair, side: Literal["a", "b"]) -> Site:
        pki = pair.pki
        mine = {
            "QKD_TLS_KME": pair.url_a if side == "a" else pair.url_b,
            "QKD_TLS_SAE_ID": f"SAE-{side.upper()}",
            "QKD_TLS_KME_CERT": str(pki.sae_a_cert if side == "a" else pki.sae_b_cert),
            "QKD_TLS_KME_KEY": str(pki.sae_a_key if side == "a" else pki.sae_b_key),
            "QKD_TLS_KME_CA": str(pki.kms_ca),
        }
        if side == "a":
            mine["QKD_TLS_CA"] = str(pki.directory / "app-ca.pem")
        else:
            mine["QKD_TLS_CERT"] = str(pki.directory / "server.pem")
            mine["QKD_TLS_KEY"] = str(pki.directory / "server.key")
        return cls(mine)

    def run(
        self, *arguments: str, input: bytes = b"", **changes: str | None
    ) -> subprocess.CompletedProcess[bytes]:
        """`qkd-tls` with these arguments, in this process, until it ends.

        `changes` are environment variables without QKD_TLS_, None for unset.
        """
        out, err = io.BytesIO(), io.BytesIO()
        with (
            mock.patch.dict(os.environ, self.variables(**changes), clear=True),
            _standard_input(input),
            contextlib.redirect_stdout(io.TextIOWrapper(out, write_through=True)),
            contextlib.redirect_stderr(io.TextIOWrapper(err, write_through=True)),
        ):
            code = _exit_code(arguments)
            return subprocess.CompletedProcess(["qkd-tls", *arguments], code, out.getvalue(), err.getvalue())

    def variables(self, **changes: str | None) -> dict[str, str]:
        """The environment of a process of this side."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("QKD_TLS_")}
        mine = self.environment | {f"QKD_TLS_{name}": value for name, value in changes.items()}
        return others | {name: value for name, value in mine.items() if value is not None}

    @contextmanager
    def start(self, *arguments: str, **changes: str | None) -> Iterator[subprocess.Popen[bytes]]:
        """The same as a running process, stopped at the end."""
        with subprocess.Popen(
            [*PROGRAM, *arguments],
            env=self.variables(**changes),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()
                process.communicate(timeout=TIMEOUT)


def _exit_code(arguments: Sequence[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        # argparse ends the program by itself.
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - shown as the interpreter does
        traceback.print_exc()
        return 1


@contextmanager
def _standard_input(data: bytes) -> Iterator[None]:
    """Let the program read this from its standard input, which it knows by its file descriptor."""
    kept = os.dup(0)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        os.dup2(file.fileno(), 0)
        reader = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: SIM115 - the descriptor is closed below
        try:
            with mock.patch.object(sys, "stdin", reader):
                yield
            for thread in threading.enumerate():
                if thread.name == "standard input":
                    thread.join(TIMEOUT)
        finally:
            reader.close()
            os.dup2(kept, 0)
            os.close(kept)


@dataclass(frozen=True)
class RunningServer:
    process: subprocess.Popen[bytes]
    address: str

    def record(self) -> dict[str, Any]:
        """The next line of JSON."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        assert ready, "the server says nothing"
        line = self.process.stdout.readline()
        assert line, "the server has ended"
        record: dict[str, Any] = json.loads(line)
        return record


@contextmanager
def running_server(site: Site, *arguments: str, **changes: str | None) -> Iterator[RunningServer]:
    """`qkd-tls serve --json` on a free port."""
    with site.start("serve", "127.0.0.1:0", "--json", *arguments, **changes) as process:
        running = RunningServer(process, "")
        listening = running.record()["listening"]
        yield RunningServer(process, listening.replace("127.0.0.1", "localhost"))


def text(result: subprocess.CompletedProcess[bytes]) -> str:
    """What it said on standard error. Nothing foreseeable ends in a traceback."""
    said = result.stderr.decode()
    assert "Traceback" not in said, said
    return said


def record(data: bytes) -> dict[str, Any]:
    """The one JSON object that was said."""
    [line] = data.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


@contextmanager
def nobody() -> Iterator[str]:
    """An address that refuses connections, for as long as the block lasts."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
