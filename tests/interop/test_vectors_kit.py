"""The test kit in interop/vectors against qkd_tls, and as far as possible against a computation by itself."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from qkd_tls import control, hybrid
from qkd_tls.client_hello import ClientHelloError, parse_client_hello
from qkd_tls.hybrid import KDF, PSKIdentity
from tests.support.client_hellos import read
from tests.support.paths import VECTORS

KIT = VECTORS


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("vectors_generator", KIT / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


def cases(name: str) -> pytest.MarkDecorator:
    """A parameter for each case of a file."""
    loaded = json.loads((KIT / name).read_text(encoding="utf-8"))
    assert loaded["protocol"] == "qkd-tls/1"
    return pytest.mark.parametrize("case", loaded["cases"], ids=[case["name"] for case in loaded["cases"]])


@pytest.mark.parametrize("name", GENERATOR.REPRODUCIBLE)
def test_what_is_checked_in_is_what_the_generator_writes(name: str) -> None:
    assert (KIT / name).read_text(encoding="utf-8") == GENERATOR.text_of(GENERATOR.REPRODUCIBLE[name]())


@cases("derivation.json")
def test_derivation(case: dict[str, str]) -> None:
    """The expected values are computed with hmac alone (generate.py); here qkd_tls has its turn."""
    kdf = KDF(case["kdf"])
    a = hybrid.association_secret(bytes.fromhex(case["exporter_secret"]), bytes.fromhex(case["kem_secret"]))
    assert a.hex() == case["association_secret"]
    assert hybrid.association_id(a).hex() == case["association_id"]
    assert hybrid.tag_key(a).hex() == case["tag_key"]
    identity = hybrid.encode_identity(kdf, hybrid.association_id(a), hybrid.tag_hmac(a), case["key_id"])
    assert identity.decode() == case["psk_identity"]
    assert PSKIdentity.parse(identity).tag.hex() == case["tag"]
    names = case["client_sae"], case["server_sae"]
    assert hybrid.imported_identity(identity, *names, kdf).hex() == case["imported_identity"]
    psk = hybrid.derive_psk(bytes.fromhex(case["qkd_key"]), a, identity, *names, kdf)
    assert psk.hex() == case["psk"]


@cases("identities.json")
def test_identities(case: dict[str, Any]) -> None:
    encoded, parsed = case["identity"].encode(), case["parsed"]
    if parsed is None:
        with pytest.raises(ValueError, match="not a PSK identity"):
            PSKIdentity.parse(encoded)
        return
    identity = PSKIdentity.parse(encoded)
    assert identity.encode() == encoded
    assert {
        "kdf": identity.kdf.value,
        "association_id": identity.association_id.hex(),
        "tag": identity.tag.hex(),
        "key_id": identity.key_id,
    } == parsed


def as_json(message: control.Message) -> dict[str, Any]:
    """A parsed message in the form that the kit has it."""
    members: dict[str, Any] = json.loads(
        json.dumps(dataclasses.asdict(message), default=lambda data: base64.b64encode(data).decode())
    )
    if isinstance(message, control.Accept):
        ciphertext = members.pop("kem_ciphertext")
        members |= {"kem": {"ct": ciphertext}} if ciphertext is not None else {}
    if isinstance(message, control.Offer):
        members = {name: value for name, value in members.items() if value not in (None, False)}
    return {"type": type(message).__name__.lower(), "version": 1, **members}


@cases("control_messages.json")
def test_control_messages(case: dict[str, Any]) -> None:
    reader = control.FrameReader()
    reader.feed(bytes.fromhex(case["frame"]))
    if case["code"] is None:
        message = reader.next()
        assert message is not None
        assert as_json(message) == case["message"]
        assert not reader.unread
        return
    with pytest.raises(control.MalformedMessage) as caught:
        reader.next()
    unsupported = isinstance(caught.value, control.UnsupportedVersion)
    assert case["code"] == ("unsupported_version" if unsupported else "malformed")


@cases("client_hellos.json")
def test_client_hellos(case: dict[str, Any]) -> None:
    message = bytes.fromhex(case["message"])
    if case["read"] is None:
        with pytest.raises(ClientHelloError):
            parse_client_hello(message)
        return
    hello = parse_client_hello(message)
    assert {
        "server_name": hello.server_name,
        "psk_identities": [identity.hex() for identity in hello.psk_identities],
        "alpn": [name.decode() for name in hello.alpn],
        "groups": list(hello.groups),
        "versions": list(hello.versions),
    } == case["read"]


# --- recorded handshakes: nothing of qkd_tls but the parser of ClientHellos


def records(flights: list[str]) -> Iterator[bytes]:
    stream = bytes.fromhex("".join(flights))
    while stream:
        size = 5 + int.from_bytes(stream[3:5], "big")
        yield stream[:size]
        stream = stream[size:]


def hash_name(case: dict[str, Any]) -> str:
    return str(case["derived"]["kdf"])


def hybrid_hello(case: dict[str, Any]) -> tuple[bytes, list[bytes]]:
    """The ClientHello with the PSK, and the client's records behind it."""
    sent = list(records(case["client_sent"]))
    (number,) = (
        n
        for n, record in enumerate(sent)
        if record[0] == 22
        and (message := read(record)[0]) is not None
        and parse_client_hello(message).psk_identities
    )
    return sent[number][5:], sent[number + 1 :]


