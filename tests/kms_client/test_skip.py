"""SkipClient against real HTTPS servers that answer rightly, wrongly or not at all; and its messages by themselves."""

from __future__ import annotations

import json
import logging
import ssl
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kms_client import (
    KeyManager,
    KMSAuthenticationError,
    KMSError,
    KMSOutsideSecureSite,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    SecureSite,
    SkipCapabilities,
    SkipClient,
    UnknownKey,
    UnknownSAE,
)
from kms_client.emulator import DemoPKI, write_demo_pki
from kms_client.emulator.kme import server_context
from kms_client.etsi014_messages import Malformed
from kms_client.skip_messages import parse_capabilities, parse_entropy, parse_key
from tests.support.kme_server import Answer, ScriptedKME, everything_in, http, spellings

ID = "550e8400e29b41d4a716446655440000"
OTHER = "650e8400e29b41d4a716446655440abc"
KEY = bytes(range(200, 232))
KEY2 = bytes(range(100, 132))
CAPABILITIES = {
    "entropy": True,
    "key": True,
    "algorithm": "QKD",
    "localSystemID": "SAE-A",
    "remoteSystemID": ["SAE-B", "site-[cd]?", "SAE/*"],
}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


@contextmanager
def scripted(
    pki: DemoPKI, *answers: Answer, capabilities: Answer | None = None, **settings: Any
) -> Iterator[tuple[SkipClient, ScriptedKME]]:
    """A client of SAE-A and its provider, which tells its capabilities, then gives the answers, the last for ever."""
    context = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
    server = ScriptedKME(context, [capabilities or http(200, CAPABILITIES), *answers])
    try:
        client = SkipClient(
            f"https://127.0.0.1:{server.port}",
            **{"sae_id": "SAE-A", "cert": pki.sae_a_cert, "key": pki.sae_a_key, "ca": pki.kms_ca, **settings},
        )
        yield client, server
        client.close()
    finally:
        server.close()


def key(key_id: object, secret: bytes | object, **more: object) -> bytes:
    return http(200, {"keyId": key_id, "key": secret.hex() if isinstance(secret, bytes) else secret, **more})


def lines(server: ScriptedKME) -> list[str]:
    return [line.removesuffix(" HTTP/1.1") for line, _ in server.requests]


class TestGlobs:
    @pytest.mark.parametrize(
        ("pattern", "matches", "others"),
        [
            ("SAE-B", ["SAE-B"], ["SAE-b", "SAE-BB", "SAE-", ""]),
            ("*", ["", "x", "a/b", "two\nlines"], []),
            ("KP_*_Test", ["KP__Test", "KP_a/b_Test"], ["KP_Test", "KP_x_Test2", "kp_x_test"]),
            ("site-?", ["site-1", "site-/", "site-*"], ["site-", "site-12"]),
            ("r[abc]", ["ra", "rc"], ["r", "rd", "rab", "rA"]),
            ("r[0-3]x", ["r0x", "r3x"], ["r4x", "r-x"]),
            ("r[!ab]", ["rc", "r!", "r["], ["ra", "rb", "r"]),
            ("r[!0-3]", ["r4", "r-"], ["r0", "r3"]),
            ("r[]x]", ["r]", "rx"], ["r[", "r"]),
            ("r[a", ["r[a"], ["ra"]),
            ("a.b\\*", ["a.b\\", "a.b\\c"], ["a.b*", "axb\\"]),
            ("[^a]", ["^", "a"], ["b"]),
            ("[[]*", ["[x"], ["x"]),
            ("[?]", ["?"], ["x"]),
        ],
    )
    def test_as_the_draft_has_them(self, pattern: str, matches: list[str], others: list[str]) -> None:
        found = SkipCapabilities(True, True, "", "me", ("nobody", pattern))
        assert [text for text in matches + others if found.shares_keys_with(text)] == matches

    def test_no_pattern_takes_long(self) -> None:
        found = SkipCapabilities(True, True, "", "me", ("*a" * 50 + "b",))
        assert not found.shares_keys_with("a" * 250)


