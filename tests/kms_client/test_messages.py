"""The JSON of ETSI GS QKD 014: pure parsing."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_client.etsi014_messages import (
    Malformed,
    build_key_ids_request,
    build_key_request,
    error_text,
    parse_key_container,
    parse_status,
)
from tests.support.kme_server import container

pytestmark = pytest.mark.pure

ID = "550e8400-e29b-41d4-a716-446655440000"
OTHER = "650e8400-e29b-41d4-a716-446655440000"
KEY = bytes(range(200, 232))

STATUS = {
    "source_KME_ID": "AAAABBBBCCCCDDDD",
    "target_KME_ID": "EEEEFFFFGGGGHHHH",
    "master_SAE_ID": "IIIIJJJJKKKKLLLL",
    "slave_SAE_ID": "MMMMNNNNOOOOPPPP",
    "key_size": 352,
    "stored_key_count": 25000,
    "max_key_count": 100000,
    "max_key_per_request": 128,
    "max_key_size": 1024,
    "min_key_size": 64,
    "max_SAE_ID_count": 0,
}


def parse(document: Any) -> tuple[list[tuple[str, bytes]], set[str]]:
    quirks: set[str] = set()
    found = []
    for key in parse_key_container(json.dumps(document).encode(), kms="https://kme", quirks=quirks):
        assert key.kms == "https://kme"
        with key.use() as secret:
            found.append((key.key_id, bytes(secret)))
    return found, quirks


def test_requests() -> None:
    assert json.loads(build_key_request(3, 1024)) == {"number": 3, "size": 1024}
    assert json.loads(build_key_request(1, None)) == {"number": 1}
    assert json.loads(build_key_ids_request([ID, OTHER])) == {"key_IDs": [{"key_ID": ID}, {"key_ID": OTHER}]}
    assert json.loads(build_key_ids_request([ID], "M")) == {"key_IDs": [{"key_ID": ID, "master_SAE_ID": "M"}]}


def test_status() -> None:
    quirks: set[str] = set()
    parse_status(json.dumps({**STATUS, "status_extension": {"x": 1}}).encode(), quirks=quirks)
    assert quirks == set()
    body = json.dumps({**STATUS, "status_extension": {"x": 1}, "more": None}).encode()
    status = parse_status(body, quirks=quirks)
    assert (status.key_size, status.stored_key_count, status.max_sae_id_count) == (352, 25000, 0)
    assert status.status_extension == {"x": 1}
    assert quirks == {"extra members", "null members"}
    quirks.clear()
    sparse = {**STATUS, "max_SAE_ID_count": None, "source_KME_ID": None, "status_extension": "odd"}
    del sparse["slave_SAE_ID"]
    status = parse_status(json.dumps(sparse).encode(), quirks=quirks)
    assert (status.source_kme_id, status.max_sae_id_count, status.status_extension) == ("", 0, {})
    assert status.slave_sae_id == ""
    assert quirks == {"null members", "missing members", "status_extension is no object"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("key_size", None), ("key_size", "256"), ("key_size", True), ("key_size", -1), ("max_key_size", 1.5),
     ("slave_SAE_ID", 7)],
)  # fmt: skip
def test_status_refused(name: str, value: Any) -> None:
    with pytest.raises(Malformed, match=name):
        parse_status(json.dumps({**STATUS, name: value}).encode(), quirks=set())


def test_key_container_as_the_standard_writes_it() -> None:
    assert parse(container((ID, KEY), (OTHER, b"x" * 16))) == ([(ID, KEY), (OTHER, b"x" * 16)], set())
    assert parse({"keys": []}) == ([], set())


@pytest.mark.parametrize(
    ("document", "quirks"),
    [
        ({"Keys": [{"key_ID": ID, "key": base64.b64encode(KEY).decode()}]}, {"Keys for keys"}),
        (
            {"keys": None, "Keys": [{"key_ID": ID, "key": base64.b64encode(KEY).decode()}]},
            {"Keys for keys", "null members"},
        ),
        ({"keys": [{"key_id": ID, "key": base64.b64encode(KEY).decode()}]}, {"key_id for key_ID"}),
        ({"keys": [{"key_ID": ID, "key": KEY.hex()}]}, {"hexadecimal key"}),
        ({"keys": [{"key_ID": ID, "key": KEY.hex().upper()}]}, {"hexadecimal key"}),
        ({"keys": [{"key_ID": ID, "key": base64.urlsafe_b64encode(KEY).decode()}]}, {"URL-safe base64 key"}),
        (
            {"keys": [{"key_ID": ID, "key": base64.b64encode(KEY).decode().rstrip("=")}]},
            {"unpadded base64 key"},
        ),
        (
            {
                "keys": [
                    {"key_ID": ID, "key": base64.b64encode(KEY).decode(), "key_extension": None, "x": 1}
                ],
                "key_container_extension": None,
            },
            {"extra members", "null members"},
        ),
    ],
)
def test_tolerated(document: Any, quirks: set[str]) -> None:
    assert parse(document) == ([(ID, KEY)], quirks)


def test_ids_that_are_no_uuids_are_tolerated() -> None:
    assert parse(container(("key-1", KEY))) == ([("key-1", KEY)], {"key ID is no UUID"})


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "not a JSON object"),
        ({}, "no list of keys"),
        ({"keys": {}}, "no list of keys"),
        ({"keys": ["x"]}, "not an object"),
        ({"keys": [{"key": "AAAA"}]}, "no key_ID"),
        ({"keys": [{"key_ID": 7, "key": "AAAA"}]}, "no key_ID"),
        ({"keys": [{"key_ID": "i" * 256, "key": "AAAA"}]}, "longer than 255"),
        ({"keys": [{"key_ID": "a\nb", "key": "AAAA"}]}, "not printable"),
        ({"keys": [{"key_ID": ID}]}, "no key member"),
        ({"keys": [{"key_ID": ID, "key": None}]}, "no key member"),
        ({"keys": [{"key_ID": ID, "key": 12}]}, "no key member"),
        ({"keys": [{"key_ID": ID, "key": ""}]}, "no key member"),
        ({"keys": [{"key_ID": ID, "key": "===="}]}, "not in base64"),
        ({"keys": [{"key_ID": ID, "key": "A"}]}, "not in base64"),
        ({"keys": [{"key_ID": ID, "key": "AA AA"}]}, "not in base64"),
        ({"keys": [{"key_ID": ID, "key": "ÄÄÄÄ"}]}, "not in base64"),
        (container((ID, KEY), (ID, KEY)), "twice"),
    ],
)
def test_refused(document: Any, problem: str) -> None:
    with pytest.raises(Malformed, match=problem):
        parse(document)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"keys":' * 50_000, b"1" * 5000]
)
def test_garbage_is_refused(body: bytes) -> None:
    with pytest.raises(Malformed) as caught:
        parse_key_container(body, kms="", quirks=set())
    assert caught.value.__context__ is None


@given(st.binary(min_size=1, max_size=128))
def test_any_base64_key_is_read_as_base64(secret: bytes) -> None:
    text = base64.b64encode(secret).decode()
    if set(text) <= set("0123456789abcdef") or set(text) <= set("0123456789ABCDEF"):
        return  # one in 2^63, or made up by hypothesis
    assert parse({"keys": [{"key_ID": ID, "key": text}]})[0] == [(ID, secret)]


@given(st.binary(min_size=16, max_size=128))
def test_any_hexadecimal_key_of_128_bits_is_read_as_such(secret: bytes) -> None:
    assert parse({"keys": [{"key_ID": ID, "key": secret.hex()}]})[0] == [(ID, secret)]


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["keys", "Keys", "key_ID", "key", "x"]), inner)))  # fmt: skip
def test_nothing_else_but_malformed(document: Any) -> None:
    with contextlib.suppress(Malformed):
        parse(document)


NOT_MESSAGE = {"error body without a message"}


@pytest.mark.parametrize(
    ("body", "text", "quirks"),
    [
        ({"message": "size shall be a multiple of 8"}, "size shall be a multiple of 8", set()),
        ({"message": None, "detail": "Not found"}, "Not found", {"detail for message"}),
        ({"error": " no keys "}, "no keys", {"error for message"}),
        ({"message": {"a": 1}}, "", NOT_MESSAGE),
        ({"message": "x" * 201}, "", set()),
        ({"message": "two\nlines"}, "", set()),
        ({"message": "fine", "keys": []}, "", set()),
        ({"message": "fine", "Keys": []}, "", set()),
        ({"message": "fine", "key": "x"}, "", set()),
        ({"message": f"key {ID} unknown"}, f"key {ID} unknown", set()),
        ({"message": "at most 4 additional_slave_SAE_IDs"}, "at most 4 additional_slave_SAE_IDs", set()),
        (
            {"message": "not all extension_mandatory parameters"},
            "not all extension_mandatory parameters",
            set(),
        ),
        ({"message": f"key {KEY.hex()} unknown"}, "key [...] unknown", set()),
        ({"message": f"key {base64.b64encode(KEY).decode()}"}, "key [...]", set()),
        ([], "", {"error body is no JSON object"}),
    ],
)
def test_error_texts(body: Any, text: str, quirks: set[str]) -> None:
    met: set[str] = set()
    assert error_text(json.dumps(body).encode(), quirks=met) == text
    assert met == quirks


def test_error_texts_of_no_json() -> None:
    quirks: set[str] = set()
    assert error_text(b"<html>500</html>", quirks=quirks) == error_text(b"", quirks=quirks) == ""
    assert quirks == {"error body is no JSON object", "empty error body"}
