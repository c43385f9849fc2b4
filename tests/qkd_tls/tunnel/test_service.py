"""The tunnel process: signals, reloads, systemd, the PROXY protocol, health, metrics and idle memory."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qkd_tls.tunnel.systemd import Notifier
from tests.support.patience import eventually
from tests.support.sizes import sized
from tests.support.tunnels import (
    TIMEOUT,
    Address,
    Backend,
    Process,
    Sites,
    both_tunnels,
    dial,
    echo,
    environment,
    receive,
    receive_all,
    tunnel,
)


def exchange(sock: socket.socket, text: bytes = b"ping") -> None:
    sock.sendall(text)
    assert receive(sock, len(text)) == text


def get(address: Address | Path, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    """Status and body of an HTTP answer."""
    with dial(address) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = receive_all(sock).decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


def metrics(address: Address | Path) -> dict[str, float]:
    samples = {}
    for line in get(address)[1].splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name.removeprefix("qkd_tls_tunnel_")] = float(value)
    return samples


class TestDrain:
    def test_connections_go_on_until_they_end(self, sites: Sites, tmp_path: Path) -> None:
        service = 'health = "unix:health"\n'
        with (
            Backend(echo) as backend,
            both_tunnels(sites, tmp_path, backend.address, client_service=service) as (client, _),
        ):
            address = client.address()
            with dial(address) as app:
                exchange(app)
                assert get(tmp_path / "health", "/readyz")[0] == 200
                client.signal(signal.SIGTERM)
                client.wait_for("stopping: 1 connections may go on for 30 seconds")
                with pytest.raises(ConnectionRefusedError):
                    dial(address)
                status, body = get(tmp_path / "health", "/readyz")
                assert (status, json.loads(body)["state"]) == (503, "draining")
                exchange(app, b"still here")
                app.shutdown(socket.SHUT_WR)
                assert receive_all(app) == b""
            assert client.wait() == 0
            assert client.log[-1] == "INFO: stopped"
            assert client.audit()[0]["ended"] == "eof"
        assert not (tmp_path / "health").exists()

    def test_what_does_not_end_is_reset(self, sites: Sites, tmp_path: Path) -> None:
        service = "drain_timeout = 0.3\n"
        with (
            Backend() as backend,
            both_tunnels(sites, tmp_path, backend.address, server_service=service) as (client, server),
        ):
            with dial(client.address()) as app, backend.accept() as sock:
                server.signal(signal.SIGINT)
                assert server.wait() == 0
                for end in (app, sock):
                    with pytest.raises(ConnectionResetError):
                        end.recv(1)
            assert server.audit()[0]["ended"] == "shutdown"
            assert client.audit()[0]["ended"] == "reset by hybrid side"
            assert "WARNING: resets 1 connections that have not ended" in server.log

    def test_the_second_signal_ends_at_once_even_in_a_handshake(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend:
            config = sites.config("server", tunnel("server", backend.address))
            with Process(tmp_path / "server.toml", config) as server:
                with dial(server.address()) as silent:
                    # Accepted: the next one is, too, and it was behind it.
                    with dial(server.address()) as next_one:
                        next_one.shutdown(socket.SHUT_WR)
                        assert receive_all(next_one) == b""
                    server.signal(signal.SIGTERM)
                    server.wait_for("stopping: 1 connections")
                    server.signal(signal.SIGTERM)
                    assert server.wait() == 0
                    with contextlib.suppress(ConnectionResetError):
                        assert silent.recv(1) == b""
                assert [line["ended"] for line in server.audit(2)] == ["handshake failed", "shutdown"]


class TestReload:
    def test_a_renewed_certificate_while_a_connection_is_open(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            with dial(client.address()) as old:
                exchange(old)
                renewed = sites.ca.issue("renewed")
                renewed.key_file.chmod(0o600)
                entry = tunnel("server", backend.address)
                server.reload(sites.config("server", entry, identity=renewed))
                # The client's association is unknown to the new context: a new bootstrap heals that.
                with dial(client.address()) as new:
                    exchange(new)
                exchange(old)
            lines = client.audit(2)
            assert {line["peer_subject"] for line in lines} == {"CN=server", "CN=renewed"}
            assert {line["ended"] for line in lines} == {"reset by plain side", "eof"} or all(
                line["ended"] == "eof" for line in lines
            )

    def test_what_has_not_changed_is_kept(self, sites: Sites, tmp_path: Path) -> None:
        service = 'health = "unix:health"\n'
        with (
            Backend(echo) as backend,
            both_tunnels(sites, tmp_path, backend.address, server_service=service) as (client, server),
        ):
            address = server.address()
            for _ in range(2):
                with dial(client.address()) as app:
                    exchange(app)
                server.reload()
                client.reload()
            assert server.address() == address
            assert [line["path"] for line in client.audit(2)] == ["bootstrap", "associated"]
            assert metrics(tmp_path / "health")['reloads_total{outcome="ok"}'] == 2

    def test_tunnels_come_and_go(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            hybrid = server.address()
            first = client.address()
            with dial(first) as old:
                exchange(old)
                seen = len(client.log)
                client.reload(sites.config("client", tunnel("client", hybrid, name="other")))
                with dial(client.address("other", after=seen)) as new:
                    exchange(new)
                with pytest.raises(ConnectionRefusedError):
                    dial(first)
                exchange(old)
                # It comes back while its connection is still open.
                seen = len(client.log)
                client.reload(sites.config("client", tunnel("client", hybrid, more="max_connections = 1\n")))
                with dial(client.address(after=seen)) as waiting:
                    waiting.sendall(b"wait")
                    waiting.settimeout(0.2)
                    with pytest.raises(TimeoutError):
                        waiting.recv(1)
                    old.close()
                    waiting.settimeout(TIMEOUT)
                    assert receive(waiting, 4) == b"wait"

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda text: text + "nonsense", "is not TOML"),
            (lambda text: text.replace('mode = "client"', 'mode = "both"'), "mode: must be client or server"),
            (lambda text: text.replace("https://", "ftp://"), r"\[kme.site\]"),
            (lambda text: text.replace('listen = "127.0.0.1:0"', 'listen = "192.0.2.1:1"'), "cannot listen"),
            (
                lambda text: text.replace("[service]\n", '[service]\naudit = "no/where"\n'),
                "audit: cannot open",
            ),
            (
                lambda text: text.replace("[service]\n", '[service]\nhealth = "unix:no/where"\n'),
                "health: cannot",
            ),
        ],
    )
    def test_a_broken_file_changes_nothing(
        self, sites: Sites, tmp_path: Path, change: Any, problem: str
    ) -> None:
        with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            good = sites.config("client", tunnel("client", server.address()))
            with dial(client.address()) as app:
                exchange(app)
                client.reload(change(good), expect=f"ERROR: not reloaded, the old .*{problem}")
                exchange(app)
                with dial(client.address()) as new:
                    exchange(new)
            client.reload(good)

    def test_health_and_audit_may_move(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            entry = tunnel("client", server.address())
            for name in ("one", "two"):
                service = f'health = "unix:{name}"\naudit = "{name}.jsonl"\n'
                client.reload(sites.config("client", entry, service=service))
                assert get(tmp_path / name, "/healthz") == (200, "ok\n")
                with dial(client.address()) as app:
                    exchange(app)
                written = tmp_path / f"{name}.jsonl"
                eventually(lambda written=written: written.stat().st_size)  # type: ignore[misc]
            assert not (tmp_path / "one").exists()
            client.reload(sites.config("client", entry, service='audit = "off"\n'))
            assert not (tmp_path / "two").exists()

    def test_the_audit_file_may_be_rotated(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, _):
            client.audit_file.rename(tmp_path / "old")
            client.reload()
            with dial(client.address()) as app:
                exchange(app)
            client.audit()
            assert (tmp_path / "old").read_text() == ""
            assert client.audit_file.stat().st_mode & 0o007 == 0


@contextlib.contextmanager
def notify_socket(folder: Path) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(TIMEOUT)
        yield sock, str(folder / "notify")


class TestSystemd:
    def test_notifications(self, sites: Sites, tmp_path: Path) -> None:
        config = sites.config("client", tunnel("client", "localhost:1"))
        with notify_socket(tmp_path) as (sock, path):
            variables = environment(NOTIFY_SOCKET=path, WATCHDOG_USEC="100000")
            with Process(tmp_path / "client.toml", config, env=variables) as client:
                assert sock.recv(1000) == f"READY=1\nSTATUS=1 tunnels from {client.file}".encode()
                for _ in range(3):
                    assert sock.recv(1000) == b"WATCHDOG=1"
                client.reload()
                messages: list[str] = []
                while not messages or not messages[-1].startswith("READY=1"):
                    messages.append(sock.recv(1000).decode())
                assert re.match(
                    r"RELOADING=1\nMONOTONIC_USEC=\d+\n",
                    next(text for text in messages if "W" not in text[:1]),
                )
                client.reload("nonsense", expect="not reloaded")
                messages = []
                while not messages or not messages[-1].startswith("READY=1"):
                    messages.append(sock.recv(1000).decode())
                assert "the last reload failed" in messages[-1]
                client.signal(signal.SIGTERM)
                while not (message := sock.recv(1000)).startswith(b"STOPPING=1"):
                    assert message == b"WATCHDOG=1"
                assert client.wait() == 0

    def test_signs_of_life_come_twice_as_often_as_they_have_to(self) -> None:
        assert Notifier({"WATCHDOG_USEC": "100000"}).watchdog_interval == 0.05

    def test_nobody_listens_to_notifications(self, sites: Sites, tmp_path: Path) -> None:
        config = sites.config("client", tunnel("client", "localhost:1"))
        variables = environment(NOTIFY_SOCKET="@nobody-listens-here", WATCHDOG_USEC="1", WATCHDOG_PID="1")
        with Process(tmp_path / "client.toml", config, env=variables) as client:
            client.address()

    def start(self, file: Path, sockets: list[socket.socket], names: str) -> subprocess.Popen[str]:
        """As systemd does it: sockets from 3 on, and the process's own number in LISTEN_PID."""
        script = "".join(
            f"exec {number}<&{sock.fileno()}; "
            for number, sock in enumerate(sockets, 3)
            if sock.fileno() != number
        )
        return subprocess.Popen(
            [
                "bash",
                "-c",
                f'{script}LISTEN_PID=$$ exec "$0" -m qkd_tls.tunnel "$1"',
                sys.executable,
                str(file),
            ],
            pass_fds=[sock.fileno() for sock in sockets],
            env=environment(LISTEN_FDS=str(len(sockets)), LISTEN_FDNAMES=names),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_sockets_that_are_open_already(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend:
            config = sites.config("server", tunnel("server", backend.address))
            with Process(tmp_path / "server.toml", config) as server, contextlib.ExitStack() as stack:
                sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
                # Numbers well above 3, so that none is overwritten before it is used.
                sockets = [
                    stack.enter_context(socket.socket(fileno=fd))
                    for fd in (high(sock, 40 + number) for number, sock in enumerate(sockets))
                ]
                file = tmp_path / "client.toml"
                entries = tunnel("client", server.address(), name="a", listen="systemd:first") + tunnel(
                    "client", server.address(), name="b", listen="systemd:second"
                )
                file.write_text(sites.config("client", entries, service='audit = "off"\n'))
                with self.start(file, sockets, "first:first:second") as process:
                    try:
                        for sock in sockets:
                            with dial(sock.getsockname()) as app:
                                exchange(app)
                        # A tunnel that is taken out and put back has its sockets again.
                        text = file.read_text()
                        assert process.stderr is not None
                        for content in (text.replace("systemd:second", "127.0.0.1:0"), text):
                            file.write_text(content)
                            process.send_signal(signal.SIGHUP)
                            while "reloaded" not in process.stderr.readline():
                                pass
                        with dial(sockets[2].getsockname()) as app:
                            exchange(app)
                    finally:
                        process.terminate()
                        assert process.wait(TIMEOUT) == 0

    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            ("other", "systemd has opened no socket of that name (it has: other)"),
            ("a:b", "LISTEN_FDNAMES has 2 names for 1 sockets"),
        ],
    )
    def test_other_names(self, sites: Sites, tmp_path: Path, names: str, problem: str) -> None:
        file = tmp_path / "client.toml"
        file.write_text(sites.config("client", tunnel("client", "localhost:1", listen="systemd:first")))
        with socket.create_server(("127.0.0.1", 0)) as sock, self.start(file, [sock], names) as process:
            assert process.wait(TIMEOUT) == 2
            assert process.stderr is not None
            assert problem in process.stderr.read()

    def test_a_socket_that_does_not_listen(self, sites: Sites, tmp_path: Path) -> None:
        file = tmp_path / "client.toml"
        file.write_text(sites.config("client", tunnel("client", "localhost:1", listen="systemd:first")))
        with socket.socket() as sock, self.start(file, [sock], "first") as process:
            assert process.wait(TIMEOUT) == 2
            assert process.stderr is not None
            assert "is no listening stream socket" in process.stderr.read()


