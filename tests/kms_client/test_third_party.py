"""Clients that others have written, against the emulator: what they ask for, they get, and they like how."""

from __future__ import annotations

import base64
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etsi_qkd_014_client import QKD014Client  # type: ignore[import-untyped]
from qkdsec.client import ETSI014Client, KMEHTTPError  # type: ignore[import-untyped]
from qkdsec.doctor import format_json, run_all  # type: ignore[import-untyped]

from kms_client.emulator import DemoPKI, RunningPair, run_pair
from tests.support.requirements import COMPILED


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPair]:
    with run_pair(
        tmp_path_factory.mktemp("kmes"), more_saes={"b": ["SAE-B2"]}, rate=0, initial=50
    ) as running:
        yield running


def certificate(pki: DemoPKI, side: str) -> tuple[str, str]:
    return str(pki.directory / f"sae-{side}.pem"), str(pki.directory / f"sae-{side}.key")


class TestEtsiQkd014Client:
    def client(self, pair: RunningPair, side: str) -> Any:
        url = pair.url_a if side == "a" else pair.url_b
        return QKD014Client(url.removeprefix("https://"), *certificate(pair.pki, side), str(pair.pki.kms_ca))

    def test_status(self, pair: RunningPair) -> None:
        code, status = self.client(pair, "a").get_status("SAE-B")
        assert code == 200
        assert (status.source_kme_id, status.target_kme_id) == ("KME-A", "KME-B")
        assert (status.master_sae_id, status.slave_sae_id) == ("SAE-A", "SAE-B")
        assert (status.key_size, status.max_key_per_request, status.max_sae_id_count) == (256, 128, 4)

    @pytest.mark.parametrize(
        "wanted", [{}, {"number": 2, "size": 128}, {"additional_slave_sae_ids": ["SAE-B2"]}]
    )
    def test_keys(self, pair: RunningPair, wanted: dict[str, Any]) -> None:
        code, ours = self.client(pair, "a").get_key("SAE-B", **wanted)
        assert (code, len(ours.keys)) == (200, wanted.get("number", 1))
        assert all(8 * len(base64.b64decode(key.key)) == wanted.get("size", 256) for key in ours.keys)
        slave = self.client(pair, "b")
        ids = [key.key_id for key in ours.keys]
        code, theirs = slave.get_key_with_key_IDs("SAE-A", ids)
        assert (code, [key.key for key in theirs.keys]) == (200, [key.key for key in ours.keys])
        code, error = slave.get_key_with_key_IDs("SAE-A", ids)
        assert (code, error.message) == (400, "one or more keys specified are not found on KME")

    def test_errors(self, pair: RunningPair) -> None:
        client = self.client(pair, "a")
        assert client.get_status("SAE-X")[1].message.startswith("SAE not found")
        assert client.get_key("SAE-B", size=100)[1].message == "size shall be a multiple of 8"
        code, error = client.get_key("SAE-B", extension_mandatory=[{"vendor": 1}])
        assert (code, error.details) == (400, [{"extension_mandatory_unsupported": "vendor"}])
        code, error = client.get_key("SAE-B", number=100)
        assert code == 503
        assert error.message.startswith("not enough keys")


class TestQkdsec:
    def client(self, url: str, pki: DemoPKI, side: str) -> Any:
        return ETSI014Client(url, client_cert=certificate(pki, side), verify=str(pki.kms_ca))

    def test_client(self, pair: RunningPair) -> None:
        with (
            self.client(pair.url_a, pair.pki, "a") as master,
            self.client(pair.url_b, pair.pki, "b") as slave,
        ):
            assert master.status("SAE-B").target_kme_id == "KME-B"
            for method in ("GET", "POST"):
                ours = master.get_enc_keys("SAE-B", number=2, size=512, method=method)
                theirs = slave.get_dec_keys("SAE-A", key_ids=[key.key_id for key in ours])
                assert [key.key for key in theirs] == [key.key for key in ours]
                assert [key.size_bits for key in ours] == [512, 512]
            with pytest.raises(KMEHTTPError, match="multiple of 8"):
                master.get_enc_keys("SAE-B", size=100)

    def test_doctor(self, tmp_path: Path) -> None:
        """With one certificate, so that the KME has to take it for master and slave."""
        arguments = ["pair", "--dir", str(tmp_path), "--local-slaves", "--json"]
        command = [sys.executable, "-m", "kms_client", *arguments]
        started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None
        with started.stdout:
            try:
                url = json.loads(started.stdout.readline())["kmes"][0]["url"]
                with self.client(url, DemoPKI(tmp_path, "SAE-A", "SAE-B"), "a") as client:
                    report = json.loads(format_json(run_all(client, "SAE-A")))
            finally:
                started.send_signal(signal.SIGTERM)
                started.wait(10)
        assert report["counts"] == {"pass": 9, "warn": 1, "fail": 0, "skip": 0}
        # It expects 404 for a key that is not there; clause 6.3 of the standard has 400.
        [warning] = [result for result in report["results"] if result["status"] == "warn"]
        assert (warning["name"], warning["details"]) == ("error_contract_404", {"http_status": 400})


class TestSkipQkd:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        if importlib.util.find_spec("skip_qkd") is None:
            raise COMPILED.missing()
        self.skip_qkd = importlib.import_module("skip_qkd")

    def client(self, pair: RunningPair, side: str) -> Any:
        """For one request: it does not open a second connection."""
        url = pair.url_a if side == "a" else pair.url_b
        files = self.skip_qkd.MTLSConfig(str(pair.pki.kms_ca), *certificate(pair.pki, side))
        return self.skip_qkd.SkipQKDClient(url.removeprefix("https://"), "KP", files)

    def test_capabilities(self, pair: RunningPair) -> None:
        assert self.client(pair, "a").capabilities() == {
            "entropy": True,
            "key": True,
            "algorithm": "emulated-qkd",
            "localSystemID": "SAE-A",
            "remoteSystemID": ["SAE-B", "SAE-B2"],
        }

    @pytest.mark.parametrize("size", [None, 128])
    def test_keys(self, pair: RunningPair, size: int | None) -> None:
        ours = self.client(pair, "a").request_key("SAE-B", size)
        theirs = self.client(pair, "b").fetch_key_by_id(ours["keyId"], "SAE-A")
        assert theirs == ours
        assert len(ours["keyId"]) == 32
        assert 4 * len(ours["key"]) == (size or 256)
        with pytest.raises(RuntimeError, match="400"):
            self.client(pair, "b").fetch_key_by_id(ours["keyId"], "SAE-A")

    def test_entropy(self, pair: RunningPair) -> None:
        answer = self.client(pair, "a").entropy(512)
        assert (len(answer["randomStr"]), answer["minentropy"]) == (128, 512)
