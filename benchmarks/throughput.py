"""The speed of data: `sendall` and `recv_into` over a TCP connection on loopback.

Plain pyOpenSSL on a blocking socket, the standard library and qkd-tls take turns in one run, with the same cipher
suite (TLS_AES_256_GCM_SHA384), the same buffers, and sender and receiver in two processes. Besides the speed of the
whole, which the slower end determines, the CPU time of each end is shown: it varies less. Usage::

    python benchmarks/throughput.py [--megabytes 512] [--rounds 5] [--write 262144]

With ``--write 1024``, each record holds 1 KiB.
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
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol

import trustme
from OpenSSL import SSL

import qkd_tls
from kms_client import LocalKeyManager

NAME = "server.example"
BUFFER = 1 << 18


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


class StandardLibrary:
    """Connections of the standard library."""

    def __init__(self, ca: trustme.CA, leaf: trustme.LeafCert) -> None:
        self._client = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(self._server)
        for context in self._client, self._server:
            # Its own choice is the same suite, and cannot be named before Python 3.15.
            context.minimum_version = ssl.TLSVersion.TLSv1_3

    def client(self, sock: socket.socket) -> ssl.SSLSocket:
        """Return the receiver's end."""
        return self._client.wrap_socket(sock, server_hostname=NAME)

    def server(self, sock: socket.socket) -> ssl.SSLSocket:
        """Return the sender's end."""
        return self._server.wrap_socket(sock, server_side=True)


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


def send(
    kinds: dict[str, Kind],
    listener: socket.socket,
    order: list[str],
    size: int,
    write: int,
    report: Connection,
) -> None:
    """Accept a connection of each kind in turn and send `size` bytes; runs in the other process."""
    data = bytes(write)
    for name in order:
        sock, _ = listener.accept()
        with contextlib.closing(sock):
            stream = kinds[name].server(sock)
            start = time.process_time()
            for _ in range(size // write):
                stream.sendall(data)
            report.send(time.process_time() - start)
            # Wait for the receiver's last word, so that nothing is reset.
            stream.recv_into(bytearray(1))


def receive(stream: Stream, size: int) -> tuple[float, float]:
    """Receive `size` bytes; return megabytes (10^6 bytes) per second, and the seconds of CPU."""
    buffer = bytearray(BUFFER)
    cpu, start = time.process_time(), time.perf_counter()
    missing = size
    while missing > 0:
        missing -= stream.recv_into(buffer)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    stream.sendall(b"x")
    return size / seconds / 1e6, cpu


def measure(
    kinds: dict[str, Kind], rounds: int, size: int, write: int, progress: Callable[[str], None]
) -> Iterator[str]:
    """Run the rounds and yield the lines of the table."""
    order = [name for _ in range(rounds) for name in kinds]
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    sending: dict[str, list[float]] = {name: [] for name in kinds}
    receiving: dict[str, list[float]] = {name: [] for name in kinds}
    fork = multiprocessing.get_context("fork")
    reports, report = fork.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = fork.Process(target=send, args=(kinds, listener, order, size, write, report))
        sender.start()
        for number, name in enumerate(order):
            progress(f"\rtransfer {number + 1} of {len(order)}")
            with socket.create_connection(listener.getsockname()) as sock:
                rate, cpu = receive(kinds[name].client(sock), size)
            rates[name].append(rate)
            receiving[name].append(cpu / size * 1e12)
            sending[name].append(reports.recv() / size * 1e12)
        sender.join()
    yield f"{'':10} {'':26} ratio, round by round    CPU of the sender, the receiver"
    for name, values in rates.items():
        ratio = statistics.median(
            value / other for value, other in zip(values, rates["pyOpenSSL"], strict=True)
        )
        yield (
            f"{name:10} {statistics.median(values):5.0f} MB/s ({min(values):4.0f} to {max(values):4.0f})"
            f" {ratio:13.2f} {statistics.median(sending[name]):24.0f} {statistics.median(receiving[name]):6.0f} us/MB"
        )


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512, help="size of a transfer in MiB (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="transfers of each kind (default 5)")
    parser.add_argument(
        "--write", type=int, default=BUFFER, help="bytes for each sendall (default 262144, 16 full records)"
    )
    arguments = parser.parse_args()
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    leaf = ca.issue_cert(NAME, key_type=trustme.KeyType.ECDSA)
    kinds: dict[str, Kind] = {
        "pyOpenSSL": PyOpenSSL(ca, leaf),
        "ssl": StandardLibrary(ca, leaf),
        "qkd-tls": QKDTLS(ca, leaf),
    }
    size = (arguments.megabytes << 20) // arguments.write * arguments.write
    progress = partial(print, end="", flush=True)
    lines = list(measure(kinds, arguments.rounds, size, arguments.write, progress))
    print()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
