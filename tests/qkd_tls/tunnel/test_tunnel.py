# ruff: noqa: SIM117, PT012
"""`python -m qkd_tls.tunnel` as processes: what goes through, what does not, and what is told of it."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
from pathlib import Path

import psutil
import pytest

from qkd_tls import create_default_context
from tests.support.ports import free_port
from tests.support.tunnels import (
    TIMEOUT,
    Backend,
    Process,
    Sites,
    both_tunnels,
    dial,
    echo,
    receive,
    receive_all,
    tunnel,
)

RESET = struct.pack("ii", 1, 0)


def exchange(sock: socket.socket, text: bytes = b"ping") -> None:
    sock.sendall(text)
    assert receive(sock, len(text)) == text


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def swallow(sock: socket.socket, size: int) -> None:
    while size > 0 and (data := sock.recv(1 << 18)):
        size -= len(data)


def send_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


class TestData:
    def test_both_ways_and_the_audit_lines(self, sites: Sites, tmp_path: Path) -> None:
        data = os.urandom(3_000_000)
        with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            with dial(client.address()) as sock:
                sender = threading.Thread(target=send_all, args=(sock, data))
                sender.start()
                assert receive_all(sock) == data
                sender.join()
                source = "{}:{}".format(*sock.getsockname())
            [near], [far] = client.audit(), server.audit()
        assert near["from"] == source
        assert far["to"] == "{}:{}".format(*backend.address)
        for line, mode, kms in (
            (near, "client", sites.kmes.url_a),
            (far, "server", sites.kmes.url_b),
        ):
            assert (line["mode"], line["kms"], line["tunnel"]) == (mode, kms, "t")
            assert (line["protection"], line["path"]) == ("hybrid", "bootstrap")
            assert (line["group"], line["cipher"]) == ("X25519MLKEM768", "TLS_AES_256_GCM_SHA384")
            assert (line["client_sae_id"], line["server_sae_id"]) == ("SAE-A", "SAE-B")
            assert (line["bytes_to_hybrid"], line["bytes_to_plain"]) == (len(data), len(data))
            assert (line["ended"], line["clean"], line["error"]) == ("eof", True, None)
            assert 0 < line["handshake_seconds"] < line["seconds"]
        assert near["key_id"] == far["key_id"]
        assert near["key_id"] in {delivery.key_id for delivery in sites.kmes.deliveries}
        assert (near["peer_subject"], far["peer_subject"]) == ("CN=server", "CN=client")
        assert far["peer_certificate_sha256"] != near["peer_certificate_sha256"]

    def test_half_close_towards_the_backend(self, sites: Sites, tmp_path: Path) -> None:
        with Backend() as backend, both_tunnels(sites, tmp_path, backend.address) as (client, _):
            with dial(client.address()) as app:
                app.sendall(b"question")
                app.shutdown(socket.SHUT_WR)
                with backend.accept() as sock:
                    assert receive_all(sock) == b"question"
                    sock.sendall(b"answer")
                    assert receive(app, 6) == b"answer"
                    sock.sendall(b", more")
                    sock.shutdown(socket.SHUT_WR)
                    assert receive_all(app) == b", more"
            assert client.audit()[0]["ended"] == "eof"

    def test_half_close_towards_the_client(self, sites: Sites, tmp_path: Path) -> None:
        with Backend() as backend, both_tunnels(sites, tmp_path, backend.address) as (client, _):
            with dial(client.address()) as app, backend.accept() as sock:
                sock.sendall(b"greeting")
                sock.shutdown(socket.SHUT_WR)
                assert receive_all(app) == b"greeting"
                app.sendall(b"data")
                assert receive(sock, 4) == b"data"
                app.sendall(b", more")
                app.shutdown(socket.SHUT_WR)
                assert receive_all(sock) == b", more"

    def test_unix_sockets_on_every_side(self, sites: Sites, tmp_path: Path) -> None:
        backend_path, hybrid, plain = (tmp_path / name for name in ("backend", "hybrid", "plain"))
        server = sites.config("server", tunnel("server", f"unix:{backend_path}", listen="unix:hybrid"))
        client = sites.config(
            "client",
            tunnel("client", f"unix:{hybrid}", listen="unix:plain", more='socket_mode = "0660"\n'),
        )
        with (
            Backend(echo, path=backend_path),
            Process(tmp_path / "server.toml", server) as server_process,
            Process(tmp_path / "client.toml", client) as client_process,
        ):
            server_process.wait_for("listens on unix:")
            client_process.wait_for("listens on unix:")
            assert plain.stat().st_mode & 0o777 == 0o660
            with dial(plain) as app:
                exchange(app)
                app.shutdown(socket.SHUT_WR)
                assert receive_all(app) == b""
            assert client_process.audit()[0]["from"] == "unix:"
        assert not plain.exists()
        assert not hybrid.exists()

    def test_a_socket_that_a_killed_process_left_is_replaced_a_used_one_is_not(
        self, sites: Sites, tmp_path: Path
    ) -> None:
        stale = tmp_path / "plain"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(stale))
        config = sites.config("client", tunnel("client", "localhost:1", listen="unix:plain"))
        with Process(tmp_path / "client.toml", config) as process:
            process.wait_for("listens on unix:")
            second = Process(tmp_path / "second.toml", config)
            assert second.wait() == 2
            assert f"listen: cannot listen on unix:{stale}: somebody listens" in second.log[-1]
        stale.write_text("no socket")
        third = Process(tmp_path / "third.toml", config)
        assert third.wait() == 2
        assert "exists, and is no socket" in third.log[-1]

    def test_back_pressure(self, sites: Sites, tmp_path: Path) -> None:
        with Backend() as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            processes = [psutil.Process(process.popen.pid) for process in (client, server)]
            with dial(client.address()) as app, backend.accept() as sock:
                app.sendall(b"x")
                assert receive(sock, 1) == b"x"
                before = [process.memory_info().rss for process in processes]
                block, sent = os.urandom(1 << 20), 0
                # Full is where nothing more is taken for a while.
                app.settimeout(1)
                with pytest.raises(TimeoutError):
                    while True:
                        sent += app.send(block[sent % len(block) :])
                for process, rss in zip(processes, before, strict=True):
                    assert process.memory_info().rss - rss < 10e6
                app.shutdown(socket.SHUT_WR)
                received = receive_all(sock)
                assert len(received) == sent
                assert received == (block * (sent // len(block) + 1))[:sent]

    def test_one_connection_does_not_keep_others_from_moving(self, sites: Sites, tmp_path: Path) -> None:
        def pour(sock: socket.socket) -> None:
            if sock.recv(1) == b"p":
                while True:
                    sock.sendall(bytes(1 << 18))
            echo(sock)

        with Backend(pour) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, _):
            with dial(client.address()) as greedy, dial(client.address()) as modest:
                greedy.sendall(b"p")
                swallowed = threading.Thread(target=swallow, args=(greedy, 100_000_000))
                swallowed.start()
                modest.sendall(b"-")
                for _ in range(20):
                    exchange(modest)
                swallowed.join(TIMEOUT)
                assert not swallowed.is_alive()


class Cutter:
    """Between the two tunnels: passes on what comes, until it is told to cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._backend = Backend(self._pass_on)
        self.address = self._backend.address

    def _pass_on(self, near: socket.socket) -> None:
        far = dial(self._target)
        self._pairs.append((near, far))
        back = threading.Thread(target=self._copy, args=(far, near))
        back.start()
        self._copy(near, far)
        back.join(TIMEOUT)
        far.close()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass

    def truncate(self) -> None:
        """TCP ends in both directions, TLS does not."""
        for pair in self._pairs:
            for sock in pair:
                sock.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Cutter:
        return self

    def __exit__(self, *_: object) -> None:
        for pair in self._pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._backend.__exit__()


