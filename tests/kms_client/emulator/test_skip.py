"""SKIP between SkipClient and the emulated KMEs: over mutual TLS, over a PSK, together with ETSI GS QKD 014."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from kms_client import (
    FailoverKeyManager,
    KeyPool,
    KMSAuthenticationError,
    KMSRequestError,
    KMSUnavailable,
    NoKeysLeft,
    QKDKey,
    SecureSite,
    SkipClient,
    UnknownKey,
    UnknownSAE,
)
from kms_client.emulator import Limits, RunningPair, run_pair
from qkd_tls import QKDInfo, create_default_context
from qkd_tls.psk_context import PSKContext
from tests.support.patience import PATIENCE

SECRET = bytes(range(48))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kmes")


@pytest.fixture(scope="module")
def pair(directory: Path) -> Iterator[RunningPair]:
    more = {"b": ["SAE-B2", "SAE*[?]"]}
    with run_pair(directory, more_saes=more, rate=0, initial=300) as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture
def sae_a(pair: RunningPair) -> Iterator[SkipClient]:
    client = pair.skip_client("a")
    yield client
    client.close()


@pytest.fixture
def sae_b(pair: RunningPair) -> Iterator[SkipClient]:
    client = pair.skip_client("b")
    yield client
    client.close()


def secret_of(key: QKDKey) -> bytes:
    with key.use() as secret:
        return bytes(secret)


class TestMutualTLS:
    def test_both_ends_get_the_same_keys(self, sae_a: SkipClient, sae_b: SkipClient) -> None:
        for initiator, responder in ((sae_a, sae_b), (sae_b, sae_a)):
            keys = initiator.get_keys(responder.sae_id, 3)
            ids = [key.key_id for key in keys]
            assert all(len(key_id) == 32 and key.size == 256 for key_id, key in zip(ids, keys, strict=True))
            found = responder.get_keys_by_id(initiator.sae_id, ids)
            assert [secret_of(key) for key in found] == [secret_of(key) for key in keys]
            assert initiator.quirks == responder.quirks == set()

    def test_from_the_same_store_as_etsi_014(self, pair: RunningPair, sae_a: SkipClient) -> None:
        etsi = pair.client("b")
        [key] = sae_a.get_keys("SAE-B", size=512)
        dashed = "-".join(key.key_id[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        assert secret_of(etsi.get_keys_by_id("SAE-A", [dashed])[0]) == secret_of(key)
        [back] = etsi.get_keys("SAE-A")
        [found] = sae_a.get_keys_by_id("SAE-B", [back.key_id.replace("-", "")])
        assert secret_of(found) == secret_of(back)
        assert [(d.key_id, d.sae_id, d.role) for d in pair.deliveries if d.key_id == dashed] == [
            (dashed, "SAE-A", "master"),
            (dashed, "SAE-B", "slave"),
        ]
        etsi.close()

    def test_capabilities_name_exactly_the_other_saes(self, sae_a: SkipClient, sae_b: SkipClient) -> None:
        found = sae_a.capabilities()
        assert (found.key, found.entropy, found.local_system_id) == (True, True, "SAE-A")
        assert [i for i in ("SAE-B", "SAE-B2", "SAE*[?]", "SAEx?", "SAE-A", "sae-b") if found.shares_keys_with(i)] == [
            "SAE-B", "SAE-B2", "SAE*[?]"]  # fmt: skip
        assert sae_b.capabilities().remote_system_ids == ("SAE-A",)
        assert sae_a.status("SAE*[?]").target_kme_id == "SAE*[?]"

    def test_entropy(self, sae_a: SkipClient) -> None:
        first, second = sae_a.entropy(), sae_a.entropy(250)
        assert len(first) == len(second) == 32
        assert first != second
        with pytest.raises(KMSRequestError, match="minentropy shall be from 1 to 8192"):
            sae_a.entropy(8193)

    def test_refusals(self, sae_a: SkipClient, sae_b: SkipClient, pair: RunningPair) -> None:
        [key] = sae_a.get_keys("SAE-B")
        [other] = sae_a.get_keys("SAE-B2")
        for unknown in ("0" * 32, key.key_id.upper(), "x", other.key_id):
            with pytest.raises(UnknownKey) as caught:
                sae_b.get_keys_by_id("SAE-A", [unknown])
            assert caught.value.status == 400
        sae_b.get_keys_by_id("SAE-A", [key.key_id])
        with pytest.raises(UnknownKey):
            sae_b.get_keys_by_id("SAE-A", [key.key_id])
        with pytest.raises(UnknownSAE):
            sae_a.get_keys("SAE-X")
        with pytest.raises(KMSRequestError, match="size shall be from"):
            sae_a.get_keys("SAE-B", size=1 << 20)
        with pytest.raises(KMSAuthenticationError, match="localSystemID is 'SAE-A'"):
            pair.skip_client("a", sae_id="SAE-B").get_keys("SAE-B")

    def test_only_get_and_only_these_paths(self, pair: RunningPair) -> None:
        cert = (str(pair.pki.sae_a_cert), str(pair.pki.sae_a_key))

        def status(method: str, path: str) -> int:
            return requests.request(
                method, pair.url_a + path, cert=cert, verify=str(pair.pki.kms_ca), timeout=PATIENCE
            ).status_code

        paths = ("/capabilities", "/key?remoteSystemID=SAE-B", "/key/00?remoteSystemID=SAE-B", "/entropy")
        assert [status(m, path) for path in paths for m in ("POST", "HEAD", "PUT", "DELETE")] == [405] * 16
        assert [status("GET", path) for path in ("/", "/keys", "/key/1/2", "/skip/key")] == [404] * 4
        assert status("GET", "/key") == 400
        assert status("GET", "/key?remoteSystemID=SAE-B&size=257") == 400
        assert status("GET", "/key?remoteSystemID=SAE-B&size=x") == 400
        assert status("GET", "/entropy?minentropy=0") == 400

    def test_no_keys_and_no_link(self, directory: Path) -> None:
        with run_pair(directory, rate=0, initial=3) as pair:
            client = pair.skip_client("a")
            with pytest.raises(NoKeysLeft, match="3 delivered before are lost") as caught:
                client.get_keys("SAE-B", 4)
            assert caught.value.keys_may_be_lost
            pair.stop_kme("b")
            with pytest.raises(NoKeysLeft, match="link to KME-B is down"):
                client.get_keys("SAE-B")
            pair.stop_kme("a")
            with pytest.raises(KMSUnavailable):
                client.get_keys("SAE-B")
            client.close()


class TestWithOthers:
    def test_pool(self, pair: RunningPair, sae_a: SkipClient, sae_b: SkipClient) -> None:
        pool = KeyPool(sae_a, low_water=2, high_water=6)
        keys = [key for _ in range(10) for key in pool.get_keys("SAE-B")]
        found = sae_b.get_keys_by_id("SAE-A", [key.key_id for key in keys])
        assert [secret_of(key) for key in found] == [secret_of(key) for key in keys]
        assert pool.protocol == "skip"
        pool.close()

    def test_failover(self, directory: Path, pair: RunningPair) -> None:
        with run_pair(directory, rate=0, initial=10) as second:
            manager = FailoverKeyManager([second.skip_client("a"), pair.skip_client("a")])
            other = FailoverKeyManager([second.skip_client("b"), pair.skip_client("b")])
            for stop in (False, True):
                if stop:
                    second.stop_kme("a")
                [key] = manager.get_keys("SAE-B")
                assert secret_of(other.get_keys_by_id("SAE-A", [key.key_id])[0]) == secret_of(key)
            manager.close()
            other.close()

    def test_a_hybrid_connection(self, pair: RunningPair, sae_a: SkipClient, sae_b: SkipClient) -> None:
        client = create_default_context(cafile=str(pair.pki.app_ca), key_manager=sae_a)
        server = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=sae_b)
        server.load_cert_chain(pair.pki.server_cert, pair.pki.server_key)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            near = socket.create_connection(listening.getsockname(), 20)
            far, _ = listening.accept()
        far.settimeout(PATIENCE)
        infos: list[QKDInfo | None] = []

        def serve() -> None:
            with server.wrap_socket(far, server_side=True) as tls:
                infos.append(tls.qkd)
                tls.sendall(tls.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        with client.wrap_socket(near, server_hostname="localhost") as tls:
            tls.sendall(b"hello")
            assert tls.recv(100) == b"hello"
            assert tls.qkd is not None
            assert (str(tls.qkd.protection), tls.qkd.kms_protocol, tls.qkd.kms) == (
                "hybrid",
                "skip",
                sae_a.name,
            )
        thread.join()
        assert infos[0] is not None
        assert (infos[0].key_id, infos[0].kms) == (tls.qkd.key_id, sae_b.name)


class PSKProvider(ThreadingHTTPServer):
    """A key provider with a PSK interface, which asks the emulator with the system's certificate."""

    daemon_threads = False

    def __init__(self, pair: RunningPair) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.emulator = pair.url_a
        self.settings: dict[str, Any] = {
            "cert": (str(pair.pki.sae_a_cert), str(pair.pki.sae_a_key)),
            "verify": str(pair.pki.kms_ca),
            "timeout": 5,
        }
        self._context = PSKContext("SAE-A", SECRET, server_side=True)

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(PATIENCE)
        with contextlib.suppress(OSError), self._context.wrap_socket(request) as tls:
            super().finish_request(tls, client_address)


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, PSKProvider)
        answer = requests.get(self.server.emulator + self.path, **self.server.settings)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def psk_url(pair: RunningPair) -> Iterator[str]:
    with PSKProvider(pair) as provider:
        thread = threading.Thread(target=provider.serve_forever, args=(0.05,))
        thread.start()
        yield f"https://127.0.0.1:{provider.server_port}"
        provider.shutdown()
        thread.join()


