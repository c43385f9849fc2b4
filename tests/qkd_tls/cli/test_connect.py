"""`qkd-tls connect` against `qkd-tls serve`, both as processes, with real KMEs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kms_client.emulator import RunningPair
from tests.support.commands import ECHO, PROGRAM, TIMEOUT, Site, nobody, record, running_server, text

KEY = r"[0-9a-f-]{36}"
MS = r" +\d+\.\d ms"


def lines_match(said: str, *patterns: str) -> None:
    """Each line of what was said is one of the patterns, in this order."""
    lines = said.splitlines()
    for line, pattern in zip(lines, patterns, strict=False):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}\n{said}"
    assert len(lines) == len(patterns), said


def summary(path: str) -> list[str]:
    return [
        "",
        r"protection   hybrid: X25519 \+ ML-KEM-768 \+ QKD key",
        rf"connection   {path}: certificates were checked .*",
        "TLS          TLSv1.3, X25519MLKEM768, TLS_AES_256_GCM_SHA384, ALPN none",
        rf"QKD key      {KEY} of https://127.0.0.1:\d+",
        "SAEs         client SAE-A, server SAE-B",
        "association  [0-9a-f]{32}",
        r"server       CN=Demo server; issued by CN=Demo application CA; expires \d{4}-\d\d-\d\dT.*",
        r"handshake    \d+\.\d ms, \d+\.\d ms of them for the KME",
        "",
    ]


def test_bootstrap_and_associated_connection_step_by_step(client_site: Site, echo: str) -> None:
    result = client_site.run("connect", echo, "--twice", input=ECHO)
    assert result.returncode == 0, text(result)
    assert result.stdout == ECHO
    lines_match(
        text(result),
        echo,
        rf"{MS}  TCP  connected to 127.0.0.1:\d+",
        rf"{MS}  TLS  ClientHello sent: a handshake with certificates",
        rf"{MS}  TLS  bootstrap: server authenticated by its certificate; asking for its SAE ID",
        rf"{MS}  TLS  identity: the server has named its SAE ID",
        rf"{MS}  KME  asking https://127.0.0.1:\d+ for a key shared with SAE-B",
        rf"{MS}  KME  answered after \d+\.\d ms: key {KEY}",
        rf"{MS}  TLS  offer sent: the key's ID",
        rf"{MS}  TLS  accept: the server has fetched the key too; hybrid handshake",
        rf"{MS}  TLS  established: both sides hold the same QKD key",
        *summary("bootstrap"),
        echo,
        rf"{MS}  TCP  connected to 127.0.0.1:\d+",
        rf"{MS}  TLS  there is an association with this server: a fresh QKD key is needed",
        rf"{MS}  KME  asking https://127.0.0.1:\d+ for a key shared with SAE-B",
        rf"{MS}  KME  answered after \d+\.\d ms: key {KEY}",
        rf"{MS}  TLS  ClientHello sent: associated, with this key",
        rf"{MS}  TLS  established: both sides hold the same QKD key",
        *summary("associated"),
    )


def test_announced_key_explicit_kem_and_known_peer(client_site: Site, echo: str) -> None:
    result = client_site.run(
        "connect", echo, "--twice", "--announced-keys", "1", "--kem", "ML-KEM-1024", "--peer-sae-id", "SAE-B"
    )
    assert result.returncode == 0, text(result)
    said = text(result)
    assert "asking for its SAE ID" not in said
    assert said.count("  KME  asking ") == 1
    assert re.search(
        rf"KME  asking \S+ for 2 keys shared with SAE-B\n{MS}  KME  .*: key {KEY} and 1 more\n", said
    )
    assert "ClientHello sent: associated, with an announced key" in said
    assert said.count("hybrid: X25519 + ML-KEM-768 + ML-KEM-1024 (explicit) + QKD key") == 2
    assert re.search(rf"QKD key      {KEY} of \S+ \(announced: fetched with an earlier connection\)", said)


def test_json_is_all_that_is_said(client_site: Site, echo: str) -> None:
    result = client_site.run("connect", echo, "--twice", "--json", input=ECHO)
    assert result.returncode == 0
    assert result.stdout == ECHO
    said = record(result.stderr)
    assert said["command"] == "connect"
    first, second = said["connections"]
    for connection in (first, second):
        assert connection["role"] == "client"
        assert connection["peer"] == echo
        assert connection["server_name"] == "localhost"
        assert connection["policy"] == "require"
        assert connection["own_certificate"] is False
        assert connection["qkd"]["protection"] == "hybrid"
        assert connection["certificate"]["subject"] == "CN=Demo server"
        assert 0 < connection["kme_milliseconds"] < connection["milliseconds"]
        assert connection["steps"][0]["what"] == "TCP"
        assert "established" in connection["steps"][-1]["text"]
    assert [one["qkd"]["path"] for one in (first, second)] == ["bootstrap", "associated"]
    assert first["qkd"]["association"] == second["qkd"]["association"]
    assert first["qkd"]["key_id"] != second["qkd"]["key_id"]


def test_quiet_says_nothing(client_site: Site, echo: str) -> None:
    result = client_site.run("connect", echo, "-q", input=ECHO)
    assert (result.returncode, result.stdout, result.stderr) == (0, ECHO, b"")


def test_server_name_and_alpn(client_site: Site, www: str) -> None:
    port = www.rpartition(":")[2]
    result = client_site.run(
        *("connect", f"127.0.0.1:{port}", "--server-name", "localhost", "--alpn", "h2,http/1.1"),
        input=b"GET / HTTP/1.0\r\n\r\n",
    )
    assert result.returncode == 0, text(result)
    assert text(result).startswith(f"127.0.0.1:{port}, as localhost\n")
    assert "TLS_AES_256_GCM_SHA384, ALPN http/1.1\n" in text(result)
    assert result.stdout.startswith(b"HTTP/1.1 200 OK\r\n")


def test_it_ends_when_the_server_closes(client_site: Site, www: str) -> None:
    """Standard input stays open all the time."""
    with client_site.start("connect", www) as process:
        assert process.stdin is not None
        process.stdin.write(b"GET / HTTP/1.0\r\n\r\n")
        process.stdin.flush()
        assert process.wait(TIMEOUT) == 0


def test_much_data_both_ways(client_site: Site, echo: str) -> None:
    data = bytes(range(256)) * (3 << 12)
    result = client_site.run("connect", echo, "-q", input=data)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == data


def test_a_reader_that_goes_away_ends_it_quietly(client_site: Site, echo: str) -> None:
    with client_site.start("connect", echo, "-q") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.write(ECHO)
        process.stdin.flush()
        assert process.stderr is not None
        assert process.wait(TIMEOUT) == 1
        assert process.stderr.read() == b""
        process.stdout = None


def test_nothing_moves_for_too_long(client_site: Site, echo: str) -> None:
    with client_site.start("connect", echo, "--idle", "0.3", "-q") as process:
        assert process.stderr is not None
        assert process.wait(TIMEOUT) == 1
        assert process.stderr.read().startswith(b"error: nothing came or went for 0.3 seconds\nhint: ")


def test_what_moves_one_way_only_is_not_idle(client_site: Site, server_site: Site) -> None:
    with server_site.start("serve", "127.0.0.1:0", "--chat", "-q", "--json") as chat:
        assert chat.stdout is not None
        address = json.loads(chat.stdout.readline())["listening"].replace("127.0.0.1", "localhost")
        with client_site.start("connect", address, "--idle", "2.5") as process:
            assert process.stdin is not None
            for _ in range(9):
                process.stdin.write(ECHO)
                process.stdin.flush()
                time.sleep(0.3)
            assert process.poll() is None


def test_standard_input_that_cannot_be_read(client_site: Site, echo: str, tmp_path: Path) -> None:
    unreadable = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        result = subprocess.run(
            [*PROGRAM, "connect", echo, "-q"],
            stdin=unreadable,
            env=client_site.variables(),
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    finally:
        os.close(unreadable)
    assert result.returncode == 1
    assert text(result).startswith("error: Bad file descriptor\n")


def test_closed_standard_input_is_empty(client_site: Site, echo: str) -> None:
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *PROGRAM, "connect", echo, "-q"],
        env=client_site.variables(),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_without_the_kme_prefer_warns(client_site: Site, server_site: Site) -> None:
    with running_server(server_site, "--policy", "prefer") as running, nobody() as nowhere:
        result = client_site.run(
            "connect", running.address, "--policy", "prefer", KME=f"https://{nowhere}", input=ECHO
        )
        seen = running.record()
    assert (result.returncode, result.stdout) == (0, ECHO)
    said = text(result)
    assert f"  KME  asking https://{nowhere} for a key shared with SAE-B\n" in said
    assert re.search(
        rf"^{MS}  KME  failed after \d+\.\d ms: cannot connect: Connection refused$", said, re.MULTILINE
    )
    assert "warning: no QKD key protects this connection: no QKD key: cannot connect" in said
    assert "protection   pq-only: X25519 + ML-KEM-768\n" in said
    assert "no QKD key   no QKD key: cannot connect" in said
    assert seen["qkd"]["protection"] == "pq-only"


def test_policy_off_needs_no_kme(client_site: Site, server_site: Site) -> None:
    none = dict.fromkeys(("KME", "SAE_ID", "KME_CERT", "KME_KEY", "KME_CA"))
    with running_server(server_site, POLICY="off", **none) as running:
        result = client_site.run("connect", running.address, POLICY="off", input=ECHO, **none)
    assert (result.returncode, result.stdout) == (0, ECHO)
    assert "  KME  " not in text(result)
    assert "server authenticated by its certificate; established without a QKD key\n" in text(result)


# --- the exit codes, and what is said


def failed(result: subprocess.CompletedProcess[bytes], code: int) -> tuple[str, str]:
    """The error and its hint."""
    said = text(result)
    assert result.returncode == code, said
    error, hint = said.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def test_1_nobody_listens(client_site: Site) -> None:
    with nobody() as nowhere:
        error, hint = failed(client_site.run("connect", nowhere), 1)
    assert error == "Connection refused"
    assert hint == "check host and port, and that the server runs"


def test_1_no_tls_server(client_site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.recv(1)
                sock.sendall(b"220 mail.example\r\n")
                while sock.recv(1 << 16):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        result = client_site.run("connect", f"127.0.0.1:{listening.getsockname()[1]}")
        thread.join(TIMEOUT)
    error, hint = failed(result, 1)
    assert error == "wrong version number"
    assert hint == "the server does not speak TLS on this port"


def test_1_silent_server(client_site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        result = client_site.run("connect", f"127.0.0.1:{listening.getsockname()[1]}", "--timeout", "0.2")
    error, hint = failed(result, 1)
    assert error == "The handshake operation timed out"
    assert "--timeout" in hint


def test_2_options_are_missing(client_site: Site, echo: str) -> None:
    error, hint = failed(client_site.run("connect", echo, KME=None, KME_CA=None), 2)
    assert error == "policy 'require' needs a KME, and this is missing: --kme, --kme-ca"
    assert hint == "give the options, or set QKD_TLS_KME, QKD_TLS_KME_CA; --policy off does without QKD keys"


@pytest.mark.parametrize(
    ("arguments", "changes", "error"),
    [
        (["--ca", "no/such.pem"], {}, "no/such.pem: No such file or directory"),
        (["--cert", "no/such.pem"], {}, "no/such.pem: No such file or directory"),
        ([], {"KME_CERT": "no/such.pem"}, "cannot be loaded"),
        ([], {"KME": "http://127.0.0.1:1"}, "https"),
        (["--groups", "X25519MLKEM786"], {}, "does not know one of the groups X25519MLKEM786"),
        (["--kem", "ROT13"], {}, "KEM 'ROT13' is not available here"),
        (["--announced-keys", "64"], {}, "announced_keys must be 0 to 63"),
        ([], {"POLICY": "maybe"}, "there is no policy 'maybe'"),
    ],
)
def test_2_options_do_not_do(
    client_site: Site, echo: str, arguments: list[str], changes: dict[str, Any], error: str
) -> None:
    assert error in failed(client_site.run("connect", echo, *arguments, **changes), 2)[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["localhost"], "'localhost' is not HOST:PORT"),
        (["localhost:1", "--kme-site", "kme.example"], "'kme.example' is not a network of the secure site"),
        (["localhost:0"], "there is no port 0"),
        (["localhost:99999"], "there is no port 99999"),
        (["localhost:1", "--timeout", "-1"], "'-1' is not a positive number of seconds"),
        (["localhost:1", "--idle", "soon"], "'soon' is not a positive number of seconds"),
        (["localhost:1", "--alpn", "qkd-tls/1"], "'qkd-tls/1' is not a list of application protocols"),
        (["localhost:1", "--policy", "maybe"], "invalid choice: 'maybe'"),
    ],
)
def test_2_usage(client_site: Site, arguments: list[str], error: str) -> None:
    result = client_site.run("connect", *arguments)
    assert result.returncode == 2
    assert error in text(result)


def test_3_no_kme(client_site: Site, echo: str) -> None:
    with nobody() as nowhere:
        result = client_site.run("connect", echo, KME=f"https://{nowhere}")
    error, hint = failed(result, 3)
    assert error == (
        f"no QKD key: cannot connect: Connection refused (KMS https://{nowhere}; peer SAE SAE-B)"
    )
    assert hint == "Check that the KME runs and is reachable, then try again"


def test_3_kme_of_the_server_fails_and_json_says_so(client_site: Site, echo: str, kmes: RunningPair) -> None:
    kmes.stop_kme("b")
    try:
        result = client_site.run("connect", echo, "--json")
    finally:
        kmes.start_kme("b")
    assert result.returncode == 3
    assert result.stdout == b""
    said = record(result.stderr)
    assert said["command"] == "connect"
    assert said["error"]["type"] == "QKDUnavailable"
    assert said["error"]["exit_code"] == 3
    assert said["error"]["message"]
    assert said["error"]["hint"]


def test_4_ca_not_trusted(client_site: Site, echo: str, mallorys_ca: object) -> None:
    result = client_site.run("connect", echo, CA=str(mallorys_ca.file))  # type: ignore[attr-defined]
    error, hint = failed(result, 4)
    assert error == "the peer's certificate was refused: unable to get local issuer certificate"
    assert hint == "give the CA of the peer's certificate with --ca"


def test_4_wrong_name(client_site: Site, echo: str) -> None:
    error, hint = failed(client_site.run("connect", echo, "--server-name", "other.example"), 4)
    assert "certificate is not valid for 'other.example'" in error
    assert "--server-name" in hint


def test_4_client_certificate_is_missing(client_site: Site, server_site: Site, kmes: RunningPair) -> None:
    with running_server(server_site, "--ca", str(kmes.pki.directory / "app-ca.pem")) as running:
        error, hint = failed(client_site.run("connect", running.address), 4)
        assert running.record()["error"]["exit_code"] == 4
    assert "certificate required" in error
    assert "client certificate" in hint


def test_client_certificate(client_site: Site, server_site: Site, kmes: RunningPair) -> None:
    files: dict[str, Any] = {
        "CERT": str(kmes.pki.directory / "client.pem"),
        "KEY": str(kmes.pki.directory / "client.key"),
    }
    with running_server(server_site, "--ca", str(kmes.pki.directory / "app-ca.pem")) as running:
        result = client_site.run("connect", running.address, "--json", **files)
        seen = running.record()
    assert result.returncode == 0
    assert record(result.stderr)["connections"][0]["own_certificate"] is True
    assert seen["certificate"]["subject"].startswith("CN=")


def test_130_interrupted(client_site: Site, echo: str) -> None:
    with client_site.start("connect", echo) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"handshake"):
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert b"error: interrupted\n" in process.stderr.read()


def test_the_key_file_may_be_the_certificate_file(
    client_site: Site, server_site: Site, kmes: RunningPair, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(
        b"".join((kmes.pki.directory / name).read_bytes() for name in ("server.key", "server.pem"))
    )
    with running_server(server_site, CERT=str(both), KEY=None) as running:
        assert client_site.run("connect", running.address, "-q").returncode == 0
