"""PSKs for stock TLS programs: what is exported really opens a connection, once."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from kms_client import KMSError, LocalKeyManager
from kms_client.emulator import RunningPair
from qkd_tls import HandshakePath, Protection, QKDContext, QKDUnavailable
from qkd_tls.hybrid import KDF
from qkd_tls.openssl import TLSConnection, TLSContext, TLSSettings
from qkd_tls.psk import PSK
from qkd_tls.psk_export import ExportedPSK, export_psk
from tests.support.commands import PROGRAM, TIMEOUT, Site, record, running_server, text
from tests.support.node_binary import node_binary
from tests.support.requirements import NODE, debian
from tests.support.sockets import Authority, Lab, Server, echo, local_lab

GROUPS = ("X25519MLKEM768", "X25519")


class StockClient:
    """A TLS 1.3 client that knows external PSKs and nothing else: no ALPN, no certificates, no control messages."""

    def __init__(self, address: tuple[str, int], psk: PSK, suites: tuple[str, ...], name: str | None) -> None:
        settings = TLSSettings(server_side=False, groups=GROUPS, cipher_suites=suites)
        self._sock = socket.create_connection(address, timeout=TIMEOUT)
        self.tls = TLSConnection(TLSContext(settings), server_hostname=name, psk=psk)
        try:
            while not self.tls.handshake():
                self._exchange()
            self._sock.sendall(self.tls.take())
        except BaseException:
            self.close()
            raise

    def _exchange(self) -> None:
        self._sock.sendall(self.tls.take())
        data = self._sock.recv(1 << 16)
        if not data:
            raise ssl.SSLEOFError("closed")
        self.tls.feed(data)

    def talk(self, data: bytes) -> bytes:
        self.tls.write(data)
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                self._exchange()

    def close(self) -> None:
        self._sock.close()


def stock(server: Server, exported: ExportedPSK, **changes: Any) -> StockClient:
    name = changes.get("name", exported.server_name)
    return StockClient(server.address, exported.psk(), exported.cipher_suites, name)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("psk"))


@pytest.fixture
def lab(authority: Authority, kmes: RunningPair) -> Iterator[Lab]:
    """Both sites with real KMEs."""
    managers = {"client": kmes.client("a"), "server": kmes.client("b")}
    yield Lab(authority, authority.issue(), authority.issue("client"), kmes, managers)
    for manager in managers.values():
        manager.close()


@pytest.fixture
def local(authority: Authority) -> Lab:
    return local_lab(authority, authority.issue(), authority.issue("client"))


def bootstrapped(server: Server, context: QKDContext, name: str = "localhost") -> Any:
    """A client's connection, closed."""
    with server.connect(context, name) as sock:
        pass
    assert server.seen_info().path is HandshakePath.BOOTSTRAP
    return sock


@pytest.mark.parametrize("kdf", list(KDF))
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_it_opens_a_connection(lab: Lab, kdf: KDF, name: str) -> None:
    """And the server fetches the key from its KME by the ID in the identity."""
    with Server(lab.server()) as server:
        sock = bootstrapped(server, lab.client(), name)
        with export_psk(sock, kdf) as exported:
            assert len(exported.secret) == kdf.psk_size
            assert exported.identity.endswith(exported.key_id)
            client = stock(server, exported)
            assert client.talk(b"hello") == b"hello"
            assert client.tls.psk_accepted
            assert client.tls.cipher_suite in exported.cipher_suites
            client.close()
        info = server.seen_info()
    assert info.protection is Protection.HYBRID
    assert info.path is HandshakePath.ASSOCIATED
    assert info.key_id == exported.key_id != sock.qkd.key_id
    assert info.association == sock.qkd.association
    assert info.kms_round_trips == 1
    assert lab.kmes is not None
    delivered = [one for one in lab.kmes.deliveries if one.key_id == exported.key_id]
    assert [(one.sae_id, one.role) for one in delivered] == [("SAE-A", "master"), ("SAE-B", "slave")]
    assert exported.secret == bytes(kdf.psk_size), "it is wiped"


def test_it_opens_one_connection_only(local: Lab) -> None:
    with Server(local.server()) as server:
        exported = export_psk(bootstrapped(server, local.client()))
        stock(server, exported).close()
        assert server.seen_info().key_id == exported.key_id
        with pytest.raises(ssl.SSLError):
            stock(server, exported)
        assert isinstance(server.seen().error, QKDUnavailable)


@pytest.mark.parametrize("name", ["other.example", None])
def test_the_server_name_has_to_be_that_of_the_bootstrap(local: Lab, name: str | None) -> None:
    with Server(local.server()) as server:
        exported = export_psk(bootstrapped(server, local.client()))
        with pytest.raises(ssl.SSLError):
            stock(server, exported, name=name)
        assert isinstance(server.seen().error, QKDUnavailable)


