"""Attackers who hold one half: QKD keys without a certificate, or the certificate's key without QKD keys."""

from __future__ import annotations

import ssl

import pytest

from qkd_tls import QKDKeyMismatch, QKDUnavailable
from qkd_tls.openssl import TLSConnection, TLSContext, TLSSettings
from tests.support.attacks import Inventing, Site, attempt, hand_shake
from tests.support.sockets import Authority, Server


class TestKnowsEveryQKDKey:
    """Mallory runs the KMEs: he may ask KME B for any key. He has no certificate."""

    def test_as_the_server_of_a_first_connection(self, site: Site, mallorys_ca: Authority) -> None:
        context = site.lab.server(key_manager=site.kme_b)
        mallorys_ca.issue("first").load_into(context)
        mallory = site.serve(context)
        outcome = attempt(mallory.address, site.client(), mallory)
        assert isinstance(outcome.client_error, ssl.SSLCertVerificationError)
        assert "alert unknown ca" in str(outcome.server_error)
        assert site.requests == (0, 0), "a key was spent before the certificate had been checked"

    def test_as_the_server_of_an_associated_connection(self, site: Site, mallorys_ca: Authority) -> None:
        server, client = site.serve(), site.client()
        path = site.middle(server)
        assert attempt(path.address, client, server).client_info.path == "bootstrap"
        context = site.lab.server(key_manager=site.kme_b)
        mallorys_ca.issue("later").load_into(context)
        mallory = site.serve(context)
        path.target = mallory.address
        outcome = attempt(path.address, client, mallory)
        assert isinstance(outcome.client_error, ssl.SSLCertVerificationError)
        assert site.requests == (2, 1), "one key of the client's is lost, and the server's KME was not asked"

    def test_as_a_client_of_mutual_tls(self, site: Site) -> None:
        server = site.serve(mutual=True)
        outcome = attempt(server.address, site.client(), server)
        assert "certificate required" in str(outcome.client_error).lower()
        assert "has sent none" in str(outcome.server_error)
        assert site.requests == (1, 0)


class TestStoleTheCertificatesKey:
    """Mallory has the server's certificate and private key. He has no QKD key."""

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_makes_a_key_up(self, site: Site, policy: str) -> None:
        mallory = site.serve(key_manager=Inventing("SAE-B"))
        outcome = attempt(mallory.address, site.client(policy=policy), mallory)
        for error in (outcome.client_error, outcome.server_error):
            assert isinstance(error, QKDKeyMismatch)
            assert site.kme_a.key_ids[0] in str(error)
        assert "somebody is in between" in str(outcome.client_error)
        assert site.requests == (1, 0)

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_makes_a_key_up_on_an_associated_connection(self, site: Site, policy: str) -> None:
        """He does not know the association secret either, so the client finds itself in a new bootstrap."""
        server, client = site.serve(), site.client(policy=policy)
        path = site.middle(server)
        attempt(path.address, client, server)
        mallory = site.serve(key_manager=Inventing("SAE-B"))
        path.target = mallory.address
        outcome = attempt(path.address, client, mallory)
        assert isinstance(outcome.client_error, QKDKeyMismatch)
        assert isinstance(outcome.server_error, QKDKeyMismatch)
        assert site.requests == (3, 1)

    def test_says_that_he_has_no_qkd(self, site: Site) -> None:
        heard: list[bytes] = []
        with Server(site.lab.server(policy="off"), lambda sock: heard.append(sock.recv(100))) as mallory:
            outcome = attempt(mallory.address, site.client(), mallory)
        assert b"".join(heard) == b""
        assert isinstance(outcome.client_error, QKDUnavailable)
        assert "does not speak qkd-tls/1" in str(outcome.client_error)
        assert site.requests == (0, 0)

    def test_rejects_the_keys(self, site: Site) -> None:
        heard: list[bytes] = []
        context = site.lab.server(policy="prefer", allowed_peer_sae_ids={"nobody"})
        with Server(context, lambda sock: heard.append(sock.recv(100))) as mallory:
            outcome = attempt(mallory.address, site.client(), mallory)
        assert b"".join(heard) == b""
        assert isinstance(outcome.client_error, QKDUnavailable)
        assert outcome.client_error.code == "unknown_sae"
        assert site.requests == (1, 0)

    def test_has_his_way_with_a_client_that_prefers(self, site: Site) -> None:
        """What `prefer` means: the PKI alone decides. The warning and `sock.qkd` say it."""
        mallory = site.serve(site.lab.server(policy="off"))
        outcome = attempt(mallory.address, site.client(policy="prefer"), mallory)
        assert outcome.client_info.protection == "pq-only"
        assert outcome.client_info.group == "X25519MLKEM768"
        assert outcome.warnings == ["QKDFallbackWarning"]
        assert "does not speak qkd-tls/1" in str(outcome.client_info.fallback)


