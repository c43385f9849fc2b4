"""An attacker records three connections today, and gets a quantum computer later. Which of them can he read?

    python examples/record_now_decrypt_later.py

The servers are real ones, on this machine: the standard library's TLS, and `qkd_tls` with a pair of emulated KMEs. The
clients and the attacker's code are in `examples/rndl/`, an implementation of TLS 1.3 and qkd-tls/1 that shares nothing
with `qkd_tls`. The clients keep their ephemeral secrets: they stand in for the computer that could find them.
"""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509

import qkd_tls
from kms_client import Etsi014Client
from kms_client.emulator import DemoPKI, OSRandomSource, run_pair
from rndl import wire
from rndl.eavesdropper import ML_KEM, X25519, Eavesdropper, FutureComputer, Opened, Recording, Sealed
from rndl.hybrid import Association
from rndl.recorder import RecordingProxy
from rndl.victim import Client, EphemeralSecrets, QKDKeyMaterial, connect_hybrid

REQUEST = b"GET /plans/2046 HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer open-sesame\r\n\r\n"
ANSWER = b"Must stay secret for twenty years.\n"
HTTP = "http/1.1"


# --- today


class LeakySource(OSRandomSource):
    """A source of a KME pair's keys that keeps a copy of each."""

    def __init__(self) -> None:
        super().__init__(rate=0)
        self.leaked: list[bytes] = []

    def make(self) -> bytearray:
        """Make one key, and a copy for the attacker."""
        key = super().make()
        self.leaked.append(bytes(key))
        return key


@dataclass
class Recorded:
    """A connection: the attacker's recording of it today, and the secrets that may come to light later."""

    name: str
    recording: Recording
    ephemeral: list[EphemeralSecrets] = field(repr=False)
    association: Association | None = None
    protection: str | None = None
    """The server's report about the connection with a QKD key."""


class Server(ThreadingHTTPServer):
    """An HTTPS server; it notes what protected its last connection if the context is one of `qkd_tls`."""

    protection: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port it listens on."""
        return "127.0.0.1", self.server_port


class Handler(BaseHTTPRequestHandler):
    """A handler that answers every GET with a secret."""

    timeout = 30  # seconds, also for the handshake
    server: Server

    def do_GET(self) -> None:
        """Answer a GET."""
        if isinstance(self.connection, qkd_tls.QKDSocket) and (qkd := self.connection.qkd):
            self.server.protection = f"{qkd.protection}, {qkd.group}, {qkd.cipher}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@contextmanager
def https_server(context: ssl.SSLContext, pki: DemoPKI) -> Iterator[Server]:
    """Run an HTTPS server in a thread."""
    context.load_cert_chain(pki.server_cert, pki.server_key)
    context.set_alpn_protocols([HTTP])
    with Server(("127.0.0.1", 0), Handler) as server:
        # Not on connect: the handshake is for the connection's own thread.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(client: Client) -> None:
    """Send the request and check the answer."""
    client.send(REQUEST)
    if not client.receive_all().endswith(ANSWER):
        raise SystemExit("the server did not answer")
    client.close()


def record_plain(group: int, context: ssl.SSLContext, pki: DemoPKI) -> Recorded:
    """Record a connection of ordinary TLS 1.3 with this group."""
    name = {wire.X25519: "X25519", wire.X25519MLKEM768: "X25519MLKEM768"}[group]
    with https_server(context, pki) as server, RecordingProxy(server.address) as tap:
        client = Client(
            socket.create_connection(tap.address), server_name="localhost", ca=trusted(pki), group=group
        )
        client.connect()
        request(client)
    return Recorded(name, tap.recordings[0], [client.ephemeral])


def record_hybrid(pki: DemoPKI, kme_a: Etsi014Client, kme_b: Etsi014Client) -> Recorded:
    """Record a first connection of qkd-tls/1: the bootstrap, and the hybrid handshake for the request."""
    context = qkd_tls.create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=kme_b)
    with https_server(context, pki) as server, RecordingProxy(server.address) as tap:
        connection = connect_hybrid(
            socket.create_connection(tap.address), new_key(kme_a), server_name="localhost", ca=trusted(pki)
        )
        request(connection.hybrid)
    return Recorded(
        "qkd-tls/1", tap.recordings[0], connection.ephemeral, connection.association, server.protection
    )


def new_key(kme: Etsi014Client) -> QKDKeyMaterial:
    """Return a QKD key to use with the server."""
    (key,) = kme.get_keys("SAE-B")
    with key.use() as secret:
        return QKDKeyMaterial(key.key_id, bytes(secret))


def trusted(pki: DemoPKI) -> x509.Certificate:
    """Return the CA of the server's certificate."""
    return x509.load_pem_x509_certificate(Path(pki.app_ca).read_bytes())


