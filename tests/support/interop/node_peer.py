"""The qkd-tls/1 peers of interop/node, and ours, behind one interface: any client with any server.

All peers of Node.js are in one process, which is told what to do in lines of JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import secrets
import ssl
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from qkd_tls import KDF, QKDContext, QKDError, QKDInfo, QKDKeyMismatch, QKDProtocolError, QKDSocket
from tests.support.node_binary import node_binary
from tests.support.paths import ROOT
from tests.support.requirements import NODE
from tests.support.sockets import TIMEOUT, Lab, Server, connect

__all__ = [
    "Client",
    "Failed",
    "NodeClient",
    "NodeProcess",
    "NodeServer",
    "OurClient",
    "OurServer",
    "Report",
    "Serving",
    "kme_settings",
    "node",
]

MAIN = ROOT / "interop" / "node" / "main.mjs"


@dataclass(frozen=True)
class Report:
    """What one side says of a connection."""

    protection: str
    group: str
    cipher: str
    alpn: str | None
    path: str | None
    key_id: str | None
    announced: bool
    kme_requests: int
    client_sae: str | None
    server_sae: str | None
    association: str | None
    kem: str | None
    fallback: str | None


class Failed(Exception):
    """What one side says of a connection that failed.

    `kind`: `unavailable`, `mismatch`, `closed` or `protocol` where it is an error of qkd-tls/1; `ended` where the
    connection was there, and then closed before all had come back; None for an error of TLS.
    """

    def __init__(
        self, message: str, kind: str | None, code: str | None = None, key_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code
        self.key_id = key_id


class Client(Protocol):
    """The client of a pair, with its associations."""

    def connect(self, address: tuple[str, int], size: int = 16) -> Report:
        """Connect to "localhost", send so many random bytes and see them come back.

        Raises Failed.
        """


class Serving(Protocol):
    """The server of a pair, which echoes."""

    @property
    def address(self) -> tuple[str, int]: ...

    def outcome(self) -> Report:
        """What it says of the next connection, once the handshake has ended.

        Raises Failed.
        """

    def restart(self) -> None:
        """Lose all associations."""


# --- ours


def _our_report(info: QKDInfo) -> Report:
    return Report(
        protection=str(info.protection),
        group=info.group,
        cipher=info.cipher,
        alpn=info.alpn,
        path=None if info.path is None else str(info.path),
        key_id=info.key_id,
        announced=info.announced,
        kme_requests=info.kms_round_trips,
        client_sae=info.client_sae_id,
        server_sae=info.server_sae_id,
        association=info.association,
        kem=info.kem,
        fallback=info.fallback,
    )


def _our_failure(error: BaseException) -> Failed:
    kind, code, key_id = None, None, None
    if isinstance(error, QKDError):
        kind = {QKDKeyMismatch: "mismatch", QKDProtocolError: "protocol"}.get(type(error), "unavailable")
        code, key_id = error.code, next(iter(error.key_ids), None)
    elif isinstance(error, ssl.SSLEOFError | ConnectionError):
        kind = "closed"
    return Failed(str(error), kind, code, key_id)


class OurClient:
    """`settings` as of `QKDContext`."""

    def __init__(self, lab: Lab, *, alpn: Sequence[str] = (), mutual: bool = False, **settings: Any) -> None:
        settings.setdefault("kdf", KDF.SHA256)
        self._context: QKDContext = lab.client(**settings)
        self._context.set_alpn_protocols(alpn)
        if mutual:
            lab.client_identity.load_into(self._context)

    def connect(self, address: tuple[str, int], size: int = 16) -> Report:
        """See `Client`."""
        try:
            sock = connect(address, self._context)
        except OSError as error:
            raise _our_failure(error) from error
        with sock:
            sent, received = secrets.token_bytes(size), bytearray()
            # A server that echoes cannot go on where nobody takes what it sends.
            sending = threading.Thread(target=_send, args=(sock, sent))
            sending.start()
            with contextlib.suppress(OSError):
                while len(received) < size and (chunk := sock.recv(1 << 16)):
                    received += chunk
            sending.join(TIMEOUT)
            if len(received) < size:
                raise Failed("the server has closed the connection", "ended")
            assert received == sent
            assert sock.qkd is not None
            return _our_report(sock.qkd)


def _send(sock: QKDSocket, data: bytes) -> None:
    # The server may have gone; who reads will see that.
    with contextlib.suppress(OSError):
        sock.sendall(data)


class OurServer:
    """`settings` as of `QKDContext`."""

    def __init__(self, lab: Lab, *, alpn: list[str], mutual: bool, **settings: Any) -> None:
        self._context: QKDContext = lab.server(mutual=mutual, **settings)
        self._context.set_alpn_protocols(alpn)
        self._server = Server(self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self._server.address

    def outcome(self) -> Report:
        """See `Serving`."""
        seen = self._server.seen()
        if seen.error is not None:
            raise _our_failure(seen.error) from seen.error
        assert seen.info is not None
        return _our_report(seen.info)

    def restart(self) -> None:
        """See `Serving`."""
        self._context.forget_associations()


# --- Node.js


@functools.cache
def node() -> str:
    """The Node.js binary; skips where there is none of version 26."""
    path = node_binary()
    if path is None:
        raise NODE.missing()
    version = subprocess.run([path, "-v"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 26:
        raise NODE.missing(f"{path} is Node.js {version}; 26 is needed for ML-KEM")
    return path


class NodeProcess:
    """One process, for any number of clients and servers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [node(), str(MAIN), "session"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._names = 0
        self._thread = threading.Thread(target=self._read, name="node")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._process.stdin.close()
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._thread.join(TIMEOUT)
            complaints = self._process.stderr.read()
            self._process.stderr.close()
        assert complaints == ""
        assert self._process.returncode == 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put("")

    def ask(self, command: str, **what: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **what}) + "\n")
        self._process.stdin.flush()
        answer = self._answers.get(timeout=TIMEOUT)
        assert answer, "the process has ended"
        result: dict[str, Any] = json.loads(answer)
        return result

    def new(self, kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A client or a server; "name" in the answer is how to address it."""
        self._names += 1
        name = str(self._names)
        return {**self.ask(kind, name=name, settings=settings), "name": name}


def kme_settings(lab: Lab, side: str) -> dict[str, str]:
    """Where the KME of one site is, and the certificate of its SAE."""
    assert lab.kmes is not None
    pki = lab.pki
    url, cert, key = (
        (lab.kmes.url_a, pki.sae_a_cert, pki.sae_a_key)
        if side == "client"
        else (lab.kmes.url_b, pki.sae_b_cert, pki.sae_b_key)
    )
    return {"url": url, "cert": str(cert), "key": str(key), "ca": str(pki.kms_ca)}


def _node_report(result: Mapping[str, Any]) -> Report:
    if "error" in result:
        error = result["error"]
        # Of other errors than those of qkd-tls/1, `code` is the TLS stack's.
        code = error["code"] if error["name"] == "QkdError" else None
        raise Failed(f"{error['message']} ({error['code']})", error["kind"], code, error["keyId"])
    info: dict[str, Any] = dict(result["info"])
    info.pop("peer")
    names: dict[str, str] = {
        "keyId": "key_id",
        "kmeRequests": "kme_requests",
        "clientSae": "client_sae",
        "serverSae": "server_sae",
    }
    return Report(**{names.get(name, name): value for name, value in info.items()})


class NodeClient:
    """`settings` as of `HybridClient` in client.mjs."""

    def __init__(self, process: NodeProcess, lab: Lab, *, mutual: bool, **settings: Any) -> None:
        identity = lab.client_identity
        given = {"saeId": "SAE-A", "kme": kme_settings(lab, "client"), "ca": str(lab.ca.file)}
        if mutual:
            given |= {"cert": str(identity.cert_file), "key": str(identity.key_file)}
        self._process = process
        self._name = process.new("client", {**given, **settings})["name"]

    def connect(self, address: tuple[str, int], size: int = 16) -> Report:
        """See `Client`."""
        result = self._process.ask(
            "connect", name=self._name, host="localhost", address=address[0], port=address[1], bytes=size
        )
        report = _node_report(result)
        if result["echo"]["bytes"] < size:
            raise Failed("the server has closed the connection", "ended")
        assert result["echo"] == {"bytes": size, "same": True}
        return report


class NodeServer:
    """`settings` as of `HybridServer` in server.mjs."""

    def __init__(self, process: NodeProcess, lab: Lab, **settings: Any) -> None:
        given = {
            "saeId": "SAE-B",
            "kme": kme_settings(lab, "server"),
            "ca": str(lab.ca.file),
            "cert": str(lab.server_identity.cert_file),
            "key": str(lab.server_identity.key_file),
        }
        self._process = process
        answer = process.new("server", {**given, **settings})
        self._name, self.address = answer["name"], ("127.0.0.1", int(answer["port"]))

    def kme_requests(self) -> int:
        """How often it has asked its KME so far."""
        return int(self._process.ask("requests", name=self._name)["kme"])

    def outcome(self) -> Report:
        """See `Serving`."""
        return _node_report(self._process.ask("outcome", name=self._name))

    def restart(self) -> None:
        """See `Serving`."""
        self._process.ask("forget", name=self._name)