class TestUnauthenticatedClient:
    """Without mutual TLS anybody may offer key IDs to a server."""

    def test_makes_the_server_ask_its_kme(self, site: Site) -> None:
        server = site.serve()
        outcome = attempt(server.address, site.client(key_manager=Inventing("SAE-A")), server)
        assert isinstance(outcome.client_error, QKDUnavailable)
        assert outcome.client_error.code == "unknown_key"
        assert isinstance(outcome.server_error, QKDUnavailable)
        assert site.kme_b.requests == 1
        assert site.kme_b.key_ids == [], "a key was spent"

    def test_an_sae_that_is_not_allowed(self, site: Site) -> None:
        server = site.serve(allowed_peer_sae_ids={"SAE-A"})
        outcome = attempt(server.address, site.client(key_manager=Inventing("SAE-X")), server)
        assert isinstance(outcome.client_error, QKDUnavailable)
        assert outcome.client_error.code == "unknown_sae"
        assert site.kme_b.requests == 0

    def test_knows_key_ids_and_the_name_of_an_sae(self, site: Site) -> None:
        """Key IDs that are overheard cost keys, and let nobody in."""
        stolen = site.kme_a.get_keys("SAE-B", 1)

        class Names(Inventing):
            def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list:  # type: ignore[type-arg]
                return self.get_keys_by_id(peer_sae_id, [key.key_id for key in stolen])

        server = site.serve()
        outcome = attempt(server.address, site.client(key_manager=Names("SAE-A")), server)
        assert isinstance(outcome.client_error, QKDKeyMismatch)
        assert isinstance(outcome.server_error, QKDKeyMismatch)
        assert site.kme_b.key_ids == [key.key_id for key in stolen]

    def test_stock_client_of_a_server_that_requires(self, site: Site) -> None:
        server = site.serve()
        outcome = attempt(server.address, site.client(policy="off", key_manager=None), server)
        assert isinstance(outcome.client_error, QKDUnavailable)
        assert isinstance(outcome.server_error, QKDUnavailable)
        assert site.requests == (0, 0)


def test_the_association_of_another_name(site: Site) -> None:
    """A server with the site's CA, but for another name, gets a redirected client: names are checked."""
    other = site.lab.server(key_manager=site.kme_b)
    site.lab.ca.issue("another", ["another.example"]).load_into(other)
    server, client = site.serve(), site.client()
    path = site.middle(server)
    attempt(path.address, client, server)
    elsewhere = site.serve(other)
    path.target = elsewhere.address
    outcome = attempt(path.address, client, elsewhere)
    assert isinstance(outcome.client_error, ssl.SSLCertVerificationError)
    assert "localhost" in str(outcome.client_error)
    assert site.requests == (2, 1)


def test_a_server_of_another_protocol(site: Site) -> None:
    """With a certificate for the right name. As in the standard library, it is for the program to look at ALPN."""
    server = site.serve()
    server.context.set_alpn_protocols(["smtp"])
    client = site.client()
    client.set_alpn_protocols(["http/1.1"])
    for path in ("bootstrap", "associated"):
        info = attempt(server.address, client, server).client_info
        assert (info.path, info.alpn) == (path, None)


class TestSelfie:
    """A client's own handshake comes back to its own machine."""

    def test_flight_played_back(self, site: Site) -> None:
        server, client = site.serve(), site.client()
        path = site.middle(server)
        attempt(path.address, client, server)
        path.target = (echo := site.echo()).address
        outcome = attempt(path.address, client)
        assert isinstance(outcome.client_error, ssl.SSLError)
        assert "unexpected message" in str(outcome.client_error).lower()
        assert echo.bytes > 0
        assert site.requests == (2, 1)

    def test_a_server_on_the_clients_own_host(self, site: Site) -> None:
        """With one certificate for both sites even: the SAE is not the one that the key is for."""
        server, client = site.serve(), site.client()
        path = site.middle(server)
        attempt(path.address, client, server)
        own = site.serve(key_manager=site.kme_a)
        path.target = own.address
        outcome = attempt(path.address, client, own)
        assert isinstance(outcome.client_error, QKDUnavailable)
        assert isinstance(outcome.server_error, QKDUnavailable)
        assert outcome.client_error.code in ("unknown_sae", "unknown_key")
        assert (len(site.kme_a.key_ids), len(site.kme_b.key_ids)) == (3, 1)


def test_a_handshake_of_tls_by_itself_gives_no_way_to_data(site: Site) -> None:
    """A peer that completes a bootstrap and then sends data instead of an offer."""
    server = site.serve()
    connection = TLSConnection(
        TLSContext(TLSSettings(server_side=False, trusted=(site.lab.ca.der,))),
        server_hostname="localhost",
        alpn=("qkd-tls/1",),
    )
    with server.tcp() as sock:
        hand_shake(connection, sock)
        connection.write_all(memoryview(b"\x00\x10GET / HTTP/1.1\r\n"), 0)
        sock.sendall(connection.take())
        assert "broke qkd-tls/1" in str(server.seen().error)
    assert site.requests == (0, 0)
