"""Write the test kit.

`derivation.json`, `identities.json`, `control_messages.json` and `client_hellos.json` are the same each time;
nothing of qkd_tls is used for them. `--record` also records new handshakes of qkd_tls, which have fresh
randomness each time, into `handshakes.json`.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import hashlib
import hmac
import json
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


# --- the key schedule, written out with hmac alone


def extract(salt: bytes, keying_material: bytes) -> bytes:
    """Compute HKDF-Extract of RFC 5869 with SHA-384."""
    return hmac.new(salt, keying_material, hashlib.sha384).digest()


def expand(key: bytes, info: bytes, size: int, name: str = "sha384") -> bytes:
    """Compute HKDF-Expand of RFC 5869 with this hash."""
    block, out, number = b"", b"", 1
    while len(out) < size:
        block = hmac.new(key, block + info + bytes([number]), name).digest()
        out += block
        number += 1
    return out[:size]


def expand_label(name: str, secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """Compute HKDF-Expand-Label of RFC 8446 section 7.1 with this hash."""
    info = size.to_bytes(2, "big") + v8(b"tls13 " + label) + v8(context)
    return expand(secret, info, size, name)


def v8(data: bytes) -> bytes:
    """Return the data behind its length in one byte."""
    return len(data).to_bytes(1, "big") + data


def v16(data: bytes) -> bytes:
    """Return the data behind its length in two bytes."""
    return len(data).to_bytes(2, "big") + data


def b64url(data: bytes) -> str:
    """Encode as base64url without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def derive(
    kdf: str, h: bytes, k: bytes, q: bytes, client_sae: str, server_sae: str, key_id: str
) -> dict[str, Any]:
    """Compute all steps of the key schedule, from the inputs to the PSK."""
    a = extract(b"qkd-tls/1 association secret", v16(h) + v16(k))
    association_id = expand(a, b"qkd-tls/1 association id", 16)
    tag_key = expand(a, b"qkd-tls/1 identity tag", 48)
    head = f"qkd1.{kdf}.{b64url(association_id)}"
    tag = hmac.new(tag_key, f"{head}.{key_id}".encode(), hashlib.sha384).digest()[:9]
    identity = f"{head}.{b64url(tag)}.{key_id}"
    epskx = extract(bytes(48), v16(q) + v16(a))
    context = v8(client_sae.encode()) + v8(server_sae.encode())
    target, size = (0x0002, 48) if kdf == "sha384" else (0x0001, 32)
    imported = v16(identity.encode()) + v16(context) + struct.pack(">HH", 0x0304, target)
    digest = hashlib.sha384(imported).digest()
    psk = expand_label("sha384", epskx, b"derived psk", digest, size)
    return {
        "kdf": kdf,
        "exporter_secret": h.hex(),
        "kem_secret": k.hex(),
        "qkd_key": q.hex(),
        "client_sae": client_sae,
        "server_sae": server_sae,
        "key_id": key_id,
        "association_secret": a.hex(),
        "association_id": association_id.hex(),
        "tag_key": tag_key.hex(),
        "tag": tag.hex(),
        "psk_identity": identity,
        "epskx": epskx.hex(),
        "imported_identity": imported.hex(),
        "psk": psk.hex(),
    }


def some_bytes(label: str, size: int) -> bytes:
    """Return bytes that look random and are the same each time."""
    return hashlib.shake_256(f"qkd-tls/1 vectors: {label}".encode()).digest(size)


