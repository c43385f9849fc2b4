"""`qkd-tls serve`, with `qkd-tls connect` and other clients."""

from __future__ import annotations

import re
import signal
import socket

import pytest

from qkd_tls.cli import serve
from tests.support.commands import ECHO, TIMEOUT, Site, running_server, text


def test_steps_of_bootstrap_and_associated_connection(client_site: Site, server_site: Site) -> None:
    with server_site.start("serve", "127.0.0.1:0", "--accept", "2") as process:
        assert process.stderr is not None
        listening = process.stderr.readline().decode()
        port = int(listening.rpartition(":")[2])
        assert client_site.run("connect", f"localhost:{port}", "--twice", "-q", input=ECHO).stdout == ECHO
        assert process.wait(TIMEOUT) == 0
        said = process.stderr.read().decode()
    first, second = (
        [line[4:] for line in said.splitlines() if line.startswith(f"[{number}] ")] for number in (1, 2)
    )
    assert listening == f"listening on 127.0.0.1:{port}\n"
    assert [what(line) for line in first] == [
        "TCP  accepted from 127.0.0.1:PORT",
        "TLS  ClientHello received: a handshake with certificates",
        "TLS  bootstrap: TLS with certificates is complete; waiting for an offer",
        "TLS  discover: the client has asked for this server's SAE ID",
        "TLS  offer received: a key's ID",
        "KME  asking https://127.0.0.1:PORT for key ID shared with SAE-A",
        "KME  answered after N ms: key ID",
        "TLS  accept sent; waiting for the hybrid handshake",
        "TLS  ClientHello received: it names a key that is at hand",
        "TLS  established: both sides hold the same QKD key",
        "protection   hybrid: X25519 + ML-KEM-768 + QKD key",
        "connection   bootstrap: certificates were checked on this connection",
        "TLS          TLSv1.3, X25519MLKEM768, TLS_AES_256_GCM_SHA384, ALPN none",
        "QKD key      ID of https://127.0.0.1:PORT",
        "SAEs         client SAE-A, server SAE-B",
        "association  ID",
        "client       no certificate was asked for",
        "handshake    N ms, N ms of them for the KME",
        "closed",
    ]
    assert [what(line) for line in second[:6]] == [
        "TCP  accepted from 127.0.0.1:PORT",
        "TLS  ClientHello received: it names a key of an association",
        "KME  asking https://127.0.0.1:PORT for key ID shared with SAE-A",
        "KME  answered after N ms: key ID",
        "TLS  the key of the ClientHello is here",
        "TLS  established: both sides hold the same QKD key",
    ]


def what(line: str) -> str:
    """Without what differs each time."""
    line = re.sub(r"^ *\d+\.\d ms  ", "", line)
    line = re.sub(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|\b[0-9a-f]{32}\b", "ID", line)
    line = re.sub(r"\d+\.\d ms", "N ms", line)
    return re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", line)


def test_both_sides_report_the_same_key(client_site: Site, server_site: Site) -> None:
    with running_server(server_site, "--accept", "1") as running:
        result = client_site.run("get", f"https://{running.address}/", "--json")
        seen = running.record()
        # It echoes the request, which is no answer to an HTTP client.
        assert result.returncode == 1
        assert running.process.wait(TIMEOUT) == 0
    assert seen["command"] == "serve"
    assert seen["connection"] == 1
    assert seen["role"] == "server"
    assert seen["qkd"]["key_id"] in str(seen["steps"])
    assert seen["certificate"] is None


def test_a_page_that_says_what_protects_the_connection(client_site: Site, www: str) -> None:
    result = client_site.run("get", f"https://{www}/whatever")
    assert result.returncode == 0, text(result)
    page = result.stdout.decode()
    assert page.startswith("protection   hybrid: X25519 + ML-KEM-768 + QKD key\n")
    assert "What an attacker would need\n" in page
    [key_id] = re.findall("QKD key      ([0-9a-f-]{36}) of", text(result))
    assert f"Key ID {key_id}; this side got it from" in page


@pytest.mark.parametrize("request_", [b"", b"GET / HTTP/1.1\r\n"], ids=["nothing", "half a request"])
def test_no_page_without_a_request(client_site: Site, www: str, request_: bytes) -> None:
    result = client_site.run("connect", www, "-q", input=request_)
    assert (result.returncode, result.stdout) == (0, b"")


def test_chat_is_between_standard_inputs_and_outputs(client_site: Site, server_site: Site) -> None:
    with server_site.start("serve", "127.0.0.1:0", "--chat") as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rpartition(b":")[2])
        with client_site.start("connect", f"localhost:{port}", "-q") as other:
            assert process.stdin is not None
            assert process.stdout is not None
            assert other.stdin is not None
            assert other.stdout is not None
            for sender, receiver in ((process, other), (other, process)):
                assert sender.stdin is not None
                assert receiver.stdout is not None
                sender.stdin.write(b"are you there?\n")
                sender.stdin.flush()
                assert receiver.stdout.readline() == b"are you there?\n"
            other.stdin.close()
            assert process.stdout.read() == b""
            assert process.wait(TIMEOUT) == 0
            assert other.wait(TIMEOUT) == 0
            other.stdin = None