class TestPSK:
    def client(self, url: str, secret: bytes = SECRET, **settings: Any) -> SkipClient:
        return SkipClient(url, sae_id="SAE-A", psk_context=PSKContext("SAE-A", secret), **settings)

    def test_all_requests(self, psk_url: str, sae_b: SkipClient) -> None:
        client = self.client(psk_url)
        keys = client.get_keys("SAE-B", 2)
        found = sae_b.get_keys_by_id("SAE-A", [key.key_id for key in keys])
        assert [secret_of(key) for key in found] == [secret_of(key) for key in keys]
        [back] = sae_b.get_keys("SAE-A")
        assert secret_of(client.get_keys_by_id("SAE-B", [back.key_id])[0]) == secret_of(back)
        assert client.capabilities().local_system_id == "SAE-A"
        assert len(client.entropy(512)) == 64
        with pytest.raises(UnknownKey):
            client.get_keys_by_id("SAE-B", [back.key_id])
        assert client.quirks == set()
        client.close()

    def test_another_psk_is_refused(self, psk_url: str) -> None:
        client = self.client(psk_url, bytes(48))
        with pytest.raises(KMSAuthenticationError, match="it probably refused the pre-shared key"):
            client.get_keys("SAE-B")
        client.close()

    def test_a_provider_with_certificates_instead_is_refused(self, pair: RunningPair) -> None:
        client = self.client(pair.url_a)
        with pytest.raises(KMSAuthenticationError, match="pre-shared key"):
            client.get_keys("SAE-B")
        client.close()

    def test_outside_the_secure_site_for_ml_kem_protects_the_link(self, psk_url: str) -> None:
        client = self.client(psk_url, site=SecureSite(this_host=False))
        assert client.capabilities().key
        client.close()

    def test_either_psk_or_certificates(self, pair: RunningPair) -> None:
        with pytest.raises(ValueError, match="either psk_context or certificates"):
            self.client(pair.url_a, ca=pair.pki.kms_ca)


