"""Etsi014Client against real HTTPS servers that answer rightly, wrongly, slowly or not at all."""

# ruff: noqa: SIM117 - the server is set up outside, what must fail stands inside

from __future__ import annotations

import base64
import gzip
import json
import logging
import os
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kms_client import (
    KeyManager,
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
from kms_client.emulator import DemoPKI, run_pair, write_demo_pki
from tests.support.kme_server import client_of, container, everything_in, http, scripted, spellings
from tests.support.patience import eventually

ID = "550e8400-e29b-41d4-a716-446655440000"
OTHER = "650e8400-e29b-41d4-a716-446655440abc"
KEY = bytes(range(200, 232))
KEY2 = bytes(range(100, 132))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def foreign_pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("foreign"))


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


class TestRightAnswers:
    def test_requests_and_keys(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, container((ID, KEY), (OTHER, KEY2)))) as (client, server):
            manager: KeyManager = client  # for the type checker
            assert isinstance(manager, KeyManager)
            assert (client.protocol, client.sae_id) == ("etsi-014", "SAE-A")
            assert repr(client) == f"<Etsi014Client {client.name} sae_id=SAE-A>"
            keys = client.get_keys("SAE/B ü", 2)
            assert [(key.key_id, key.size, key.kms) for key in keys] == [
                (ID, 256, client.name), (OTHER, 256, client.name)]  # fmt: skip
            with keys[0].use() as secret:
                assert secret == KEY
            client.get_keys_by_id("SAE-B", [OTHER, ID])
            (line, body), (line2, body2) = server.requests
            assert line == "POST /api/v1/keys/SAE%2FB%20%C3%BC/enc_keys HTTP/1.1"
            assert json.loads(body) == {"number": 2, "size": 256}
            assert line2 == "POST /api/v1/keys/SAE-B/dec_keys HTTP/1.1"
            assert json.loads(body2) == {"key_IDs": [{"key_ID": OTHER}, {"key_ID": ID}]}
            assert client.quirks == set()

    def test_by_id_in_the_order_asked_whatever_the_letter_case(self, pki: DemoPKI) -> None:
        answer = http(200, container((ID.upper(), KEY), (OTHER, KEY2)))
        with scripted(pki, answer) as (client, _):
            keys = client.get_keys_by_id("SAE-B", [OTHER, ID])
            assert [key.key_id for key in keys] == [OTHER, ID]
            with keys[1].use() as secret:
                assert secret == KEY
            assert client.quirks == {"letter case of key ID changed"}

    def test_path_prefix_and_the_kmes_own_size(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, container((ID, KEY)))) as (_, server):
            url = f"https://localhost:{server.port}/vendor/kme/"
            client = client_of(pki, url, size=None, master_in_key_ids=True)
            assert client.name == url[:-1]
            client.get_keys("SAE-B")
            client.get_keys_by_id("SAE-B", [ID])
            client.close()
            assert server.requests[0] == (
                "POST /vendor/kme/api/v1/keys/SAE-B/enc_keys HTTP/1.1", b'{"number": 1}')  # fmt: skip
            assert json.loads(server.requests[1][1]) == {
                "key_IDs": [{"key_ID": ID, "master_SAE_ID": "SAE-B"}]
            }

    def test_chunked_and_trickling_within_the_deadline(self, pki: DemoPKI) -> None:
        body = json.dumps(container((ID, KEY))).encode()

        def answer(sock: ssl.SSLSocket) -> None:
            sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(body), 10):
                sock.sendall(b"%x\r\n%s\r\n" % (len(body[at : at + 10]), body[at : at + 10]))
            sock.sendall(b"0\r\n\r\n")

        with scripted(pki, answer) as (client, _):
            assert client.get_keys("SAE-B")[0].key_id == ID