def test_exit_code_and_error_of_the_first_connection_that_failed(
    client_site: Site, server_site: Site
) -> None:
    with server_site.start("serve", "127.0.0.1:0", "--accept", "2") as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rpartition(b":")[2])
        assert client_site.run("connect", f"localhost:{port}", "--policy", "off").returncode == 3
        assert client_site.run("connect", f"localhost:{port}", "-q", input=ECHO).returncode == 0
        assert process.wait(TIMEOUT) == 3
        said = process.stderr.read().decode()
    assert "[1] error: the client does not speak qkd-tls/1, or has no QKD key" in said
    assert "\n[1] hint: " in said
    assert "Traceback" not in said


def test_what_is_not_tls_is_said_and_others_are_served(client_site: Site, server_site: Site) -> None:
    with running_server(server_site) as running:
        port = int(running.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while plain.recv(1 << 16):
                pass
        refused = running.record()
        assert client_site.run("connect", running.address, "-q", input=ECHO).stdout == ECHO
    assert refused["connection"] == 1
    assert refused["error"]["exit_code"] == 1
    assert "plain HTTP" in refused["error"]["hint"]


def test_silent_and_idle_clients_are_let_go(client_site: Site, server_site: Site) -> None:
    with running_server(server_site, "--timeout", "0.2") as running:
        port = int(running.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as plain:
            assert plain.recv(1) == b""
        assert "handshake operation timed out" in running.record()["error"]["message"]
    with (
        running_server(server_site, "--idle", "0.2") as running,
        client_site.start("connect", running.address, "-q") as process,
    ):
        assert running.record()["qkd"]["protection"] == "hybrid"
        assert "timed out" in running.record()["error"]["message"]
        process.wait(TIMEOUT)


@pytest.mark.parametrize("listen", ["0", "[::1]:0"])
def test_it_listens_where_it_is_told(client_site: Site, server_site: Site, listen: str) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with server_site.start("serve", listen, "--accept", "1") as process:
        assert process.stderr is not None
        where = process.stderr.readline().decode().strip().removeprefix("listening on ")
        host = "[::1]" if listen.startswith("[") else "[::]"
        assert where.startswith(host)
        target = where.replace("[::]", "127.0.0.1")
        assert (
            client_site.run("connect", target, "-q", "--server-name", "localhost", input=ECHO).stdout == ECHO
        )
        assert (
            f"accepted from {host if listen != '0' else '127.0.0.1'}:" in process.stderr.readline().decode()
        )


@pytest.mark.parametrize("both", [True, False])
def test_all_addresses(monkeypatch: pytest.MonkeyPatch, both: bool) -> None:
    """Of IPv4 only, where the system has no sockets for both."""
    if both and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: both)
    with serve._listen("", 0) as listening:
        assert listening.family == (socket.AF_INET6 if both else socket.AF_INET)
        with socket.create_connection(("127.0.0.1", listening.getsockname()[1])) as sock:
            accepted, _ = listening.accept()
            accepted.close()
            assert sock.recv(1) == b""


def test_only_the_allowed_sae(client_site: Site, server_site: Site) -> None:
    with running_server(server_site, "--peer-sae-id", "SAE-C") as running:
        result = client_site.run("connect", running.address)
    assert result.returncode == 3
    assert "unknown_sae" in text(result)


def test_no_certificate(server_site: Site) -> None:
    result = server_site.run("serve", "127.0.0.1:0", CERT=None)
    assert result.returncode == 2
    assert text(result) == (
        "error: a server needs a certificate\nhint: give --cert and --key, or set QKD_TLS_CERT and QKD_TLS_KEY\n"
    )


def test_port_in_use(server_site: Site, echo: str) -> None:
    result = server_site.run("serve", f"127.0.0.1:{echo.rpartition(':')[2]}")
    assert result.returncode == 1
    assert "Address already in use" in text(result)


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["99999"], ["127.0.0.1:"], ["0", "--accept", "0"], ["0", "--www", "--chat"]]
)
def test_usage(server_site: Site, arguments: list[str]) -> None:
    result = server_site.run("serve", *arguments)
    assert result.returncode == 2
    assert "usage: qkd-tls serve" in text(result)


def test_interrupted(server_site: Site) -> None:
    with server_site.start("serve", "127.0.0.1:0") as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr.read().startswith(b"error: interrupted\n")
