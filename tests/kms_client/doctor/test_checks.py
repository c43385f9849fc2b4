"""`qkd-kme doctor` at real KMEs: good ones, and ones that get each thing wrong."""

from __future__ import annotations

import base64
import datetime
import json
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from OpenSSL import SSL

from kms_client import KeyAlreadyUsed, KMSAuthenticationError, SecureSite
from kms_client.doctor import Report, SAECredentials, Side, Verdict, checks, examine
from kms_client.doctor.report_html import html
from kms_client.doctor.report_text import text
from kms_client.emulator import DemoPKI, Limits, OSRandomSource, RunningPair, add_sae, run_pair
from kms_client.emulator.kme import server_context
from tests.support.kme_server import spellings
from tests.support.misbehaving_kme import (
    Answered,
    Request,
    answered,
    credentials,
    diagnose,
    expect,
    found,
    setting,
    twisted,
)
from tests.support.patience import PATIENCE
from tests.support.ports import free_port

PASS, WARN, FAIL, SKIP = Verdict
REFUSALS = [
    "limits.number",
    "limits.zero",
    "limits.size-multiple",
    "limits.size-min",
    "limits.size-max",
    "errors.unknown-sae",
    "errors.malformed-json",
    "errors.wrong-type",
    "errors.extension",
    "errors.unknown-key-post",
    "errors.unknown-key-get",
    "by-id.not-slave",
    "by-id.wrong-slave",
    "by-id.deleted",
]
WITH_STANDARD_TEXT = [
    "limits.size-multiple",
    "errors.extension",
    "errors.unknown-key-post",
    "errors.unknown-key-get",
    "by-id.deleted",
]