# Status, body, exception for status, enc_keys and dec_keys.
Kind = type[KMSError]
NOT_FOUND = "one or more keys specified are not found on KME"
ERRORS: list[tuple[int, str, Kind, Kind, Kind]] = [
    (400, f'{{"message": "{NOT_FOUND}"}}', KMSRequestError, KMSRequestError, UnknownKey),
    (400, '{"message": "size shall be a multiple of 8"}', KMSRequestError, KMSRequestError, KMSRequestError),
    (400, '{"message": "SAE not found"}', UnknownSAE, UnknownSAE, UnknownSAE),
    (400, '{"message": "not enough keys"}', KMSRequestError, NoKeysLeft, KMSRequestError),
    (400, '{"message": "no such key size"}', KMSRequestError, KMSRequestError, KMSRequestError),
    (400, "", KMSRequestError, KMSRequestError, KMSRequestError),
    (401, "<html>no</html>", KMSAuthenticationError, KMSAuthenticationError, KMSAuthenticationError),
    (401, '{"error": "unknown key"}', KMSAuthenticationError, KMSAuthenticationError, UnknownKey),
    (403, '{"detail": "no"}', KMSAuthenticationError, KMSAuthenticationError, KMSAuthenticationError),
    (404, "<html>404</html>", UnknownSAE, UnknownSAE, UnknownKey),
    (404, '{"detail": "Not Found"}', UnknownSAE, UnknownSAE, UnknownKey),
    (408, "", KMSTimeout, KMSTimeout, KMSTimeout),
    (409, '{"detail": "key does not exist"}', KMSRequestError, KMSRequestError, UnknownKey),
    (410, "", KMSRequestError, KMSRequestError, UnknownKey),
    (412, "", KMSRequestError, KMSRequestError, KMSRequestError),
    (422, '{"detail": [{"loc": 1}]}', KMSRequestError, KMSRequestError, KMSRequestError),
    (429, "", KMSUnavailable, KMSUnavailable, KMSUnavailable),
    (500, "<html>500</html>", KMSUnavailable, KMSUnavailable, KMSUnavailable),
    (503, '{"message": "the pool is exhausted: no keys"}', KMSUnavailable, NoKeysLeft, KMSUnavailable),
    (503, '{"message": "the link is down"}', KMSUnavailable, KMSUnavailable, KMSUnavailable),
    (504, '{"message": "the other KME is silent"}', KMSTimeout, KMSTimeout, KMSTimeout),
    (204, "", KMSProtocolError, KMSProtocolError, KMSProtocolError),
    (302, "", KMSProtocolError, KMSProtocolError, KMSProtocolError),
]


class TestErrorAnswers:
    @pytest.mark.parametrize(("status", "body", "of_status", "of_enc", "of_dec"), ERRORS)
    def test_kind(
        self, pki: DemoPKI, status: int, body: str, of_status: Kind, of_enc: Kind, of_dec: Kind
    ) -> None:
        location = "Location: https://127.0.0.1:1/"
        with scripted(pki, http(status, body, location)) as (client, server):
            calls: list[tuple[Kind, Callable[[], Any]]] = [
                (of_status, lambda: client.status("SAE-B")),
                (of_enc, lambda: client.get_keys("SAE-B")),
                (of_dec, lambda: client.get_keys_by_id("SAE-B", [ID])),
            ]
            for kind, call in calls:
                with pytest.raises(KMSError) as caught:
                    call()
                error = caught.value
                assert type(error) is kind
                assert (error.status, error.peer, error.kms) == (status, "SAE-B", client.name)
                assert error.hint
                assert client.name in str(error)
            assert error.key_ids == (ID,)
            assert len(server.requests) == 3

    def test_the_kmes_own_words(self, pki: DemoPKI) -> None:
        with scripted(pki, http(400, {"message": "number shall be 1"})) as (client, _):
            with pytest.raises(KMSRequestError, match="the KME refused: number shall be 1 "):
                client.get_keys("SAE-B", 5)

    def test_an_error_with_keys_in_it_is_not_quoted(self, pki: DemoPKI) -> None:
        with scripted(pki, http(500, {"message": "odd", **container((ID, KEY))})) as (client, _):
            with pytest.raises(KMSUnavailable) as caught:
                client.get_keys("SAE-B")
            assert "odd" not in str(caught.value)
            assert_no_leak(everything_in(caught.value), KEY)


def assert_no_leak(text: str, *secrets: bytes) -> None:
    for secret in secrets:
        assert not [spelling for spelling in spellings(secret) if spelling in text]