class TestCuts:
    def test_tls_without_an_end_is_passed_on_as_a_reset(self, sites: Sites, tmp_path: Path) -> None:
        with Backend() as backend:
            config = sites.config("server", tunnel("server", backend.address))
            with Process(tmp_path / "server.toml", config) as server, Cutter(server.address()) as cutter:
                config = sites.config("client", tunnel("client", cutter.address))
                with Process(tmp_path / "client.toml", config) as client:
                    with dial(client.address()) as app, backend.accept() as sock:
                        app.sendall(b"one")
                        assert receive(sock, 3) == b"one"
                        cutter.truncate()
                        for end in (app, sock):
                            with pytest.raises(ConnectionResetError):
                                end.recv(1)
                    lines = [process.audit()[0] for process in (client, server)]
                    assert [line["clean"] for line in lines] == [False, False]
                    # OpenSSL tells its peer by an alert, which may be there before the cut.
                    ends = {(line["ended"], line["error"]) for line in lines}
                    truncated = ("truncated", "hybrid side: TLS ended without close_notify")
                    assert truncated in ends
                    for reason, error in ends - {truncated}:
                        assert reason == "tls"
                        assert "alert decode error" in error

    def test_a_reset_is_passed_on(self, sites: Sites, tmp_path: Path) -> None:
        with Backend() as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
            with dial(client.address()) as app, backend.accept() as sock:
                app.sendall(b"x")
                assert receive(sock, 1) == b"x"
                send_reset(app)
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
            with dial(client.address()) as app, backend.accept() as sock:
                app.sendall(b"x")
                assert receive(sock, 1) == b"x"
                send_reset(sock)
                with pytest.raises(ConnectionResetError):
                    app.recv(1)
            assert [line["ended"] for line in client.audit(2)] == [
                "reset by plain side",
                "reset by hybrid side",
            ]
            assert [line["ended"] for line in server.audit(2)] == [
                "reset by hybrid side",
                "reset by plain side",
            ]

    def test_no_backend(self, sites: Sites, tmp_path: Path) -> None:
        nobody = "127.0.0.1", free_port()
        with both_tunnels(sites, tmp_path, nobody) as (client, server):
            with dial(client.address()) as app, pytest.raises(ConnectionResetError):
                app.recv(1)
            [line] = server.audit()
            assert (line["ended"], line["error"]) == ("connect failed", "Connection refused")
            assert line["key_id"] == client.audit()[0]["key_id"]
            server.wait_for("WARNING: t: 127.0.0.1:[0-9]+, connect failed: Connection refused")

    def test_nobody_at_the_hybrid_side(self, sites: Sites, tmp_path: Path) -> None:
        nobody = "127.0.0.1", free_port()
        config = sites.config("client", tunnel("client", nobody))
        with Process(tmp_path / "client.toml", config) as client:
            with dial(client.address()) as app, pytest.raises(ConnectionResetError):
                app.recv(1)
            [line] = client.audit()
            assert (line["ended"], line["protection"]) == ("connect failed", None)


