"""The speed of data: `sendall` and `recv_into` over a TCP connection on loopback.

Plain pyOpenSSL on a blocking socket and qkd-tls take turns in one run, with the same cipher suite
(TLS_AES_256_GCM_SHA384), the same buffers, and sender and receiver in two processes. Usage::

    python benchmarks/throughput.py [--megabytes 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import socket
import ssl
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import trustme
from OpenSSL import SSL

import qkd_tls
from kms_client import LocalKeyManager

NAME = "server.example"
CHUNK = 1 << 18


class Stream(Protocol):
    """The methods that both kinds of connection have."""

    def sendall(self, data: bytes, /) -> object:
        """Send all of `data`."""

    def recv_into(self, buffer: bytearray, /) -> int:
        """Receive at least one byte."""


class Kind(Protocol):
    """A kind of TLS connection, made from a TCP connection."""

    def client(self, sock: socket.socket) -> Stream:
        """Return the receiver's end."""

    def server(self, sock: socket.socket) -> Stream:
        """Return the sender's end."""


class PyOpenSSL:
    """Connections of an ordinary pyOpenSSL program."""

    def __init__(self, ca: trustme.CA, leaf: trustme.LeafCert) -> None:
        self._contexts = SSL.Context(SSL.TLS_METHOD), SSL.Context(SSL.TLS_METHOD)
        for context in self._contexts:
            context.set_min_proto_version(SSL.TLS1_3_VERSION)
            context.set_tls13_ciphersuites(b"TLS_AES_256_GCM_SHA384")
        ca.configure_trust(self._contexts[0])
        leaf.configure_cert(self._contexts[1])

    def client(self, sock: socket.socket) -> SSL.Connection:
        """Return the receiver's end."""
        connection = SSL.Connection(self._contexts[0], sock)
        connection.set_tlsext_host_name(NAME.encode())
        connection.set_connect_state()
        connection.do_handshake()
        return connection

    def server(self, sock: socket.socket) -> SSL.Connection:
        """Return the sender's end."""
        connection = SSL.Connection(self._contexts[1], sock)
        connection.set_accept_state()
        connection.do_handshake()
        return connection


class QKDTLS:
    """Connections of qkd-tls with the same settings."""

    def __init__(self, ca: trustme.CA, leaf: trustme.LeafCert) -> None:
        alice, bob = LocalKeyManager("SAE-A"), LocalKeyManager("SAE-B")
        # The two ends run in two processes: each is given the same keys, as by a QKD device.
        for number in range(100):
            secret = bytes([number]) * 32
            alice.add("SAE-B", f"key-{number}", secret)
            bob.add("SAE-A", f"key-{number}", secret)
        self._client = qkd_tls.QKDContext(key_manager=alice, peer_sae_id="SAE-B")
        self._client.load_verify_locations(cadata=ca.cert_pem.bytes().decode())
        self._server = qkd_tls.QKDContext(ssl.PROTOCOL_TLS_SERVER, key_manager=bob)
        with leaf.private_key_and_cert_chain_pem.tempfile() as pem:
            self._server.load_cert_chain(pem)

    def client(self, sock: socket.socket) -> qkd_tls.QKDSocket:
        """Return the receiver's end."""
        return self._client.wrap_socket(sock, server_hostname=NAME)

    def server(self, sock: socket.socket) -> qkd_tls.QKDSocket:
        """Return the sender's end."""
        return self._server.wrap_socket(sock, server_side=True)


def send(kinds: dict[str, Kind], listener: socket.socket, order: list[str], size: int) -> None:
    """Accept a connection of each kind in turn and send `size` bytes; runs in the other process."""
    data = bytes(CHUNK)
    for name in order:
        sock, _ = listener.accept()
        with contextlib.closing(sock):
            stream = kinds[name].server(sock)
            for _ in range(size // CHUNK):
                stream.sendall(data)
            # Wait for the receiver's last word, so that nothing is reset.
            stream.recv_into(bytearray(1))


def receive(stream: Stream, size: int) -> float:
    """Receive `size` bytes; return megabytes (10^6 bytes) per second."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    missing = size
    while missing > 0:
        missing -= stream.recv_into(buffer)
    seconds = time.perf_counter() - start
    stream.sendall(b"x")
    return size / seconds / 1e6


def measure(kinds: dict[str, Kind], rounds: int, size: int, progress: Callable[[str], None]) -> Iterator[str]:
    """Run the rounds and yield the lines of the table."""
    order = [name for _ in range(rounds) for name in kinds]
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = multiprocessing.get_context("fork").Process(target=send, args=(kinds, listener, order, size))
        sender.start()
        for number, name in enumerate(order):
            progress(f"\rtransfer {number + 1} of {len(order)}")
            with socket.create_connection(listener.getsockname()) as sock:
                rates[name].append(receive(kinds[name].client(sock), size))
        sender.join()
    base = rates["pyOpenSSL"]
    for name, values in rates.items():
        ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
        yield (
            f"{name:10} {statistics.median(values):7.0f} MB/s   ({min(values):.0f} to {max(values):.0f})"
            f"   ratio to pyOpenSSL, round by round: {ratio:.2f}"
        )


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512, help="size of a transfer in MiB (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="transfers of each kind (default 5)")
    arguments = parser.parse_args()
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    leaf = ca.issue_cert(NAME, key_type=trustme.KeyType.ECDSA)
    kinds: dict[str, Kind] = {"pyOpenSSL": PyOpenSSL(ca, leaf), "qkd-tls": QKDTLS(ca, leaf)}
    size = arguments.megabytes << 20
    lines = list(measure(kinds, arguments.rounds, size, lambda text: print(text, end="", flush=True)))
    print()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