class TestMessages:
    def test_right_ones_have_no_quirks(self) -> None:
        quirks: set[str] = set()
        found = parse_capabilities(json.dumps(CAPABILITIES).encode(), quirks=quirks)
        assert found == SkipCapabilities(True, True, "QKD", "SAE-A", ("SAE-B", "site-[cd]?", "SAE/*"))
        parsed = parse_key(f'{{"keyId": "{ID}", "key": "{KEY.hex()}"}}'.encode(), kms="kp", quirks=quirks)
        assert (parsed.key_id, parsed.size, parsed.kms) == (ID, 256, "kp")
        assert parse_entropy(b'{"randomStr": "00ff", "minentropy": 16}', quirks=quirks) == (
            bytearray(b"\0\xff"),
            16,
        )
        assert quirks == set()

    def test_tolerated(self) -> None:
        quirks: set[str] = set()
        body = {**CAPABILITIES, "remoteSystemID": "SAE-B", "vendor": 1, "algorithm": None}
        found = parse_capabilities(json.dumps(body).encode(), quirks=quirks)
        assert (found.remote_system_ids, found.algorithm) == (("SAE-B",), "")
        parsed = parse_key(
            f'{{"keyId": "key:1", "key": "{KEY.hex().upper()}"}}'.encode(), kms="", quirks=quirks
        )
        with parsed.use() as secret:
            assert secret == KEY
        assert quirks == {
            "remoteSystemID is no list", "no algorithm", "extra members", "keyId is not hexadecimal"}  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"entropy": "yes"}, "entropy is missing or neither true nor false"),
            ({"key": None}, "key is missing"),
            ({"algorithm": 5}, "algorithm is missing or not a string"),
            ({"localSystemID": None}, "localSystemID is missing"),
            ({"remoteSystemID": None}, "remoteSystemID is missing or not a list of strings"),
            ({"remoteSystemID": ["a", 1]}, "not a list of strings"),
        ],
    )
    def test_wrong_capabilities(self, change: dict[str, object], text: str) -> None:
        with pytest.raises(Malformed, match=text):
            parse_capabilities(json.dumps({**CAPABILITIES, **change}).encode(), quirks=set())

    @pytest.mark.parametrize(
        ("key_id", "secret", "text"),
        [
            (None, "00", "keyId is missing"),
            ("", "00", "keyId is missing"),
            ("a b", "00", "without a space"),
            ("é", "00", "printable ASCII"),
            ("x" * 201, "00", "1 to 200"),
            (ID, None, "key is missing or not hexadecimal"),
            (ID, "", "key is missing or not hexadecimal"),
            (ID, "abc", "not hexadecimal"),
            (ID, "zz", "not hexadecimal"),
            (ID, "00 11", "not hexadecimal"),
        ],
    )
    def test_wrong_keys(self, key_id: object, secret: object, text: str) -> None:
        with pytest.raises(Malformed, match=text):
            parse_key(json.dumps({"keyId": key_id, "key": secret}).encode(), kms="", quirks=set())

    @pytest.mark.parametrize("body", [b"[]", b"\xff", b'{"randomStr": "00"}', b'{"minentropy": 8}',
        b'{"randomStr": "00", "minentropy": true}'])  # fmt: skip
    def test_wrong_entropy(self, body: bytes) -> None:
        with pytest.raises(Malformed):
            parse_entropy(body, quirks=set())


