"""Recorded bytes, computed again from ephemeral secrets, certificates and QKD key, with nothing of `qkd_tls`.

The client is the independent one of `examples/rndl/`, which keeps its ephemeral secrets; the server and the KMEs are
ours. The recomputation is checked against OpenSSL's key log and against what the server's socket says.
"""

from __future__ import annotations

import ast
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from rndl import wire  # type: ignore[import-not-found,unused-ignore]
from rndl.eavesdropper import ML_KEM, X25519, Eavesdropper, FutureComputer, Opened, Recording  # type: ignore[import-not-found,unused-ignore]
from rndl.handshake import Forged, Handshake, binder_fits  # type: ignore[import-not-found,unused-ignore]
from rndl.hybrid import EXPORTER_LABEL, Association, identity_parts, read_frames  # type: ignore[import-not-found,unused-ignore]
from socket_support import Lab
from transcript_support import EXAMPLES, QUESTION, Conversation, Site, site

from qkd_tls import QKDInfo

VECTORS = json.loads(
    (Path(__file__).resolve().parents[1] / "vectors" / "hybrid_psk_v1.json").read_text(encoding="utf-8")
)
HANDSHAKE_SECRETS = ["CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_HANDSHAKE_TRAFFIC_SECRET"]
ALL_SECRETS = [*HANDSHAKE_SECRETS, "CLIENT_TRAFFIC_SECRET_0", "EXPORTER_SECRET", "SERVER_TRAFFIC_SECRET_0"]


@pytest.fixture
def our_site(lab: Lab, tmp_path: Path) -> Iterator[Site]:
    with site(lab, tmp_path) as running:
        yield running


def info(conversation: Conversation) -> QKDInfo:
    assert conversation.seen.error is None
    assert conversation.seen.info is not None
    return conversation.seen.info


def inbound(stream: bytes) -> wire.Inbound:
    return wire.Inbound(wire.record_source(io.BytesIO(stream).read))


def check_against_the_key_log(our_site: Site, opened: Opened) -> None:
    logged = our_site.logged(opened.handshake.client_hello.random)
    assert sorted(logged) == sorted(ALL_SECRETS)
    assert logged == opened.handshake.schedule.secrets


def check_hybrid(conversation: Conversation, hybrid: Opened, association: Association) -> None:
    """Identity, PSK, binder, and that no certificate is in it; and the data."""
    qkd, key = info(conversation), conversation.key
    first = hybrid.handshake.client_hello.psk
    assert first is not None
    assert first.identity == association.identity(key.key_id)
    assert identity_parts(first.identity) == ("sha384", association.id, qkd.key_id)
    psk = association.psk(first.identity, key.secret)
    hello = conversation.recording.handshakes()[-1].client[5:]
    hello = hello[: 4 + int.from_bytes(hello[1:4], "big")]
    assert binder_fits(hello, psk)
    assert not binder_fits(hello, association.psk(first.identity, bytes(32)))
    assert hybrid.handshake.psk_taken
    assert hybrid.handshake.certificates == {"server": [], "client": []}
    assert hybrid.handshake.alpn is None
    assert (hybrid.handshake.group, qkd.group) == (0x11EC, "X25519MLKEM768")
    assert hybrid.handshake.suite.name == qkd.cipher
    assert (hybrid.client_data, hybrid.server_data) == (QUESTION, QUESTION)


@pytest.mark.parametrize("pipelined", [False, True], ids=["offer first", "pipelined"])
def test_bootstrap_and_hybrid_handshake_from_the_bytes_alone(our_site: Site, pipelined: bool) -> None:
    conversation = our_site.talk(pipelined=pipelined)
    bootstrap, hybrid = conversation.opened()
    check_against_the_key_log(our_site, bootstrap)
    check_against_the_key_log(our_site, hybrid)

    # The signature over the transcript was verified with the key of this certificate.
    certificate = bootstrap.handshake.certificates["server"][0]
    assert certificate.public_bytes(Encoding.DER) == our_site.lab.server_identity.der
    assert bootstrap.handshake.signature_schemes == {"server": 0x0403}
    assert not bootstrap.handshake.psk_taken
    assert bootstrap.handshake.alpn == "qkd-tls/1"

    # The control messages fill the rest of the bootstrap.
    (offer,), (accept,) = read_frames(bootstrap.client_data), read_frames(bootstrap.server_data)
    assert (offer["type"], offer["key_ids"]) == ("offer", [conversation.key.key_id])
    assert (accept["type"], accept["key_ids"]) == ("accept", [conversation.key.key_id])

    exported = bootstrap.handshake.schedule.export(EXPORTER_LABEL, b"", 48)
    association = Association.made(exported, offer["sae_id"], accept["sae_id"])
    assert association == bootstrap.association == conversation.client.association
    assert (association.id.hex(), str(info(conversation).path)) == (
        info(conversation).association,
        "bootstrap",
    )
    check_hybrid(conversation, hybrid, association)