def record_three(source: LeakySource) -> list[Recorded]:
    """Record the same request over each kind of connection."""
    with ExitStack() as stack:
        pair = stack.enter_context(run_pair(source=source, buffer=32))
        kme_a, kme_b = (stack.enter_context(closing(pair.client(side))) for side in ("a", "b"))
        return [
            # The standard library's; whether its OpenSSL has ML-KEM does not matter: the client has not.
            record_plain(wire.X25519, ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), pair.pki),
            record_plain(
                wire.X25519MLKEM768,
                qkd_tls.create_default_context(ssl.Purpose.CLIENT_AUTH, policy="off"),
                pair.pki,
            ),
            record_hybrid(pair.pki, kme_a, kme_b),
        ]


# --- later


@dataclass(frozen=True)
class Scenario:
    """The attacker's gains beside his recordings, and what he must be able to read then.

    `reads` has names of columns. An association secret leaks by breaking the bootstrap, or from a peer's
    memory.
    """

    text: str
    breaks: tuple[str, ...] = ()
    qkd_keys: bool = False
    association: bool = False
    reads: frozenset[str] = frozenset()


PLAIN, ML, BOOTSTRAP, HYBRID = COLUMNS = ("X25519", "X25519MLKEM768", "bootstrap", "request")

SCENARIOS = (
    Scenario("nothing but the recordings"),
    Scenario("X25519 falls", (X25519,), reads=frozenset({PLAIN})),
    Scenario("X25519 and ML-KEM-768 fall", (X25519, ML_KEM), reads=frozenset({PLAIN, ML, BOOTSTRAP})),
    Scenario("  and all QKD keys leak", (X25519, ML_KEM), qkd_keys=True, reads=frozenset(COLUMNS)),
    Scenario("all QKD keys leak", qkd_keys=True),
    Scenario("  and the association secret", qkd_keys=True, association=True),
    Scenario("  and X25519 falls", (X25519,), qkd_keys=True, association=True, reads=frozenset({PLAIN})),
    Scenario("  and ML-KEM-768 falls instead", (ML_KEM,), qkd_keys=True, association=True),
)


@dataclass
class Outcome:
    """The result of one scenario: the columns that were read, and why the third request was not."""

    scenario: Scenario
    reads: frozenset[str]
    why_not: str

    @property
    def as_expected(self) -> bool:
        """True if exactly the expected columns were read."""
        return self.reads == self.scenario.reads


def attack(scenario: Scenario, connections: Sequence[Recorded], leaked: Sequence[bytes]) -> Outcome:
    """Try to read all recordings with what the scenario gives."""
    told = [secrets for connection in connections for secrets in connection.ephemeral]
    stolen = [one.association for one in connections if one.association and scenario.association]
    attacker = Eavesdropper(
        FutureComputer(scenario.breaks, told), leaked if scenario.qkd_keys else (), stolen
    )
    results = [result for connection in connections for result in attacker.read(connection.recording)]
    reads = frozenset(name for name, result in zip(COLUMNS, results, strict=True) if was_read(name, result))
    why_not = ""
    if isinstance(last := results[-1], Sealed):
        why_not = ", ".join(last.missing) + ("; the PSK is known" if last.binder_fits else "")
    return Outcome(scenario, reads, why_not)


def was_read(column: str, result: Opened | Sealed) -> bool:
    """Return whether the request and its answer were found; for a bootstrap, whether the association was."""
    if isinstance(result, Sealed):
        return False
    if column == BOOTSTRAP:
        return result.association is not None
    return result.client_data == REQUEST and result.server_data.endswith(ANSWER)


# --- the story


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the table's lines, one per outcome."""
    yield f"{'':32}{'1':10}{'2':18}3 qkd-tls/1"
    yield f"{'the attacker has':32}{PLAIN:10}{ML:18}{BOOTSTRAP:13}{HYBRID:10}missing for the request of 3"
    for outcome in outcomes:
        cells = ("READ" if name in outcome.reads else "closed" for name in COLUMNS)
        line = f"{outcome.scenario.text:32}" + "{:10}{:18}{:13}{:10}".format(*cells) + outcome.why_not
        yield line.rstrip() + ("" if outcome.as_expected else "   <-- not as expected")


def main() -> int:
    """Record, attack and report. Return 0 if every outcome was as expected, 1 if not."""
    print("Today: the same request over three connections, each through the attacker's tap")
    source = LeakySource()
    connections = record_three(source)
    for number, one in enumerate(connections, 1):
        size = len(one.recording.client) + len(one.recording.server)
        says = f", and the server says: {one.protection}" if one.protection else ""
        print(f"  {number}  {one.name:15} {size:,} bytes recorded{says}")
    print(f"     {len(source.leaked)} QKD keys were made, and a copy of each leaked")

    print("\nLater: what he can read")
    outcomes = [attack(scenario, connections, source.leaked) for scenario in SCENARIOS]
    for line in table(outcomes):
        print(f"  {line}".rstrip())
    if not all(outcome.as_expected for outcome in outcomes):
        print("\nNot everything was as it should be.")
        return 1
    print(
        "\nThe third request opened with X25519, ML-KEM-768 and the QKD key together, and with nothing less."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