def test_a_wrong_secret_opens_nothing(local: Lab) -> None:
    with Server(local.server()) as server:
        exported = export_psk(bootstrapped(server, local.client()))
        exported.secret[0] ^= 1
        with pytest.raises(ssl.SSLError):
            stock(server, exported)
        assert "different keys" in str(server.seen().error)


def test_the_client_goes_on_as_before(local: Lab) -> None:
    """Its association and its announced keys are its own."""
    context = local.client(announced_keys=1)
    with Server(local.server()) as server:
        sock = bootstrapped(server, context)
        exported = export_psk(sock)
        with server.connect(context) as again:
            assert again.qkd is not None
            assert again.qkd.announced
            assert again.qkd.key_id != exported.key_id
        assert server.seen_info().path is HandshakePath.ASSOCIATED


def test_the_secret_is_in_no_repr(local: Lab) -> None:
    with Server(local.server()) as server:
        exported = export_psk(bootstrapped(server, local.client()))
    assert exported.secret.hex() not in repr(exported)
    assert str(bytes(exported.secret)) not in repr(exported)


def test_what_has_no_psk(local: Lab) -> None:
    context = local.client()
    with Server(local.server()) as server:
        sock = bootstrapped(server, context)
        context.forget_associations()
        with pytest.raises(QKDUnavailable, match="the association has ended"):
            export_psk(sock)
    with Server(local.server(policy="off")) as server:
        with server.connect(local.client(policy="off")) as plain, pytest.raises(QKDUnavailable) as caught:
            export_psk(plain)
        assert caught.value.hint == "see why: the policy is 'off'"
    with Server(local.server(), echo) as server:
        unshaken = server.connect(local.client(), do_handshake_on_connect=False)
        with unshaken, pytest.raises(ValueError, match="after its handshake"):
            export_psk(unshaken)
        server.seen()


def test_a_fallen_back_connection_says_why(local: Lab) -> None:
    with (
        warnings.catch_warnings(),
        Server(local.server(policy="off")) as server,
    ):
        warnings.simplefilter("ignore")
        with server.connect(local.client(policy="prefer")) as sock, pytest.raises(QKDUnavailable) as caught:
            export_psk(sock)
    assert "does not speak qkd-tls/1" in caught.value.hint


class SmallKeys:
    """The client's key manager; from its second answer on, keys are too short or are not there."""

    def __init__(self, manager: LocalKeyManager, size: int | None) -> None:
        self._manager, self._size, self._asked = manager, size, 0
        self.protocol, self.name, self.sae_id = manager.protocol, manager.name, manager.sae_id

    def get_keys(self, peer: str, number: int = 1, size: int | None = 256) -> Any:
        self._asked += 1
        if self._asked > 1 and self._size is None:
            raise KMSError("no more")
        return self._manager.get_keys(peer, number, size if self._asked == 1 else self._size)


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [(128, QKDUnavailable, "at least 32 bytes"), (None, KMSError, "no more")],
)
def test_no_key_no_psk(local: Lab, size: int | None, kind: type[Exception], message: str) -> None:
    manager: Any = SmallKeys(local.manager("client"), size)
    with Server(local.server()) as server:
        sock = bootstrapped(server, local.client(key_manager=manager))
        with pytest.raises(kind, match=message):
            export_psk(sock)


# --- the command


def openssl() -> str:
    path = shutil.which("openssl")
    if path is None:
        raise debian("openssl").missing()
    return path


@pytest.fixture(scope="module")
def classical_too(server_site: Site) -> Iterator[Any]:
    """A server whose operator has added X25519, which every stock program has."""
    with running_server(server_site, "--www", "--groups", ",".join(GROUPS)) as running:
        yield running