def derivation() -> list[dict[str, Any]]:
    """Return cases of every kind of input, and the limits of their lengths."""
    cases = (
        ("the usual", "sha384", 0, 32, "SAE-A", "SAE-B", "26e9895d-5ce9-e8ef-74fc-92a52024c7d9"),
        ("SHA-256", "sha256", 0, 32, "SAE-A", "SAE-B", "e347b561-0bda-24b0-b608-fb04aa79672c"),
        ("explicit ML-KEM-768", "sha384", 32, 32, "SAE-A", "SAE-B", "kem-1"),
        ("explicit KEM, SHA-256", "sha256", 64, 32, "SAE-A", "SAE-B", "kem-2"),
        ("SAE IDs beyond ASCII", "sha384", 0, 64, "Zürich-1", "東京-2", "unicode"),
        ("SAE IDs of one byte", "sha384", 0, 33, "A", "B", "!"),
        ("SAE IDs of 255 bytes", "sha384", 0, 32, "é" * 127 + "x", "B" * 255, "long-names"),
        ("the longest key ID", "sha384", 0, 32, "SAE-A", "SAE-B", "~" * 207),
        ("a key ID with dots", "sha256", 0, 32, "SAE-A", "SAE-B", "qkd1.sha384.a.b"),
        ("the longest QKD key", "sha384", 0, 65535, "SAE-A", "SAE-B", "long-key"),
        ("roles exchanged", "sha384", 0, 32, "SAE-B", "SAE-A", "26e9895d-5ce9-e8ef-74fc-92a52024c7d9"),
    )
    return [
        {
            "name": name,
            **derive(
                kdf,
                some_bytes(f"H {name}", 48),
                some_bytes(f"K {name}", k),
                some_bytes(f"Q {name}", q),
                *names,
            ),
        }
        for name, kdf, k, q, *names in cases
    ]


def identities() -> list[dict[str, Any]]:
    """Return PSK identities: their contents, or null if they must be refused."""
    association, tag = some_bytes("a", 16), some_bytes("tag", 9)
    a, t = b64url(association), b64url(tag)

    def good(kdf: str, key_id: str) -> dict[str, Any]:
        parsed = {"kdf": kdf, "association_id": association.hex(), "tag": tag.hex(), "key_id": key_id}
        return {
            "name": f"{kdf}, key ID of {len(key_id)}",
            "identity": f"qkd1.{kdf}.{a}.{t}.{key_id}",
            "parsed": parsed,
        }

    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = a[:-1] + last[last.index(a[-1]) + 1]
    bad = {
        "another version": f"qkd2.sha384.{a}.{t}.k",
        "capitals": f"QKD1.sha384.{a}.{t}.k",
        "unknown hash": f"qkd1.sha512.{a}.{t}.k",
        "padding": f"qkd1.sha384.{a}==.{t}.k",
        "bits behind the association ID": f"qkd1.sha384.{twin}.{t}.k",
        "base64 instead of base64url": f"qkd1.sha384.{'+' * 21}A.{t}.k",
        "short association ID": f"qkd1.sha384.{a[1:]}.{t}.k",
        "short tag": f"qkd1.sha384.{a}.{t[1:]}.k",
        "long tag": f"qkd1.sha384.{a}.{t}A.k",
        "no key ID": f"qkd1.sha384.{a}.{t}.",
        "no last part": f"qkd1.sha384.{a}.{t}",
        "key ID of 208": f"qkd1.sha384.{a}.{t}.{'k' * 208}",
        "a space": f"qkd1.sha384.{a}.{t}.k k",
        "a newline at the end": f"qkd1.sha384.{a}.{t}.k\n",
        "beyond ASCII": f"qkd1.sha384.{a}.{t}.é",
        "a NUL": f"qkd1.sha384.{a}.{t}.k\0",
        "nothing": "",
    }
    return [
        good("sha384", "26e9895d-5ce9-e8ef-74fc-92a52024c7d9"),
        good("sha256", "k"),
        good("sha384", "~" * 207),
        good("sha384", "a.b.c!"),
        *({"name": name, "identity": text, "parsed": None} for name, text in bad.items()),
    ]


