"""Stock TLS programs that are told one PSK: how each is started, as a client and as a server."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from qkd_tls import KDF
from tests.support.node_binary import node_binary
from tests.support.ports import free_port
from tests.support.requirements import NODE, PYTHON313, debian
from tests.support.sockets import TIMEOUT

with warnings.catch_warnings():
    # It imports asyncore, which it does not need here.
    warnings.simplefilter("ignore", DeprecationWarning)
    from tlslite.api import HandshakeSettings
    from tlslite.api import TLSConnection as TLSLite

__all__ = [
    "HELLO",
    "STACKS",
    "Given",
    "GnuTLS",
    "Mosquitto",
    "Node",
    "OpenSSL",
    "Stack",
    "Stunnel",
    "answer",
]

HELLO: Final = b"hello\n"


@dataclass(frozen=True)
class Given:
    """What a stock program is told: the PSK, and which algorithms to use. The key share is of the first group."""

    identity: str
    psk: bytes
    kdf: KDF
    groups: tuple[str, ...]
    folder: Path

    @property
    def suite(self) -> str:
        """The cipher suite, by OpenSSL's name."""
        return self.kdf.cipher_suites[0]

    def write(self, name: str, text: str) -> str:
        """A file that only its owner may read."""
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        return str(path)


class Stack:
    """A stock TLS stack; `hash_reason` says why it has no PSK of SHA-384."""

    name: ClassVar[str]
    client_program: ClassVar[str]
    server_program: ClassVar[str]
    ml_kem: ClassVar[bool] = False
    sha384_reason: ClassVar[str] = ""
    note: ClassVar[str] = ""
    """What an operator has to know of it."""

    def version(self) -> str:
        """Raises Missing."""
        raise NotImplementedError

    def client(self, given: Given, port: int) -> str:
        """Connect to localhost, send a line, and return all that the program says until the connection ends."""
        raise NotImplementedError

    def confirms(self, given: Given) -> str:
        """What a client says, among other things, of a connection with this PSK; empty where it says nothing."""
        return ""

    def server(self, given: Given) -> contextlib.AbstractContextManager[int]:
        """The port of a server that answers."""
        raise NotImplementedError

    def talk(self, sock: Any) -> bool:
        """Send a line to the server; whether the right answer comes."""
        sock.sendall(HELLO)
        return bool(_read_line(sock) == HELLO)


def _read_line(sock: Any) -> bytes:
    received = b""
    while not received.endswith(b"\n") and (chunk := sock.recv(4096)):
        received += chunk
    return received


_DEBIAN_PACKAGES: Final = {
    "gnutls-cli": "gnutls-bin",
    "gnutls-serv": "gnutls-bin",
    "stunnel": "stunnel4",
    "mosquitto_sub": "mosquitto-clients",
}


@functools.cache
def _program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin")
    if path is None:
        raise debian(_DEBIAN_PACKAGES.get(name, name), name).missing()
    return path


def _first_line(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stdout or run.stderr).splitlines()[0]


def _number(text: str) -> str:
    match = re.search(r"\d+(\.\d+)+", text)
    assert match is not None, text
    return match.group()


def _openssl_conf(given: Given) -> dict[str, str]:
    """For programs that have no setting for the cipher suites of TLS 1.3: OpenSSL's configuration file has."""
    text = (
        "openssl_conf = all\n[all]\nssl_conf = tls\n[tls]\nsystem_default = defaults\n"
        f"[defaults]\nCiphersuites = {given.suite}\nGroups = {':'.join(given.groups)}\n"
    )
    return {**os.environ, "OPENSSL_CONF": given.write("openssl.cnf", text)}


@contextmanager
def _running(command: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program, ended by its own process ID."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
    ) as process:
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.terminate()
            process.wait(TIMEOUT)


def _said(command: Sequence[str], line: bytes = HELLO, **settings: Any) -> str:
    """What a client says, to which standard input stays open until it ends."""
    with _running(command, **settings) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        text = process.stdout.read().decode(errors="replace")
        # What is left in a pipe that nobody reads must not be an error of its closing.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return text


