"""A dissector that is not ours, Wireshark's `tshark`, reads recorded connections as plain TLS 1.3.

Client and server are ours; what their connections put on the wire is written into pcap files.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rndl.recorder import RecordingProxy
from tests.support.interop.pcap import PORT, write_pcap
from tests.support.requirements import debian
from tests.support.sockets import Lab, Server, connect, talk

X25519MLKEM768 = str(0x11EC)
TLS13 = "0x0304"
PRE_SHARED_KEY = "41"
PSK_DHE_KE = "1"
CLIENT_HELLO, SERVER_HELLO = "1", "2"
MESSAGE = b"read by a dissector"
# Beyond 0x200000 ("chat", such as the begin of a connection) are notes, warnings and errors.
WRONG = "_ws.malformed || _ws.unreassembled || _ws.expert.severity > 0x200000"


@functools.cache
def tshark() -> str:
    if path := shutil.which("tshark"):
        return path
    raise debian("tshark").missing()


@dataclass
class Capture:
    file: Path
    keylog: Path
    pieces: list[tuple[str, bytes]] = field(default_factory=list, repr=False)

    def rows(self, *fields: str, only: str, keylog: bool = False) -> list[list[str]]:
        """These fields of the packets that the display filter lets through."""
        command = [
            tshark(),
            "-n",
            "-r",
            str(self.file),
            "-d",
            f"tcp.port=={PORT},tls",
            "-Y",
            only,
            "-T",
            "fields",
        ]
        command += ["-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"]
        if keylog:
            command += ["-o", f"tls.keylog_file:{self.keylog}"]
        for name in fields:
            command += ["-e", name]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return [line.split("\t") for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def captures(all_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Capture]:
    """A first and an associated connection."""
    directory = tmp_path_factory.mktemp("captures")
    context, client = all_lab.server(), all_lab.client()
    context.keylog_filename = str(directory / "keys.log")
    with Server(context) as server, RecordingProxy(server.address) as tap:
        for path in ("bootstrap", "associated"):
            with connect(tap.address, client) as sock:
                assert sock.qkd is not None
                assert sock.qkd.path == path
                talk(sock, MESSAGE)
        tap.wait()
    found = {}
    for name, recording in zip(("first", "associated"), tap.recordings, strict=True):
        found[name] = Capture(directory / f"{name}.pcap", directory / "keys.log", recording.pieces)
        write_pcap(found[name].file, recording.pieces)
    return found


@pytest.mark.parametrize(
    ("name", "psks"),
    [("first", [False, True]), ("associated", [True])],
    ids=["bootstrap and hybrid handshake", "hybrid handshake alone"],
)
def test_tshark_sees_tls_13_with_a_psk_and_ml_kem(
    captures: dict[str, Capture], name: str, psks: list[bool]
) -> None:
    hellos = captures[name].rows(
        "tls.handshake.extension.type",
        "tls.handshake.extensions_key_share_group",
        "tls.handshake.extensions.supported_version",
        "tls.extension.psk_ke_mode",
        "tls.handshake.extensions_alpn_str",
        only=f"tls.handshake.type == {CLIENT_HELLO}",
    )
    assert [PRE_SHARED_KEY in kinds.split(",") for kinds, *_ in hellos] == psks
    for kinds, *rest in hellos:
        assert rest == [X25519MLKEM768, TLS13, PSK_DHE_KE, "qkd-tls/1"]
        # RFC 8446 section 4.2.11: the last extension.
        assert PRE_SHARED_KEY not in kinds.split(",")[:-1]
    answers = captures[name].rows(
        "tls.handshake.extension.type",
        "tls.handshake.extensions_key_share_group",
        "tls.handshake.extensions.supported_version",
        only=f"tls.handshake.type == {SERVER_HELLO}",
    )
    assert [PRE_SHARED_KEY in kinds.split(",") for kinds, *_ in answers] == psks
    assert [rest for _, *rest in answers] == [[X25519MLKEM768, TLS13]] * len(psks)


@pytest.mark.parametrize("name", ["first", "associated"])
@pytest.mark.parametrize("keylog", [False, True], ids=["as on the wire", "decrypted"])
def test_tshark_finds_nothing_wrong(captures: dict[str, Capture], name: str, keylog: bool) -> None:
    assert captures[name].rows("frame.number", "_ws.expert.message", only=WRONG, keylog=keylog) == []
    assert len(captures[name].rows("frame.number", only="tls", keylog=keylog)) > 3


@pytest.mark.parametrize("name", ["first", "associated"])
def test_with_the_key_log_tshark_reads_the_application_data(captures: dict[str, Capture], name: str) -> None:
    """And without it, it does not: the key log has what the QKD key protects."""
    wanted = f"tls.app_data && data.data contains {MESSAGE.hex(':')}"
    assert captures[name].rows("frame.number", only=wanted) == []
    data = captures[name].rows("data.data", only=wanted.partition(" && ")[2], keylog=True)
    assert data == [[MESSAGE.hex()]] * 2


def test_tshark_reads_identity_and_binder(captures: dict[str, Capture]) -> None:
    """The identity is what docs/protocol.md says; one binder of SHA-384; the server takes the first identity."""
    psk = "tls.handshake.extensions.psk."
    ((identity, length),) = captures["associated"].rows(
        f"{psk}identity.identity", f"{psk}binders_len", only=f"tls.handshake.type == {CLIENT_HELLO}"
    )
    text = bytes.fromhex(identity.replace(":", "")).decode()
    assert re.fullmatch(r"qkd1\.sha384\.[\w-]{22}\.[\w-]{12}\.[0-9a-f-]{36}", text)
    assert length == str(1 + 48)
    only = f"tls.handshake.type == {SERVER_HELLO}"
    assert captures["associated"].rows(f"{psk}identity.selected", only=only) == [["0"]]


@pytest.mark.parametrize(
    ("intact", "broken"),
    [
        (b"\x11\xec\x04\xc0", b"\x11\xec\xff\xff"),
        (b"\x00\x2b\x00\x03\x02\x03\x04", b"\x00\x2b\x00\x03\x09\x03\x04"),
    ],
    ids=["the key share ends behind the message", "the list of versions ends behind its extension"],
)
def test_a_broken_recording_is_seen_to_be_one(
    captures: dict[str, Capture], tmp_path: Path, intact: bytes, broken: bytes
) -> None:
    """The check above can fail."""
    ((_, hello), *rest) = captures["associated"].pieces
    assert hello.count(intact) == 1
    changed = Capture(tmp_path / "broken.pcap", tmp_path, [("client", hello.replace(intact, broken)), *rest])
    write_pcap(changed.file, changed.pieces)
    assert changed.rows("frame.number", only=f"({WRONG}) && tls.handshake.type == {CLIENT_HELLO}")
    assert not changed.rows("frame.number", only="tcp.checksum.status != 1 || ip.checksum.status != 1")