WRONG: list[tuple[str, Any, Kind, str]] = [
    ("enc", container(), NoKeysLeft, "2 keys were asked for, 0 delivered"),
    ("enc", container((ID, KEY)), NoKeysLeft, "2 keys were asked for, 1 delivered"),
    (
        "enc",
        container((ID, KEY), (OTHER, KEY2), ("x", KEY)),
        KMSProtocolError,
        "2 keys were asked for, 3 deliv",
    ),
    (
        "enc",
        container((ID, KEY), (OTHER, KEY2[:16])),
        KMSProtocolError,
        "256 bits were asked for, one of 128",
    ),
    ("enc", container((ID, KEY), (ID, KEY2)), KMSProtocolError, "twice"),
    ("dec", container((ID, KEY)), UnknownKey, "2 keys were asked for, 1 delivered"),
    ("dec", container(), UnknownKey, "2 keys were asked for, 0 delivered"),
    ("dec", container((ID, KEY), ("other", KEY2)), KMSProtocolError, "keys that were not asked for"),
    (
        "dec",
        container((ID, KEY), (OTHER, KEY2), ("x", KEY)),
        KMSProtocolError,
        "keys that were not asked for",
    ),
    (
        "dec",
        container((ID, KEY), (OTHER.upper(), KEY2), (OTHER.title(), KEY)),
        KMSProtocolError,
        "not asked for",
    ),
    (
        "both",
        {"keys": [container((ID, KEY))["keys"][0], {"key_ID": OTHER}]},
        KMSProtocolError,
        "no key member",
    ),
    ("both", "{" + KEY.hex(), KMSProtocolError, "not a JSON object"),
    ("both", b"\xff" + KEY, KMSProtocolError, "not a JSON object"),
    ("both", "[" * 100_000, KMSProtocolError, "not a JSON object"),
    ("both", "", KMSProtocolError, "not a JSON object"),
]


class TestWrongAnswers:
    @pytest.mark.parametrize(("call", "body", "kind", "says"), WRONG)
    def test_named_and_without_a_trace_of_the_keys(
        self, pki: DemoPKI, caplog: pytest.LogCaptureFixture, call: str, body: Any, kind: Kind, says: str
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with scripted(pki, http(200, body)) as (client, server):
            calls: list[Callable[[], Any]] = (
                [lambda: client.get_keys("SAE-B", 2)] if call in ("enc", "both") else []
            )
            if call in ("dec", "both"):
                calls.append(lambda: client.get_keys_by_id("SAE-B", [ID, OTHER]))
            for ask in calls:
                with pytest.raises(KMSError, match=says) as caught:
                    ask()
                assert type(caught.value) is kind
                text = everything_in(caught.value) + "".join(traceback.format_exception(caught.value))
                assert_no_leak(text + caplog.text, KEY, KEY2)
            assert len(server.requests) == len(calls)

    def test_status(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, {"key_size": 1})) as (client, _):
            with pytest.raises(KMSProtocolError, match="stored_key_count is missing"):
                client.status("SAE-B")

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (b"SSH-2.0-OpenSSH_9.2\r\n", "the answer is not HTTP"),
            (
                http(200, gzip.compress(b"{}"), "Content-Encoding: gzip"),
                "the answer is encoded .gzip., unasked",
            ),
            (http(200, b"x" * (1 << 21)), "the answer is larger than"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "the answer is not HTTP|lost"),
        ],
    )
    def test_no_answers(self, pki: DemoPKI, answer: bytes, says: str) -> None:
        with scripted(pki, answer) as (client, _), pytest.raises(KMSError, match=says):
            client.get_keys("SAE-B")

    def test_an_endless_body_is_cut_off(self, pki: DemoPKI) -> None:
        def answer(sock: ssl.SSLSocket) -> None:
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                sock.sendall(b"x" * 65536)

        with scripted(pki, answer) as (client, _), pytest.raises(KMSProtocolError, match="larger than"):
            client.get_keys("SAE-B")