def logged(case: dict[str, Any], label: str) -> bytes:
    """A secret of the hybrid handshake."""
    random = hybrid_hello(case)[0][6:38].hex()
    (secret,) = (line.split()[2] for line in case["key_log"] if line.split()[:2] == [label, random])
    return bytes.fromhex(secret)


@cases("handshakes.json")
class TestHandshakes:
    def test_identity_and_binder(self, case: dict[str, Any]) -> None:
        """From the key log's exporter secret and Q to the binder on the wire (RFC 8446 section 4.2.11.2)."""
        message, _ = hybrid_hello(case)
        derived = case["derived"]
        assert parse_client_hello(message).psk_identities == (derived["psk_identity"].encode(),)
        name = hash_name(case)
        size = hashlib.new(name).digest_size
        empty = hashlib.new(name).digest()
        early = hmac.new(bytes(size), bytes.fromhex(derived["psk"]), name).digest()
        binder_key = GENERATOR.expand_label(name, early, b"ext binder", empty, size)
        finished = GENERATOR.expand_label(name, binder_key, b"finished", b"", size)
        # The binder is the last thing in the message; its length and that of the list precede it.
        truncated = message[: -size - 3]
        expected = hmac.new(finished, hashlib.new(name, truncated).digest(), name).digest()
        assert message[-size:] == expected

    def test_derivation(self, case: dict[str, Any]) -> None:
        given = case["derived"]
        h, k, q = (bytes.fromhex(given[name]) for name in ("exporter_secret", "kem_secret", "qkd_key"))
        names = given["client_sae"], given["server_sae"], given["key_id"]
        assert GENERATOR.derive(given["kdf"], h, k, q, *names) == given
        if case["outcome"]["path"] == "bootstrap":
            random = next(records(case["client_sent"]))[11:43].hex()
            (exporter,) = (
                line.split()[2] for line in case["key_log"] if line.split()[:2] == ["EXPORTER_SECRET", random]
            )
            assert GENERATOR.export(bytes.fromhex(exporter)) == h

    @pytest.mark.parametrize("sender", ["client", "server"])
    def test_application_data(self, case: dict[str, Any], sender: str) -> None:
        """The last record opens with the traffic secret in the key log, and holds what was sent."""
        name = hash_name(case)
        secret = logged(case, f"{sender.upper()}_TRAFFIC_SECRET_0")
        key = GENERATOR.expand_label(name, secret, b"key", b"", 32 if name == "sha384" else 16)
        iv = int.from_bytes(GENERATOR.expand_label(name, secret, b"iv", b"", 12), "big")
        record = list(records(case[f"{sender}_sent"]))[-1]
        # Behind the tickets, where there are any.
        opened = []
        for number in range(4):
            with contextlib.suppress(InvalidTag):
                opened.append(AESGCM(key).decrypt((iv ^ number).to_bytes(12, "big"), record[5:], record[:5]))
        assert opened == [bytes.fromhex(case["application_data"][sender]) + b"\x17"]

    def test_outcome(self, case: dict[str, Any]) -> None:
        message, _ = hybrid_hello(case)
        assert parse_client_hello(message).groups == (0x11EC,)
        assert case["outcome"]["protection"] == "hybrid"
        hellos = [record for record in records(case["client_sent"]) if record[0] == 22]
        assert len(hellos) == (2 if case["outcome"]["path"] == "bootstrap" else 1)
