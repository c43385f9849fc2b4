"""Attackers on the path without any secret: they replay, change, cut and drop what they see."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from qkd_tls import QKDUnavailable
from qkd_tls.hybrid import PSKIdentity
from tests.support.attacks import (
    ALPN,
    GROUPS,
    KEY_SHARE,
    PSK_EXTENSION,
    QKD_ALPN,
    SNI,
    VERSIONS,
    Change,
    Cut,
    Outcome,
    Site,
    attempt,
    extensions,
    first_hello,
    forged_connection,
    hand_shake,
    identity_in,
    with_extensions,
)

CLASSICAL = ("X25519MLKEM768", "X25519")


def without_psk(hello: bytes) -> bytes:
    return with_extensions(hello, **{f"x{PSK_EXTENSION}": None})


def without_qkd_alpn(hello: bytes) -> bytes:
    names = extensions(hello)[1][ALPN][2:].replace(QKD_ALPN, b"")
    return with_extensions(hello, **{f"x{ALPN}": len(names).to_bytes(2, "big") + names if names else None})


def with_another_key_id(hello: bytes) -> bytes:
    identity = identity_in(hello)
    other = identity[:-1] + (b"0" if identity[-1:] != b"0" else b"1")
    return hello.replace(identity, other)


def with_another_name(hello: bytes) -> bytes:
    name = b"server.example"
    entry = b"\x00" + len(name).to_bytes(2, "big") + name
    return with_extensions(hello, **{f"x{SNI}": len(entry).to_bytes(2, "big") + entry})


def with_x25519_alone(hello: bytes) -> bytes:
    """With a key share of the attacker's own."""
    share = b"\x00\x1d\x00\x20" + X25519PrivateKey.generate().public_key().public_bytes_raw()
    return with_extensions(
        hello,
        **{f"x{GROUPS}": b"\x00\x02\x00\x1d", f"x{KEY_SHARE}": len(share).to_bytes(2, "big") + share},
    )


def asking_for_x25519(hello: bytes) -> bytes:
    """No key share, so that the server asks for one in a HelloRetryRequest."""
    return with_extensions(hello, **{f"x{GROUPS}": b"\x00\x02\x00\x1d", f"x{KEY_SHARE}": b"\x00\x00"})


def without_tls_1_3(hello: bytes) -> bytes:
    return with_extensions(hello, **{f"x{VERSIONS}": None})


def associated_behind(site: Site, change: Change, policy: str) -> Outcome:
    """A bootstrap, and then an associated connection with a man in the middle."""
    server, client = site.serve(policy=policy), site.client(policy=policy)
    path = site.middle(server)
    assert attempt(path.address, client, server).client_info.path == "bootstrap"
    path.change = change
    return attempt(path.address, client, server)