class TestLocalSlaves:
    """What programs need that examine a KME with one certificate; off unless asked for."""

    def test_off(self, pair: RunningPair) -> None:
        client = pair.client("a")
        with pytest.raises(UnknownSAE):
            client.get_keys("SAE-A")
        client.close()

    def test_keys_among_the_saes_of_one_kme(self, directory: Path) -> None:
        with run_pair(
            directory, rate=0, initial=10, more_saes={"b": ["SAE-B2"]}, local_slaves=True, limits=Limits()
        ) as pair:
            a, b, skip = pair.client("a"), pair.client("b"), pair.skip_client("a")
            status = a.status("SAE-A")
            assert (status.source_kme_id, status.target_kme_id) == ("KME-A", "KME-A")
            keys = a.get_keys("SAE-A", 2, 384)
            found = a.get_keys_by_id("SAE-A", [key.key_id for key in keys])
            assert [secret_of(key) for key in found] == [secret_of(key) for key in keys]
            with pytest.raises(UnknownKey):
                a.get_keys_by_id("SAE-A", [keys[0].key_id])
            # The other end has given up its copies, and goes on in step.
            assert (pair.stored("a"), pair.stored("b")) == (6, 10)
            [key] = a.get_keys("SAE-B")
            assert secret_of(b.get_keys_by_id("SAE-A", [key.key_id])[0]) == secret_of(key)
            assert skip.capabilities().shares_keys_with("SAE-A")
            for client in (a, b, skip):
                client.close()