def control_messages() -> list[dict[str, Any]]:
    """Return frames: the message in each, or the code for its rejection."""
    ek, ct = some_bytes("ek", 40), some_bytes("ct", 33)
    offer = {
        "type": "offer",
        "version": 1,
        "kms": "etsi-014",
        "sae_id": "SAE-A",
        "key_ids": ["key-1", "key-2"],
    }
    identity = {
        "type": "identity",
        "version": 1,
        "sae_id": "SAE-B",
        "kms": ["etsi-014"],
        "kems": [],
        "max_keys": 64,
    }
    accept = {"type": "accept", "version": 1, "sae_id": "SAE-B", "lifetime": 3600, "key_ids": ["key-1"]}
    reject = {"type": "reject", "version": 1, "code": "unknown_key", "detail": "", "alpn": None}
    discover = {"type": "discover", "version": 1}
    good: dict[str, dict[str, Any]] = {
        "discover": discover,
        "unknown members are ignored": {**discover, "new": {"a": [1]}},
        "identity": identity,
        "identity with KEMs": {**identity, "kems": ["ML-KEM-768", "ML-KEM-1024"], "max_keys": 65535},
        "offer": offer,
        "offer, pipelined": {**offer, "pipelined": True},
        "offer with a KEM": {**offer, "kem": {"name": "ML-KEM-768", "ek": base64.b64encode(ek).decode()}},
        "offer without a key": {**offer, "kms": "none", "key_ids": ["none"]},
        "SAE ID beyond ASCII": {**offer, "sae_id": "Zürich-1"},
        "SAE ID of 255 bytes": {**offer, "sae_id": "x" * 255},
        "key ID of 200": {**offer, "key_ids": ["~" * 200]},
        "accept": accept,
        "accept, longest lifetime": {**accept, "lifetime": 1 << 31},
        "accept with a KEM": {**accept, "kem": {"ct": base64.b64encode(ct).decode()}},
        "reject": reject,
        "reject with ALPN": {**reject, "alpn": "http/1.1", "detail": "no such key"},
        "reject with an unknown code": {**reject, "code": "something-new"},
    }
    bad: dict[str, dict[str, Any]] = {
        "unknown type": {**discover, "type": "hello"},
        "no type": {"version": 1},
        "no version": {"type": "discover"},
        "version as text": {**discover, "version": "1"},
        "version true": {**discover, "version": True},
        "no SAE ID": {name: value for name, value in offer.items() if name != "sae_id"},
        "empty SAE ID": {**offer, "sae_id": ""},
        "SAE ID of 256 bytes": {**offer, "sae_id": "é" * 128},
        "SAE ID with a control character": {**offer, "sae_id": "SAE\n"},
        "no key IDs": {**offer, "key_ids": []},
        "a key ID twice": {**offer, "key_ids": ["k", "k"]},
        "key ID of 201": {**offer, "key_ids": ["k" * 201]},
        "key ID with a space": {**offer, "key_ids": ["k k"]},
        "key ID as a number": {**offer, "key_ids": [1]},
        "pipelined as a number": {**offer, "pipelined": 1},
        "pipelined with a KEM": {**offer, "pipelined": True, "kem": {"name": "ML-KEM-768", "ek": "AAAA"}},
        "KEM null": {**offer, "kem": None},
        "KEM without padding": {**offer, "kem": {"name": "ML-KEM-768", "ek": "AAA"}},
        "KEM with bits behind the end": {**offer, "kem": {"name": "ML-KEM-768", "ek": "AAB="}},
        "KEM empty": {**offer, "kem": {"name": "ML-KEM-768", "ek": ""}},
        "identity without a KMS": {**identity, "kms": []},
        "max_keys 0": {**identity, "max_keys": 0},
        "max_keys 65536": {**identity, "max_keys": 65536},
        "lifetime 0": {**accept, "lifetime": 0},
        "lifetime beyond 2^31": {**accept, "lifetime": (1 << 31) + 1},
        "lifetime with a fraction": {**accept, "lifetime": 1.0},
        "reject without ALPN": {name: value for name, value in reject.items() if name != "alpn"},
    }
    raw = {
        "empty frame": b"",
        "not JSON": b"hello",
        "a list": b"[]",
        "a member twice": b'{"type":"discover","type":"discover","version":1}',
        "NaN": b'{"type":"discover","version":1,"x":NaN}',
        "UTF-16": '{"type":"discover","version":1}'.encode("utf-16"),
        "not UTF-8": b'{"type":"discover","version":1,"x":"\xff"}',
    }

    def case(name: str, body: bytes, message: dict[str, Any] | None, code: str | None) -> dict[str, Any]:
        return {"name": name, "frame": v16(body).hex(), "message": message, "code": code}

    def text(message: dict[str, Any]) -> bytes:
        return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode()

    return [
        *(case(name, text(m), {k: v for k, v in m.items() if k != "new"}, None) for name, m in good.items()),
        *(case(name, text(m), None, "malformed") for name, m in bad.items()),
        *(case(name, body, None, "malformed") for name, body in raw.items()),
        *(
            case(f"version {n}", text({**discover, "version": n}), None, "unsupported_version")
            for n in (0, 2, -1, 1 << 70)
        ),
    ]