class TestRightAnswers:
    def test_requests_and_keys(self, pki: DemoPKI) -> None:
        with scripted(pki, key(ID, KEY), key(OTHER, KEY2), key(OTHER, KEY2)) as (client, server):
            manager: KeyManager = client  # for the type checker
            assert isinstance(manager, KeyManager)
            assert (client.protocol, client.sae_id) == ("skip", "SAE-A")
            assert repr(client) == f"<SkipClient {client.name} sae_id=SAE-A>"
            keys = client.get_keys("SAE/B ü&x", 2)
            assert [(k.key_id, k.size, k.kms) for k in keys] == [
                (ID, 256, client.name),
                (OTHER, 256, client.name),
            ]
            with keys[0].use() as secret:
                assert secret == KEY
            [found] = client.get_keys_by_id("SAE-B", [OTHER])
            with found.use() as secret:
                assert secret == KEY2
            remote = "remoteSystemID=SAE%2FB%20%C3%BC%26x"
            assert lines(server) == [
                "GET /capabilities",
                f"GET /key?{remote}&size=256",
                f"GET /key?{remote}&size=256",
                f"GET /key/{OTHER}?remoteSystemID=SAE-B",
            ]
            assert all(body == b"" for _, body in server.requests)
            assert client.quirks == set()

    def test_the_providers_own_size_and_odd_key_ids(self, pki: DemoPKI) -> None:
        with scripted(pki, key("a/b?c", KEY[:16]), size=None) as (client, server):
            assert client.get_keys("SAE-B")[0].size == 128
            assert client.get_keys_by_id("SAE-B", ["a/b?c"])[0].key_id == "a/b?c"
            assert lines(server)[1:] == [
                "GET /key?remoteSystemID=SAE-B",
                "GET /key/a%2Fb%3Fc?remoteSystemID=SAE-B",
            ]

    def test_status_is_what_skip_tells(self, pki: DemoPKI) -> None:
        without = {**CAPABILITIES, "key": False}
        with scripted(pki, http(200, without), http(200, CAPABILITIES)) as (client, server):
            status = client.status("SAE-B")
            assert (status.source_kme_id, status.target_kme_id) == ("SAE-A", "SAE-B")
            assert (status.master_sae_id, status.slave_sae_id) == ("SAE-A", "SAE-B")
            assert (status.key_size, status.max_key_per_request, status.max_sae_id_count) == (256, 1, 0)
            assert status.stored_key_count > 0
            assert status.status_extension == {"entropy": True, "key": True, "algorithm": "QKD"}
            assert client.status("site-c1").stored_key_count == 0
            with pytest.raises(UnknownSAE, match="names no such remote system") as caught:
                client.status("site-e1")
            assert (caught.value.peer, caught.value.kms) == ("site-e1", client.name)
            assert lines(server) == ["GET /capabilities"] * 3

    def test_entropy(self, pki: DemoPKI) -> None:
        answer = http(200, {"randomStr": KEY.hex(), "minentropy": 256})
        with scripted(pki, capabilities=answer) as (client, server):
            assert client.entropy() == KEY
            assert client.entropy(200) == KEY
            with pytest.raises(
                KMSProtocolError, match="257 bits of entropy were asked for, 256 delivered"
            ) as caught:
                client.entropy(257)
            assert not caught.value.keys_may_be_lost
            assert lines(server) == [f"GET /entropy?minentropy={bits}" for bits in (256, 200, 257)]
            with pytest.raises(ValueError, match="bits of entropy must be 1 or more, not 0"):
                client.entropy(0)


# Status; exception for capabilities, key and key by ID; whether a key may be lost by the latter two.
Kind = type[KMSError]
ERRORS: list[tuple[int, Kind, Kind, Kind, bool]] = [
    (302, KMSProtocolError, KMSProtocolError, KMSProtocolError, False),
    (400, KMSRequestError, KMSRequestError, UnknownKey, False),
    (401, KMSAuthenticationError, KMSAuthenticationError, KMSAuthenticationError, False),
    (403, KMSAuthenticationError, KMSAuthenticationError, KMSAuthenticationError, False),
    (404, KMSRequestError, KMSRequestError, UnknownKey, False),
    (405, KMSProtocolError, KMSProtocolError, KMSProtocolError, False),
    (410, KMSRequestError, KMSRequestError, UnknownKey, False),
    (422, KMSRequestError, KMSRequestError, KMSRequestError, False),
    (429, KMSUnavailable, KMSUnavailable, KMSUnavailable, False),
    (500, KMSUnavailable, KMSUnavailable, KMSUnavailable, True),
    (502, KMSUnavailable, KMSUnavailable, KMSUnavailable, True),
    (503, KMSUnavailable, NoKeysLeft, KMSUnavailable, False),
    (504, KMSTimeout, KMSTimeout, KMSTimeout, True),
]