def test_an_associated_connection_from_the_bytes_alone(our_site: Site) -> None:
    first = our_site.talk()
    association = first.opened()[0].association
    assert association is not None
    second = our_site.talk(association=association)
    (hybrid,) = second.opened(associations=(association,))
    assert str(info(second).path) == "associated"
    assert info(second).association == association.id.hex()
    check_against_the_key_log(our_site, hybrid)
    check_hybrid(second, hybrid, association)


@pytest.mark.parametrize(("kind", "scheme"), [("RSA-2048", 0x0804), ("Ed25519", 0x0807)])
def test_signatures_of_other_kinds_of_certificates(lab: Lab, tmp_path: Path, kind: str, scheme: int) -> None:
    with site(lab, tmp_path, kind=kind) as running:
        bootstrap, _ = running.talk().opened()
    assert bootstrap.handshake.signature_schemes == {"server": scheme}


def test_each_secret_and_each_byte_of_the_hellos_is_needed(our_site: Site) -> None:
    conversation = our_site.talk()
    told, key = conversation.client.ephemeral, conversation.key.secret
    whole = conversation.recording

    def closed(recording: Recording, breaks: tuple[str, ...], keys: list[bytes], known: bool) -> list[str]:
        association = [conversation.client.association] if known else []
        results = Eavesdropper(FutureComputer(breaks, told), keys, association).read(recording)
        return ["" if isinstance(one, Opened) else ",".join(one.missing) or "changed" for one in results]

    assert closed(whole, (X25519, ML_KEM), [key], False) == ["", ""]
    assert closed(whole, (X25519, ML_KEM), [], False) == ["", "QKD key"]
    assert closed(whole, (X25519, ML_KEM), [bytes([key[0] ^ 1]) + key[1:]], False) == ["", "QKD key"]
    assert closed(whole, (X25519,), [key], True) == [ML_KEM, ML_KEM]
    assert closed(whole, (ML_KEM,), [key], True) == [X25519, X25519]
    # The random of the bootstrap's ClientHello; then of its ServerHello.
    for side in ("client", "server"):
        stream = getattr(whole, side)
        changed = replace(whole, **{side: stream[:11] + bytes([stream[11] ^ 1]) + stream[12:]})
        assert closed(changed, (X25519, ML_KEM), [key], False)[0] == "changed"


def test_a_signature_that_does_not_fit_the_transcript_is_refused(our_site: Site) -> None:
    handshake: Handshake = our_site.talk().opened()[0].handshake
    with pytest.raises(Forged, match="CertificateVerify"):
        handshake._check_signature("server", 0x0403, bytes.fromhex("3006020101020101"))
    with pytest.raises(Forged, match="0x0804"):
        handshake._check_signature("server", 0x0804, b"")


def test_a_finished_that_does_not_fit_the_transcript_is_refused(our_site: Site) -> None:
    """A flight of the same handshake whose Finished was changed by somebody who has the keys."""
    conversation = our_site.talk()
    hybrid = conversation.opened()[1].handshake
    assert hybrid.client_hello.psk is not None
    identity = hybrid.client_hello.psk.identity
    hellos = [
        inbound(getattr(conversation.recording.handshakes()[1], side)).message()
        for side in ("client", "server")
    ]
    shared = conversation.client.hybrid.ephemeral.shared_secret(
        next(iter(hybrid.server_hello.key_shares.values()))
    )
    psk = conversation.client.association.psk(identity, conversation.key.secret)
    again = Handshake(*hellos, shared_secret=shared, psk=psk)
    assert again.schedule.secrets.items() <= hybrid.schedule.secrets.items()
    keys = again.keys("SERVER_HANDSHAKE_TRAFFIC_SECRET")
    forged = keys.seal(wire.HANDSHAKE, wire.handshake_message(wire.FINISHED, bytes(48)))
    with pytest.raises(Forged, match="server's Finished"):
        again.read_server_flight(inbound(forged))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["kdf"] + " " + case["key_id"][:8])
def test_the_derivation_agrees_with_the_vectors(case: dict[str, str]) -> None:
    association = Association.made(
        bytes.fromhex(case["exporter_secret"]),
        case["client_sae"],
        case["server_sae"],
        bytes.fromhex(case["kem_secret"]),
    )
    assert association.secret.hex() == case["association_secret"]
    identity = association.identity(case["key_id"], case["kdf"])
    assert identity.decode() == case["psk_identity"]
    assert association.psk(identity, bytes.fromhex(case["qkd_key"])).hex() == case["psk"]


@pytest.mark.parametrize("module", sorted((EXAMPLES / "rndl").glob("*.py")), ids=lambda path: path.stem)
def test_the_independent_code_imports_nothing_of_ours(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            assert name.partition(".")[0] in {*sys.stdlib_module_names, "cryptography"}
