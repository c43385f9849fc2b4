"""The tunnel's throughput, beside stunnel with plain TLS 1.3; and the memory of idle connections.

A plain sender, a client tunnel, a server tunnel and a plain receiver, each a process of its own, over
loopback. The two programs take turns in one run, with the same cipher suite (TLS_AES_256_GCM_SHA384) and
certificate. The ratio is the median over the rounds. Usage::

    python benchmarks/tunnel.py [--megabytes 512] [--rounds 7] [--idle 2000]

Needs stunnel (Debian: stunnel4), and the extras emulator and tunnel.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import trustme

from kms_client.emulator import RunningPair, run_pair

NAME = "localhost"
CHUNK = 1 << 18
START = 20.0
Address = tuple[str, int]


@dataclass
class Files:
    """A certificate, its key and its CA, for both programs."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Files:
        """Create new files in the folder."""
        ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        leaf = ca.issue_cert(NAME, key_type=trustme.KeyType.ECDSA)
        files = cls(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
        ca.cert_pem.write_to_path(files.ca)
        leaf.cert_chain_pems[0].write_to_path(files.certificate)
        files.key.touch(0o600)
        leaf.private_key_pem.write_to_path(files.key)
        return files


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(command: list[str], port: int) -> Iterator[int]:
    """Run a program until the end of the block; yield its process ID once the port accepts."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            deadline = time.monotonic() + START
            while True:
                with (
                    contextlib.suppress(ConnectionRefusedError),
                    socket.create_connection(("127.0.0.1", port)),
                ):
                    break
                if running.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"does not start: {' '.join(command)}")
                time.sleep(0.05)
            yield running.pid
        finally:
            running.terminate()
            try:
                running.wait(5)
            except subprocess.TimeoutExpired:
                running.kill()


@contextlib.contextmanager
def qkd_tunnels(
    folder: Path, files: Files, kmes: RunningPair, target: int
) -> Iterator[tuple[int, list[int]]]:
    """Run both tunnels; yield the port to connect to and their process IDs."""
    pki = kmes.pki
    ports = {"server": free_port(), "client": free_port()}
    for mode, url, sae, cert, key, connect in (
        ("server", kmes.url_b, pki.sae_b, pki.sae_b_cert, pki.sae_b_key, target),
        ("client", kmes.url_a, pki.sae_a, pki.sae_a_cert, pki.sae_a_key, ports["server"]),
    ):
        own = (
            f'certificate = "{files.certificate}"\nkey = "{files.key}"\nverify_client = "none"'
            if mode == "server"
            else f'ca = "{files.ca}"\npeer_sae_id = "{pki.sae_b}"'
        )
        (folder / f"{mode}.toml").write_text(
            f'[service]\naudit = "off"\ndrain_timeout = 0\n'
            f'[kme.k]\nurl = "{url}"\nsae_id = "{sae}"\ncert = "{cert}"\nkey = "{key}"\nca = "{pki.kms_ca}"\n'
            f'[tls.t]\nkme = "k"\n{own}\n'
            f'[[tunnel]]\nname = "{mode}"\nmode = "{mode}"\ntls = "t"\nmax_connections = 10000\n'
            f'listen = "127.0.0.1:{ports[mode]}"\nconnect = "localhost:{connect}"\n'
        )
    command = [sys.executable, "-m", "qkd_tls.tunnel"]
    with (
        process([*command, str(folder / "server.toml")], ports["server"]) as server,
        process([*command, str(folder / "client.toml")], ports["client"]) as client,
    ):
        yield ports["client"], [client, server]


@contextlib.contextmanager
def stunnels(folder: Path, files: Files, target: int) -> Iterator[tuple[int, list[int]]]:
    """Run two stunnels instead; yield the port to connect to and their process IDs."""
    program = shutil.which("stunnel4") or shutil.which("stunnel")
    if program is None:
        raise SystemExit("stunnel is not installed")
    ports = {"server": free_port(), "client": free_port()}
    common = (
        "foreground = yes\npid =\nsyslog = no\nsslVersion = TLSv1.3\nciphersuites = TLS_AES_256_GCM_SHA384\n"
    )
    common += "socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
    (folder / "server.conf").write_text(
        f"{common}[t]\naccept = 127.0.0.1:{ports['server']}\nconnect = 127.0.0.1:{target}\n"
        f"cert = {files.certificate}\nkey = {files.key}\n"
    )
    (folder / "client.conf").write_text(
        f"{common}[t]\nclient = yes\naccept = 127.0.0.1:{ports['client']}\nconnect = 127.0.0.1:{ports['server']}\n"
        f"CAfile = {files.ca}\nverifyChain = yes\ncheckHost = {NAME}\n"
    )
    with (
        process([program, str(folder / "server.conf")], ports["server"]) as server,
        process([program, str(folder / "client.conf")], ports["client"]) as client,
    ):
        yield ports["client"], [client, server]


# --- throughput


def far_end(listener: socket.socket) -> None:
    """Serve transfers in the other process.

    The first byte of a connection is `u` (receive data) or `d` (send data); the next eight are its size.
    """
    buffer = bytearray(CHUNK)
    while True:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            head = sock.recv(9, socket.MSG_WAITALL)
            if len(head) < 9:
                continue
            missing = int.from_bytes(head[1:], "big")
            if head[:1] == b"u":
                while missing > 0 and (size := sock.recv_into(buffer)):
                    missing -= size
                sock.sendall(b"x")
            else:
                for _ in range(missing // CHUNK):
                    sock.sendall(buffer)
                sock.recv(1)


def transfer(port: int, direction: str, size: int) -> float:
    """Return megabytes (10^6 bytes) per second in one direction."""
    buffer = bytearray(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        start = time.perf_counter()
        sock.sendall(direction.encode() + size.to_bytes(8, "big"))
        if direction == "u":
            for _ in range(size // CHUNK):
                sock.sendall(buffer)
            if sock.recv(1) != b"x":
                raise SystemExit("the transfer was cut")
        else:
            missing = size
            while missing > 0:
                if not (got := sock.recv_into(buffer)):
                    raise SystemExit("the transfer was cut")
                missing -= got
        seconds = time.perf_counter() - start
        with contextlib.suppress(OSError):
            sock.sendall(b"x")
    return size / seconds / 1e6


def throughput(ports: dict[str, int], rounds: int, size: int) -> None:
    """Measure both programs in turn and print the rates."""
    for direction, text in (("u", "client to server"), ("d", "server to client")):
        rates: dict[str, list[float]] = {name: [] for name in ports}
        for number in range(rounds + 1):
            for name, port in ports.items():
                rate = transfer(port, direction, size)
                # The first round is for warming up.
                if number:
                    rates[name].append(rate)
        base = rates["stunnel"]
        for name, values in rates.items():
            ratio = statistics.median(value / other for value, other in zip(values, base, strict=True))
            print(
                f"{text}  {name:8} {statistics.median(values):6.0f} MB/s ({min(values):.0f} to {max(values):.0f})"
                f"   ratio to stunnel, round by round: {ratio:.2f}",
                flush=True,
            )


# --- memory


def idle(port: int, pids: list[int], number: int) -> None:
    """Open connections, pass a byte over each in both directions, and print the memory of the processes."""

    def rss() -> list[float]:
        return [psutil.Process(pid).memory_info().rss / 1e6 for pid in pids]

    before = rss()
    with contextlib.ExitStack() as stack:
        start = time.perf_counter()
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(number)]
        for sock in socks:
            sock.sendall(b"x")
        for sock in socks:
            sock.settimeout(START)
            if sock.recv(1) != b"x":
                raise SystemExit("a connection was cut")
        seconds = time.perf_counter() - start
        after = rss()
        print(
            f"{number} idle connections, made in {seconds:.1f} s: client tunnel {after[0]:.0f} MB (before "
            f"{before[0]:.0f}), server tunnel {after[1]:.0f} MB (before {before[1]:.0f}), together {sum(after):.0f} MB"
        )


def echo_bytes(listener: socket.socket) -> None:
    """Send back the first byte of each connection and keep it open; runs in the other process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    kept = []
    while True:
        sock, _ = listener.accept()
        kept.append(sock)
        sock.sendall(sock.recv(1))


@contextlib.contextmanager
def helper(work: object) -> Iterator[int]:
    """Run `work` in a process with a listening socket; yield the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        running = multiprocessing.get_context("fork").Process(target=work, args=(listener,), daemon=True)  # type: ignore[arg-type]
        running.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            running.terminate()
            running.join()


def main() -> None:
    """Measure throughput and memory, and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512, help="size of a transfer in MiB (default 512)")
    parser.add_argument("--rounds", type=int, default=7, help="transfers of each kind (default 7)")
    parser.add_argument("--idle", type=int, default=2000, help="idle connections; 0 for none (default 2000)")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = Files.make(folder)
        # Forked before this process has threads.
        far = stack.enter_context(helper(far_end))
        echo = stack.enter_context(helper(echo_bytes))
        kmes = stack.enter_context(run_pair(buffer=4 * arguments.idle + 1000))
        if arguments.rounds:
            with (
                stunnels(folder, files, far) as (stunnel, _),
                qkd_tunnels(folder, files, kmes, far) as (tunnel, _),
            ):
                throughput(
                    {"stunnel": stunnel, "qkd-tls": tunnel}, arguments.rounds, arguments.megabytes << 20
                )
        if arguments.idle:
            with qkd_tunnels(folder, files, kmes, echo) as (tunnel, pids):
                idle(tunnel, pids, arguments.idle)


if __name__ == "__main__":
    main()
