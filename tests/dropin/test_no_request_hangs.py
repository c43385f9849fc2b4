"""Requests that come together with the client's Finished, to servers that look at the descriptor before they read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kms_client.emulator import RunningPair
from tests.support.dropin.harness import Program, Sites
from tests.support.dropin.programs import PROGRAMS
from tests.support.paths import ROOT
from tests.support.patience import PATIENCE
from tests.support.sizes import sized

NUMBER = sized(1000, 20)
SERVERS = {
    "uvicorn, uvloop": "HTTP",
    "aiohttp, server, uvloop": "HTTP",
    "tornado, server": "HTTP",
    "websockets.sync, server": "WebSocket",
    "gunicorn": "HTTP",
    "gunicorn -k gevent": "HTTP",
    "Werkzeug, processes": "HTTP",
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, running_kmes: RunningPair) -> Iterator[Sites]:
    sites = Sites.make(tmp_path_factory.mktemp("requests"), running_kmes)
    yield sites
    sites.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SERVERS)
def test_all_are_answered(sites: Sites, name: str) -> None:
    program: type[Program] = next(program for program in PROGRAMS if program.name == name)
    pki = sites.kmes.pki
    with program(sites.hybrid()) as server:
        description = {
            "kind": SERVERS[name],
            "port": server.port,  # type: ignore[attr-defined]
            "number": NUMBER,
            "ca": str(sites.ca.file),
            "peer": pki.sae_b,
            "kme": {
                "url": sites.kmes.url_a,
                "sae_id": pki.sae_a,
                "cert": str(pki.sae_a_cert),
                "key": str(pki.sae_a_key),
                "ca": str(pki.kms_ca),
            },
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.dropin.many_requests", json.dumps(description)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            # One that hangs ends the client, by its own time limit.
            timeout=NUMBER + 2 * PATIENCE,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == NUMBER