@contextmanager
def _serving(command: Sequence[str], ready: bytes, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from when it has said that it is ready."""
    with _running(command, **settings) as process:
        assert process.stdout is not None
        said = b""
        while ready not in said:
            line = process.stdout.readline()
            assert line, f"it has ended: {said.decode(errors='replace')}"
            said += line
        # Its output must not fill the pipe.
        reader = threading.Thread(target=process.stdout.read)
        reader.start()
        try:
            yield process
        finally:
            process.terminate()
            reader.join(TIMEOUT)


def _listens(port: int) -> None:
    """Wait until a server that says nothing takes connections; each trial is one that it sees ended at once."""
    for _ in range(400):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"nobody listens on {port}")


class OpenSSL(Stack):
    name = "OpenSSL"
    client_program, server_program = "`openssl s_client`", "`openssl s_server`"
    sha384_reason = "`-psk` is for SHA-256 only"

    def version(self) -> str:
        return _number(_first_line(_program("openssl"), "version"))

    def _options(self, given: Given) -> list[str]:
        return [
            "-tls1_3", "-groups", ":".join(given.groups), "-ciphersuites", given.suite,
            "-psk_identity", given.identity, "-psk", given.psk.hex(),
        ]  # fmt: skip

    def confirms(self, given: Given) -> str:
        return f"Reused, TLSv1.3, Cipher is {given.suite}"

    def client(self, given: Given, port: int) -> str:
        target = ["-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-ign_eof"]
        return _said([_program("openssl"), "s_client", *target, *self._options(given)])

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        port = free_port()
        listen = ["-accept", f"127.0.0.1:{port}", "-nocert", "-rev"]
        with _serving([_program("openssl"), "s_server", *listen, *self._options(given)], b"ACCEPT"):
            yield port

    def talk(self, sock: Any) -> bool:
        sock.sendall(HELLO)
        return bool(_read_line(sock) == b"olleh\n")


class GnuTLS(Stack):
    name = "GnuTLS"
    client_program, server_program = "`gnutls-cli`", "`gnutls-serv`"
    note = (
        "`gnutls-serv` listens on all addresses; `gnutls-cli` sends key shares of two groups, so that there is no "
        "HelloRetryRequest"
    )
    sha384_reason = "its PSKs are for SHA-256 only"
    _GROUPS: ClassVar = {"X25519": "GROUP-X25519", "P-256": "GROUP-SECP256R1"}

    def version(self) -> str:
        return _number(_first_line(_program("gnutls-cli"), "--version"))

    def _priority(self, given: Given) -> list[str]:
        cipher = "AES-128-GCM" if given.kdf is KDF.SHA256 else "AES-256-GCM"
        groups = "".join(f":+{self._GROUPS[group]}" for group in given.groups)
        return [
            "--priority",
            f"NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK:-CIPHER-ALL:+{cipher}:-GROUP-ALL{groups}",
        ]

    def confirms(self, given: Given) -> str:
        return f"PSK authentication. Connected as '{given.identity}'"

    def client(self, given: Given, port: int) -> str:
        psk = ["--pskusername", given.identity, "--pskkey", given.psk.hex()]
        target = ["localhost", "--port", str(port)]
        return _said([_program("gnutls-cli"), *target, *psk, *self._priority(given)])

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        port = free_port()
        secrets = given.write("psk.gnutls", f"{given.identity}:{given.psk.hex()}\n")
        command = [_program("gnutls-serv"), "--echo", "--port", str(port), "--pskpasswd", secrets]
        with _serving([*command, *self._priority(given)], b"...done"):
            yield port


class TLSLiteNG(Stack):
    name = "tlslite-ng"
    client_program, server_program = "`handshakeClientCert`", "`handshakeServer`"
    note = "the server fails at the ALPN extension unless it is given `alpn`, with a protocol that the client offers"

    def version(self) -> str:
        return importlib.metadata.version("tlslite-ng")

    def _settings(self, given: Given) -> HandshakeSettings:
        names = {"X25519": "x25519", "P-256": "secp256r1"}
        settings = HandshakeSettings()
        settings.minVersion = settings.maxVersion = (3, 4)
        settings.eccCurves = [names[group] for group in given.groups]
        settings.keyShares = settings.eccCurves[:1]
        settings.pskConfigs = [(given.identity.encode(), given.psk, given.kdf.value)]
        settings.psk_modes = ["psk_dhe_ke"]
        settings.cipherNames = ["aes128gcm" if given.kdf is KDF.SHA256 else "aes256gcm"]
        return settings

    def client(self, given: Given, port: int) -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as raw:
            connection = TLSLite(raw)
            try:
                connection.handshakeClientCert(settings=self._settings(given), serverName="localhost")
                connection.send(HELLO)
                return bytes(connection.read(max=64, min=6)).decode()
            except Exception as error:  # noqa: BLE001 - whatever it raises is what this program says
                return f"{type(error).__name__}: {error}"

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(TIMEOUT)

            def serve() -> None:
                raw, _ = listening.accept()
                with raw:
                    raw.settimeout(TIMEOUT)
                    connection = TLSLite(raw)
                    # What goes wrong, the client tells of.
                    with contextlib.suppress(Exception):
                        # It fails at any ALPN extension unless it has protocols of its own.
                        connection.handshakeServer(settings=self._settings(given), alpn=[bytearray(b"echo")])
                        connection.send(connection.read(max=64, min=1))
                        connection.read(max=1, min=1)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield listening.getsockname()[1]
            finally:
                thread.join(TIMEOUT)


_NODE: Final = """
const tls = require('node:tls');
const [role, port, identity, psk, ciphers, ecdhCurve] = process.argv.slice(1);
const options = {minVersion: 'TLSv1.3', ciphers, ecdhCurve, host: 'localhost', port};
if (role == 'client') {
  const sock = tls.connect({...options, servername: 'localhost', checkServerIdentity: () => undefined,
    pskCallback: () => ({identity, psk: Buffer.from(psk, 'hex')})}, () => sock.write('hello\\n'));
  sock.on('data', data => process.stdout.write(data));
  sock.on('error', error => console.log(error.message));
} else {
  const server = tls.createServer({...options, pskIdentityHint: '',
    pskCallback: (sock, name) => name == identity ? Buffer.from(psk, 'hex') : null}, sock => {
      sock.on('error', () => {});
      sock.pipe(sock);
    });
  server.on('tlsClientError', error => {});
  server.listen(0, '127.0.0.1', () => console.log(`port ${server.address().port} `));
}
"""


class Node(Stack):
    name = "Node.js"
    client_program, server_program = "`tls.connect`", "`tls.createServer`"
    ml_kem = True
    sha384_reason = "its `pskCallback` is for SHA-256 only"

    @staticmethod
    def _binary() -> str:
        path = node_binary()
        if path is None:
            raise NODE.missing()
        return path

    def version(self) -> str:
        return _number(_first_line(self._binary(), "-v"))

    def _command(self, role: str, given: Given, port: int) -> list[str]:
        algorithms = [given.suite, ":".join(given.groups)]
        return [self._binary(), "-e", _NODE, role, str(port), given.identity, given.psk.hex(), *algorithms]

    def client(self, given: Given, port: int) -> str:
        return _said(self._command("client", given, port))

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        with _running(self._command("server", given, 0)) as process:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            assert line.startswith("port "), line + process.stdout.read().decode()
            yield int(line.split()[1])


_PYTHON: Final = """
import socket, ssl, sys
role, port, identity, psk = sys.argv[1], int(sys.argv[2]), sys.argv[3], bytes.fromhex(sys.argv[4])
server = role == "server"
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
context.minimum_version = ssl.TLSVersion.TLSv1_3
if server:
    context.set_psk_server_callback(lambda name: psk if name == identity else b"")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print("port", listening.getsockname()[1], flush=True)
        raw, _ = listening.accept()
else:
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_psk_client_callback(lambda hint: (identity, psk))
    raw = socket.create_connection(("127.0.0.1", port))
try:
    with context.wrap_socket(raw, server_side=server, server_hostname=None if server else "localhost") as sock:
        if server:
            while data := sock.recv(4096):
                sock.sendall(data)
        else:
            sock.sendall(b"hello\\n")
            print(sock.recv(4096).decode(), sock.cipher())
except OSError as error:
    print(error)
"""


class Python(Stack):
    name = "Python 3.13 `ssl`"
    client_program, server_program = "`set_psk_client_callback`", "`set_psk_server_callback`"
    note = "the TLS 1.3 cipher suites come from OpenSSL's configuration file (`OPENSSL_CONF`)"
    sha384_reason = "its callbacks are for SHA-256 only"

    @staticmethod
    def _binary() -> str:
        path = os.environ.get("QKD_TLS_PYTHON313") or shutil.which("python3.13")
        # What is on the path may be a launcher for versions that are not there.
        if not path or subprocess.run([path, "-V"], capture_output=True, check=False).returncode:
            raise PYTHON313.missing()
        return path

    def version(self) -> str:
        return _number(_first_line(self._binary(), "-V"))

    def _command(self, role: str, given: Given, port: int) -> list[str]:
        return [self._binary(), "-c", _PYTHON, role, str(port), given.identity, given.psk.hex()]

    def confirms(self, given: Given) -> str:
        return f"('{given.suite}', 'TLSv1.3', "

    def client(self, given: Given, port: int) -> str:
        return _said(self._command("client", given, port), env=_openssl_conf(given))

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        with _running(self._command("server", given, 0), env=_openssl_conf(given)) as process:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            assert line.startswith("port "), line + process.stdout.read().decode()
            yield int(line.split()[1])


class Stunnel(Stack):
    name = "stunnel"
    client_program, server_program = "`client = yes`", "`client = no`"
    sha384_reason = "`PSKsecrets` is for SHA-256 only"

    def version(self) -> str:
        run = subprocess.run([_program("stunnel"), "-version"], capture_output=True, text=True, check=False)
        match = re.search(r"stunnel (\d+\.\d+)", run.stderr + run.stdout)
        assert match is not None
        return match[1]

    @contextmanager
    def _tunnel(self, given: Given, connect: int, *options: str) -> Iterator[int]:
        accept = free_port()
        secrets = given.write("psk.stunnel", f"{given.identity}:{given.psk.hex()}\n")
        lines = [
            "foreground = yes", "pid =", "syslog = no", "[psk]", f"accept = 127.0.0.1:{accept}",
            f"connect = 127.0.0.1:{connect}", f"PSKsecrets = {secrets}", "sslVersion = TLSv1.3", "ciphers = PSK",
            f"ciphersuites = {given.suite}", f"curves = {':'.join(given.groups)}", *options,
        ]  # fmt: skip
        file = given.write("stunnel.conf", "\n".join(lines) + "\n")
        with _serving([_program("stunnel"), file], b"Configuration successful"):
            yield accept

    def client(self, given: Given, port: int) -> str:
        options = ["client = yes", "sni = localhost", f"PSKidentity = {given.identity}"]
        with (
            self._tunnel(given, port, *options) as accept,
            socket.create_connection(("127.0.0.1", accept), timeout=TIMEOUT) as sock,
        ):
            sock.sendall(HELLO)
            try:
                return _read_line(sock).decode() or "closed"
            except OSError as error:
                return str(error)

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        with _tcp_echo() as port, self._tunnel(given, port) as accept:
            yield accept


@contextmanager
def _tcp_echo() -> Iterator[int]:
    """What is behind a tunnel."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listening.accept()
                except OSError:
                    return
                with raw, contextlib.suppress(OSError):
                    while data := raw.recv(4096):
                        raw.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT)