def high(sock: socket.socket, number: int) -> int:
    """The socket under a higher file number."""
    import fcntl

    return fcntl.fcntl(sock.detach(), fcntl.F_DUPFD_CLOEXEC, number)


def parse_proxy_header(sock: socket.socket) -> tuple[str, tuple[Any, ...], dict[int, bytes]]:
    """Family, addresses and fields, written from the specification."""
    assert receive(sock, 12) == b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
    version, family, length = struct.unpack("!BBH", receive(sock, 4))
    assert version == 0x21
    body = receive(sock, length)
    if family == 0x11:
        addresses = (
            socket.inet_ntop(socket.AF_INET, body[:4]),
            socket.inet_ntop(socket.AF_INET, body[4:8]),
            *struct.unpack("!HH", body[8:12]),
        )
        return "TCP4", addresses, fields(body[12:])
    assert family == 0x31
    return "UNIX", (body[:108].rstrip(b"\0"), body[108:216].rstrip(b"\0")), fields(body[216:])


def fields(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        kind, length = struct.unpack("!BH", data[:3])
        found[kind] = data[3 : 3 + length]
        data = data[3 + length :]
    return found


class TestProxyProtocol:
    def test_the_backend_learns_who_it_is(self, sites: Sites, tmp_path: Path) -> None:
        with (
            Backend() as backend,
            both_tunnels(sites, tmp_path, backend.address, server="proxy_protocol = true\n") as (
                client,
                server,
            ),
        ):
            for path in ("bootstrap", "associated"):
                with dial(client.address()) as app, backend.accept() as sock:
                    app.sendall(b"hello")
                    app.shutdown(socket.SHUT_WR)
                    family, addresses, found = parse_proxy_header(sock)
                    assert receive_all(sock) == b"hello"
                [line] = [line for line in server.audit() if line["path"] == path] or server.audit(2)[1:]
                assert family == "TCP4"
                assert (addresses[1], addresses[3]) == server.address()
                assert f"{addresses[0]}:{addresses[2]}" == line["from"]
                client_flags, verified = struct.unpack("!BI", found[0x20][:5])
                assert client_flags == (0x07 if path == "bootstrap" else 0x05)
                assert verified == 0
                assert fields(found[0x20][5:]) == {
                    0x21: b"TLSv1.3",
                    0x22: b"client",
                    0x23: b"TLS_AES_256_GCM_SHA384",
                }
                assert found[0x05].decode() == line["id"]
                assert found[0xE0] == b"hybrid"
                assert found[0xE1].decode() == line["key_id"]
                assert (found[0xE2], found[0xE3]) == (b"SAE-A", b"SAE-B")
                assert found[0xE4].hex() == line["peer_certificate_sha256"]

    def test_over_a_unix_socket(self, sites: Sites, tmp_path: Path) -> None:
        with Backend() as backend:
            more = "proxy_protocol = true\n"
            tls = 'alpn = ["x/1"]\n'
            config = sites.config(
                "server", tunnel("server", backend.address, listen="unix:hybrid", more=more), tls=tls
            )
            with Process(tmp_path / "server.toml", config) as server:
                server.wait_for("listens on")
                config = sites.config("client", tunnel("client", f"unix:{tmp_path}/hybrid"), tls=tls)
                with Process(tmp_path / "client.toml", config) as client:
                    with dial(client.address()) as app, backend.accept() as sock:
                        family, addresses, found = parse_proxy_header(sock)
                        app.close()
                    assert family == "UNIX"
                    assert addresses == (b"", bytes(tmp_path / "hybrid"))
                    assert found[0x01] == b"x/1"


class TestHealth:
    def test_pages(self, sites: Sites, tmp_path: Path) -> None:
        config = sites.config("client", tunnel("client", "localhost:1"), service='health = "unix:health"\n')
        with Process(tmp_path / "client.toml", config) as client:
            port = client.address()[1]
            health = tmp_path / "health"
            assert get(health, "/healthz") == (200, "ok\n")
            assert get(health, "/healthz?x=1") == (200, "ok\n")
            assert get(health, "/healthz", "HEAD") == (200, "")
            assert get(health, "/healthz", "POST")[0] == 405
            assert get(health, "/other")[0] == 404
            assert get(health, "/" + 10_000 * "x")[0] == 400
            with dial(health) as sock:
                sock.sendall(b"nonsense\r\n\r\n")
                assert receive_all(sock).startswith(b"HTTP/1.1 400 ")
            with dial(health) as sock:
                sock.sendall(b"GET")
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == b""
            status, body = get(health, "/readyz")
            assert (status, json.loads(body)) == (
                200,
                {"state": "ready", "tunnels": {"t": {"connections": 0, "listens": [["127.0.0.1", port]]}}},
            )

    def test_metrics(self, sites: Sites, tmp_path: Path) -> None:
        with (
            Backend(echo) as backend,
            both_tunnels(
                sites,
                tmp_path,
                backend.address,
                client="max_connections = 1\n",
                client_service='health = "127.0.0.1:0"\n',
            ) as (client, _),
        ):
            listening = psutil.Process(client.popen.pid).net_connections("tcp4")
            [port] = {entry.laddr.port for entry in listening if entry.status == psutil.CONN_LISTEN} - {
                client.address()[1]
            }
            health = ("127.0.0.1", port)
            with dial(client.address()) as app:
                exchange(app, b"0123456789")
                during = metrics(health)
                with dial(client.address()) as waiting:
                    eventually(lambda: metrics(health)['limit_reached_total{tunnel="t"}'] == 1)
                    app.shutdown(socket.SHUT_WR)
                    assert receive_all(app) == b""
                    exchange(waiting)
                    waiting.shutdown(socket.SHUT_WR)
                    assert receive_all(waiting) == b""
            client.audit(2)
            sites.kmes.faults("a").answer_with = 503, "{}"
            with dial(client.address()) as app, pytest.raises(ConnectionResetError):
                app.recv(1)
            client.audit(3)
            after = metrics(health)
            text = get(health)[1] + "\n".join(client.log) + client.audit_file.read_text()
        assert during['connections_active{tunnel="t"}'] == 1
        assert during['bytes_total{direction="to_hybrid",tunnel="t"}'] == 10
        assert during['bytes_total{direction="to_plain",tunnel="t"}'] == 10
        ok = 'handshakes_total{outcome="ok",path="%s",protection="hybrid",tunnel="t"}'
        assert (after[ok % "bootstrap"], after[ok % "associated"]) == (1, 1)
        failed = 'handshakes_total{outcome="qkd_unavailable",path="none",protection="none",tunnel="t"}'
        assert after[failed] == 1
        assert after['connections_total{ended="eof",tunnel="t"}'] == 2
        assert after['connections_total{ended="handshake_failed",tunnel="t"}'] == 1
        assert after['connections_active{tunnel="t"}'] == 0
        assert after['kme_requests_total{kme="site",operation="get_keys",outcome="ok"}'] == 2
        assert after['kme_requests_total{kme="site",operation="get_keys",outcome="KMSUnavailable"}'] == 1
        assert after['kme_request_seconds_count{kme="site",operation="get_keys"}'] == 3
        assert after['handshake_seconds_count{tunnel="t"}'] == 2
        assert after['connection_seconds_count{tunnel="t"}'] == 3
        # Keys are 256 bits: 64 hexadecimal digits or 44 of base64. Fingerprints of certificates are not keys.
        text = re.sub(r'"peer_certificate_sha256": "[0-9a-f]{64}"', "", text)
        assert not re.search(r"[0-9a-fA-F]{64}|[A-Za-z0-9+/]{43}=", text)


def megabytes(processes: Iterable[Process]) -> float:
    return float(sum(psutil.Process(process.popen.pid).memory_info().rss for process in processes) / 1e6)


class TestMemory:
    def test_2000_idle_connections(self, sites: Sites, tmp_path: Path) -> None:
        """2000 at full size."""
        number, first = sized(2000, 400), 200
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * number + 200
        if hard != resource.RLIM_INFINITY and hard < needed:
            pytest.skip(f"this system lets a process open {hard} files, and {needed} are needed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
        try:
            more = f"max_connections = {number}\n"
            with (
                Backend() as backend,
                both_tunnels(sites, tmp_path, backend.address, client=more, server=more) as processes,
                contextlib.ExitStack() as stack,
            ):
                address = processes[0].address()
                before = 0.0
                for start in range(0, number, 100):
                    apps = [stack.enter_context(dial(address)) for _ in range(start, start + 100)]
                    for app in apps:
                        app.sendall(b"x")
                    for _ in apps:
                        sock = stack.enter_context(backend.accept())
                        assert receive(sock, 1) == b"x"
                        sock.sendall(b"y")
                    for app in apps:
                        assert receive(app, 1) == b"y"
                    if start + 100 == first:
                        # With what many handshakes at once take, which is the same for more of them.
                        before = megabytes(processes)
                after = megabytes(processes)
                print(
                    f"{number} idle connections: client and server tunnel take {after:.0f} MB, {first} {before:.0f}"
                )
                assert after < 400
                # Both ends of a connection together.
                assert (after - before) / (number - first) < 0.15
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
