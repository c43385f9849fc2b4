"""The derivation against the published vectors, and against RFC 5869, 8446 and 9258 written out again here."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
from collections.abc import Callable
from typing import TypeAlias

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from qkd_tls import hybrid
from qkd_tls.hybrid import (
    EXPORTER_LABEL,
    EXPORTER_SIZE,
    KDF,
    PSKIdentity,
    TagMismatch,
    association_id,
    association_secret,
    derive_psk,
    encode_identity,
    imported_identity,
    tag_hmac,
    tag_key,
)
from tests.support.paths import VECTORS

pytestmark = pytest.mark.pure

Vector: TypeAlias = dict[str, str]

CASES: list[Vector] = json.loads((VECTORS / "hybrid_psk_v1.json").read_text(encoding="utf-8"))["cases"]
A = bytes(range(48))


def keyed(tag_key: bytes) -> HMAC:
    return HMAC(tag_key, SHA384())


def created(kdf: KDF, association_id: bytes, tagger: HMAC, key_id: str) -> PSKIdentity:
    return PSKIdentity.parse(encode_identity(kdf, association_id, tagger, key_id))


IDENTITY = created(KDF.SHA384, bytes(16), keyed(A), "key-1")
KEY_IDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=207)


def unhex(vector: Vector, *names: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(vector[name]) for name in names)


@pytest.mark.parametrize("vector", CASES)
class TestVectors:
    def test_association(self, vector: Vector) -> None:
        exporter_secret, kem_secret = unhex(vector, "exporter_secret", "kem_secret")
        secret = association_secret(exporter_secret, kem_secret)
        assert secret.hex() == vector["association_secret"]
        assert association_id(secret).hex() == vector["association_id"]

    def test_identity(self, vector: Vector) -> None:
        secret, association = unhex(vector, "association_secret", "association_id")
        identity = created(KDF(vector["kdf"]), association, tag_hmac(secret), vector["key_id"])
        assert identity.encode() == vector["psk_identity"].encode()
        assert PSKIdentity.parse(vector["psk_identity"].encode()) == identity
        identity.verify_tag(tag_hmac(secret))

    def test_imported_identity(self, vector: Vector) -> None:
        imported = imported_identity(
            vector["psk_identity"].encode(), vector["client_sae"], vector["server_sae"], KDF(vector["kdf"])
        )
        assert imported.hex() == vector["imported_identity"]
        assert vector["imported_identity_context"] in vector["imported_identity"]

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_psk(self, vector: Vector, kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
        qkd_key, secret = unhex(vector, "qkd_key", "association_secret")
        psk = derive_psk(
            kind(qkd_key),
            secret,
            vector["psk_identity"].encode(),
            vector["client_sae"],
            vector["server_sae"],
            KDF(vector["kdf"]),
        )
        assert psk.hex() == vector["psk"]
        assert len(psk) == KDF(vector["kdf"]).psk_size


@pytest.mark.parametrize("vector", CASES)
def test_second_implementation(vector: Vector) -> None:
    """Everything once more, from the text of the RFCs and with the HKDF of `cryptography`."""
    sha384 = hashes.SHA384()
    exporter_secret, kem_secret, qkd_key = unhex(vector, "exporter_secret", "kem_secret", "qkd_key")
    kdf = KDF(vector["kdf"])

    def v16(data: bytes) -> bytes:
        return struct.pack("!H", len(data)) + data

    secret = HKDF.extract(sha384, b"qkd-tls/1 association secret", v16(exporter_secret) + v16(kem_secret))
    identifier = HKDFExpand(sha384, 16, b"qkd-tls/1 association id").derive(secret)
    key = HKDFExpand(sha384, 48, b"qkd-tls/1 identity tag").derive(secret)
    head = f"qkd1.{vector['kdf']}.{base64.urlsafe_b64encode(identifier).decode().rstrip('=')}"
    mac = hmac.new(key, f"{head}.{vector['key_id']}".encode(), "sha384").digest()
    identity = f"{head}.{base64.urlsafe_b64encode(mac[:9]).decode()}.{vector['key_id']}".encode()
    client, server = vector["client_sae"].encode(), vector["server_sae"].encode()
    context = struct.pack("!B", len(client)) + client + struct.pack("!B", len(server)) + server
    target_kdf = {"sha256": 1, "sha384": 2}[vector["kdf"]]
    imported = v16(identity) + v16(context) + struct.pack("!HH", 0x0304, target_kdf)
    digest = hashlib.sha384(imported).digest()
    size = {"sha256": 32, "sha384": 48}[vector["kdf"]]
    label = struct.pack("!HB", size, 17) + b"tls13 derived psk" + struct.pack("!B", 48) + digest
    psk = HKDF(sha384, size, bytes(48), label).derive(v16(qkd_key) + v16(secret))

    assert association_secret(exporter_secret, kem_secret) == secret
    assert association_id(secret) == identifier
    assert tag_key(secret) == key
    assert created(kdf, identifier, keyed(key), vector["key_id"]).encode() == identity
    assert imported_identity(identity, vector["client_sae"], vector["server_sae"], kdf) == imported
    assert derive_psk(qkd_key, secret, identity, vector["client_sae"], vector["server_sae"], kdf) == psk


class TestInputs:
    def test_any_other_input_gives_another_psk(self) -> None:
        qkd_key, identity = bytes(32), IDENTITY.encode()
        psks = [
            derive_psk(qkd_key, A, identity, "client", "server", KDF.SHA384),
            derive_psk(b"\x01" + qkd_key[1:], A, identity, "client", "server", KDF.SHA384),
            derive_psk(qkd_key + b"\0", A, identity, "client", "server", KDF.SHA384),
            derive_psk(qkd_key, A[::-1], identity, "client", "server", KDF.SHA384),
            derive_psk(qkd_key, A, identity + b"1", "client", "server", KDF.SHA384),
            derive_psk(qkd_key, A, identity, "client1", "server", KDF.SHA384),
            derive_psk(qkd_key, A, identity, "client", "server1", KDF.SHA384),
            derive_psk(qkd_key, A, identity, "server", "client", KDF.SHA384),
            derive_psk(qkd_key, A, identity, "clients", "erver", KDF.SHA384),
            derive_psk(qkd_key, A, identity, "client", "server", KDF.SHA256),
        ]
        assert len({bytes(psk[:32]) for psk in psks}) == len(psks)

    def test_any_other_secret_gives_another_association(self) -> None:
        first, second = bytes(48), b"\x01" + bytes(47)
        secrets = [
            association_secret(first),
            association_secret(second),
            association_secret(first, b"\0"),
            association_secret(first, b"\0\0"),
            association_secret(second, b"\0"),
        ]
        for derived in (association_secret, association_id, tag_key):
            assert len({derived(secret) for secret in secrets}) == len(secrets)

    @pytest.mark.parametrize("size", [0, 32, 47, 49])
    def test_size_of_the_exporter_secret(self, size: int) -> None:
        with pytest.raises(ValueError, match="must have 48 bytes"):
            association_secret(bytes(size))

    def test_size_of_the_kem_secret(self) -> None:
        with pytest.raises(ValueError, match="too long"):
            association_secret(bytes(48), bytes(65536))

    @pytest.mark.parametrize("size", [0, 16, 31])
    def test_short_qkd_key(self, size: int) -> None:
        with pytest.raises(ValueError, match="at least 32 bytes"):
            derive_psk(bytes(size), A, IDENTITY.encode(), "client", "server", KDF.SHA384)

    def test_long_qkd_key(self) -> None:
        derive_psk(bytes(65535), A, IDENTITY.encode(), "client", "server", KDF.SHA384)
        with pytest.raises(ValueError, match="too long"):
            derive_psk(bytes(65536), A, IDENTITY.encode(), "client", "server", KDF.SHA384)

    def test_size_of_the_association_secret(self) -> None:
        with pytest.raises(ValueError, match="association secret has 48 bytes"):
            derive_psk(bytes(32), A[:-1], IDENTITY.encode(), "client", "server", KDF.SHA384)

    def test_size_of_a_memoryview_counts_in_bytes(self) -> None:
        with pytest.raises(ValueError, match="at least 32 bytes"):
            derive_psk(
                memoryview(bytearray(31)).cast("b"), A, IDENTITY.encode(), "client", "server", KDF.SHA384
            )
        words = memoryview(bytearray(32)).cast("Q")
        assert len(words) == 4
        assert derive_psk(words, A, IDENTITY.encode(), "c", "s", KDF.SHA384) == derive_psk(
            bytes(32), A, IDENTITY.encode(), "c", "s", KDF.SHA384
        )

    @pytest.mark.parametrize("sae_id", ["", "x" * 256, "ü" * 128])
    def test_sae_ids(self, sae_id: str) -> None:
        for pair in ((sae_id, "server"), ("client", sae_id)):
            with pytest.raises(ValueError, match="SAE ID has 1 to 255 bytes"):
                imported_identity(IDENTITY.encode(), *pair, KDF.SHA384)
        imported_identity(IDENTITY.encode(), "x" * 255, "ü" * 127, KDF.SHA384)

    @pytest.mark.parametrize("identity", [b"", bytes(256)])
    def test_size_of_the_identity(self, identity: bytes) -> None:
        with pytest.raises(ValueError, match="PSK identity has 1 to 255 bytes"):
            imported_identity(identity, "client", "server", KDF.SHA384)

    def test_errors_hold_no_secret(self) -> None:
        with pytest.raises(ValueError, match="31") as caught:
            derive_psk(b"S" * 31, A, IDENTITY.encode(), "client", "server", KDF.SHA384)
        assert "SS" not in str(caught.value)


class TestPSKIdentity:
    @given(st.sampled_from(KDF), st.binary(min_size=16, max_size=16), KEY_IDS)
    def test_round_trip(self, kdf: KDF, association: bytes, key_id: str) -> None:
        identity = created(kdf, association, keyed(A), key_id)
        encoded = identity.encode()
        assert len(encoded) <= 255
        assert encoded.isascii()
        assert PSKIdentity.parse(encoded) == identity
        identity.verify_tag(keyed(A))

    @given(st.binary(max_size=300) | st.from_regex(rb"qkd1\.(sha384|sha256)\.[A-Za-z0-9_=-]*\.[ -~]*"))
    def test_parses_only_what_it_would_write(self, data: bytes) -> None:
        try:
            identity = PSKIdentity.parse(data)
        except ValueError:
            return
        assert identity.encode() == data

    @pytest.mark.parametrize(
        "identity",
        [
            b"",
            b"qkd1",
            b"qkd2.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
            b"QKD1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
            b"qkd1.sha512.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
            b"qkd1.SHA384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA==.AAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAB.AAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAA+A.AAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAAA.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAA/.id",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.i d",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id\n",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id\0",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.\xc3\xa9",
            b"qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA." + b"x" * 208,
            b" qkd1.sha384.AAAAAAAAAAAAAAAAAAAAAA.AAAAAAAAAAAA.id",
        ],
    )
    def test_not_an_identity(self, identity: bytes) -> None:
        with pytest.raises(ValueError, match="not a PSK identity"):
            PSKIdentity.parse(identity)

    def test_key_id_with_dots(self) -> None:
        identity = created(KDF.SHA256, bytes(16), keyed(A), "a.b..c.")
        assert PSKIdentity.parse(identity.encode()).key_id == "a.b..c."

    @pytest.mark.parametrize("key_id", ["", "a b", "a\n", "é", "\x7f", "x" * 208, "\ud800"])
    def test_key_ids_that_cannot_be(self, key_id: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011  (the text may be that of the ASCII codec)
            created(KDF.SHA384, bytes(16), keyed(A), key_id)
        with pytest.raises(ValueError, match="key ID"):
            PSKIdentity(KDF.SHA384, bytes(16), bytes(9), key_id)

    def test_sizes(self) -> None:
        with pytest.raises(ValueError, match="association ID has 16 bytes"):
            PSKIdentity(KDF.SHA384, bytes(15), bytes(9), "id")
        with pytest.raises(ValueError, match="tag of a PSK identity has 9 bytes"):
            PSKIdentity(KDF.SHA384, bytes(16), bytes(10), "id")

    def test_tag_covers_everything(self) -> None:
        tag = IDENTITY.tag
        for other in (
            PSKIdentity(KDF.SHA256, bytes(16), tag, "key-1"),
            PSKIdentity(KDF.SHA384, b"\x01" + bytes(15), tag, "key-1"),
            PSKIdentity(KDF.SHA384, bytes(16), b"\x01" + tag[1:], "key-1"),
            PSKIdentity(KDF.SHA384, bytes(16), tag, "key-2"),
        ):
            with pytest.raises(TagMismatch):
                other.verify_tag(keyed(A))

    def test_tag_of_another_association(self) -> None:
        with pytest.raises(TagMismatch, match="does not belong"):
            IDENTITY.verify_tag(keyed(A[::-1]))


def test_kdf() -> None:
    assert (KDF.SHA384.target_kdf, KDF.SHA384.psk_size) == (2, 48)
    assert (KDF.SHA256.target_kdf, KDF.SHA256.psk_size) == (1, 32)
    assert KDF.SHA384.cipher_suites == ("TLS_AES_256_GCM_SHA384",)
    assert KDF.SHA256.cipher_suites == ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256")


def test_exporter() -> None:
    assert EXPORTER_LABEL == b"EXPERIMENTAL qkd-tls/1 association"
    assert EXPORTER_SIZE == 48


def test_concatenated_secrets_are_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[bytearray] = []
    lengths: list[int] = []

    def concatenation(first: bytes, second: bytes) -> bytearray:
        joined.append(original(first, second))
        lengths.append(len(joined[-1]))
        assert any(joined[-1])
        return joined[-1]

    original = hybrid._concatenation
    monkeypatch.setattr(hybrid, "_concatenation", concatenation)
    association_secret(b"\x01" * 48, b"\x02" * 32)
    derive_psk(b"\x03" * 32, A, IDENTITY.encode(), "client", "server", KDF.SHA384)
    assert lengths == [2 + 48 + 2 + 32, 2 + 32 + 2 + 48]
    assert not any(map(any, joined))


def test_an_association_id_has_16_bytes() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        encode_identity(KDF.SHA384, bytes(15), keyed(A), "key-1")