class TestTransport:
    def test_refused(self, pki: DemoPKI, closed_port: int) -> None:
        client = client_of(pki, f"https://127.0.0.1:{closed_port}")
        with pytest.raises(KMSUnavailable, match="cannot connect: Connection refused") as caught:
            client.get_keys_by_id("SAE-B", [ID])
        assert caught.value.key_ids == (ID,)
        assert caught.value.__context__ is None

    def test_unknown_host(self, pki: DemoPKI) -> None:
        with pytest.raises(KMSUnavailable, match="cannot connect"):
            client_of(pki, "https://kme.invalid").get_keys("SAE-B")

    def test_a_host_name_that_cannot_be(self, pki: DemoPKI) -> None:
        with pytest.raises(KMSUnavailable, match="the URL cannot be used"):
            client_of(pki, "https://*").get_keys("SAE-B")

    def test_listening_but_silent_before_tls(self, pki: DemoPKI) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = client_of(pki, f"https://127.0.0.1:{silent.getsockname()[1]}", connect_timeout=0.3)
            with pytest.raises(KMSTimeout, match=r"within 0\.3 seconds"):
                client.get_keys("SAE-B")

    @pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX", b"HTTP/1.1 200 OK\r\n\r\n{"])
    @pytest.mark.parametrize("pause", [0.2, 0.0005])
    def test_a_slow_answer_ends_at_the_deadline(self, pki: DemoPKI, start: bytes, pause: float) -> None:
        done = threading.Event()

        def answer(sock: ssl.SSLSocket) -> None:
            sock.sendall(start)
            while not done.wait(pause):
                sock.sendall(start and b"x")

        with scripted(pki, answer, read_timeout=0.5) as (client, _):
            # The answer goes on until this has been raised.
            with pytest.raises(KMSTimeout, match=r"no complete answer within 0\.5 seconds"):
                client.get_keys("SAE-B")
            done.set()

    @pytest.mark.parametrize("answer", [b"", http(200, container((ID, KEY)))[:-5]])
    def test_a_lost_connection_is_not_retried_for_keys(self, pki: DemoPKI, answer: bytes) -> None:
        with scripted(pki, answer) as (client, server):
            with pytest.raises(KMSUnavailable, match="the connection was lost") as caught:
                client.get_keys("SAE-B")
            assert_no_leak(everything_in(caught.value), KEY)
            assert len(server.requests) == 1

    def test_a_lost_connection_is_retried_once_for_the_status(self, pki: DemoPKI) -> None:
        status = dict.fromkeys(
            ["key_size", "stored_key_count", "max_key_count", "max_key_per_request", "max_key_size", "min_key_size"],
            256,
        )  # fmt: skip
        with scripted(pki, b"", http(200, status)) as (client, server):
            assert client.status("SAE-B").key_size == 256
            assert len(server.requests) == 2
        with scripted(pki, b"") as (client, server):
            with pytest.raises(KMSUnavailable):
                client.status("SAE-B")
            assert len(server.requests) == 2

    def test_a_kept_connection_that_was_closed_is_replaced(self, pki: DemoPKI) -> None:
        # "Connection: keep-alive" is a lie: the server closes, as one does that restarts.
        answers = [
            http(200, container((key_id, KEY))).replace(b"Connection: close", b"Connection: keep-alive")
            for key_id in (ID, OTHER, ID[::-1])
        ]
        with scripted(pki, *answers) as (client, server):
            for _ in answers:
                client.get_keys("SAE-B")
                eventually(lambda: server.ended == server.connections, "the server's end")
            assert (len(server.requests), server.connections) == (3, 3)

    def test_no_proxy_and_no_bundle_from_the_environment(
        self, pki: DemoPKI, foreign_pki: DemoPKI, closed_port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(foreign_pki.kms_ca))
        with scripted(pki, http(200, container((ID, KEY)))) as (client, _):
            client.get_keys("SAE-B")

    def test_closed(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, container((ID, KEY)))) as (client, _):
            client.get_keys("SAE-B")
            client.close()
            client.close()
            with pytest.raises(KMSUnavailable, match="closed"):
                client.get_keys("SAE-B")

    def test_closed_while_a_request_is_under_way(self, pki: DemoPKI) -> None:
        def answer(sock: ssl.SSLSocket) -> None:
            client.close()
            sock.sendall(http(200, container((ID, KEY))))

        with scripted(pki, answer) as (client, _):
            assert client.get_keys("SAE-B")
            assert not client._https._idle

    def test_a_forked_child_opens_its_own_connection(self, pki: DemoPKI) -> None:
        answers = [
            http(200, container((key_id, KEY))).replace(b"Connection: close", b"Connection: keep-alive")
            for key_id in (ID, OTHER)
        ]
        with scripted(pki, *answers) as (client, _):
            client.get_keys("SAE-B")
            parents = client._https._idle[0]
            pid = os.fork()
            if pid == 0:
                os._exit(len(client._https._idle))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert client._https._idle[0] is parents
            client._https.forget()  # as in the child, where the next connection can be looked at
            client.get_keys("SAE-B")
            assert client._https._idle[0] is not parents
            parents.close()


