"""KMEs that differ from the standard, as running ones were seen to; and the options of the client for some of them.

Each is a real HTTPS server that answers exactly so. `quirks` must say what was met, and nothing else.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs12

import kms_client.etsi014
from kms_client import (
    Etsi014Client,
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    UnknownKey,
    UnknownSAE,
)
from kms_client.emulator import DemoPKI, write_demo_pki
from kms_client.emulator.kme import server_context
from tests.support.kme_server import client_of, container, everything_in, http, issue, scripted

ID = "550e8400-e29b-41d4-a716-446655440000"
OTHER = "650e8400-e29b-41d4-a716-446655440abc"
KEY = bytes(range(200, 232))
KEY2 = bytes(range(100, 132))
TEXT = base64.b64encode(KEY).decode()
STATUS: dict[str, Any] = {
    "source_KME_ID": "KME-A",
    "target_KME_ID": "KME-B",
    "master_SAE_ID": "SAE-A",
    "slave_SAE_ID": "SAE-B",
    "key_size": 256,
    "stored_key_count": 7,
    "max_key_count": 100,
    "max_key_per_request": 8,
    "max_key_size": 1024,
    "min_key_size": 64,
    "max_SAE_ID_count": 0,
}
Kind = type[KMSError]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


def call(client: Etsi014Client, name: str) -> Any:
    calls: dict[str, Callable[[], Any]] = {
        "status": lambda: client.status("SAE-B"),
        "enc_keys": lambda: client.get_keys("SAE-B"),
        "dec_keys": lambda: client.get_keys_by_id("SAE-B", [ID]),
    }
    return calls[name]()


class TestCopedWith:
    @pytest.mark.parametrize(
        ("answer", "quirks"),
        [
            ({"Keys": [{"key_ID": ID, "key": TEXT}]}, {"Keys for keys"}),
            ({"keys": [{"key_id": ID, "key": TEXT}]}, {"key_id for key_ID"}),
            ({"keys": [{"key_ID": ID, "key": KEY.hex()}]}, {"hexadecimal key"}),
            (
                {"keys": [{"key_ID": ID, "key": base64.urlsafe_b64encode(KEY).decode()}]},
                {"URL-safe base64 key"},
            ),
            ({"keys": [{"key_ID": ID, "key": TEXT.rstrip("=")}]}, {"unpadded base64 key"}),
            ({"keys": [{"key_ID": ID, "key": TEXT, "expires": 5}]}, {"extra members"}),
            ({"keys": [{"key_ID": ID, "key": TEXT}], "vendor": {}}, {"extra members"}),
            ({"keys": [{"key_ID": ID, "key": TEXT, "key_extension": None}]}, {"null members"}),
            ({"keys": [{"key_ID": ID, "key": TEXT, "key_extension": {"a": 1}}]}, set()),
        ],
    )
    @pytest.mark.parametrize("name", ["enc_keys", "dec_keys"])
    def test_key_containers(self, pki: DemoPKI, name: str, answer: Any, quirks: set[str]) -> None:
        with scripted(pki, http(200, answer)) as (client, _):
            [key] = call(client, name)
            with key.use() as secret:
                assert (key.key_id, secret) == (ID, KEY)
            assert client.quirks == quirks

    @pytest.mark.parametrize(
        ("changes", "quirks"),
        [
            ({}, set()),
            ({"vendor": 1}, {"extra members"}),
            ({"status_extension": None}, {"null members"}),
            ({"status_extension": "none"}, {"status_extension is no object"}),
            ({"source_KME_ID": None, "max_SAE_ID_count": None}, {"null members"}),
        ],
    )
    def test_status(self, pki: DemoPKI, changes: dict[str, Any], quirks: set[str]) -> None:
        with scripted(pki, http(200, {**STATUS, **changes})) as (client, _):
            assert client.status("SAE-B").stored_key_count == 7
            assert client.quirks == quirks

    def test_key_ids_in_another_letter_case(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, container((ID.upper(), KEY)))) as (client, _):
            [key] = client.get_keys_by_id("SAE-B", [ID])
            assert key.key_id == ID
            assert client.quirks == {"letter case of key ID changed"}

    def test_a_kme_that_knows_a_key_id_in_one_letter_case_only(self, pki: DemoPKI) -> None:
        mixed = ID[:-3] + "AbC"

        def answer(sock: ssl.SSLSocket) -> None:
            asked = json.loads(server.requests[-1][1])["key_IDs"][0]["key_ID"]
            known = asked == mixed
            sock.sendall(http(200, container((mixed, KEY))) if known else http(404, {"message": "no key"}))

        with scripted(pki, answer) as (client, server):
            with pytest.raises(UnknownKey):
                client.get_keys_by_id("SAE-B", [mixed.lower()])
            assert client.get_keys_by_id("SAE-B", [mixed])[0].key_id == mixed

    def test_one_that_ignores_number_and_size_on_get(self, pki: DemoPKI) -> None:
        def answer(sock: ssl.SSLSocket) -> None:
            line, body = server.requests[-1]
            asked = json.loads(body) if line.startswith("POST") else {}
            number, size = asked.get("number", 1), asked.get("size", 128)
            keys = [(f"{ID[:-1]}{n}", bytes([n + 1]) * (size // 8)) for n in range(number)]
            sock.sendall(http(200, container(*keys)))

        with scripted(pki, answer) as (client, server):
            assert [key.size for key in client.get_keys("SAE-B", 3)] == [256, 256, 256]
            assert client.quirks == set()

    def test_a_path_prefix_and_header_fields(self, pki: DemoPKI) -> None:
        def answer(sock: ssl.SSLSocket) -> None:
            right = (
                server.requests[-1][0].startswith("POST /gateway/7/api/v1/keys/")
                and server.headers[-1].get("x-tenant") == "seven"
            )
            sock.sendall(http(200, container((ID, KEY))) if right else http(403))

        with scripted(pki, answer) as (_, server):
            url = f"https://127.0.0.1:{server.port}/gateway/7"
            client = client_of(pki, url, headers={"X-Tenant": "seven", "Accept": "*/*"})
            assert client.get_keys("SAE-B")
            assert server.headers[-1]["accept"] == "*/*"
            client.close()

    def test_one_that_wants_the_masters_id_in_each_entry(self, pki: DemoPKI) -> None:
        def answer(sock: ssl.SSLSocket) -> None:
            [entry] = json.loads(server.requests[-1][1])["key_IDs"]
            right = entry == {"key_ID": ID, "master_SAE_ID": "SAE-B"}
            sock.sendall(
                http(200, container((ID, KEY))) if right else http(400, {"message": "no master_SAE_ID"})
            )

        with scripted(pki, answer, master_in_key_ids=True) as (client, server):
            assert client.get_keys_by_id("SAE-B", [ID])
            plain = client_of(pki, client.name)
            with pytest.raises(KMSRequestError, match="the KME refused: no master_SAE_ID"):
                plain.get_keys_by_id("SAE-B", [ID])
            plain.close()

    def test_a_certificate_without_a_san(self, pki: DemoPKI, tmp_path: Path) -> None:
        context = server_context(*issue(pki, tmp_path / "kme", "localhost"), pki.kms_ca)
        with scripted(pki, http(200, container((ID, KEY))), context=context) as (by_address, _):
            by_name = client_of(pki, by_address.name.replace("127.0.0.1", "localhost"))
            assert by_name.get_keys("SAE-B")
            assert by_name.quirks == {"certificate without a subject alternative name"}
            with pytest.raises(KMSAuthenticationError, match="mismatch") as caught:
                by_address.get_keys("SAE-B")
            assert "server_hostname" in caught.value.hint
            named = client_of(pki, by_address.name, server_hostname="localhost")
            assert named.get_keys("SAE-B")
            by_name.close()
            named.close()


class TestErrorsOfAllKinds:
    @pytest.mark.parametrize(
        ("status", "body", "name", "kind", "quirks"),
        [
            (404, {"message": "x"}, "dec_keys", UnknownKey, {"status 404 for dec_keys"}),
            (410, {"message": "x"}, "dec_keys", UnknownKey, {"status 410 for dec_keys"}),
            (401, {"message": "unknown key"}, "dec_keys", UnknownKey, set()),
            (401, "", "dec_keys", KMSAuthenticationError, set()),
            (404, {"message": "x"}, "status", UnknownSAE, {"status 404 for status"}),
            (409, {"message": "x"}, "enc_keys", KMSRequestError, {"status 409 for enc_keys"}),
            (412, {"message": "x"}, "enc_keys", KMSRequestError, {"status 412 for enc_keys"}),
            (422, {"message": "x"}, "enc_keys", KMSRequestError, {"status 422 for enc_keys"}),
            (500, {"message": "x"}, "enc_keys", KMSUnavailable, {"status 500 for enc_keys"}),
            (504, {"message": "x"}, "enc_keys", KMSTimeout, {"status 504 for enc_keys"}),
            (400, "<html>no</html>", "enc_keys", KMSRequestError, {"error body is no JSON object"}),
            (503, "<html>no</html>", "status", KMSUnavailable, {"error body is no JSON object"}),
            (503, "", "enc_keys", KMSUnavailable, {"empty error body"}),
            (400, {"detail": "size too big"}, "enc_keys", KMSRequestError, {"detail for message"}),
            (400, {"error": "no keys"}, "enc_keys", NoKeysLeft, {"error for message"}),
            (400, {"detail": [{"loc": 1}]}, "enc_keys", KMSRequestError, {"error body without a message"}),
            (400, {"message": "x"}, "enc_keys", KMSRequestError, set()),
        ],
    )
    def test_named(
        self, pki: DemoPKI, status: int, body: Any, name: str, kind: Kind, quirks: set[str]
    ) -> None:
        with scripted(pki, http(status, body)) as (client, _):
            with pytest.raises(KMSError) as caught:
                call(client, name)
            assert type(caught.value) is kind
            assert caught.value.status == status
            assert client.quirks == quirks


class TestRefused:
    @pytest.mark.parametrize(
        ("keys", "kind", "quirk"),
        [
            ([(ID, KEY[:16]), (OTHER, KEY2[:16])], KMSProtocolError, "keys of another size than asked for"),
            ([(ID, KEY)], NoKeysLeft, "fewer keys than asked for"),
            ([(ID, KEY), (OTHER, KEY2), (ID[::-1], KEY)], KMSProtocolError, "more keys than asked for"),
        ],
    )
    def test_other_keys_than_asked_for(
        self, pki: DemoPKI, keys: list[tuple[str, bytes]], kind: Kind, quirk: str
    ) -> None:
        with scripted(pki, http(200, container(*keys))) as (client, _):
            with pytest.raises(kind):
                client.get_keys("SAE-B", 2)
            assert quirk in client.quirks

    def test_other_ids_than_asked_for(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, container((OTHER, KEY))), http(200, container())) as (client, _):
            with pytest.raises(KMSProtocolError):
                client.get_keys_by_id("SAE-B", [ID])
            with pytest.raises(UnknownKey):
                client.get_keys_by_id("SAE-B", [ID])
            assert client.quirks == {"keys that were not asked for", "fewer keys than asked for"}

    def test_one_that_does_not_delete_what_it_delivers(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, container((ID, KEY)))) as (client, _):
            assert client.get_keys_by_id("SAE-B", [ID])
            with pytest.raises(UnknownKey, match=f"a second time .*{ID}"):
                client.get_keys_by_id("SAE-B", [ID])
            assert client.quirks == {"delivered keys are delivered again"}
            # Another master's key of this name, and one for us as a master, are others.
            assert client.get_keys_by_id("SAE-C", [ID])
            assert client.get_keys("SAE-B")
            with pytest.raises(KMSProtocolError, match=f"a second time .*{ID}"):
                client.get_keys("SAE-B")

    def test_what_was_delivered_is_remembered_for_a_while(
        self, pki: DemoPKI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kms_client.etsi014, "_MAX_REMEMBERED", 1)
        answers = [http(200, container((key_id, KEY))) for key_id in (ID, OTHER, ID)]
        with scripted(pki, *answers) as (client, _):
            for _answer in answers:
                assert client.get_keys("SAE-B")

    def test_one_that_drops_the_first_batch_when_asked_for_a_second(self, pki: DemoPKI) -> None:
        batch: list[str] = []

        def answer(sock: ssl.SSLSocket) -> None:
            line, body = server.requests[-1]
            if "enc_keys" in line:
                batch[:] = [f"{ID[:-1]}{len(server.requests)}"]
            elif json.loads(body)["key_IDs"][0]["key_ID"] not in batch:
                sock.sendall(http(400, {"message": "one or more keys specified are not found on KME"}))
                return
            sock.sendall(http(200, container((batch[0], KEY))))

        with scripted(pki, answer) as (client, server):
            [first], [second] = client.get_keys("SAE-B"), client.get_keys("SAE-B")
            with pytest.raises(UnknownKey) as caught:
                client.get_keys_by_id("SAE-B", [first.key_id])
            assert caught.value.key_ids == (first.key_id,)
            assert client.get_keys_by_id("SAE-B", [second.key_id])

    def test_one_that_listens_and_never_answers(self, pki: DemoPKI) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"https://127.0.0.1:{silent.getsockname()[1]}"
            client = client_of(pki, url, connect_timeout=0.2)
            with pytest.raises(KMSTimeout, match="no connection within"):
                client.status("SAE-B")


PASSWORD = "not to be seen: pässword"


@pytest.fixture(scope="module")
def credentials(pki: DemoPKI) -> dict[str, Path]:
    """The SAE's key encrypted, and with its certificate as PKCS#12, both under `PASSWORD`."""
    key = serialization.load_pem_private_key(pki.sae_a_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    cert = x509.load_pem_x509_certificate(pki.sae_a_cert.read_bytes())
    ca = x509.load_pem_x509_certificate(pki.kms_ca.read_bytes())
    encryption = serialization.BestAvailableEncryption(PASSWORD.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    plain = serialization.NoEncryption()
    weak = rsa.generate_private_key(65537, 1024)
    subject = cert.subject
    weak_cert = (
        x509.CertificateBuilder(subject, subject, weak.public_key(), 1)
        .not_valid_before(cert.not_valid_before_utc)
        .not_valid_after(cert.not_valid_after_utc)
        .sign(weak, hashes.SHA256())
    )  # fmt: skip
    contents = {
        "key": pem,
        "both": pki.sae_a_cert.read_bytes() + pem,
        "p12": pkcs12.serialize_key_and_certificates(b"SAE-A", key, cert, [ca], encryption),
        "open.p12": pkcs12.serialize_key_and_certificates(b"SAE-A", key, cert, None, plain),
        "no-key.p12": pkcs12.serialize_key_and_certificates(b"SAE-A", None, None, [cert], encryption),
        "weak.p12": pkcs12.serialize_key_and_certificates(None, weak, weak_cert, None, encryption),
        "password": PASSWORD.encode() + b"\n",
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = pki.directory / f"encrypted-{name}"
        paths[name].write_bytes(content)
        paths[name].chmod(0o600)
    return paths


class TestCredentials:
    @pytest.mark.parametrize("form", ["str", "bytes", "file", "function"])
    @pytest.mark.parametrize("kind", ["key", "both", "pkcs12"])
    def test_encrypted(self, pki: DemoPKI, credentials: dict[str, Path], form: str, kind: str) -> None:
        passwords: dict[str, Any] = {
            "str": PASSWORD,
            "bytes": PASSWORD.encode(),
            "file": credentials["password"],
            "function": lambda: PASSWORD,
        }
        kinds: dict[str, dict[str, Any]] = {
            "key": {"key": credentials["key"]},
            "both": {"cert": credentials["both"], "key": None},
            "pkcs12": {"pkcs12": credentials["p12"]},
        }
        settings = {**kinds[kind], "key_password": passwords[form]}
        with scripted(pki, http(200, container((ID, KEY))), **settings) as (client, _):
            assert client.get_keys("SAE-B")
            assert PASSWORD not in repr(client) + repr(vars(client)) + repr(vars(client._https))

    def test_pkcs12_without_a_password(self, pki: DemoPKI, credentials: dict[str, Path]) -> None:
        with scripted(pki, http(200, container((ID, KEY))), pkcs12=credentials["open.p12"]) as (client, _):
            assert client.get_keys("SAE-B")

    def test_nothing_is_written_to_a_disk_and_nothing_left_open(
        self, pki: DemoPKI, credentials: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        before = os.listdir("/proc/self/fd")
        written: list[str] = []
        real = os.open

        def watched(path: Any, *rest: Any, **more: Any) -> int:
            written.append(path)
            return real(path, *rest, **more)

        monkeypatch.setattr(os, "open", watched)
        client_of(pki, "https://kme", pkcs12=credentials["p12"], key_password=PASSWORD).close()
        assert (written, list(tmp_path.iterdir())) == ([], [])
        assert len(os.listdir("/proc/self/fd")) == len(before)

    @pytest.mark.parametrize(
        ("settings", "says", "hint"),
        [
            ({"key": "key"}, "cannot be loaded from", "The private key is encrypted: give key_password"),
            ({"key": "key", "key_password": "wrong"}, "cannot be loaded from", "Check key_password"),
            ({"pkcs12": "p12"}, "Invalid password", "Check key_password"),
            ({"pkcs12": "p12", "key_password": "wrong"}, "Invalid password", "Check key_password"),
            (
                {"pkcs12": "key", "key_password": PASSWORD},
                "Could not deserialize",
                "that the file is PKCS#12",
            ),
            ({"pkcs12": "nowhere", "key_password": PASSWORD}, "No such file", "that the file is PKCS#12"),
            ({"pkcs12": "no-key.p12", "key_password": PASSWORD}, "it has no private key", "Check the CA"),
            ({"pkcs12": "weak.p12", "key_password": PASSWORD}, "EE_KEY_TOO_SMALL", "Check the CA"),
            (
                {"key": "key", "key_password": Path("/nowhere")},
                "cannot be read from /nowhere: No such",
                "Check",
            ),
        ],
    )
    def test_that_cannot_be_loaded(
        self,
        pki: DemoPKI,
        credentials: dict[str, Path],
        caplog: pytest.LogCaptureFixture,
        settings: dict[str, Any],
        says: str,
        hint: str,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        files = {
            name: credentials.get(value, value) for name, value in settings.items() if name != "key_password"
        }
        password = {name: value for name, value in settings.items() if name == "key_password"}
        with pytest.raises(KMSAuthenticationError, match=says) as caught:
            client_of(pki, "https://kme", **files, **password)
        assert hint in caught.value.hint
        assert caught.value.kms == "https://kme"
        assert PASSWORD not in everything_in(caught.value) + caplog.text

    def test_a_password_file_that_everybody_may_read(
        self, pki: DemoPKI, credentials: dict[str, Path], tmp_path: Path
    ) -> None:
        file = tmp_path / "password"
        file.write_text(PASSWORD)
        file.chmod(0o644)
        with pytest.raises(KMSAuthenticationError, match=r"everybody .* \(mode 0644\)") as caught:
            client_of(pki, "https://kme", key=credentials["key"], key_password=file)
        assert caught.value.hint == "chmod 600 it."

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"cert": None, "key": None}, "give cert and key, or pkcs12"),
            ({"ca": None}, "give ca"),
        ],
    )
    def test_missing(self, pki: DemoPKI, change: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            client_of(pki, "https://kme", **change)

    def test_given_twice(self, pki: DemoPKI, credentials: dict[str, Path]) -> None:
        files: dict[str, Any] = {"ca": pki.kms_ca, "pkcs12": credentials["p12"], "key": pki.sae_a_key}
        with pytest.raises(ValueError, match="give cert and key, or pkcs12"):
            Etsi014Client("https://kme", sae_id="SAE-A", **files)


class TestOwnContext:
    def test_keys(self, pki: DemoPKI) -> None:
        context = ssl.create_default_context(cafile=pki.kms_ca)
        context.load_cert_chain(pki.sae_a_cert, pki.sae_a_key)
        with scripted(pki, http(200, container((ID, KEY))), ssl_context=context) as (client, _):
            assert client.get_keys("SAE-B")

    def test_one_that_checks_nothing(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        with pytest.raises(ValueError, match="must check the KME"):
            Etsi014Client("https://kme", sae_id="SAE-A", ssl_context=context)
        context.verify_mode = ssl.CERT_NONE
        with pytest.raises(ValueError, match="must check the KME"):
            Etsi014Client("https://kme", sae_id="SAE-A", ssl_context=context)

    def test_certificates_beside_it(self, pki: DemoPKI) -> None:
        with pytest.raises(ValueError, match="give either ssl_context or"):
            Etsi014Client(
                "https://kme", sae_id="SAE-A", ssl_context=ssl.create_default_context(), ca=pki.kms_ca
            )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X Tenant", "secret"),
        ("", "secret"),
        ("X-Tenant", "secret\r\nX: y"),
        ("X-Tenant", "secrät"),
        ("X-Tenant", " secret"),
        ("Content-Length", "secret"),
        ("host", "secret"),
    ],
)
def test_header_fields_that_cannot_be(pki: DemoPKI, name: str, value: str) -> None:
    with pytest.raises(ValueError, match="header field") as caught:
        client_of(pki, "https://kme", headers={name: value})
    assert "secr" not in str(caught.value)
