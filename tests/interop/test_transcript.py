"""Recorded bytes, computed again from ephemeral secrets, certificates and QKD key, with nothing of `qkd_tls`.

The client is the independent one of `examples/rndl/`, which keeps its ephemeral secrets; the server and the KMEs are
ours. The recomputation is checked against OpenSSL's key log and against what the server's socket says.
"""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from qkd_tls import QKDInfo
from rndl import wire
from rndl.eavesdropper import ML_KEM, X25519, Eavesdropper, FutureComputer, Opened, Recording
from rndl.handshake import Forged, Handshake, binder_fits
from rndl.hybrid import EXPORTER_LABEL, Association, identity_parts, read_frames
from rndl.tls13 import CannotDecrypt
from tests.support.interop.transcript import QUESTION, Conversation, Site, site
from tests.support.paths import EXAMPLES, VECTORS
from tests.support.sockets import Lab

CASES = json.loads((VECTORS / "hybrid_psk_v1.json").read_text(encoding="utf-8"))
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


@dataclass(frozen=True)
class Inputs:
    """What a connection's hybrid handshake comes from, beside its bytes on the wire. `exported` is H."""

    conversation: Conversation
    exported: bytes
    qkd_key: bytes
    ml_kem: bytes
    x25519: bytes

    @classmethod
    def of(cls, conversation: Conversation) -> Inputs:
        assert conversation.client.bootstrap is not None
        exported = conversation.client.bootstrap.handshake.schedule.export(EXPORTER_LABEL, b"", 48)
        (share,) = conversation.client.hybrid.handshake.server_hello.key_shares.values()
        shared = conversation.client.hybrid.ephemeral.shared_secret(share)
        return cls(conversation, exported, conversation.key.secret, shared[:32], shared[32:])

    @property
    def streams(self) -> Recording:
        return self.conversation.recording.handshakes()[-1]

    @property
    def psk(self) -> bytes:
        offered = wire.parse_client_hello(inbound(self.streams.client).message()).psk
        assert offered is not None
        return Association.made(self.exported, "SAE-A", "SAE-B").psk(offered.identity, self.qkd_key)

    def binder_fits(self) -> bool:
        return binder_fits(inbound(self.streams.client).message(), self.psk)

    def begin(self) -> Handshake:
        hellos = (inbound(stream).message() for stream in (self.streams.client, self.streams.server))
        return Handshake(*hellos, shared_secret=self.ml_kem + self.x25519, psk=self.psk)

    def read(self) -> tuple[bytes, bytes]:
        """The data of the client, and of the server."""
        handshake, client, server = self.begin(), inbound(self.streams.client), inbound(self.streams.server)
        client.message()
        server.message()
        handshake.read_server_flight(server)
        handshake.read_client_flight(client)
        return client.all_data(), server.all_data()

    def with_one_bit_changed(self, name: str, bit: int) -> Inputs:
        value = int.from_bytes(getattr(self, name), "big") ^ (1 << bit)
        changed: dict[str, Any] = {name: value.to_bytes(len(getattr(self, name)), "big")}
        return replace(self, **changed)


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


def test_one_bit_of_any_secret_decides(our_site: Site) -> None:
    inputs = Inputs.of(our_site.talk())
    assert inputs.binder_fits()
    assert inputs.read() == (QUESTION, QUESTION)
    for name in ("exported", "qkd_key", "ml_kem", "x25519"):
        for bit in (0, 8 * len(getattr(inputs, name)) - 1):
            changed = inputs.with_one_bit_changed(name, bit)
            # The binder is made with the PSK alone, before there is a shared secret.
            assert changed.binder_fits() == (name in {"ml_kem", "x25519"}), (name, bit)
            with pytest.raises(CannotDecrypt):
                changed.read()


def test_with_a_psk_of_sha256(our_site: Site) -> None:
    """An associated connection whose KDF and cipher suite are those of SHA-256."""
    association = our_site.talk().client.association
    conversation = our_site.talk_with_sha256(association)
    (hybrid,) = conversation.opened(associations=(association,))
    check_against_the_key_log(our_site, hybrid)
    qkd, handshake = info(conversation), hybrid.handshake
    assert (qkd.cipher, qkd.key_id) == ("TLS_AES_128_GCM_SHA256", conversation.key.key_id)
    assert (handshake.suite.name, handshake.psk_taken) == (qkd.cipher, True)
    assert handshake.client_hello.psk is not None
    assert len(handshake.client_hello.psk.binder) == 32
    assert identity_parts(handshake.client_hello.psk.identity) == ("sha256", association.id, qkd.key_id)
    assert (hybrid.client_data, hybrid.server_data) == (QUESTION, QUESTION)


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
    again = Inputs.of(conversation).begin()
    assert again.schedule.secrets.items() <= hybrid.schedule.secrets.items()
    keys = again.keys("SERVER_HANDSHAKE_TRAFFIC_SECRET")
    forged = keys.seal(wire.HANDSHAKE, wire.handshake_message(wire.FINISHED, bytes(48)))
    with pytest.raises(Forged, match="server's Finished"):
        again.read_server_flight(inbound(forged))


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["kdf"] + " " + case["key_id"][:8])
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
            assert name.partition(".")[0] in {*sys.stdlib_module_names, "cryptography", "rndl"}


def test_an_interpreter_that_runs_the_independent_code_has_loaded_nothing_of_ours() -> None:
    modules = [f"rndl.{path.stem}" for path in sorted((EXAMPLES / "rndl").glob("[!_]*.py"))]
    program = f"import sys, {', '.join(modules)}; print(*sys.modules, sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(run.stdout.split())
    assert loaded >= set(modules)
    ours = ("qkd_tls", "kms_client", "OpenSSL")
    assert [name for name in loaded if name.partition(".")[0] in ours] == []
