# ruff: noqa: SIM117
"""What goes wrong in or around the tunnel process itself ends at most one connection, and is said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qkd_tls import create_default_context
from qkd_tls.tunnel.audit import AuditLog
from qkd_tls.tunnel.connection import Connection, Reporting
from qkd_tls.tunnel.metrics import Metrics
from qkd_tls.tunnel.relay import End, Relay
from qkd_tls.tunnel.settings import load
from tests.support.patience import eventually
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


def exchange(sock: socket.socket, text: bytes = b"ping") -> None:
    sock.sendall(text)
    assert receive(sock, len(text)) == text


def test_no_more_files(sites: Sites, tmp_path: Path) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))

    with Backend(echo) as backend:
        config = sites.config("server", tunnel("server", backend.address))
        with Process(tmp_path / "server.toml", config) as server:
            config = sites.config("client", tunnel("client", server.address()))
            with Process(tmp_path / "client.toml", config, preexec_fn=few_files) as client:
                socks = [dial(client.address()) for _ in range(30)]
                client.wait_for("ERROR: t: cannot accept: .*Too many open files.* raise LimitNOFILE")
                for sock in socks:
                    sock.close()
                # The first ones may still meet files that are being closed.
                eventually(lambda: answers(client))


def answers(client: Process) -> bool:
    with contextlib.suppress(ConnectionError), dial(client.address()) as app:
        exchange(app)
        return True
    return False


def test_an_audit_log_that_cannot_be_written(sites: Sites, tmp_path: Path) -> None:
    with (
        Backend(echo) as backend,
        both_tunnels(sites, tmp_path, backend.address, client_service='audit = "/dev/full"\n') as (client, _),
    ):
        for _ in range(2):
            with dial(client.address()) as app:
                exchange(app)
        client.wait_for("ERROR: the audit log cannot be written: No space left on device")


def test_the_audit_log_on_stderr(sites: Sites, tmp_path: Path) -> None:
    with (
        Backend(echo) as backend,
        both_tunnels(sites, tmp_path, backend.address, client_service='audit = "stderr"\n') as (client, _),
    ):
        with dial(client.address()) as app:
            exchange(app)
            app.shutdown(socket.SHUT_WR)
            assert receive_all(app) == b""
        assert json.loads(client.wait_for(r"^\{.*\}$")[0])["ended"] == "eof"


def test_a_proxy_header_for_a_client_of_whom_little_is_known(sites: Sites, tmp_path: Path) -> None:
    with Backend() as backend:
        config = sites.config(
            "server",
            tunnel("server", backend.address, more="proxy_protocol = true\n"),
            tls='policy = "prefer"\nverify_client = "none"\n',
        )
        with Process(tmp_path / "server.toml", config) as server:
            context = create_default_context(cafile=str(sites.ca.file), policy="off")
            with dial(server.address()) as raw:
                with context.wrap_socket(raw, server_hostname="localhost"), backend.accept() as sock:
                    header = receive(sock, 16)
                    body = receive(sock, int.from_bytes(header[14:], "big"))
    # Addresses, then TLS: no certificate, so none verified; no name, no SAE IDs, no key ID.
    assert body[12:20] == bytes.fromhex("20 0028 01 00000001")[:8]
    assert b"pq-only" in body
    assert b"\xe1\x00" not in body


def socket_pairs() -> tuple[socket.socket, ...]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        socks = []
        for _ in range(2):
            socks.append(socket.create_connection(listening.getsockname(), timeout=TIMEOUT))
            socks.append(listening.accept()[0])
            socks[-1].setblocking(False)
    return tuple(socks)


def test_a_fault_in_the_middle_of_a_stream_is_a_cut(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: int) -> NoReturn:
        raise RuntimeError("broken")

    async def scenario() -> tuple[End, tuple[socket.socket, ...]]:
        app, plain, far, hybrid = socket_pairs()
        relay = Relay(plain, hybrid, to_hybrid=broken, to_plain=broken)
        relay.start()
        app.sendall(b"x")
        end = await asyncio.wait_for(relay.ended, TIMEOUT)
        # Once is enough.
        relay.abort("again")
        relay.retire("again")
        return end, (app, far)

    with caplog.at_level(logging.ERROR, "qkd_tls.tunnel"):
        end, ends = asyncio.run(scenario())
    assert end == End("internal error", error="RuntimeError")
    assert "RuntimeError: broken" in caplog.text
    for sock in ends:
        with sock, pytest.raises(ConnectionResetError):
            receive(sock, 2)


def test_retiring_twice_and_while_bytes_are_on_their_way() -> None:
    async def scenario() -> tuple[End, bytes]:
        app, plain, far, hybrid = socket_pairs()
        relay = Relay(plain, hybrid, to_hybrid=int, to_plain=int, preface=b"first ")
        app.sendall(b"up")
        relay.start()
        relay.retire("max_age")
        relay.retire("idle")
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, receive_all, far) == b"up"
        far.sendall(b"down")
        far.close()
        received = await loop.run_in_executor(None, receive_all, app)
        app.close()
        return await asyncio.wait_for(relay.ended, TIMEOUT), received

    end, received = asyncio.run(scenario())
    assert received == b"first down"
    assert end == End("max_age", clean=True)


def test_a_slow_reader_is_not_idle() -> None:
    """What is kept for it goes on bit by bit, though nothing is read meanwhile."""

    async def scenario() -> None:
        app, plain, far, hybrid = socket_pairs()
        hybrid.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        relay = Relay(plain, hybrid, to_hybrid=int, to_plain=int)
        app.sendall(bytes(1 << 19))
        relay.start()
        loop = asyncio.get_running_loop()
        times: dict[int, set[float]] = {}
        async with asyncio.timeout(TIMEOUT):
            # More often than anything is read.
            while all(len(seen) < 3 for seen in times.values()):
                await loop.run_in_executor(None, far.recv, 1 << 14)
                times.setdefault(relay.to_hybrid, set()).add(relay.last_byte)
        relay.abort("over")
        for sock in (app, far):
            sock.close()

    asyncio.run(scenario())


def test_a_fault_while_setting_up_ends_one_connection(
    sites: Sites, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tunnel.toml"
    file.write_text(sites.config("server", tunnel("server", ("localhost", 1))))
    [settings] = load(file).tunnels
    broken: Any = object()

    async def scenario() -> None:
        app, accepted, far, other = socket_pairs()
        for sock in (far, other):
            sock.close()
        reporting = Reporting(Metrics(), AuditLog(tmp_path / "audit"))
        connection = Connection(settings, broken, accepted, accepted.getpeername(), reporting)
        # Nothing has begun, and nothing is there to be cut.
        connection.abort("shutdown")
        await connection.run()
        reporting.audit.close()
        with app, pytest.raises(ConnectionResetError):
            app.recv(1)

    with caplog.at_level(logging.ERROR, "qkd_tls.tunnel"):
        asyncio.run(scenario())
    line = json.loads((tmp_path / "audit").read_text())
    assert (line["ended"], line["error"]) == ("internal error", "AttributeError")
    assert "AttributeError" in caplog.text