class TestErrors:
    @pytest.mark.parametrize(("status", "capabilities", "new_key", "by_id", "lost"), ERRORS)
    def test_statuses(
        self, pki: DemoPKI, status: int, capabilities: Kind, new_key: Kind, by_id: Kind, lost: bool
    ) -> None:
        with scripted(pki, http(status), http(status, {"message": "because"}), http(status)) as (client, _):
            with pytest.raises(KMSError) as first:
                client.get_keys("SAE-B")
            with pytest.raises(KMSError) as second:
                client.get_keys_by_id("SAE-B", [ID])
            with pytest.raises(KMSError) as third:
                client.status("SAE-B")
            with pytest.raises(KMSError) as fourth:
                client.entropy()
        assert [type(e.value) for e in (first, second, third)] == [new_key, by_id, capabilities]
        assert [e.value.keys_may_be_lost for e in (first, second, third, fourth)] == [
            lost,
            lost,
            False,
            False,
        ]
        for error in (first.value, second.value, third.value):
            assert (error.status, error.peer, error.kms) == (status, "SAE-B", client.name)
            assert error.hint
        assert second.value.key_ids == (ID,)
        assert ("because" in str(second.value)) == (status not in (302, 405))
        not_in_the_draft = status not in (400, 404, 405, 500, 503)
        assert (f"status {status} for key" in client.quirks) == not_in_the_draft
        assert (f"status {status} for key by ID" in client.quirks) == (not_in_the_draft or status == 404)

    def test_a_peer_that_the_provider_does_not_name(self, pki: DemoPKI) -> None:
        with scripted(pki, http(400)) as (client, _):
            with pytest.raises(UnknownSAE, match="peer SAE SAE-X"):
                client.get_keys("SAE-X")
            with pytest.raises(UnknownSAE, match="peer SAE SAE-X"):
                client.get_keys_by_id("SAE-X", [ID])

    def test_a_wrong_path_gets_a_hint(self, pki: DemoPKI) -> None:
        with scripted(pki, capabilities=http(404, "<html>nothing here</html>")) as (client, _):
            with pytest.raises(KMSRequestError, match="SKIP has no path of its own") as caught:
                client.get_keys("SAE-B")
            assert "nothing here" not in str(caught.value)

    def test_the_provider_has_another_name_for_this_end(self, pki: DemoPKI) -> None:
        with scripted(pki, http(200, CAPABILITIES), sae_id="SAE-Z") as (client, server):
            calls: list[Callable[[], object]] = [
                client.capabilities,
                lambda: client.get_keys("SAE-B"),
                lambda: client.get_keys_by_id("SAE-B", [ID]),
                lambda: client.status("SAE-B"),
            ]
            for call in calls:
                with pytest.raises(
                    KMSAuthenticationError, match="localSystemID is 'SAE-A', not 'SAE-Z'"
                ) as caught:
                    call()
                assert "Give that one as sae_id" in caught.value.hint
            assert lines(server) == ["GET /capabilities"] * 4

    def test_it_is_asked_for_that_name_once(self, pki: DemoPKI) -> None:
        with scripted(pki, key(ID, KEY), key(OTHER, KEY)) as (client, server):
            client.get_keys("SAE-B")
            client.get_keys("SAE-B")
            assert lines(server).count("GET /capabilities") == 1

    def test_when_one_of_several_requests_fails_the_keys_before_are_wiped(self, pki: DemoPKI) -> None:
        with scripted(pki, key(ID, KEY), key(OTHER, KEY2), http(503)) as (client, server):
            with pytest.raises(NoKeysLeft, match="2 delivered before are lost") as caught:
                client.get_keys("SAE-B", 5)
            assert caught.value.keys_may_be_lost
            assert_no_secrets_in(caught.value)
            assert len(server.requests) == 4
        with scripted(pki, key(ID, KEY), http(400)) as (client, _):
            with pytest.raises(UnknownKey, match="1 delivered before is lost") as by_id:
                client.get_keys_by_id("SAE-B", [ID, OTHER])
            assert by_id.value.keys_may_be_lost
            assert by_id.value.key_ids == (OTHER,)
            assert_no_secrets_in(by_id.value)

    @pytest.mark.parametrize(
        ("answers", "text", "quirk"),
        [
            ([key(ID, KEY), key(ID, KEY)], "delivered a key a second time", "delivered keys are delivered again"),
            ([key(ID, KEY[:16])], "256 bits was asked for, one of 128 bits was delivered",
             "keys of another size than asked for"),
            ([key(ID, "x" + KEY.hex()[1:])], "key is missing or not hexadecimal", None),
            ([http(200, "<html>")], "not a JSON object", None),
            ([http(200, "[" * 100_000)], "not a JSON object", None),
            ([http(200, " " * (2 << 20))], "larger than", None),
        ],
    )  # fmt: skip
    def test_keys_that_are_none(
        self, pki: DemoPKI, answers: list[bytes], text: str, quirk: str | None
    ) -> None:
        with scripted(pki, *answers) as (client, _):
            with pytest.raises(KMSProtocolError, match=text) as caught:
                client.get_keys("SAE-B", 2)
            assert caught.value.keys_may_be_lost
            assert quirk is None or quirk in client.quirks
            assert_no_secrets_in(caught.value)

    def test_keys_by_id_that_are_none(self, pki: DemoPKI) -> None:
        with scripted(pki, key(ID.upper(), KEY), key(OTHER, KEY2)) as (client, _):
            # IDs are compared as they were given.
            with pytest.raises(KMSProtocolError, match=f"delivered key {ID.upper()} instead") as caught:
                client.get_keys_by_id("SAE-B", [ID])
            assert caught.value.key_ids == (ID,)
            assert client.quirks == {"keys that were not asked for"}
            assert_no_secrets_in(caught.value)
            client.get_keys_by_id("SAE-B", [OTHER])
            with pytest.raises(UnknownKey, match="a second time") as again:
                client.get_keys_by_id("SAE-B", [OTHER])
            assert_no_secrets_in(again.value)

    def test_no_answer(self, pki: DemoPKI) -> None:
        def nothing(_: ssl.SSLSocket) -> None:
            """Close without an answer."""

        with scripted(pki, nothing) as (client, _):
            with pytest.raises(KMSUnavailable, match="connection was lost") as caught:
                client.get_keys("SAE-B")
            assert (caught.value.keys_may_be_lost, caught.value.peer) == (True, "SAE-B")
            with pytest.raises(KMSUnavailable) as asked:
                client.capabilities()
            assert not asked.value.keys_may_be_lost
        with pytest.raises(KMSUnavailable, match="closed"):
            client.entropy()

    def test_outside_the_secure_site(self, pki: DemoPKI) -> None:
        with scripted(pki, site=SecureSite(this_host=False)) as (client, server):
            with pytest.raises(KMSOutsideSecureSite, match="outside the secure site"):
                client.get_keys("SAE-B")
            assert server.requests == []

    def test_arguments(self, pki: DemoPKI) -> None:
        with scripted(pki) as (client, server):
            calls: list[Callable[[], object]] = [
                lambda: client.get_keys("SAE-B", 0),
                lambda: client.get_keys("SAE-B", size=100),
                lambda: client.get_keys_by_id("SAE-B", []),
                lambda: client.get_keys_by_id("SAE-B", [ID, ID]),
                lambda: client.get_keys_by_id("SAE-B", [".."]),
            ]
            for call in calls:
                with pytest.raises(ValueError, match="key"):
                    call()
            assert server.requests == []
        with pytest.raises(ValueError, match="sae_id must not be empty"):
            SkipClient("https://kp.example", sae_id="")
        with pytest.raises(ValueError, match="give cert and key"):
            SkipClient("https://kp.example", sae_id="SAE-A")
        with pytest.raises(ValueError, match="key size"):
            SkipClient("https://kp.example", sae_id="SAE-A", size=4)


def assert_no_secrets_in(error: BaseException) -> None:
    texts = everything_in(error) + "".join(traceback.format_exception(error))
    for secret in (KEY, KEY2, KEY[:16]):
        assert not [s for s in spellings(secret) if s in texts]


def test_no_secret_in_any_log(pki: DemoPKI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with scripted(pki, key(ID, KEY), key(OTHER, KEY2)) as (client, _):
        keys = client.get_keys("SAE-B", 1) + client.get_keys_by_id("SAE-B", [OTHER])
    texts = caplog.text + repr(keys) + repr(client) + repr(vars(client))
    for secret in (KEY, KEY2):
        assert not [s for s in spellings(secret) if s in texts]
