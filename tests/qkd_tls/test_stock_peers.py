"""Peers that know nothing of qkd-tls/1: Node.js 26, which has ML-KEM, OpenSSL 3.0 and the standard library's ssl."""

from __future__ import annotations

import functools
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qkd_tls import (
    ClassicalGroupWarning,
    Protection,
    QKDFallbackWarning,
    QKDUnavailable,
)
from tests.support import sockets
from tests.support.node_binary import node_binary
from tests.support.ports import free_port
from tests.support.requirements import NODE, debian
from tests.support.sockets import TIMEOUT, Lab, Server, talk

CLASSICAL_TOO = ["X25519MLKEM768", "X25519"]


FALLBACK = (QKDFallbackWarning, "does not speak qkd-tls/1")
CLASSICAL = (ClassicalGroupWarning, "the key exchange of this connection is X25519, which has no ML-KEM")


@contextmanager
def warned(*expected: tuple[type[Warning], str]) -> Iterator[None]:
    """These warnings and no others, from any thread, each at the line that made the connection."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert sorted(one.category.__name__ for one in caught) == sorted(kind.__name__ for kind, _ in expected)
    for one in caught:
        assert any(one.category is kind and text in str(one.message) for kind, text in expected)
        assert Path(one.filename).parent in (Path(__file__).parent, Path(sockets.__file__).parent)


# --- Node.js


@functools.cache
def node() -> str:
    """The Node.js binary; skips where there is none that has ML-KEM."""
    path = node_binary()
    if path is None:
        raise NODE.missing()
    command = [path, "-p", "process.versions.openssl"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 5):
        raise NODE.missing(f"{path} has OpenSSL {version}, which has no ML-KEM")
    return path


NODE_CLIENT = """
const tls = require('node:tls'), fs = require('node:fs');
const [port, ca, connections] = process.argv.slice(1);
let session, results = [];
function next() {
  if (results.length == connections) { console.log(JSON.stringify(results)); return; }
  const sock = tls.connect({port, host: '127.0.0.1', servername: 'localhost', ca: fs.readFileSync(ca), session});
  let text = '', got;
  sock.on('session', s => { session = s; got = true; });
  sock.on('secureConnect', () => sock.write('hello from node'));
  sock.on('data', chunk => {
    text += chunk;
    if (text == 'hello from node') {
      results.push({text, protocol: sock.getProtocol(), cipher: sock.getCipher().name,
                    group: sock.getEphemeralKeyInfo(), reused: sock.isSessionReused(), ticket: Boolean(got)});
      sock.end();
    }
  });
  sock.on('close', next);
  sock.on('error', error => { results.push({error: error.code, message: error.message}); });
}
next();
"""

NODE_SERVER = """
const tls = require('node:tls'), fs = require('node:fs');
const [cert, key] = process.argv.slice(1);
const server = tls.createServer({cert: fs.readFileSync(cert), key: fs.readFileSync(key)}, sock => {
  sock.on('error', () => {});
  sock.pipe(sock);
});
server.on('tlsClientError', () => {});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
process.stdin.on('end', () => process.exit(0)).resume();
"""


def node_connects(lab: Lab, server: Server, connections: int = 1) -> list[dict[str, Any]]:
    """What a Node.js client says of its connections, one after the other, each with the last one's session."""
    command = [node(), "-e", NODE_CLIENT, str(server.address[1]), str(lab.ca.file), str(connections)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    results: list[dict[str, Any]] = json.loads(run.stdout)
    return results


@contextmanager
def node_server(lab: Lab) -> Iterator[tuple[str, int]]:
    files = [str(lab.server_identity.cert_file), str(lab.server_identity.key_file)]
    with subprocess.Popen(
        [node(), "-e", NODE_SERVER, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield "127.0.0.1", int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(TIMEOUT)


class TestNode:
    def test_client_of_a_server_that_prefers(self, lab: Lab) -> None:
        with warned(FALLBACK), Server(lab.server(policy="prefer")) as server:
            (result,) = node_connects(lab, server)
            info = server.seen_info()
        assert result["text"] == "hello from node"
        assert result["protocol"] == "TLSv1.3"
        assert info.protection is Protection.PQ_ONLY
        assert info.group == "X25519MLKEM768"
        assert info.cipher == result["cipher"]
        assert info.key_id is None

    def test_client_of_a_server_that_requires(self, lab: Lab) -> None:
        with Server(lab.server()) as server:
            (result,) = node_connects(lab, server)
            error = server.seen().error
        assert "alert no application protocol" in result["message"]
        assert isinstance(error, QKDUnavailable)
        assert "the client does not speak qkd-tls/1" in str(error)

    def test_server_of_a_client_that_prefers(self, lab: Lab) -> None:
        with node_server(lab) as address, warned(FALLBACK):
            raw = socket.create_connection(address, timeout=TIMEOUT)
            with lab.client(policy="prefer").wrap_socket(raw, server_hostname="localhost") as client:
                talk(client)
                assert client.qkd is not None
                assert client.qkd.protection is Protection.PQ_ONLY
                assert client.qkd.group == "X25519MLKEM768"
                assert "localhost does not speak qkd-tls/1" in (client.qkd.fallback or "")

    def test_server_of_a_client_that_requires(self, lab: Lab) -> None:
        with node_server(lab) as address:
            raw = socket.create_connection(address, timeout=TIMEOUT)
            with pytest.raises(QKDUnavailable, match="localhost does not speak qkd-tls/1"):
                lab.client().wrap_socket(raw, server_hostname="localhost")

    def test_tickets_resume_nothing(self, lab: Lab) -> None:
        """OpenSSL's server cannot be kept from sending tickets; they are good for nothing."""
        with Server(lab.server(policy="off")) as server:
            results = node_connects(lab, server, 3)
            for _ in range(3):
                seen = server.seen()
                assert seen.error is None
                assert seen.session_reused is False
        assert [result["reused"] for result in results] == [False] * 3
        assert [result["ticket"] for result in results] == [True] * 3, "there was nothing to present"


# --- OpenSSL 3.0 on the command line


@functools.cache
def openssl() -> str:
    """The openssl command; skips unless it lacks ML-KEM, which is what these tests are about."""
    path = shutil.which("openssl")
    if path is None:
        raise debian("openssl").missing()
    text = subprocess.run([path, "version"], capture_output=True, text=True, check=True).stdout
    version = re.match(r"OpenSSL (\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) >= (3, 5):
        pytest.skip(f"{text.strip()} has ML-KEM; a peer without it is needed, such as OpenSSL 3.0")
    return path


def s_client(lab: Lab, server: Server) -> subprocess.CompletedProcess[str]:
    """Connects, says something, and ends when the server has echoed it and closed."""
    command = [
        openssl(), "s_client", "-connect", f"127.0.0.1:{server.address[1]}", "-servername", "localhost",
        "-CAfile", str(lab.ca.file), "-verify_return_error", "-brief", "-ign_eof",
    ]  # fmt: skip
    return subprocess.run(
        command, input="hello\n", capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


@contextmanager
def s_server(lab: Lab) -> Iterator[tuple[str, int]]:
    """Sends back each line reversed."""
    port = free_port()
    files = ["-cert", str(lab.server_identity.cert_file), "-key", str(lab.server_identity.key_file)]
    with subprocess.Popen(
        [openssl(), "s_server", "-accept", f"127.0.0.1:{port}", *files, "-rev"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            while "ACCEPT" not in (line := process.stdout.readline()):
                assert line, "s_server has ended"
            # Its output must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield "127.0.0.1", port
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def echo_once(sock: Any) -> None:
    sock.sendall(sock.recv(1 << 16))


class TestOpenSSLCommand:
    @pytest.mark.parametrize("policy", ["prefer", "off"])
    def test_client_is_refused(self, lab: Lab, policy: str) -> None:
        with Server(lab.server(policy=policy)) as server:
            run = s_client(lab, server)
            error = server.seen().error
        assert run.returncode != 0
        assert "handshake failure" in run.stderr
        assert type(error) is ssl.SSLError
        assert "no key exchange group in common" in str(error)
        assert "the client offers X25519, secp256r1" in str(error)
        assert "a classical group has to be added by name" in str(error)

    @pytest.mark.parametrize("policy", ["prefer", "off"])
    def test_client_where_a_classical_group_was_added(self, lab: Lab, policy: str) -> None:
        expected = [CLASSICAL, FALLBACK] if policy == "prefer" else [CLASSICAL]
        with (
            warned(*expected),
            Server(lab.server(policy=policy, groups=CLASSICAL_TOO), echo_once) as server,
        ):
            run = s_client(lab, server)
            info = server.seen_info()
        assert "hello" in run.stdout
        assert info.protection is Protection.CLASSICAL
        assert info.group == "X25519"

    def test_classical_group_does_not_satisfy_a_server_that_requires(self, lab: Lab) -> None:
        with Server(lab.server(groups=CLASSICAL_TOO)) as server:
            run = s_client(lab, server)
            assert isinstance(server.seen().error, QKDUnavailable)
        assert run.returncode != 0

    @pytest.mark.parametrize("policy", ["prefer", "off", "require"])
    def test_server_is_refused(self, lab: Lab, policy: str) -> None:
        with s_server(lab) as address:
            raw = socket.create_connection(address, timeout=TIMEOUT)
            with pytest.raises(ssl.SSLError, match="it may lack X25519MLKEM768") as caught:
                lab.client(policy=policy).wrap_socket(raw, server_hostname="localhost")
        assert type(caught.value) is ssl.SSLError

    @pytest.mark.parametrize("policy", ["prefer", "off"])
    def test_server_where_a_classical_group_was_added(self, lab: Lab, policy: str) -> None:
        """The client's first key share is not one that this server knows: there is a HelloRetryRequest."""
        context = lab.client(policy=policy, groups=CLASSICAL_TOO)
        expected = [CLASSICAL, FALLBACK] if policy == "prefer" else [CLASSICAL]
        with s_server(lab) as address, warned(*expected):
            raw = socket.create_connection(address, timeout=TIMEOUT)
            with context.wrap_socket(raw, server_hostname="localhost") as client:
                client.sendall(b"hello\n")
                with client.makefile("rb") as file:
                    assert file.readline() == b"olleh\n"
                assert client.qkd is not None
                assert client.qkd.protection is Protection.CLASSICAL
                assert client.qkd.group == "X25519"

    def test_classical_group_does_not_satisfy_a_client_that_requires(self, lab: Lab) -> None:
        with s_server(lab) as address:
            raw = socket.create_connection(address, timeout=TIMEOUT)
            with pytest.raises(QKDUnavailable, match="does not speak qkd-tls/1"):
                lab.client(groups=CLASSICAL_TOO).wrap_socket(raw, server_hostname="localhost")


# --- both ends ours, without ML-KEM in the group


class TestClassicalGroupOnBothEnds:
    def test_explicit_kem_is_added(self, lab: Lab) -> None:
        """Without ML-KEM in the group the offer brings it; so it is in the association's secret."""
        context = lab.client(groups=["X25519"])
        mixed_in = (ClassicalGroupWarning, "; ML-KEM-768 is mixed in beside it")
        with warned(*[mixed_in] * 4), Server(lab.server(groups=["X25519"])) as server:
            for _ in range(2):
                with server.connect(context) as client:
                    talk(client)
                    theirs = server.seen_info()
                    for info in (client.qkd, theirs):
                        assert info is not None
                        assert info.protection is Protection.HYBRID
                        assert info.group == "X25519"
                        assert info.kem == "ML-KEM-768"

    def test_ml_kem_group_is_preferred(self, lab: Lab) -> None:
        """Where both have it, no warning."""
        with (
            Server(lab.server(groups=CLASSICAL_TOO)) as server,
            server.connect(lab.client(groups=CLASSICAL_TOO)) as client,
        ):
            assert client.qkd is not None
            assert client.qkd.group == "X25519MLKEM768"
            assert client.qkd.kem is None

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_one_side_alone_cannot_give_up_ml_kem(self, lab: Lab, side: str) -> None:
        groups = {side: ["X25519"]}
        client = lab.client(groups=groups.get("client", ["X25519MLKEM768"]))
        with Server(lab.server(groups=groups.get("server", ["X25519MLKEM768"]))) as server:
            with pytest.raises(ssl.SSLError, match="handshake failure"):
                server.connect(client)
            assert "no key exchange group in common" in str(server.seen().error)

    def test_hello_retry_request(self, lab: Lab) -> None:
        """The server asks for another key share: the same PSK and the same key, on a bootstrap and later."""
        context = lab.client(groups=CLASSICAL_TOO)
        with warned(*[CLASSICAL] * 4), Server(lab.server(groups=["X25519"])) as server:
            key_ids = set()
            for _ in range(2):
                with server.connect(context) as client:
                    talk(client)
                    assert client.qkd is not None
                    assert client.qkd.protection is Protection.HYBRID
                    assert client.qkd.key_id == server.seen_info().key_id
                    assert client.qkd.kms_round_trips == 1
                    key_ids.add(client.qkd.key_id)
        assert len(key_ids) == 2

    def test_misspelt_group(self, lab: Lab) -> None:
        with pytest.raises(
            ssl.SSLError, match="does not know one of the groups X25519MLKEM786: check the spelling"
        ):
            lab.client(groups=["X25519MLKEM786"])


# --- the standard library's ssl


class TestStandardLibrary:
    def test_session_resumes_nothing(self, lab: Lab) -> None:
        """A client that presents the ticket of an earlier connection gets a full handshake."""
        stock = lab.stock_client()
        session: ssl.SSLSession | None = None
        with warned(*[CLASSICAL] * 3), Server(lab.server(policy="off", groups=CLASSICAL_TOO)) as server:
            for _ in range(3):
                raw = server.tcp()
                with stock.wrap_socket(raw, server_hostname="localhost", session=session) as client:
                    talk(client)
                    assert client.version() == "TLSv1.3"
                    assert not client.session_reused
                    assert server.seen().session_reused is False
                    session = client.session
                    assert session is not None
                    assert session.has_ticket

    def test_we_never_resume(self, lab: Lab) -> None:
        """A server that gives tickets gets a full handshake from our client each time."""
        context = lab.client(policy="off", groups=CLASSICAL_TOO)
        with warned(*[CLASSICAL] * 3), Server(lab.stock_server()) as server:
            for _ in range(3):
                with server.connect(context) as client:
                    talk(client)
                    assert client.session is None
                assert server.seen().session_reused is False

    def test_alpn_with_a_stock_peer(self, lab: Lab) -> None:
        """qkd-tls/1 among the protocols offered disturbs nobody."""
        context = lab.client(policy="prefer", groups=CLASSICAL_TOO)
        context.set_alpn_protocols(["h2", "http/1.1"])
        stock = lab.stock_server()
        stock.set_alpn_protocols(["http/1.1"])
        with warned(CLASSICAL, FALLBACK), Server(stock) as server, server.connect(context) as client:
            assert client.selected_alpn_protocol() == "http/1.1"
            assert server.seen().alpn == "http/1.1"