class TestPolicy:
    def test_require_refuses_without_a_kme(self, sites: Sites, tmp_path: Path) -> None:
        sites.kmes.stop_kme("a")
        try:
            with Backend(echo) as backend, both_tunnels(sites, tmp_path, backend.address) as (client, server):
                with dial(client.address()) as app, pytest.raises(ConnectionResetError):
                    app.recv(1)
                [line] = client.audit()
                assert (line["ended"], line["clean"]) == ("handshake failed", False)
                assert f"KMS {sites.kmes.url_a}" in line["error"]
                assert "What to do:" in line["error"]
                client.wait_for("WARNING: t: 127.0.0.1:[0-9]+, handshake failed: no QKD key")
                assert server.audit()[0]["ended"] == "handshake failed"
        finally:
            sites.kmes.start_kme("a")

    def test_prefer_goes_on_and_says_so(self, sites: Sites, tmp_path: Path) -> None:
        sites.kmes.stop_kme("a")
        try:
            prefer = 'policy = "prefer"\n'
            with (
                Backend(echo) as backend,
                both_tunnels(sites, tmp_path, backend.address, client_tls=prefer, server_tls=prefer) as (
                    client,
                    server,
                ),
            ):
                with dial(client.address()) as app:
                    exchange(app)
                for process in (client, server):
                    [line] = process.audit()
                    assert (line["protection"], line["path"], line["key_id"]) == ("pq-only", None, None)
                    assert line["fallback"]
                    process.wait_for("WARNING: t: 127.0.0.1:[0-9]+, no QKD key: ")
        finally:
            sites.kmes.start_kme("a")

    def test_a_client_without_a_certificate_is_refused(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend:
            tls = 'policy = "prefer"\n'
            config = sites.config("server", tunnel("server", backend.address), tls=tls)
            with Process(tmp_path / "server.toml", config) as server:
                context = create_default_context(cafile=str(sites.ca.file), policy="off")
                with dial(server.address()) as raw:
                    # In TLS 1.3 the client's handshake is over before the server has seen its certificate.
                    with context.wrap_socket(raw, server_hostname="localhost") as sock:
                        with pytest.raises((ssl.SSLError, ConnectionError)):
                            sock.recv(1)
                [line] = server.audit()
                assert line["ended"] == "handshake failed"
                assert "certificate" in line["error"]

    def test_programs_without_a_tunnel_can_be_at_the_other_end(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend:
            tls = 'policy = "prefer"\nverify_client = "none"\nalpn = ["x/1"]\n'
            config = sites.config("server", tunnel("server", backend.address), tls=tls)
            with Process(tmp_path / "server.toml", config) as server:
                context = create_default_context(cafile=str(sites.ca.file), policy="off")
                context.set_alpn_protocols(["x/1"])
                with dial(server.address()) as raw:
                    with context.wrap_socket(raw, server_hostname="localhost") as sock:
                        exchange(sock)
                [line] = server.audit()
                assert (line["alpn"], line["peer_subject"]) == ("x/1", None)


class TestLimits:
    def test_connections_beyond_the_limit_wait(self, sites: Sites, tmp_path: Path) -> None:
        with (
            Backend(echo) as backend,
            both_tunnels(
                sites,
                tmp_path,
                backend.address,
                client="max_connections = 2\n",
                client_service='health = "unix:health"\n',
            ) as (client, _),
            dial(client.address()) as first,
            dial(client.address()) as second,
        ):
            exchange(first)
            exchange(second)
            with dial(client.address()) as third:
                third.sendall(b"wait")
                third.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    third.recv(1)
                first.close()
                third.settimeout(TIMEOUT)
                assert receive(third, 4) == b"wait"

    def test_idle(self, sites: Sites, tmp_path: Path) -> None:
        with (
            Backend(echo) as backend,
            both_tunnels(sites, tmp_path, backend.address, client="idle_timeout = 2\n") as (client, _),
        ):
            with dial(client.address()) as app:
                # Longer than that in all, but never at a time.
                for _ in range(11):
                    app.settimeout(TIMEOUT)
                    exchange(app)
                    app.settimeout(0.2)
                    with pytest.raises(TimeoutError):
                        app.recv(1)
                app.settimeout(TIMEOUT)
                # The backend ends its stream when it sees the end.
                assert receive_all(app) == b""
            [line] = client.audit()
            assert (line["ended"], line["clean"]) == ("idle", True)

    def test_idle_with_bytes_that_nobody_takes(self, sites: Sites, tmp_path: Path) -> None:
        with (
            Backend() as backend,
            both_tunnels(sites, tmp_path, backend.address, client="idle_timeout = 0.5\n") as (client, _),
        ):
            with dial(client.address()) as app, backend.accept(), pytest.raises(ConnectionError):
                while True:
                    app.send(bytes(1 << 20))
            [line] = client.audit()
            assert (line["ended"], line["clean"]) == ("idle", False)

    def test_max_age_ends_a_quiet_connection_gently(self, sites: Sites, tmp_path: Path) -> None:
        more = "max_age = 0.3\nquiet = 1\n"
        with (
            Backend(echo) as backend,
            both_tunnels(sites, tmp_path, backend.address, client=more) as (client, server),
        ):
            for _ in range(2):
                with dial(client.address()) as app:
                    exchange(app)
                    assert receive_all(app) == b""
            lines = client.audit(2)
            assert [(line["ended"], line["clean"]) for line in lines] == 2 * [("max_age", True)]
            # What the limit is for: another key.
            assert lines[0]["key_id"] != lines[1]["key_id"]
            assert [line["ended"] for line in server.audit(2)] == ["eof", "eof"]

    def test_max_age_at_the_server(self, sites: Sites, tmp_path: Path) -> None:
        more = "max_age = 0.3\nquiet = 0.2\n"
        with (
            Backend() as backend,
            both_tunnels(sites, tmp_path, backend.address, server=more) as (client, server),
        ):
            with dial(client.address()) as app, backend.accept() as sock:
                assert receive_all(app) == b""
                app.close()
                assert receive_all(sock) == b""
            assert server.audit()[0]["ended"] == "max_age"

    def test_max_age_resets_what_never_is_quiet(self, sites: Sites, tmp_path: Path) -> None:
        more = "max_age = 0.2\nmax_age_grace = 0.6\nquiet = 60\n"
        with (
            Backend(echo) as backend,
            both_tunnels(sites, tmp_path, backend.address, client=more) as (client, _),
        ):
            with dial(client.address()) as app, pytest.raises(ConnectionError):
                while True:
                    app.sendall(b"tick")
                    assert app.recv(4)
            [line] = client.audit()
            assert (line["ended"], line["clean"]) == ("max_age", False)
            assert line["seconds"] >= 0.8

    def test_max_age_resets_when_the_other_end_goes_on(self, sites: Sites, tmp_path: Path) -> None:
        more = "max_age = 0.2\nmax_age_grace = 0.3\nquiet = 0.1\n"
        with (
            Backend() as backend,
            both_tunnels(sites, tmp_path, backend.address, client=more) as (client, _),
        ):
            with dial(client.address()) as app, backend.accept() as sock:
                assert receive_all(sock) == b""
                with pytest.raises(ConnectionResetError):
                    app.recv(1)
            [line] = client.audit()
            assert (line["ended"], line["clean"]) == ("max_age", False)

    def test_bytes_sent_after_a_gentle_end_are_not_lost_unseen(self, sites: Sites, tmp_path: Path) -> None:
        more = "max_age = 0.2\nquiet = 0.1\n"
        with (
            Backend() as backend,
            both_tunnels(sites, tmp_path, backend.address, client=more) as (client, _),
        ):
            with dial(client.address()) as app, backend.accept() as sock:
                assert receive_all(sock) == b""
                app.sendall(b"too late")
                sock.close()
                [line] = client.audit()
                # The end may be seen before the reset.
                with pytest.raises(ConnectionError):
                    while True:
                        app.sendall(b"x")
            assert (line["ended"], line["clean"]) == ("max_age", False)
            assert line["error"] == "the plain side went on sending"

    def test_handshake_timeout(self, sites: Sites, tmp_path: Path) -> None:
        with Backend(echo) as backend:
            config = sites.config(
                "server", tunnel("server", backend.address, more="handshake_timeout = 0.3\n")
            )
            with Process(tmp_path / "server.toml", config) as server:
                with dial(server.address()) as silent:
                    assert silent.recv(1) == b""
                [line] = server.audit()
                assert (line["ended"], line["bytes_to_plain"]) == ("handshake failed", 0)
                assert "timed out after 0.3 seconds" in line["error"]

    def test_connect_timeout(self, sites: Sites, tmp_path: Path) -> None:
        # A listening socket whose backlog is full answers nobody.
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = []
            try:
                for _ in range(4):
                    filler = socket.socket()
                    filler.setblocking(False)
                    filler.connect_ex(full.getsockname())
                    fillers.append(filler)
                more = "connect_timeout = 0.3\n"
                config = sites.config("client", tunnel("client", full.getsockname(), more=more))
                with Process(tmp_path / "client.toml", config) as client:
                    with dial(client.address()) as app, pytest.raises(ConnectionResetError):
                        app.recv(1)
                    [line] = client.audit()
                    assert line["error"] == "no connection within 0.3 seconds"
            finally:
                for filler in fillers:
                    filler.close()