class Mosquitto(Stack):
    name = "Mosquitto"
    client_program, server_program = "`mosquitto_sub --psk`", "`psk_file`"
    note = (
        "the tests set `tls_version tlsv1.3`; the client's TLS 1.3 cipher suites come from OpenSSL's configuration "
        "file (`OPENSSL_CONF`)"
    )
    sha384_reason = "its PSKs are for SHA-256 only"

    def version(self) -> str:
        return _number(_first_line(_program("mosquitto"), "-h"))

    def client(self, given: Given, port: int) -> str:
        psk = ["--psk-identity", given.identity, "--psk", given.psk.hex(), "--tls-version", "tlsv1.3"]
        what = ["-V", "mqttv311", "-t", "hello", "-C", "1"]
        return _said(
            [_program("mosquitto_sub"), "-h", "localhost", "-p", str(port), *psk, *what],
            env=_openssl_conf(given),
        )

    @contextmanager
    def server(self, given: Given) -> Iterator[int]:
        port = free_port()
        secrets = given.write("psk.mosquitto", f"{given.identity}:{given.psk.hex()}\n")
        lines = [
            f"listener {port} 127.0.0.1", "allow_anonymous true", "psk_hint qkd", f"psk_file {secrets}",
            "use_identity_as_username true", "tls_version tlsv1.3", "user root",
        ]  # fmt: skip
        file = given.write("mosquitto.conf", "\n".join(lines) + "\n")
        with _running([_program("mosquitto"), "-c", file]):
            _listens(port)
            yield port

    def talk(self, sock: Any) -> bool:
        # CONNECT of MQTT 3.1.1 as client "qkd", and PINGREQ.
        sock.sendall(bytes.fromhex("100f 0004 4d515454 04 02 003c 0003 716b64"))
        connack = sock.recv(64)
        sock.sendall(b"\xc0\x00")
        return bool(connack == b"\x20\x02\x00\x00" and sock.recv(64) == b"\xd0\x00")


def answer(sock: Any) -> None:
    """What our server does with a connection of any of them: a line comes back reversed, and MQTT has one message."""
    first = sock.recv(4096)
    if first[:1] != b"\x10":
        sock.sendall(first.strip()[::-1] + b"\n")
        return
    sock.sendall(b"\x20\x02\x00\x00")
    subscribe = sock.recv(4096)
    sock.sendall(b"\x90\x03" + subscribe[2:4] + b"\x00")
    topic, text = b"hello", b"olleh\n"
    body = len(topic).to_bytes(2, "big") + topic + text
    sock.sendall(b"\x30" + bytes([len(body)]) + body)
    sock.recv(64)


STACKS: Final[tuple[Stack, ...]] = (
    OpenSSL(), GnuTLS(), TLSLiteNG(), Node(), Python(), Stunnel(), Mosquitto(),
)  # fmt: skip