class TestAuthentication:
    def test_kme_of_another_ca(self, pki: DemoPKI, foreign_pki: DemoPKI) -> None:
        with scripted(pki, http(200), ca=foreign_pki.kms_ca) as (client, server):
            with pytest.raises(KMSAuthenticationError, match="the KME's certificate was refused: ") as caught:
                client.get_keys("SAE-B")
            assert caught.value.hint
            assert server.requests == []

    def test_wrong_host_name(self, pki: DemoPKI, tmp_path: Path) -> None:
        elsewhere = write_demo_pki(tmp_path, hosts=["kme.example"])
        with scripted(elsewhere, http(200)) as (client, server):
            with pytest.raises(KMSAuthenticationError, match="mismatch"):
                client.get_keys("SAE-B")
            assert server.requests == []

    def test_expired(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datetime

        from kms_client.emulator import pki as pki_module

        old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
        monkeypatch.setattr(pki_module, "_now", lambda: old)
        expired = write_demo_pki(tmp_path)
        with scripted(expired, http(200)) as (client, server):
            with pytest.raises(KMSAuthenticationError, match="expired"):
                client.get_keys("SAE-B")
            assert server.requests == []

    def test_our_certificate_refused(self, pki: DemoPKI, foreign_pki: DemoPKI) -> None:
        foreign: dict[str, Any] = {"cert": foreign_pki.sae_a_cert, "key": foreign_pki.sae_a_key}
        with scripted(pki, http(200), **foreign) as (client, server):
            # With TLS 1.3 the refusal arrives after our request, and may be overtaken by the end of the connection.
            with pytest.raises(KMSError, match="certificate") as caught:
                client.get_keys("SAE-B")
            assert isinstance(caught.value, KMSAuthenticationError | KMSUnavailable)
            assert server.requests == []

    def test_our_certificate_refused_under_tls_1_2(self, pki: DemoPKI, foreign_pki: DemoPKI) -> None:
        from kms_client.emulator.kme import server_context

        context = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        foreign: dict[str, Any] = {"cert": foreign_pki.sae_a_cert, "key": foreign_pki.sae_a_key}
        with scripted(pki, http(200), context=context, **foreign) as (client, _):
            with pytest.raises(KMSAuthenticationError, match="ALERT_UNKNOWN_CA"):
                client.get_keys("SAE-B")

    def test_not_tls(self, pki: DemoPKI) -> None:
        with socket.create_server(("127.0.0.1", 0)) as plain:

            def serve() -> None:
                with plain.accept()[0] as sock:
                    sock.recv(4096)
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(KMSProtocolError, match="TLS failed"):
                client_of(pki, f"https://127.0.0.1:{plain.getsockname()[1]}").get_keys("SAE-B")
            thread.join()

    def test_files_that_cannot_be_loaded(self, pki: DemoPKI, foreign_pki: DemoPKI, tmp_path: Path) -> None:
        url = "https://127.0.0.1"
        for wrong in ({"cert": tmp_path / "none"}, {"key": foreign_pki.sae_a_key}):
            with pytest.raises(KMSAuthenticationError, match="certificate and key cannot be loaded from"):
                client_of(pki, url, **wrong)
        with pytest.raises(KMSAuthenticationError, match="CA certificates cannot be loaded from"):
            client_of(pki, url, ca=pki.sae_a_key)


class TestArguments:
    @pytest.mark.parametrize(
        "url", ["http://kme", "kme:443", "https://", "https://kme/?x=1", "https://kme/#x", "https://u:p@kme"]
    )
    def test_urls(self, pki: DemoPKI, url: str) -> None:
        with pytest.raises(ValueError, match="a KME's URL is https://"):
            client_of(pki, url)

    @pytest.mark.parametrize("sae_id", ["", ".", ".."])
    def test_sae_ids(self, pki: DemoPKI, sae_id: str) -> None:
        with pytest.raises(ValueError, match="cannot be an SAE ID"):
            client_of(pki, "https://kme", sae_id=sae_id)
        with pytest.raises(ValueError, match="cannot be an SAE ID"):
            client_of(pki, "https://kme").get_keys(sae_id)

    def test_numbers_sizes_and_ids(self, pki: DemoPKI) -> None:
        client = client_of(pki, "https://kme")
        with pytest.raises(ValueError, match="number of keys"):
            client.get_keys("SAE-B", 0)
        for size in (0, 12, -8):
            with pytest.raises(ValueError, match="key size"):
                client.get_keys("SAE-B", 1, size)
        with pytest.raises(ValueError, match="key ID"):
            client.get_keys_by_id("SAE-B", [])
        with pytest.raises(ValueError, match="key size"):
            client_of(pki, "https://kme", size=4)


def test_keys_never_reach_the_logs(
    pki: DemoPKI, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with scripted(pki, http(200, container((ID, KEY)))) as (client, _):
        keys = client.get_keys("SAE-B")
        text = caplog.text + repr(keys) + repr(vars(client))
        assert "POST /api/v1/keys/SAE-B/enc_keys" in caplog.text
        assert_no_leak(text + "".join(capfd.readouterr()), KEY)


def test_the_search_for_leaks_finds_leaks() -> None:
    try:
        raise ValueError(base64.b64encode(KEY).decode())
    except ValueError as error:
        found = everything_in(error)
    with pytest.raises(AssertionError):
        assert_no_leak(found, KEY)


def test_the_link_to_the_kme_has_no_key_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", os.fspath(log))
    with run_pair() as pair:
        client = pair.client("a")
        client.get_keys("SAE-B")[0].wipe()
        client.close()
    assert not log.exists() or not log.read_text()