def client_hellos() -> list[dict[str, Any]]:
    """Return handshake messages: what a server of qkd-tls/1 reads in each, or null if it must refuse it."""
    identity = b"qkd1.sha384.E9_zJpGJBj8WIjZr4e1cXA.h5_YEbgUSqGG.26e9895d-5ce9-e8ef-74fc-92a52024c7d9"

    def hello(*extensions: tuple[int, bytes]) -> bytes:
        block = b"".join(struct.pack(">H", kind) + v16(data) for kind, data in extensions)
        body = (
            b"\x03\x03" + some_bytes("random", 32) + v8(some_bytes("session", 32)) + v16(b"\x13\x02\x13\x01")
        )
        body += b"\x01\x00" + v16(block)
        return b"\x01" + len(body).to_bytes(3, "big") + body

    def psk(*ids: bytes) -> tuple[int, bytes]:
        entries = b"".join(v16(one) + bytes(4) for one in ids)
        return 41, v16(entries) + v16(b"".join(v8(some_bytes("binder", 48)) for _ in ids))

    sni = (0, v16(b"\x00" + v16(b"server.example")))
    alpn = (16, v16(v8(b"qkd-tls/1") + v8(b"http/1.1")))
    groups, versions = (10, v16(b"\x11\xec")), (43, v8(b"\x03\x04"))
    share = (51, v16(b"\x11\xec" + v16(some_bytes("share", 1216))))
    modes = (45, v8(b"\x01"))
    usual = (sni, groups, alpn, versions, modes, share)

    def case(
        name: str, message: bytes, ids: Sequence[bytes] = (), server_name: str | None = "server.example"
    ) -> dict[str, Any]:
        read = {
            "server_name": server_name,
            "psk_identities": [one.hex() for one in ids],
            "alpn": ["qkd-tls/1", "http/1.1"],
            "groups": [0x11EC],
            "versions": [0x0304],
        }
        return {"name": name, "message": message.hex(), "read": read}

    whole = hello(*usual, psk(identity))
    bad = {
        "cut short": whole[:-1],
        "a byte too many": whole + b"\0",
        "pre_shared_key is not last": hello(psk(identity), *usual),
        "an extension twice": hello(*usual, sni),
        "two binders for one identity": hello(
            *usual, (41, v16(v16(identity) + bytes(4)) + v16(v8(bytes(48)) * 2))
        ),
        "a binder of 31 bytes": hello(*usual, (41, v16(v16(identity) + bytes(4)) + v16(v8(bytes(31))))),
        "an empty identity": hello(*usual, psk(b"")),
        "two host names": hello((0, v16((b"\x00" + v16(b"a.example")) * 2)), *usual[1:]),
        "a host name with a NUL": hello((0, v16(b"\x00" + v16(b"a\0b"))), *usual[1:]),
        "a ServerHello": b"\x02" + whole[1:],
    }
    return [
        case("bootstrap", hello(*usual)),
        case("hybrid", whole, [identity]),
        case("no SNI", hello(*usual[1:], psk(identity)), [identity], None),
        case("two PSKs: no hybrid identity", hello(*usual, psk(identity, b"other")), [identity, b"other"]),
        case("an unknown extension", hello((0x7A7A, b"\0"), *usual)),
        *({"name": name, "message": message.hex(), "read": None} for name, message in bad.items()),
    ]


# --- recorded handshakes of qkd_tls


def handshakes() -> list[dict[str, Any]]:
    """Record a bootstrap and an associated connection over memory for each hash; disclose all secrets."""
    return [case for kdf in ("sha384", "sha256") for case in record(kdf)]


