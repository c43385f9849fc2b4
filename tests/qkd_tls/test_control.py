"""Control messages: what is written is read back, and everything else is named as malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_tls.control import (
    Accept,
    Discover,
    FrameReader,
    Identity,
    KEMOffer,
    MalformedMessage,
    Message,
    Offer,
    Reject,
    RejectCode,
    UnsupportedVersion,
    encode,
)

pytestmark = pytest.mark.pure

MESSAGES: list[Message] = [
    Discover(),
    Identity("SAE-B", ("etsi-014",), (), 1),
    Identity("Genève-2", ("etsi-014", "skip"), ("ML-KEM-768", "HQC-256"), 64),
    Offer("etsi-014", "SAE-A", ("key-1",)),
    Offer("etsi-014", "Zürich-1", ("a.b", "c"), KEMOffer("ML-KEM-768", b"\0\xff")),
    Offer("etsi-014", "SAE-A", ("key-1",), pipelined=True),
    Accept("SAE-B", 1, ("key-1",)),
    Accept("SAE-B", 2**31, ("key-1", "key-2"), b"ciphertext"),
    Reject(RejectCode.BUSY, "", None),
    Reject(RejectCode.UNKNOWN_KEY, "the KME has no key 'é'", "h2"),
    Reject("a_code_of_tomorrow", "who knows", "http/1.1"),
]

VALID: dict[str, dict[str, Any]] = {
    "discover": {"type": "discover", "version": 1},
    "identity": {
        "type": "identity",
        "version": 1,
        "sae_id": "B",
        "kms": ["etsi-014"],
        "kems": [],
        "max_keys": 8,
    },
    "offer": {"type": "offer", "version": 1, "kms": "etsi-014", "sae_id": "A", "key_ids": ["k"]},
    "accept": {"type": "accept", "version": 1, "sae_id": "B", "lifetime": 60, "key_ids": ["k"]},
    "reject": {"type": "reject", "version": 1, "code": "busy", "detail": "", "alpn": None},
}
MISSING = object()
NOT_STRINGS = [MISSING, None, 1, True, ["x"], {}]
NOT_INTEGERS = [MISSING, None, "1", True, 1.0, [1]]
NOT_NAMES = ["", " ", "a b", "é", "\n", "x" * 201]
NOT_SAE_IDS = ["", "x" * 256, "ü" * 128, "a\n", "\0", "\x7f", "\u202e", "\ud800"]
NOT_NAME_LISTS = [["a", 1], ["a", "a"], *([name] for name in NOT_NAMES)]
NOT_LISTS = [MISSING, None, "k", {"k": 1}, *NOT_NAME_LISTS]
WRONG: list[tuple[str, str, list[Any]]] = [
    ("identity", "sae_id", [*NOT_STRINGS, *NOT_SAE_IDS]),
    ("identity", "kms", [*NOT_LISTS, []]),
    ("identity", "kems", NOT_LISTS),
    ("identity", "max_keys", [*NOT_INTEGERS, 0, -1, 65536]),
    ("offer", "kms", [*NOT_STRINGS, *NOT_NAMES]),
    ("offer", "sae_id", [*NOT_STRINGS, *NOT_SAE_IDS]),
    ("offer", "key_ids", [*NOT_LISTS, []]),
    ("offer", "pipelined", [None, 0, 1, "true"]),
    ("offer", "kem", [None, "ML-KEM-768", [], {}, {"name": "x"}, {"ek": "AAAA"}]),
    ("offer", "kem", [{"name": name, "ek": "AAAA"} for name in [*NOT_STRINGS[1:], *NOT_NAMES]]),
    ("offer", "kem", [{"name": "x", "ek": ek} for ek in [None, 1, "", "A", "AA", "AB==", "A-A_", "AAAA\n"]]),
    ("offer", "kem", [{"name": "x", "ek": ek} for ek in ["AA=A", "AAAA====", "AAAA=", "ÄAAA", "\ud800"]]),
    ("accept", "sae_id", [*NOT_STRINGS, *NOT_SAE_IDS]),
    ("accept", "lifetime", [*NOT_INTEGERS, 0, -1, 2**31 + 1]),
    ("accept", "key_ids", [*NOT_LISTS, []]),
    ("accept", "kem", [None, "AAAA", {}, {"ct": None}, {"ct": ""}, {"ct": "A"}]),
    ("reject", "code", [*NOT_STRINGS, *NOT_NAMES]),
    ("reject", "detail", NOT_STRINGS),
    ("reject", "alpn", [MISSING, 1, True, [], *NOT_NAMES]),
]
WRONG_MEMBERS = [(kind, member, value) for kind, member, values in WRONG for value in values]


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(2, "big") + body


def frame_of(value: object) -> bytes:
    return frame(json.dumps(value).encode())


def read(data: bytes) -> Message | None:
    reader = FrameReader()
    reader.feed(data)
    return reader.next()


@pytest.mark.parametrize("message", MESSAGES)
class TestRoundTrip:
    def test_whole(self, message: Message) -> None:
        reader = FrameReader()
        reader.feed(encode(message))
        assert reader.next() == message
        assert reader.next() is None
        assert reader.unread == b""

    def test_byte_by_byte(self, message: Message) -> None:
        reader = FrameReader()
        *first, last = encode(message)
        for byte in first:
            reader.feed(bytes([byte]))
            assert reader.next() is None
        reader.feed(bytes([last]))
        assert reader.next() == message

    def test_frame(self, message: Message) -> None:
        encoded = encode(message)
        assert int.from_bytes(encoded[:2], "big") == len(encoded) - 2
        members = json.loads(encoded[2:].decode("utf-8"))
        assert members["version"] == 1
        assert members["type"] == type(message).__name__.lower()

    def test_unknown_members_are_ignored(self, message: Message) -> None:
        members = json.loads(encode(message)[2:])
        members["of_tomorrow"] = {"deep": [1, None, {}]}
        assert read(frame_of(members)) == message


def test_members_are_those_of_the_protocol() -> None:
    offer = Offer("etsi-014", "A", ("k1", "k2"), KEMOffer("ML-KEM-768", b"\0\0"))
    assert encode(offer)[2:] == (
        b'{"type":"offer","version":1,"kms":"etsi-014","sae_id":"A","key_ids":["k1","k2"],'
        b'"kem":{"name":"ML-KEM-768","ek":"AAA="}}'
    )
    accept = Accept("B", 60, ("k1",), b"\xff")
    assert encode(accept)[2:] == (
        b'{"type":"accept","version":1,"sae_id":"B","lifetime":60,"key_ids":["k1"],"kem":{"ct":"/w=="}}'
    )
    reject = Reject(RejectCode.MALFORMED, "x", None)
    assert encode(reject)[2:] == (
        b'{"type":"reject","version":1,"code":"malformed","detail":"x","alpn":null}'
    )
    assert encode(Offer("etsi-014", "A", ("k",), pipelined=True)).endswith(b'"pipelined":true}')


def test_reject_codes() -> None:
    assert set(RejectCode) == {
        "kms_unavailable",
        "unknown_key",
        "unknown_sae",
        "unsupported_kms",
        "unsupported_kem",
        "kem_required",
        "unsupported_version",
        "busy",
        "malformed",
    }
    known = read(encode(Reject(RejectCode.BUSY, "", None)))
    assert isinstance(known, Reject)
    assert isinstance(known.code, RejectCode)
    unknown = read(encode(Reject("tomorrow", "", None)))
    assert isinstance(unknown, Reject)
    assert not isinstance(unknown.code, RejectCode)


class TestDetail:
    @pytest.mark.parametrize(
        ("sent", "shown"),
        [
            ("x" * 501, "x" * 500),
            ("a\nb\r\x1b[31mc\0", "ab[31mc"),
            ("\u202eé\ud800 ok", "é ok"),
        ],
    )
    def test_is_trimmed_both_ways(self, sent: str, shown: str) -> None:
        for data in (encode(Reject("busy", sent, None)), frame_of(VALID["reject"] | {"detail": sent})):
            assert read(data) == Reject(RejectCode.BUSY, shown, None)


@pytest.mark.parametrize("members", VALID.values(), ids=VALID)
def test_valid(members: dict[str, Any]) -> None:
    message = read(frame_of(members))
    assert message is not None
    assert read(encode(message)) == message


@pytest.mark.parametrize(("kind", "member", "value"), WRONG_MEMBERS)
def test_wrong_member(kind: str, member: str, value: Any) -> None:
    members = VALID[kind] | {member: value}
    if value is MISSING:
        del members[member]
    with pytest.raises(MalformedMessage, match=rf"{member}|SAE ID|member (name|ek|ct) ") as caught:
        read(frame_of(members))
    assert not isinstance(caught.value, UnsupportedVersion)
    assert len(str(caught.value)) < 120


def test_kem_and_pipelined_exclude_each_other() -> None:
    with pytest.raises(MalformedMessage, match="cannot be pipelined"):
        read(frame_of(VALID["offer"] | {"kem": {"name": "x", "ek": "AAAA"}, "pipelined": True}))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Identity("", ("x",), (), 1),
        lambda: Offer("etsi-014", "A", ()),
        lambda: Offer("etsi-014", "A", ("k", "k")),
        lambda: Accept("B", 0, ("k",)),
        lambda: Accept("B", 1, ("k",), b""),
        lambda: Reject("", "", None),
        lambda: KEMOffer("x", b""),
    ],
)
def test_what_could_not_be_received_cannot_be_built(build: Callable[[], object]) -> None:
    with pytest.raises(MalformedMessage):
        build()


@pytest.mark.parametrize("version", [0, 2, -1, 10**30])
def test_other_versions(version: int) -> None:
    for members in ({"type": "offer"}, {"type": "of_tomorrow"}, {}):
        with pytest.raises(UnsupportedVersion):
            read(frame_of(members | {"version": version}))


@pytest.mark.parametrize("version", [None, "1", True, 1.0, [1]])
def test_version_that_is_none(version: object) -> None:
    with pytest.raises(MalformedMessage, match="version is missing or not") as caught:
        read(frame_of({"type": "discover", "version": version}))
    assert not isinstance(caught.value, UnsupportedVersion)


@pytest.mark.parametrize("kind", [None, 1, [], {}, "", "Offer", "hello"])
def test_unknown_type(kind: object) -> None:
    with pytest.raises(MalformedMessage, match="type is missing or unknown"):
        read(frame_of({"type": kind, "version": 1}))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"type":"\xed\xa0\x80"}', "not JSON"),
        (b'\xef\xbb\xbf{"type":"discover","version":1}', "not JSON"),
        ('{"type":"discover","version":1}'.encode("utf-16"), "not JSON"),
        (b'{"type":"discover","version":1} x', "not JSON"),
        (b'{"type":"discover","version":1,}', "not JSON"),
        (b'{"version":' + b"1" * 5000 + b"}", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b'{"x":' * 10_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'"discover"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"type":"discover","version":1,"x":NaN}', "NaN and Infinity"),
        (b'{"type":"discover","version":1,"x":-Infinity}', "NaN and Infinity"),
        (b'{"type":"discover","type":"discover","version":1}', "twice"),
        (b'{"type":"discover","version":1,"x":{"y":1,"y":2}}', "twice"),
    ],
)
def test_not_a_message(body: bytes, reason: str) -> None:
    with pytest.raises(MalformedMessage, match=reason):
        read(frame(body))


def test_errors_do_not_keep_the_frame() -> None:
    with pytest.raises(MalformedMessage) as caught:
        read(frame(b'{"ek":"secret'))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@given(st.binary(max_size=300) | st.builds(frame, st.binary(max_size=300)))
def test_any_bytes(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    try:
        message = reader.next()
    except MalformedMessage:
        return
    if message is None:
        assert reader.unread == data
    else:
        assert read(encode(message)) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(list(VALID)), st.data())
def test_any_json_in_any_member(kind: str, data: st.DataObject) -> None:
    members = dict(VALID[kind])
    for name in data.draw(st.lists(st.sampled_from([*members, "kem", "pipelined"]), max_size=2)):
        members[name] = data.draw(JSON)
    try:
        message = read(frame_of(members))
    except MalformedMessage:
        return
    assert message is not None
    assert read(encode(message)) == message


def test_several_frames_at_once() -> None:
    reader = FrameReader()
    reader.feed(b"".join(map(encode, MESSAGES)) + b"rest")
    assert [reader.next() for _ in MESSAGES] == MESSAGES
    assert reader.unread == b"rest"


def test_a_malformed_frame_is_taken_off() -> None:
    reader = FrameReader()
    reader.feed(frame(b"nonsense") + encode(Discover()) + b"\0")
    with pytest.raises(MalformedMessage):
        reader.next()
    assert reader.next() == Discover()
    assert reader.unread == b"\0"
    assert reader.next() is None


def test_size_limit() -> None:
    # Of one frame, with an encapsulation key of 45,000 bytes and 100 key IDs.
    key_ids = tuple(f"{number:036}" for number in range(100))
    offer = Offer("etsi-014", "x" * 255, key_ids, KEMOffer("FrodoKEM-1344-SHAKE", bytes(45_000)))
    assert read(encode(offer)) == offer
    with pytest.raises(ValueError, match="limit is 65535"):
        encode(Offer("etsi-014", "x", key_ids, KEMOffer("Classic-McEliece-348864", bytes(261_120))))
