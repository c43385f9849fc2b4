"""The examples as real processes, against a real pair of emulated KMEs."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES
from tests.support.patience import PATIENCE
from tests.support.ports import free_port

KEY = r"key [0-9a-f-]{36}$"


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python process and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, line
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@dataclass
class Setup:
    pki: Path
    kme_a: str
    kme_b: str

    def options(self, side: str) -> list[str]:
        kme, pki = (self.kme_a if side == "a" else self.kme_b), self.pki
        files = ["--sae-cert", f"{pki}/sae-{side}.pem", "--sae-key", f"{pki}/sae-{side}.key"]
        return ["--kme", kme, "--sae", f"SAE-{side.upper()}", *files, "--kme-ca", f"{pki}/kms-ca.pem"]

    @contextmanager
    def server(self, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
        files = ["--cert", f"{self.pki}/server.pem", "--key", f"{self.pki}/server.key"]
        with running(f"{EXAMPLES}/https_server.py", *self.options("b"), *files, "--port", "0", *more) as (
            process,
            line,
        ):
            yield process, int(line.rpartition(" ")[2])

    def client(self, port: int, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                f"{EXAMPLES}/https_client.py",
                f"https://localhost:{port}/",
                *self.options("a"),
                *("--ca", f"{self.pki}/app-ca.pem", *more),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    pki = tmp_path_factory.mktemp("pki") / "demo"
    with running("-m", "kms_client", "pair", "--dir", str(pki), "--json") as (_, line):
        yield Setup(pki, *(kme["url"] for kme in json.loads(line)["kmes"]))


@pytest.mark.parametrize("more", [[], ["--peer-sae", "SAE-B"]], ids=["server asked", "peer known"])
def test_both_sides_say_what_protects_the_connection(setup: Setup, more: list[str]) -> None:
    with setup.server() as (server, port):
        client = setup.client(port, *more)
        assert server.stdout is not None
        assert client.returncode == 0, client.stderr
        ours, theirs = client.stdout.splitlines()[0], server.stdout.readline().strip()
    assert re.fullmatch(rf"200: hybrid, X25519MLKEM768, bootstrap, {KEY}", ours)
    assert theirs == ours.replace("200:", "/:")
    assert client.stdout.splitlines()[1] == "Hello over a connection with protection hybrid."


def test_without_the_kme_require_refuses_and_names_it(setup: Setup) -> None:
    with setup.server() as (_, port):
        nowhere = f"https://127.0.0.1:{free_port()}"
        client = setup.client(port, "--kme", nowhere)
    assert client.returncode == 1
    assert client.stderr.startswith("no connection: ")
    assert nowhere in client.stderr
    assert "Traceback" not in client.stderr


def test_without_the_kme_prefer_falls_back_and_says_so(setup: Setup) -> None:
    with setup.server("--policy", "prefer") as (_, port):
        nowhere = f"https://127.0.0.1:{free_port()}"
        client = setup.client(port, "--kme", nowhere, "--policy", "prefer")
    assert client.returncode == 0, client.stderr
    assert client.stdout.splitlines()[0] == "200: pq-only, X25519MLKEM768, None, key None"
    assert "QKDFallbackWarning: no QKD key protects this connection" in client.stderr


def test_a_silent_client_does_not_hold_up_others(setup: Setup) -> None:
    with setup.server() as (_, port), socket.create_connection(("127.0.0.1", port)):
        # The silent connection is accepted first: they wait in a queue.
        client = setup.client(port)
    assert client.returncode == 0, client.stderr


def test_asyncio(setup: Setup) -> None:
    with running(f"{EXAMPLES}/asyncio_server.py", str(setup.pki), "0", setup.kme_b) as (server, line):
        client = subprocess.run(
            [sys.executable, f"{EXAMPLES}/asyncio_client.py", str(setup.pki), line.split()[1], setup.kme_a],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert client.returncode == 0, client.stderr
        assert server.stdout is not None
        assert server.stdout.readline() == "connection: hybrid\n"
    first, *later = client.stdout.splitlines()
    assert re.fullmatch(r"hello hybrid bootstrap [0-9a-f-]{36}", first)
    assert len(later) == 2
    assert all(re.fullmatch(r"hello hybrid associated [0-9a-f-]{36}", line) for line in later)
