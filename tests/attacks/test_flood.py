"""Peers who send garbage, never end, or never begin: they cost a bounded time, and nobody else notices."""

from __future__ import annotations

import socket
import ssl
import threading

import pytest

from qkd_tls import QKDUnavailable
from tests.support.attacks import Site, attempt
from tests.support.sockets import tcp_pair


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(0x4000), "EXCESSIVE_MESSAGE_SIZE"),
        (
            (b"\x16\x03\x01\x00\x01\x01" + b"\x16\x03\x01\x00\x01\x00" * 60_000)[:200_000],
            "LENGTH_TOO_SHORT",
        ),
        (b"\x17\x03\x03\xff\xff" + bytes(200_000), "DATA_LENGTH_TOO_LONG"),
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP_REQUEST"),
        (b"\x00" * 100_000, "WRONG_VERSION_NUMBER"),
    ],
    ids=["huge ClientHello", "a byte a record", "application data", "HTTP", "zeros"],
)
def test_garbage(site: Site, data: bytes, reason: str) -> None:
    server = site.serve()
    with server.tcp() as sock:
        try:
            sock.sendall(data)
            while sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        error = server.seen().error
        assert isinstance(error, ssl.SSLError)
        assert error.reason == reason
    assert site.requests == (0, 0)
    assert attempt(server.address, site.client(), server).client_info.protection == "hybrid"


def test_a_client_that_trickles(site: Site) -> None:
    """The socket's timeout is that of the whole handshake; others are served meanwhile."""
    server = site.serve()
    with server.tcp() as slow:
        slow.sendall(b"\x16\x03\x01")
        # It would not be served before the slow one has gone, which is afterwards.
        assert attempt(server.address, site.client(), server).client_info.protection == "hybrid"
    assert isinstance(server.seen().error, ssl.SSLEOFError)


def test_a_byte_now_and_then_does_not_put_the_time_limit_off(site: Site) -> None:
    """The socket's timeout is that of the whole handshake, however the bytes of it come."""
    hello = b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03" + bytes(200)
    over = threading.Event()
    with tcp_pair() as (near, far):

        def trickle() -> None:
            for number in hello:
                if over.wait(0.02):
                    return
                near.sendall(bytes([number]))
            # The time limit has been put off: then it ends otherwise.
            near.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            far.settimeout(0.5)
            with pytest.raises(TimeoutError):
                site.lab.server(key_manager=site.kme_b).wrap_socket(far, server_side=True)
        finally:
            over.set()
            sender.join()
    assert site.requests == (0, 0)


def test_without_its_kme_a_client_that_prefers_goes_on_and_says_so(site: Site) -> None:
    """Whoever can stop a KME can have `prefer` do without; `require` refuses."""
    lab = site.lab
    assert lab.kmes is not None
    server = site.serve(policy="prefer")
    lab.kmes.stop_kme("b")
    try:
        outcome = attempt(server.address, site.client(policy="prefer"), server)
        assert outcome.client_info.protection == "pq-only"
        assert outcome.warnings.count("QKDFallbackWarning") >= 1
        refused = attempt(server.address, site.client(), server)
        assert isinstance(refused.client_error, QKDUnavailable)
        assert "no QKD key" in str(refused.client_error)
        assert (site.kme_a.key_ids, site.kme_b.key_ids) == ([], [])
    finally:
        lab.kmes.start_kme("b")
    assert attempt(server.address, site.client(), server).client_info.protection == "hybrid"