def test_openssl_s_client_connects_with_it(client_site: Site, classical_too: Any) -> None:
    """The command line that is printed, but for the group: older versions have no ML-KEM."""
    result = client_site.run("psk", classical_too.address, "--yes", "--json")
    assert result.returncode == 0, text(result)
    assert result.stderr == b""
    said = record(result.stdout)
    bootstrap = classical_too.record()
    command = shlex.split(said["openssl"].replace("X25519MLKEM768", "X25519"))
    run = subprocess.run(
        [openssl(), *command[1:], "-ign_eof"],
        input=b"GET / HTTP/1.0\r\n\r\n",
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    seen = classical_too.record()
    assert b"HTTP/1.1 200 OK" in run.stdout, run.stderr
    assert b"Reused, TLSv1.3, Cipher is TLS_AES_128_GCM_SHA256" in run.stdout
    assert seen["qkd"]["key_id"] == said["key_id"] in said["identity"]
    assert seen["qkd"]["protection"] == "hybrid"
    assert seen["qkd"]["path"] == "associated"
    assert seen["qkd"]["group"] == "X25519"
    assert seen["qkd"]["kms_round_trips"] == 1
    assert seen["qkd"]["association"] == bootstrap["qkd"]["association"]
    assert any(step["what"] == "KME" and said["key_id"] in step["text"] for step in seen["steps"])


NODE_CLIENT = """
const tls = require('node:tls');
const [port, servername, identity, psk] = process.argv.slice(1);
const sock = tls.connect({
  port, host: 'localhost', servername, minVersion: 'TLSv1.3', ciphers: 'TLS_AES_128_GCM_SHA256',
  pskCallback: () => ({identity, psk: Buffer.from(psk, 'hex')}), checkServerIdentity: () => undefined,
});
sock.on('secureConnect', () => sock.write('GET / HTTP/1.0\\r\\n\\r\\n'));
sock.on('data', data => process.stdout.write(data));
"""


def node() -> str:
    path = node_binary() or shutil.which("node")
    if path is None:
        raise NODE.missing()
    return path


def test_node_connects_with_it(client_site: Site, classical_too: Any) -> None:
    said = record(client_site.run("psk", classical_too.address, "--yes", "--json").stdout)
    classical_too.record()
    port = classical_too.address.rpartition(":")[2]
    run = subprocess.run(
        [node(), "-e", NODE_CLIENT, port, said["server_name"], said["identity"], said["psk"]],
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    seen = classical_too.record()
    assert run.stdout.startswith(b"HTTP/1.1 200 OK\r\n"), run.stderr
    assert seen["qkd"]["key_id"] == said["key_id"]
    assert seen["qkd"]["path"] == "associated"
    # Node.js 26 has ML-KEM, older ones have X25519 only.
    assert seen["qkd"]["group"] in GROUPS


def test_transcript(client_site: Site, echo: str) -> None:
    result = client_site.run("psk", echo, "--yes")
    assert result.returncode == 0
    match = re.fullmatch(
        r"identity: (qkd1\.sha256\.[\w-]{22}\.[\w-]{12}\.[0-9a-f-]{36})\npsk:      ([0-9a-f]{64})\n",
        result.stdout.decode(),
    )
    assert match is not None
    said = text(result)
    assert said.count("  KME  asking ") == 2
    assert re.search(
        r"For one handshake, in the next (59|60) min \(until .* UTC\), unless the server restarts\.", said
    )
    command = shlex.split(said.splitlines()[-1])
    assert command[:4] == ["openssl", "s_client", "-connect", echo]
    assert command[-4:] == ["-psk_identity", match[1], "-psk", match[2]]
    assert command[command.index("-servername") + 1] == "localhost"


def test_address_without_server_name_and_sha384(client_site: Site, echo: str) -> None:
    target = f"127.0.0.1:{echo.rpartition(':')[2]}"
    said = record(client_site.run("psk", target, "--yes", "--json").stdout)
    assert "-noservername" in shlex.split(said["openssl"])
    result = client_site.run("psk", target, "--yes", "--kdf", "sha384")
    assert re.search(r"^psk:      [0-9a-f]{96}$", result.stdout.decode(), re.MULTILINE)
    assert "OpenSSL's s_client takes PSKs for SHA-256 only" in text(result)


def test_nobody_can_be_asked(client_site: Site, echo: str, kmes: RunningPair) -> None:
    before = kmes.stored("a")
    result = client_site.run("psk", echo)
    assert (result.returncode, result.stdout) == (2, b"")
    assert text(result).endswith(
        "error: the PSK is a secret, and nobody can be asked whether to print it\n"
        "hint: give --yes if you want it printed\n"
    )
    assert kmes.stored("a") >= before


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 2), (b"\n", 2)])
def test_on_a_terminal_it_asks(client_site: Site, echo: str, answer: bytes, code: int) -> None:
    ours, theirs = os.openpty()
    try:
        os.write(ours, answer)
        result = subprocess.run(
            [*PROGRAM, "psk", echo],
            stdin=theirs,
            capture_output=True,
            env=client_site.variables(),
            timeout=TIMEOUT,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    said = text(result)
    assert result.returncode == code
    assert said.startswith("The PSK is a SECRET, and it is about to be printed.")
    assert f"can open one connection to {echo} as SAE SAE-A" in said.replace("\n", " ")
    assert (b"psk:" in result.stdout) == (code == 0)


def test_without_qkd_there_is_no_psk(client_site: Site, server_site: Site) -> None:
    with running_server(server_site, "--policy", "off") as running:
        result = client_site.run("psk", running.address, "--policy", "off", "--yes")
    assert result.returncode == 3
    assert text(result).endswith(
        "error: this connection has no association: no QKD key protects it\nhint: see why: the policy is 'off'\n"
    )