def record(kdf: str) -> list[dict[str, Any]]:
    """Record the two connections of one association."""
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from kms_client import QKDKey
    from qkd_tls import create_default_context
    from qkd_tls.hybrid import KDF

    class Keys:
        protocol, asked = "etsi-014", 0

        def __init__(self, sae_id: str) -> None:
            self.name, self.sae_id = f"KMS of {sae_id}", sae_id

        def status(self, peer_sae_id: str) -> Any:
            raise NotImplementedError

        def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
            self.asked += number
            return self.get_keys_by_id(peer_sae_id, [f"{kdf}-key-{self.asked}"])

        def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
            return [QKDKey(key_id, some_bytes(key_id, 32)) for key_id in key_ids]

        def close(self) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server.example")])
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=36500))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("server.example")]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem, log = os.path.join(folder, "server.pem"), os.path.join(folder, "keys")
        Path(pem).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        client = create_default_context(
            cafile=pem, key_manager=Keys("SAE-A"), peer_sae_id="SAE-B", kdf=KDF(kdf)
        )
        client.keylog_filename = log
        server = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=Keys("SAE-B"))
        server.load_cert_chain(pem)
        made: list[dict[str, Any]] = []
        for number, path in enumerate(("bootstrap", "associated"), 1):
            before = os.path.getsize(log) if os.path.exists(log) else 0
            sent = talk(client, server)
            lines = Path(log).read_text()[before:].splitlines()
            key_id = f"{kdf}-key-{number}"
            if path == "bootstrap":
                exporter = next(line for line in lines if line.startswith("EXPORTER_SECRET")).split()[2]
                h = export(bytes.fromhex(exporter))
            made.append(
                {
                    "name": f"{path}, {kdf}",
                    "client_sent": [flight.hex() for flight in sent[0]],
                    "server_sent": [flight.hex() for flight in sent[1]],
                    "key_log": lines,
                    "derived": derive(kdf, h, b"", some_bytes(key_id, 32), "SAE-A", "SAE-B", key_id),
                    "certificate": certificate.public_bytes(serialization.Encoding.DER).hex(),
                    "application_data": {"client": b"ping".hex(), "server": b"pong".hex()},
                    "outcome": {"protection": "hybrid", "path": path, "group": "X25519MLKEM768"},
                }
            )
        return made


def export(exporter_secret: bytes) -> bytes:
    """Return H from the exporter secret of a bootstrap (RFC 8446 section 7.5).

    The hash is SHA-384 or SHA-256, by the secret's size.
    """
    name = "sha384" if len(exporter_secret) == 48 else "sha256"
    empty = hashlib.new(name).digest()
    secret = expand_label(name, exporter_secret, b"EXPERIMENTAL qkd-tls/1 association", empty, len(empty))
    return expand_label(name, secret, b"exporter", empty, 48)


def talk(client: Any, server: Any) -> tuple[list[bytes], list[bytes]]:
    """Shake hands over memory, send ping and pong, and return each side's flights."""
    import ssl

    bios = [ssl.MemoryBIO() for _ in range(4)]
    near = client.wrap_bio(bios[0], bios[1], server_hostname="server.example")
    far = server.wrap_bio(bios[2], bios[3], server_side=True)
    sent: tuple[list[bytes], list[bytes]] = ([], [])

    def move() -> None:
        for source, sink, kept in ((bios[1], bios[2], sent[0]), (bios[3], bios[0], sent[1])):
            if data := source.read():
                kept.append(data)
                sink.write(data)

    def until(step: Any) -> Any:
        for _ in range(20):
            try:
                return step()
            except ssl.SSLWantReadError:
                move()
        raise AssertionError("no progress")

    done = []

    def both() -> None:
        for side in (near, far):
            if side not in done:
                try:
                    side.do_handshake()
                    done.append(side)
                except ssl.SSLWantReadError:
                    pass
                move()
        if len(done) < 2:
            raise ssl.SSLWantReadError

    until(both)
    near.write(b"ping")
    move()
    assert until(lambda: far.read(10)) == b"ping"
    far.write(b"pong")
    move()
    assert until(lambda: near.read(10)) == b"pong"
    return sent


REPRODUCIBLE = {
    "derivation.json": derivation,
    "identities.json": identities,
    "control_messages.json": control_messages,
    "client_hellos.json": client_hellos,
}


def text_of(cases: list[dict[str, Any]]) -> str:
    """Return the text of a file of the kit."""
    return json.dumps({"protocol": "qkd-tls/1", "cases": cases}, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="record new handshakes, too")
    makers = dict(REPRODUCIBLE)
    if parser.parse_args().record:
        makers["handshakes.json"] = handshakes
    for name, make in makers.items():
        (FOLDER / name).write_text(text_of(make()), encoding="utf-8")


if __name__ == "__main__":
    main()