class TestChangedClientHello:
    """The transcript covers it: both sides compute other keys, and the handshake ends. No policy falls back."""

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    @pytest.mark.parametrize(
        "change", [without_psk, with_another_key_id, with_another_name], ids=lambda change: change.__name__
    )
    def test_of_an_associated_connection(
        self, site: Site, change: Callable[[bytes], bytes], policy: str
    ) -> None:
        outcome = associated_behind(site, first_hello(change), policy)
        assert isinstance(outcome.client_error, ssl.SSLError)
        for error in (outcome.client_error, outcome.server_error):
            assert isinstance(error, ssl.SSLError)
            assert "bad record mac" in str(error).lower()
        assert site.requests == (2, 1), "a key of the client's is lost; the server's KME was not asked"

    def test_stripped_alpn_where_the_server_requires(self, site: Site) -> None:
        server = site.serve()
        path = site.middle(server, first_hello(without_qkd_alpn))
        outcome = attempt(path.address, site.client(policy="prefer"), server)
        assert "no application protocol" in str(outcome.client_error).lower()
        assert isinstance(outcome.server_error, QKDUnavailable)
        assert "does not speak qkd-tls/1" in str(outcome.server_error)
        assert site.requests == (0, 0)

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_stripped_alpn_where_the_server_prefers(self, site: Site, policy: str) -> None:
        server = site.serve(policy="prefer")
        path = site.middle(server, first_hello(without_qkd_alpn))
        outcome = attempt(path.address, site.client(policy=policy), server)
        for error in (outcome.client_error, outcome.server_error):
            assert isinstance(error, ssl.SSLError)
            assert "bad record mac" in str(error).lower()
        assert site.requests == (0, 0)

    def test_x25519_alone(self, site: Site) -> None:
        server = site.serve()
        path = site.middle(server, first_hello(with_x25519_alone))
        outcome = attempt(path.address, site.client(policy="prefer"), server)
        assert "no common ground" in str(outcome.client_error)
        assert isinstance(outcome.server_error, ssl.SSLError)
        assert site.requests == (0, 0)

    @pytest.mark.parametrize(
        ("change", "client_reason", "server_reason"),
        [
            (with_x25519_alone, "BAD_KEY_SHARE", "SSLV3_ALERT_ILLEGAL_PARAMETER"),
            (asking_for_x25519, "DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "SSLV3_ALERT_BAD_RECORD_MAC"),
        ],
        ids=["with_x25519_alone", "asking_for_x25519"],
    )
    def test_x25519_where_both_would_take_it(
        self, site: Site, change: Callable[[bytes], bytes], client_reason: str, server_reason: str
    ) -> None:
        """The operators have added it as a second choice; who is on the path cannot make it the first."""
        server = site.serve(groups=CLASSICAL, policy="prefer")
        path = site.middle(server, first_hello(change))
        outcome = attempt(path.address, site.client(groups=CLASSICAL, policy="prefer"), server)
        assert isinstance(outcome.client_error, ssl.SSLError)
        assert isinstance(outcome.server_error, ssl.SSLError)
        assert (outcome.client_error.reason, outcome.server_error.reason) == (client_reason, server_reason)
        assert site.requests == (0, 0)

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_tls_1_2(self, site: Site, policy: str) -> None:
        server = site.serve(policy=policy)
        path = site.middle(server, first_hello(without_tls_1_3))
        outcome = attempt(path.address, site.client(policy=policy), server)
        for error in (outcome.client_error, outcome.server_error):
            assert isinstance(error, ssl.SSLError)
            assert "does not speak TLS 1.3" in str(error)
        assert site.requests == (0, 0)


class TestReplay:
    def test_client_hello(self, site: Site) -> None:
        """Its key ID is spent: no PSK, so that the sender has no secret for what follows."""
        server, client = site.serve(), site.client()
        path = site.middle(server)
        attempt(path.address, client, server)
        attempt(path.address, client, server)
        before = site.requests
        with server.tcp() as sock:
            sock.sendall(path.seen[1]["client"][0])
            answer = sock.recv(1 << 16)
        assert PSK_EXTENSION not in server_hello_extensions(answer)
        assert isinstance(server.seen().error, ssl.SSLError)
        assert site.requests == before, "a KME was asked"

    @pytest.mark.parametrize("which", [0, 1], ids=["bootstrap", "associated"])
    def test_everything_that_the_client_has_sent(self, site: Site, which: int) -> None:
        """Offers included: the server's part is new each time, so that nothing of it can be read."""
        server, client = site.serve(), site.client()
        path = site.middle(server)
        for _ in range(which + 1):
            attempt(path.address, client, server)
        before = site.requests
        with server.tcp() as sock:
            sock.sendall(b"".join(path.seen[which]["client"]))
            error = server.seen().error
        assert isinstance(error, ssl.SSLError)
        assert "bad record mac" in str(error).lower()
        assert site.requests == before, "a KME was asked"

    @pytest.mark.parametrize(
        ("number", "reason"),
        [(2, "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"), (3, "UNEXPECTED_MESSAGE"), (4, "BAD_RECORD_TYPE")],
    )
    def test_a_record_twice(self, site: Site, number: int, reason: str) -> None:
        """Finished, the offer, the second ClientHello. Each record has its number."""
        server = site.serve()
        path = site.middle(
            server, lambda sender, n, record: record * (1 + (sender == "client" and n == number))
        )
        outcome = attempt(path.address, site.client(), server)
        assert isinstance(outcome.client_error, ssl.SSLError)
        assert isinstance(outcome.server_error, ssl.SSLError)
        assert outcome.server_error.reason == reason
        assert site.kme_b.requests <= 1


class TestForgedIdentity:
    def test_association_of_another_client(self, site: Site) -> None:
        """Mallory may connect, too, and names the association that he has seen on the wire."""
        server = site.serve()
        path = site.middle(server)
        client = site.client()
        attempt(path.address, client, server)
        attempt(path.address, client, server)
        theirs = PSKIdentity.parse(identity_in(path.seen[1]["client"][0]))
        before = site.requests
        theirs.key_id = "never-used-before"
        forged = forged_connection(site.lab, theirs.encode())
        with server.tcp() as sock:
            hand_shake(forged, sock)
            assert not forged.psk_accepted
            assert forged.alpn == "qkd-tls/1"
        assert isinstance(server.seen().error, OSError)
        assert site.requests == before, "a KME was asked"

    @pytest.mark.parametrize("hostname", ["localhost", "other.example"])
    def test_right_identity_under_a_psk_of_zeros(self, site: Site, hostname: str) -> None:
        """A ClientHello kept from the server, sent by Mallory: the binder shows that he has no key, and burns it.

        Under another name (SNI) the association is not even looked at.
        """
        server, client = site.serve(), site.client()
        path = site.middle(server)
        attempt(path.address, client, server)

        def cut(_sender: str, _number: int, _record: bytes) -> bytes:
            raise Cut

        path.change = cut
        assert isinstance(attempt(path.address, client).client_error, OSError)
        server.seen()
        forged = forged_connection(site.lab, identity_in(path.seen[1]["client"][0]), hostname)
        with server.tcp() as sock:
            if hostname == "localhost":
                with pytest.raises(ssl.SSLError, match=r"(?i)decrypt error"):
                    hand_shake(forged, sock)
                assert "BINDER_DOES_NOT_VERIFY" in str(server.seen().error)
                assert site.kme_b.requests == 2
            else:
                hand_shake(forged, sock)
                assert not forged.psk_accepted
                assert site.kme_b.requests == 1
        if hostname != "localhost":
            assert isinstance(server.seen().error, (ssl.SSLEOFError, ConnectionError))
        path.change = lambda _sender, _number, record: record
        assert attempt(path.address, client, server).client_info.protection == "hybrid"


class TestCut:
    """Nobody falls back because of a cut, whatever the policy; it costs the key on its way."""

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    @pytest.mark.parametrize(
        ("sender", "number"), [("client", 0), ("client", 1), ("server", 0), ("server", 2), ("server", 4)]
    )
    def test_bootstrap(self, site: Site, policy: str, sender: str, number: int) -> None:
        def cut(who: str, n: int, record: bytes) -> bytes:
            if (who, n) == (sender, number):
                raise Cut
            return record

        server = site.serve(policy=policy)
        path = site.middle(server, cut)
        outcome = attempt(path.address, site.client(policy=policy), server)
        for error in (outcome.client_error, outcome.server_error):
            # Which of them depends on whether bytes of the other side were unread.
            assert isinstance(error, (ssl.SSLEOFError, ConnectionError))
        assert outcome.warnings == []
        assert site.kme_a.requests <= 1

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_a_key_is_burnt_for_each_associated_connection(self, site: Site, policy: str) -> None:
        def cut(who: str, _number: int, record: bytes) -> bytes:
            if who == "server":
                raise Cut
            return record

        server, client = site.serve(policy=policy), site.client(policy=policy)
        path = site.middle(server)
        attempt(path.address, client, server)
        path.change = cut
        for burnt in range(1, 4):
            assert isinstance(attempt(path.address, client, server).client_error, OSError)
            assert site.requests == (1 + burnt, 1 + burnt)
        path.change = lambda _sender, _number, record: record
        assert attempt(path.address, client, server).client_info.path == "associated"
        assert len(set(site.kme_a.key_ids)) == len(site.kme_a.key_ids)

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    @pytest.mark.parametrize("number", [1, 2, 3, 4])
    def test_a_bit_flipped_in_a_record_of_the_server(self, site: Site, policy: str, number: int) -> None:
        def flip(who: str, n: int, record: bytes) -> bytes:
            return record[:-1] + bytes([record[-1] ^ 1]) if (who, n) == ("server", number) else record

        server = site.serve(policy=policy)
        path = site.middle(server, flip)
        outcome = attempt(path.address, site.client(policy=policy), server)
        ours = "INVALID_CCS_MESSAGE" if number == 1 else "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
        theirs = "SSLV3_ALERT_UNEXPECTED_MESSAGE" if number == 1 else "SSLV3_ALERT_BAD_RECORD_MAC"
        assert isinstance(outcome.client_error, ssl.SSLError)
        assert isinstance(outcome.server_error, ssl.SSLError)
        assert (outcome.client_error.reason, outcome.server_error.reason) == (ours, theirs)
        assert outcome.warnings == []


def server_hello_extensions(record: bytes) -> dict[int, bytes]:
    """The extensions in the ServerHello that a stream of records starts with."""
    assert record[5] == 2, "no ServerHello"
    position = 5 + 4 + 2 + 32
    position += 1 + record[position] + 3 + 2
    end, found = 5 + int.from_bytes(record[3:5], "big"), {}
    while position < end:
        kind, size = (int.from_bytes(record[at : at + 2], "big") for at in (position, position + 2))
        found[kind] = record[position + 4 : position + 4 + size]
        position += 4 + size
    return found