class Recorded(OSRandomSource):
    """A source that remembers its keys."""

    def __init__(self) -> None:
        super().__init__(rate=1000)
        self.made: list[bytes] = []

    def make(self) -> bytearray:
        key = super().make()
        self.made.append(bytes(key))
        return key


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slow machine be no finding about the KME."""
    monkeypatch.setattr(checks, "_SLOW", PATIENCE)


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    with run_pair(more_saes={"b": ["SAE-C"]}) as running:
        yield running


@pytest.fixture(scope="module")
def other(pair: RunningPair) -> SAECredentials:
    cert, key = add_sae(pair.pki, "SAE-C", "sae-c")
    return SAECredentials("SAE-C", pair.pki.kms_ca, cert=cert, key=key)


def as_it_is(request: Request) -> Answered:
    return request.forward()


# --- good KMEs


def test_a_pair_without_fault(other: SAECredentials) -> None:
    source = Recorded()
    said: list[str] = []
    with run_pair(source=source, buffer=60, more_saes={"b": ["SAE-C"]}) as pair:
        cert, key = add_sae(pair.pki, "SAE-C", "sae-c")
        third = SAECredentials("SAE-C", pair.pki.kms_ca, cert=cert, key=key)
        report = examine(setting(pair.pki, pair.url_a, pair.url_b, other=third, progress=said.append))
        delivered = [d for d in pair.deliveries if d.role == "master"]
        fetched = [d for d in pair.deliveries if d.role == "slave"]
    assert report.counts == {PASS: len(report.findings) - 1, WARN: 0, FAIL: 0, SKIP: 1}
    expect(report, "by-id.wrong-slave", SKIP, "the third SAE is one of side B", "B")
    assert report.keys == len(delivered) == 12
    assert sorted(d.key_id for d in delivered) == sorted(d.key_id for d in fetched)
    assert report.exit_code() == report.exit_code(strict=True) == 0
    assert {finding.check for finding in report.findings} == {check.name for check in checks.CHECKS}
    assert any("key rate" in line for line in said)
    shown = text(report) + html(report) + json.dumps(report.as_dict()) + repr(report) + "\n".join(said)
    assert len(source.made) >= 120
    for secret in source.made:
        for spelling in spellings(secret):
            assert spelling not in shown


def test_one_kme_alone(pair: RunningPair) -> None:
    report = examine(setting(pair.pki, pair.url_a))
    assert report.counts[FAIL] == report.counts[WARN] == 0
    assert found(report, "status.pair", "A-B") == []
    for check in ("by-id.post", "by-id.get", "by-id.several", "by-id.deleted", "by-id.not-slave"):
        expect(report, check, SKIP, "needs the other side too")
    assert report.keys == 6


def test_no_keys_are_taken_where_that_is_forbidden(pair: RunningPair) -> None:
    before = len(pair.deliveries)
    report = examine(setting(pair.pki, pair.url_a, pair.url_b, take_keys=False))
    assert len(pair.deliveries) == before
    assert report.keys == 0
    assert report.counts[FAIL] == report.counts[WARN] == 0
    for check in ("get-key.post", "limits.number", "by-id.post"):
        expect(report, check, SKIP, "--no-keys")


def test_few_keys_are_left_alone() -> None:
    with run_pair(initial=3, rate=0) as pair:
        report = examine(setting(pair.pki, pair.url_a, pair.url_b))
        assert pair.deliveries == []
    expect(report, "get-key.post", SKIP, "3 keys are stored, 8 needed")
    expect(report, "by-id.post", SKIP, "no key was delivered to the master")
    expect(report, "by-id.not-slave", SKIP, "no key was delivered to the master")
    expect(report, "by-id.deleted", SKIP, "no key was delivered to the slave")
    expect(report, "rate", WARN, "no more keys")


def test_a_third_sae_without_a_key_to_ask_for(other: SAECredentials) -> None:
    with run_pair(initial=0, rate=0, more_saes={"b": ["SAE-C"]}) as pair:
        report = examine(setting(pair.pki, pair.url_a, pair.url_b, other=other))
    expect(report, "by-id.wrong-slave", SKIP, "no key was delivered to the master")


def test_a_rate_is_measured() -> None:
    with run_pair(initial=0, rate=400) as pair:
        report = examine(setting(pair.pki, pair.url_a, seconds=0.3))
    expect(report, "rate", PASS, "keys/s")


def test_tight_limits() -> None:
    limits = Limits(max_key_per_request=1, min_key_size=8, max_key_size=8)
    with run_pair(key_size=8, limits=limits, buffer=20) as pair:
        report = examine(setting(pair.pki, pair.url_a))
    expect(report, "get-key.get-query", SKIP, "one key a request")
    expect(report, "get-key.size", SKIP, "keys of 8 bits only")
    expect(report, "limits.size-min", SKIP, "no whole number of bytes")
    expect(report, "status.values", WARN, "keys of 256 bits are not possible")
    assert report.counts[FAIL] == 0
    assert report.exit_code(strict=True) == 3


def test_a_kme_without_a_limit_is_not_emptied() -> None:
    with run_pair(limits=Limits(max_key_per_request=5000)) as pair:
        expect(examine(setting(pair.pki, pair.url_a)), "limits.number", SKIP, "would use up 5001 keys")


# --- refusals


def fresh_container(request: Request) -> Answered:
    """Keys for everything: those the real KME delivers, else new ones, under the IDs asked for."""
    answer = request.forward()
    if answer.status == 200 or request.call == "status":
        return answer
    asked = [entry["key_ID"] for entry in json.loads(request.body or b"{}").get("key_IDs", [])] if (
        request.call == "dec_keys" and request.method == "POST") else [str(uuid.uuid4())]  # fmt: skip
    key = base64.b64encode(bytes(32)).decode()
    return answered(200, {"keys": [{"key_ID": key_id, "key": key} for key_id in asked]})


def changed_refusals(change: Callable[[Answered], Answered]) -> Callable[[Request], Answered]:
    def twist(request: Request) -> Answered:
        answer = request.forward()
        return answer if answer.status == 200 else change(answer)

    return twist


def test_a_kme_that_refuses_nothing(pair: RunningPair, other: SAECredentials) -> None:
    report = diagnose(pair, lambda request: lenient(request), other=other)
    for check in REFUSALS:
        expect(report, check, FAIL, "accepted, 1 key delivered")
    expect(report, "errors.path", WARN, "status 200")
    expect(report, "errors.method", WARN, "status 200")
    assert report.exit_code() == 1


def lenient(request: Request) -> Answered:
    # PUT .../status and the unknown call too.
    if request.method == "PUT" or request.call == "no_such_call":
        return answered(200, {})
    if request.call == "enc_keys" and request.body == b'{"number": 1':
        request = request._replace(body=b"{}")
    return fresh_container(request)


def test_a_kme_with_other_status_codes_and_html(pair: RunningPair, other: SAECredentials) -> None:
    page = Answered(404, b"<html><h1>Not found</h1></html>", "text/html")
    report = diagnose(pair, changed_refusals(lambda _: page), other=other)
    for check in REFUSALS:
        expect(report, check, WARN, "refused with status 404; the standard has 4")
    for check in ("errors.path", "errors.method"):
        expect(report, check, WARN, "status 404, without a JSON message")
    assert report.counts[FAIL] == 0
    assert (report.exit_code(), report.exit_code(strict=True)) == (0, 3)


def test_a_kme_without_messages(pair: RunningPair) -> None:
    report = diagnose(pair, changed_refusals(lambda answer: answered(answer.status, {"detail": "no"})))
    for check in REFUSALS:
        if check != "by-id.wrong-slave":
            expect(report, check, WARN, "without a JSON message")


def test_a_kme_with_texts_of_its_own(pair: RunningPair) -> None:
    report = diagnose(pair, changed_refusals(lambda answer: answered(answer.status, {"message": "No."})))
    for check in WITH_STANDARD_TEXT:
        expect(report, check, WARN, "the standard's text is")
    assert {f.check for f in report.findings if f.verdict is WARN} == set(WITH_STANDARD_TEXT)


def test_a_kme_that_answers_401_to_the_master_as_slave(pair: RunningPair) -> None:
    def twist(request: Request) -> Answered:
        answer = request.forward()
        return Answered(401, b"") if request.call == "dec_keys" and answer.status == 400 else answer

    report = diagnose(pair, twist)
    expect(report, "by-id.not-slave", PASS, "status 401")
    expect(report, "errors.unknown-key-post", WARN, "status 401; the standard has 400")


def test_a_kme_that_breaks_down_at_errors(pair: RunningPair) -> None:
    report = diagnose(pair, changed_refusals(lambda _: answered(500, {"message": "oops"})), both=False)
    expect(report, "errors.path", WARN, 'status 500, "oops"')
    expect(report, "errors.malformed-json", WARN, 'status 500, "oops"; the standard has 400')


def test_a_message_that_has_a_key_in_it_is_not_shown(pair: RunningPair) -> None:
    secret = base64.b64encode(bytes(range(32))).decode()
    report = diagnose(
        pair, changed_refusals(lambda a: answered(a.status, {"message": f"not {secret}"})), both=False
    )
    expect(report, "errors.malformed-json", PASS, "not [...]")
    assert secret not in text(report) + html(report) + json.dumps(report.as_dict())


# --- status


def status_with(**members: Any) -> Callable[[Request], Answered]:
    def twist(request: Request) -> Answered:
        answer = request.forward()
        if request.call != "status" or answer.status != 200:
            return answer
        return answered(200, {n: v for n, v in {**answer.json(), **members}.items() if v != "absent"})

    return twist


def test_a_status_that_lacks_members(pair: RunningPair) -> None:
    twist = status_with(key_size="absent", source_KME_ID=7, max_key_count=True, status_extension=[], vendor=1)
    report = diagnose(pair, twist, both=False)
    expect(
        report,
        "status.members",
        FAIL,
        "source_KME_ID is not a string with something in it; key_size is missing;",
    )
    expect(
        report,
        "status.members",
        FAIL,
        "max_key_count is not a number from 0 up; status_extension is not an object",
    )
    expect(report, "status.members", WARN, "does not have: vendor")
    expect(report, "status.values", FAIL, "no client can use it")
    expect(report, "get-key.post", SKIP, "status cannot be used")


def test_a_status_of_the_other_kme_that_cannot_be_used(pair: RunningPair) -> None:
    with twisted(pair, "b", status_with(key_size=None)) as url:
        report = examine(setting(pair.pki, pair.url_a, url))
    expect(report, "by-id.post", SKIP, "the KME of side B gives no usable status")


def test_a_status_whose_numbers_do_not_go_together(pair: RunningPair) -> None:
    twist = status_with(
        key_size=0, min_key_size=1, stored_key_count=9, max_key_count=8, max_key_per_request=0,
        source_KME_ID="X", target_KME_ID="X", master_SAE_ID="someone")  # fmt: skip
    report = diagnose(pair, twist, take_keys=False)
    for seen in (
        "key_size 0 is not from 1 to 4096",
        "key_size 0 is not a number of whole bytes",
        "stored_key_count 9 is above max_key_count 8",
        "max_key_per_request is 0",
        "source_KME_ID and target_KME_ID are the same",
    ):
        expect(report, "status.values", WARN, seen)
    expect(report, "status.values", FAIL, "master_SAE_ID is someone, not SAE-A")


def test_kmes_that_do_not_belong_together(pair: RunningPair) -> None:
    report = diagnose(pair, status_with(source_KME_ID="X"), take_keys=False)
    expect(report, "status.pair", FAIL, "source_KME_ID is X at A, target_KME_ID is KME-A at B", "A-B")


@pytest.mark.parametrize("body", [b"[]", b"{", b"<html>"], ids=["list", "cut", "html"])
def test_a_status_that_is_none(pair: RunningPair, body: bytes) -> None:
    report = diagnose(pair, lambda _: Answered(200, body), both=False)
    expect(report, "identity.accepted", FAIL, "not a JSON object")
    expect(report, "status.members", SKIP, "the KME gives no status")


def test_an_sae_that_is_not_known(pair: RunningPair) -> None:
    report = diagnose(pair, lambda _: answered(401, {"message": "who are you"}), both=False)
    expect(report, "identity.accepted", FAIL, 'status 401, "who are you"')


def test_another_content_type(pair: RunningPair) -> None:
    report = diagnose(pair, lambda r: r.forward()._replace(content_type="text/plain"), take_keys=False)
    expect(report, "status.content-type", WARN, "text/plain, not application/json")


def test_a_kme_that_serves_one_connection_only(pair: RunningPair) -> None:
    asked = 0

    def twist(request: Request) -> Answered:
        nonlocal asked
        asked += request.call == "status"
        if asked == 2:  # after that of the SAE
            raise ConnectionResetError
        return request.forward()

    report = diagnose(pair, twist, both=False, take_keys=False)
    expect(report, "status.content-type", FAIL, "no answer on a new connection")


# --- keys


def keys_with(call: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Request], Answered]:
    def twist(request: Request) -> Answered:
        answer = request.forward()
        return (
            answered(200, change(answer.json())) if (request.call, answer.status) == (call, 200) else answer
        )

    return twist


def test_fewer_keys_than_asked_for(pair: RunningPair) -> None:
    report = diagnose(pair, keys_with("enc_keys", lambda c: {"keys": c["keys"][:1]}), both=False)
    expect(report, "get-key.get-query", FAIL, "asked for 2 keys, got 1")
    expect(report, "get-key.get", PASS, "1 key of 256 bits")


def test_keys_of_another_size(pair: RunningPair) -> None:
    def cut(container: dict[str, Any]) -> object:
        return {"keys": [{**k, "key": base64.b64encode(b"12345678").decode()} for k in container["keys"]]}

    report = diagnose(pair, keys_with("enc_keys", cut), both=False)
    expect(report, "get-key.post", FAIL, "asked for 256 bits, got 64")


@pytest.mark.parametrize("call", ["enc_keys", "dec_keys"])
def test_containers_that_cannot_be_used(pair: RunningPair, call: str) -> None:
    report = diagnose(pair, keys_with(call, lambda _: {"keys": [{"key_ID": "x"}]}))
    check = "get-key.post" if call == "enc_keys" else "by-id.post"
    expect(report, check, FAIL, "no client can use the answer: key x has no key member")


@pytest.mark.parametrize("call", ["enc_keys", "dec_keys"])
def test_containers_that_deviate(pair: RunningPair, call: str) -> None:
    report = diagnose(pair, keys_with(call, lambda c: {"Keys": c["keys"], "vendor": 1}))
    check = "get-key.post" if call == "enc_keys" else "by-id.several"
    expect(report, check, PASS, "")
    expect(report, check, WARN, "Keys for keys, extra members")


def test_a_kme_without_keys_to_give(pair: RunningPair) -> None:
    def twist(request: Request) -> Answered:
        return request.forward() if request.call == "status" else answered(503, {"message": "link down"})

    report = diagnose(pair, twist)
    expect(report, "get-key.post", FAIL, 'no key: status 503, "link down"')


def test_other_keys_at_the_slave(pair: RunningPair) -> None:
    pair.faults("b").corrupt_keys = True
    try:
        report = examine(setting(pair.pki, pair.url_a, pair.url_b))
    finally:
        pair.faults("b").corrupt_keys = False
    expect(report, "by-id.post", FAIL, "1 of 1 key with different bits")
    expect(report, "by-id.several", FAIL, "4 of 4 keys with different bits")
    expect(report, "by-id.post", PASS, "the same bits", "B")


def test_other_ids_at_the_slave(pair: RunningPair) -> None:
    def other_ids(container: dict[str, Any]) -> object:
        return {"keys": [{**key, "key_ID": str(uuid.uuid4())} for key in container["keys"]]}

    expect(diagnose(pair, keys_with("dec_keys", other_ids)), "by-id.get", FAIL, "other IDs than it asked for")


def test_ids_in_capitals_at_the_slave(pair: RunningPair) -> None:
    def capitals(container: dict[str, Any]) -> object:
        return {"keys": [{**key, "key_ID": key["key_ID"].upper()} for key in container["keys"]]}

    report = diagnose(pair, keys_with("dec_keys", capitals))
    expect(report, "by-id.get", PASS, "the same bits")
    expect(report, "by-id.get", WARN, "letter case of a key ID changed")


def test_a_slave_that_gets_nothing(pair: RunningPair) -> None:
    def twist(request: Request) -> Answered:
        return answered(503, {"message": "later"}) if request.call == "dec_keys" else request.forward()

    report = diagnose(pair, twist)
    expect(report, "by-id.post", FAIL, 'the slave did not get the key: status 503, "later"')


def test_a_kme_that_falls_silent(pair: RunningPair) -> None:
    def twist(request: Request) -> Answered:
        if request.call == "dec_keys":
            raise ConnectionResetError
        return request.forward()

    report = diagnose(pair, twist, both=False)
    expect(report, "errors.unknown-key-post", FAIL, "connection was lost")


# --- TLS and identity


def void(_: object) -> None:
    """For expressions that are statements."""


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port whose connections are given to `serve`, one by one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock, suppress(OSError, SSL.Error):
                    sock.settimeout(PATIENCE)
                    serve(sock)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_nobody_listens(pair: RunningPair) -> None:
    report = examine(setting(pair.pki, f"https://127.0.0.1:{free_port()}"))
    expect(report, "reach", FAIL, "Connection refused")
    expect(report, "tls.version", SKIP, "cannot be reached")
    expect(report, "sae.expiry", PASS, "CN=SAE-A until")
    assert "checks: the KME cannot be reached" in text(report)


def test_no_tls(pair: RunningPair) -> None:
    with listening(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        report = examine(setting(pair.pki, f"https://127.0.0.1:{port}"))
    expect(report, "reach", FAIL, "no TLS server answers")


def test_a_kme_that_hangs(pair: RunningPair) -> None:
    ended = threading.Event()
    with listening(lambda _: void(ended.wait(PATIENCE))) as port:
        report = examine(setting(pair.pki, f"https://127.0.0.1:{port}", timeout=0.3))
        ended.set()
    expect(report, "reach", FAIL, "no TLS handshake within 0.3 seconds")


@contextmanager
def openssl_server(pki: DemoPKI, handshakes: int = 1000) -> Iterator[int]:
    """Shakes hands and hangs up; after so many handshakes it only hangs up."""
    left = [None] * handshakes
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_file(str(pki.kme_a_cert))
    context.use_privatekey_file(str(pki.kme_a_key))
    context.set_min_proto_version(SSL.TLS1_VERSION)
    context.set_cipher_list(b"ALL:@SECLEVEL=0")

    def serve(sock: socket.socket) -> None:
        if not left:
            return
        left.pop()
        sock.settimeout(None)
        connection = SSL.Connection(context, sock)
        connection.set_accept_state()
        connection.do_handshake()

    with listening(serve) as port:
        yield port


def test_old_tls_and_ml_kem(pair: RunningPair) -> None:
    with openssl_server(pair.pki) as port:
        url = f"https://localhost:{port}"
        report = examine(setting(pair.pki, url, site=SecureSite(this_host=False)))
    expect(report, "tls.old-versions", WARN, "TLS 1.1 or older is accepted")
    expect(report, "tls.version", PASS, "TLSv1.3, TLS_AES_256_GCM_SHA384, group X25519MLKEM768")
    expect(report, "tls.site", PASS, "can protect keys on the way with X25519MLKEM768")
    expect(report, "tls.certificate", PASS, "CN=KME-A")
    expect(report, "identity.accepted", FAIL, "connection was lost")
    expect(report, "status.members", SKIP, "the KME gives no status")


def test_a_kme_that_soon_hangs_up(pair: RunningPair) -> None:
    with openssl_server(pair.pki, handshakes=2) as port:
        report = examine(setting(pair.pki, f"https://127.0.0.1:{port}"))
    expect(report, "tls.certificate", FAIL, "the handshake failed: ")
    expect(report, "identity.accepted", SKIP, "certificate was not verified")
    expect(report, "identity.no-certificate", SKIP, "certificate was not verified")


def test_old_tls_cannot_be_told(pair: RunningPair, monkeypatch: pytest.MonkeyPatch) -> None:
    # At this level OpenSSL has no TLS 1.1, as where it was built without it: this side cannot begin.
    monkeypatch.setattr("kms_client.doctor.tls._OLD_CIPHERS", b"ALL:@SECLEVEL=2")
    report = examine(setting(pair.pki, pair.url_a, take_keys=False))
    expect(report, "tls.old-versions", SKIP, "cannot speak TLS 1.1")


def test_outside_the_secure_site(pair: RunningPair) -> None:
    report = examine(setting(pair.pki, pair.url_a, site=SecureSite(this_host=False), take_keys=False))
    expect(report, "tls.site", WARN, "outside the secure site, and the KME has no ML-KEM (group x25519)")
    inside = SecureSite(["127.0.0.0/8"], this_host=False)
    expect(examine(setting(pair.pki, pair.url_a, site=inside, take_keys=False)), "tls.site", PASS, "inside")


def test_another_ca(pair: RunningPair) -> None:
    as_a = credentials(pair.pki, "a")
    wrong = SAECredentials("SAE-A", pair.pki.app_ca, cert=as_a.cert, key=as_a.key)
    report = examine(setting(pair.pki, pair.url_a, credentials_a=wrong))
    expect(report, "tls.certificate", FAIL, "refused: ")
    expect(report, "identity.accepted", SKIP, "not verified")
    assert report.keys == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_sae_whose_certificate_is_refused(pair: RunningPair, version: ssl.TLSVersion) -> None:
    pki = pair.pki
    stranger = SAECredentials("SAE-A", pki.kms_ca, cert=pki.client_cert, key=pki.client_key)
    context = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
    context.maximum_version = version
    report = diagnose(pair, as_it_is, both=False, context=context, credentials_a=stranger)
    expect(report, "tls.version", PASS, "TLSv1.2" if version is ssl.TLSVersion.TLSv1_2 else "TLSv1.3")
    expect(report, "tls.certificate", PASS, "CN=KME-A")
    expect(report, "identity.accepted", FAIL, "")
    expect(report, "status.members", SKIP, "the KME gives no status")


def reissued(pki: DemoPKI, days: float, directory: Path, *, names: bool = True) -> tuple[Path, Path]:
    """KME A's certificate with another end."""
    ca_key = serialization.load_pem_private_key((pki.directory / "kms-ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate(pki.kme_a_cert.read_bytes())
    subject = old.subject if names else x509.Name.from_rfc4514_string("CN=localhost")
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(old.issuer).public_key(old.public_key())
        .serial_number(7).not_valid_before(now - datetime.timedelta(days=400))
        .not_valid_after(now + datetime.timedelta(days=days)))  # fmt: skip
    for extension in old.extensions:
        if names or not isinstance(extension.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(extension.value, extension.critical)
    new = builder.sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]
    path = directory / "kme.pem"
    path.write_bytes(new.public_bytes(serialization.Encoding.PEM))
    return path, pki.kme_a_key


@pytest.mark.parametrize(
    ("days", "verdict", "seen"),
    [(-1, FAIL, "CN=KME-A has expired on"), (10.5, WARN, "in 10 days"), (100, PASS, "CN=KME-A until")],
)
def test_how_long_a_certificate_lasts(
    pair: RunningPair, tmp_path: Path, days: float, verdict: Verdict, seen: str
) -> None:
    context = server_context(*reissued(pair.pki, days, tmp_path), pair.pki.kms_ca)
    report = diagnose(pair, as_it_is, both=False, context=context, take_keys=False)
    expect(report, "tls.expiry", verdict, seen)
    if days < 0:
        expect(report, "tls.certificate", FAIL, "certificate has expired")


def test_a_certificate_without_names(pair: RunningPair, tmp_path: Path) -> None:
    context = server_context(*reissued(pair.pki, 100, tmp_path, names=False), pair.pki.kms_ca)
    with twisted(pair, "a", as_it_is, context) as url:
        report = examine(setting(pair.pki, url, take_keys=False))
        expect(report, "tls.certificate", FAIL, "refused: ")
        report = examine(setting(pair.pki, url.replace("127.0.0.1", "localhost"), take_keys=False))
        expect(report, "tls.certificate", WARN, "no subject alternative name")
        expect(report, "identity.accepted", PASS, "SAE-A")


def lax(pki: DemoPKI, mode: ssl.VerifyMode) -> ssl.SSLContext:
    context = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
    context.verify_mode = mode
    return context


def test_a_kme_that_lets_everybody_in(pair: RunningPair) -> None:
    report = diagnose(pair, as_it_is, both=False, context=lax(pair.pki, ssl.CERT_NONE), take_keys=False)
    expect(report, "identity.no-certificate", FAIL, "no certificate: let in")
    expect(report, "identity.foreign-certificate", FAIL, "let in")


@pytest.mark.parametrize(("status", "verdict"), [(401, PASS), (403, WARN)])
def test_a_kme_that_refuses_strangers_itself(pair: RunningPair, status: int, verdict: Verdict) -> None:
    def twist(request: Request) -> Answered:
        return request.forward() if request.authenticated else answered(status, {"message": "who are you"})

    context = lax(pair.pki, ssl.CERT_OPTIONAL)
    report = diagnose(pair, twist, both=False, context=context, take_keys=False)
    expect(report, "identity.no-certificate", verdict, f'refused with status {status}, "who are you"')
    expect(report, "identity.foreign-certificate", PASS, "refused in the TLS handshake")


def test_a_kme_that_lets_strangers_wait(pair: RunningPair) -> None:
    ended = threading.Event()

    def twist(request: Request) -> Answered:
        if not request.authenticated:
            ended.wait(PATIENCE)
        return request.forward()

    context = lax(pair.pki, ssl.CERT_OPTIONAL)
    report = diagnose(pair, twist, both=False, context=context, take_keys=False, timeout=2)
    ended.set()
    expect(report, "identity.no-certificate", WARN, "no complete answer within 2 seconds")


def test_pkcs12(pair: RunningPair, tmp_path: Path) -> None:
    pki = pair.pki
    key = serialization.load_pem_private_key(pki.sae_a_key.read_bytes(), None)
    cert = x509.load_pem_x509_certificate(pki.sae_a_cert.read_bytes())
    encryption = serialization.BestAvailableEncryption(b"secret")
    file = tmp_path / "sae.p12"
    file.write_bytes(
        serialization.pkcs12.serialize_key_and_certificates(b"sae", key, cert, None, encryption))  # type: ignore[arg-type]  # fmt: skip
    as_a = SAECredentials("SAE-A", pki.kms_ca, pkcs12=file, key_password="secret")
    report = examine(setting(pki, pair.url_a, credentials_a=as_a, take_keys=False))
    assert report.counts[FAIL] == report.counts[WARN] == 0
    assert "secret" not in repr(as_a)


# --- how it runs


def test_a_slow_kme(pair: RunningPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_STATUS_CALLS", 2)
    monkeypatch.setattr(checks, "_SLOW", 0.05)
    pair.faults("a").delay = 0.06
    try:
        report = examine(setting(pair.pki, pair.url_a, take_keys=False))
    finally:
        pair.faults("a").delay = 0
    expect(report, "latency", WARN, "Get status 2 times: median ")


@pytest.mark.parametrize("sae_id", ["", ".", ".."])
def test_impossible_sae_ids(pair: RunningPair, sae_id: str) -> None:
    with pytest.raises(ValueError, match="cannot be an SAE ID"):
        Side("A", pair.url_a, credentials(pair.pki, "a"), sae_id, timeout=1)


def test_keys_are_wiped_when_the_examination_is_broken_off(pair: RunningPair) -> None:
    def stop(what: str) -> None:
        if "More keys than max_key_per_request" in what:
            raise KeyboardInterrupt

    examined = setting(pair.pki, pair.url_a, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        examine(examined)
    pending = examined.sides[0].pending
    assert len(pending) == 6
    for key in pending:
        with pytest.raises(KeyAlreadyUsed), key.use():
            pass


def test_credentials_that_cannot_be_loaded(pair: RunningPair, tmp_path: Path) -> None:
    missing = SAECredentials("SAE-A", pair.pki.kms_ca, cert=tmp_path / "none.pem")
    with pytest.raises(KMSAuthenticationError, match="cannot be loaded"):
        Side("A", pair.url_a, missing, "SAE-B", timeout=1)


def test_a_report_is_about_what_was_examined(pair: RunningPair) -> None:
    report: Report = examine(setting(pair.pki, pair.url_a, take_keys=False))
    [side] = report.sides
    assert (side.name, side.url, side.sae_id, side.peer_sae_id, side.keys) == (
        "A",
        pair.url_a,
        "SAE-A",
        "SAE-B",
        0,
    )
    started = datetime.datetime.fromisoformat(report.started)
    assert abs(datetime.datetime.now(datetime.UTC) - started) < datetime.timedelta(minutes=5)
