"""Programs that gevent has patched: what waits, waits in its own greenlet only."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kms_client.emulator import RunningPair
from tests.support.paths import ROOT
from tests.support.patience import PATIENCE


@pytest.mark.parametrize("order", ["first", "late"])
def test_a_silent_peer_and_a_silent_kme_hold_up_nobody_else(kmes: RunningPair, order: str) -> None:
    """A hundred other connections are made meanwhile, with keys from a KME and from a pool."""
    pki = kmes.pki
    description = {
        "kmes": {
            "a": {
                "url": kmes.url_a,
                "sae_id": pki.sae_a,
                "cert": str(pki.sae_a_cert),
                "key": str(pki.sae_a_key),
            },
            "b": {
                "url": kmes.url_b,
                "sae_id": pki.sae_b,
                "cert": str(pki.sae_b_cert),
                "key": str(pki.sae_b_key),
            },
        },
        "ca": str(pki.app_ca),
        "certificate": str(pki.server_cert),
        "key": str(pki.server_key),
    }
    for kme in description["kmes"].values():  # type: ignore[attr-defined]
        kme["ca"] = str(pki.kms_ca)
    done = subprocess.run(
        # Of other packages there are warnings about being patched late.
        [sys.executable, "-W", "ignore", "-m", "tests.support.greenlets", order, json.dumps(description)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["protections"] == ["hybrid"] * 100
    assert result["still waiting"]
    # It was a patched program.
    assert result["kind"].startswith("gevent.")
