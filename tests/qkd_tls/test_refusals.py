"""What does not become a hybrid connection: which side raises what, and what falls back.

A cause that lies with QKD falls back where both sides' policy is `prefer`, and says so. A cause that lies with
certificates, ML-KEM or TLS 1.3 never does.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from kms_client import Etsi014Client, LocalKeyManager
from kms_client.emulator import RunningPair
from qkd_tls import (
    HandshakePath,
    Protection,
    QKDContext,
    QKDError,
    QKDFallbackWarning,
    QKDInfo,
    QKDKeyMismatch,
    QKDProtocolError,
    QKDUnavailable,
)
from tests.support.ports import free_port
from tests.support.sockets import Authority, Lab, Seen, Server, StealingManager, connect, talk

POLICIES = [
    pytest.param(client, server, id=f"client {client}, server {server}")
    for client in ("require", "prefer")
    for server in ("require", "prefer")
]


@dataclass
class Attempt:
    """What came of a connection, on both sides."""

    client: QKDInfo | BaseException
    server: Seen
    warnings: list[warnings.WarningMessage]
    talked: bool
    """Whether the application's data went there and back."""

    @property
    def client_error(self) -> BaseException:
        assert isinstance(self.client, BaseException), f"the client has connected: {self.client}"
        return self.client

    @property
    def server_error(self) -> BaseException:
        assert self.server.error is not None, f"the server has connected: {self.server.info}"
        return self.server.error

    @property
    def fallback_warnings(self) -> list[str]:
        return [str(one.message) for one in self.warnings if one.category is QKDFallbackWarning]

    @property
    def errors(self) -> Iterator[BaseException]:
        for one in (self.client, self.server.error):
            if isinstance(one, BaseException):
                yield one


def attempt(server: Server, client: QKDContext, hostname: str = "localhost") -> Attempt:
    """Connect and say something; what goes wrong is for the test to look at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome: QKDInfo | BaseException
        talked = False
        try:
            with server.connect(client, hostname) as sock:
                assert sock.qkd is not None
                outcome = sock.qkd
                try:
                    talk(sock)
                    talked = True
                except AssertionError:
                    pass
                except OSError as error:
                    outcome = error if isinstance(error, ssl.SSLError) else outcome
        except OSError as error:
            outcome = error
        return Attempt(outcome, server.seen(), caught, talked)


def explained(error: BaseException, kind: type[BaseException], *words: str) -> None:
    """It is exactly of this class, and its text names the cause and what to do."""
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    for word in words:
        assert word in str(error)
    if isinstance(error, QKDError):
        assert error.hint
        assert f"What to do: {error.hint.rstrip('.')}" in str(error)


# --- causes that lie with QKD


def unreachable(lab: Lab, side: str) -> Etsi014Client:
    """A client of a KME that does not run."""
    pki = lab.pki
    files = (pki.sae_a_cert, pki.sae_a_key) if side == "client" else (pki.sae_b_cert, pki.sae_b_key)
    sae_id = "SAE-A" if side == "client" else "SAE-B"
    url = f"https://127.0.0.1:{free_port()}"
    return Etsi014Client(url, sae_id=sae_id, cert=files[0], key=files[1], ca=pki.kms_ca)


def answering(status: int, body: str) -> Callable[[Lab, RunningPair, str], Any]:
    def cause(lab: Lab, kmes: RunningPair, side: str) -> Any:
        kmes.faults("a" if side == "client" else "b").answer_with = (status, body)
        return lab.manager(side)

    return cause


def slow(lab: Lab, kmes: RunningPair, side: str) -> Any:
    kmes.faults("a" if side == "client" else "b").delay = 10.0
    return lab.manager(side, read_timeout=0.2)


KME_FAILURES: dict[str, tuple[Callable[[Lab, RunningPair, str], Any], str]] = {
    "down": (lambda lab, _, side: unreachable(lab, side), "cannot connect: Connection refused"),
    "slow": (slow, "no complete answer within 0.2 seconds"),
    "answers 503": (answering(503, '{"message": "maintenance"}'), "the KME cannot serve: maintenance"),
    "answers 401": (answering(401, '{"message": "who are you?"}'), "the KME refused: who are you?"),
    "answers garbage": (answering(200, "<html>It works!</html>"), "JSON"),
    "answers an empty list": (answering(200, '{"keys": []}'), "key"),
    "has another CA": (
        lambda lab, _, side: lab.manager(side, ca=lab.ca.file),
        "the KME's certificate was refused",
    ),
}
"""How a KME fails, and what the error then says."""


@pytest.mark.parametrize(("client_policy", "server_policy"), POLICIES)
@pytest.mark.parametrize("failure", KME_FAILURES)
@pytest.mark.parametrize("side", ["client", "server"])
def test_kme_fails(
    lab: Lab, kmes: RunningPair, side: str, failure: str, client_policy: str, server_policy: str
) -> None:
    cause, words = KME_FAILURES[failure]
    failing = cause(lab, kmes, side)
    contexts = {
        "client": lab.client(
            policy=client_policy, key_manager=failing if side == "client" else lab.manager("client")
        ),
        "server": lab.server(
            policy=server_policy, key_manager=failing if side == "server" else lab.manager("server")
        ),
    }
    with Server(contexts["server"]) as server:
        seen = attempt(server, contexts["client"])
    assert_by_policy(seen, client_policy, server_policy)
    # The side whose KME it is says what is wrong with it.
    policy = client_policy if side == "client" else server_policy
    error = seen.client if side == "client" else seen.server.error or seen.server.info
    if policy == "require":
        assert isinstance(error, QKDUnavailable)
        explained(error, QKDUnavailable, words, failing.name)
        assert error.kms == failing.name
        if side == "server":
            assert error.peer == "SAE-A"
            assert len(error.key_ids) == 1
            assert error.key_ids[0] in str(error)
        else:
            assert error.peer == "SAE-B"
    elif isinstance(error, QKDInfo):
        assert words in (error.fallback or "")
        assert failing.name in (error.fallback or "")
    # The client learns from the server's reject what kind of failure it was, nothing about the server's KME.
    if side == "server" and client_policy == "require":
        code, hint = ("kms_unavailable", "check the server's KME")
        if failure == "answers an empty list":
            code, hint = ("unknown_key", "check that the KMEs of both sites belong to one link")
        explained(seen.client_error, QKDUnavailable, f"the server rejected the QKD keys: {code}", hint)
        assert failing.name not in str(seen.client_error)


def assert_by_policy(seen: Attempt, client_policy: str, server_policy: str) -> None:
    """What both policies together make of a cause that lies with QKD."""
    if client_policy == server_policy == "prefer":
        assert seen.talked
        assert isinstance(seen.client, QKDInfo)
        assert seen.server.info is not None
        for info in (seen.client, seen.server.info):
            assert info.protection is Protection.PQ_ONLY
            assert info.group == "X25519MLKEM768"
            assert info.fallback
            assert info.key_id is None
            assert any(info.fallback in text for text in seen.fallback_warnings)
        assert len(seen.fallback_warnings) == 2
        return
    assert not seen.talked
    if client_policy == "require":
        assert type(seen.client_error) is QKDUnavailable
    if server_policy == "require":
        # On an associated connection a client that fails first has not said a word.
        assert type(seen.server_error) in (QKDUnavailable, ssl.SSLEOFError)
    # Whoever would have fallen back finds the connection ended, if it got that far.
    for outcome in (seen.client, seen.server.error or seen.server.info):
        if isinstance(outcome, QKDInfo):
            assert outcome.fallback
            assert outcome.key_id is None


@pytest.mark.parametrize(("client_policy", "server_policy"), POLICIES)
class TestOtherQKDCauses:
    def test_link_down(self, lab: Lab, kmes: RunningPair, client_policy: str, server_policy: str) -> None:
        """The server's KME is off: the client's own KME then has nobody to share keys with."""
        client_context, server_context = lab.client(policy=client_policy), lab.server(policy=server_policy)
        kmes.stop_kme("b")
        try:
            with Server(server_context) as server:
                seen = attempt(server, client_context)
        finally:
            kmes.start_kme("b")
        assert_by_policy(seen, client_policy, server_policy)
        if client_policy == "require":
            explained(seen.client_error, QKDUnavailable, "the QKD link to KME-B is down", kmes.url_a, "SAE-B")

    def test_own_kme_turned_off(
        self, lab: Lab, kmes: RunningPair, client_policy: str, server_policy: str
    ) -> None:
        client_context, server_context = lab.client(policy=client_policy), lab.server(policy=server_policy)
        kmes.stop_kme("a")
        try:
            with Server(server_context) as server:
                seen = attempt(server, client_context)
        finally:
            kmes.start_kme("a")
        assert_by_policy(seen, client_policy, server_policy)
        if client_policy == "require":
            explained(seen.client_error, QKDUnavailable, "cannot connect", kmes.url_a, "SAE-B")

    def test_key_already_spent_at_the_servers_kme(
        self, lab: Lab, client_policy: str, server_policy: str
    ) -> None:
        manager = StealingManager(lab.manager("client"), lab.manager("server"))
        manager.steal = 1
        with Server(lab.server(policy=server_policy)) as server:
            seen = attempt(server, lab.client(policy=client_policy, key_manager=manager))
        assert_by_policy(seen, client_policy, server_policy)
        if server_policy == "require":
            explained(seen.server_error, QKDUnavailable, "unknown_key", manager.stolen[0])
        if client_policy == "require":
            explained(seen.client_error, QKDUnavailable, "unknown_key")
            assert seen.client_error.code == "unknown_key"  # type: ignore[attr-defined]

    def test_client_sae_not_allowed(self, lab: Lab, client_policy: str, server_policy: str) -> None:
        with Server(lab.server(policy=server_policy, allowed_peer_sae_ids=["SAE-C"])) as server:
            seen = attempt(server, lab.client(policy=client_policy))
        assert_by_policy(seen, client_policy, server_policy)
        for policy, error in ((client_policy, seen.client), (server_policy, seen.server.error)):
            if policy == "require":
                assert isinstance(error, QKDUnavailable)
                explained(error, QKDUnavailable, "SAE-A", "is not allowed here", "check the SAE IDs")
                assert error.code == "unknown_sae"

    def test_peer_sae_unknown_to_the_clients_kme(
        self, lab: Lab, client_policy: str, server_policy: str
    ) -> None:
        with Server(lab.server(policy=server_policy)) as server:
            seen = attempt(server, lab.client(policy=client_policy, peer_sae_id="SAE-X"))
        assert_by_policy(seen, client_policy, server_policy)
        if client_policy == "require":
            explained(seen.client_error, QKDUnavailable, "SAE not found", "SAE-X")

    def test_key_managers_of_two_kinds(self, lab: Lab, client_policy: str, server_policy: str) -> None:
        here = LocalKeyManager("SAE-B", peers=["SAE-A"])
        with Server(lab.server(policy=server_policy, key_manager=here)) as server:
            seen = attempt(server, lab.client(policy=client_policy))
        assert_by_policy(seen, client_policy, server_policy)
        if client_policy == "require":
            explained(seen.client_error, QKDUnavailable, "unsupported_kms", "'etsi-014'", "'local'")


class TestAssociatedConnection:
    """The same where an association is at hand."""

    @pytest.fixture
    def pair(self, lab: Lab) -> Iterator[Callable[[str, str], tuple[Server, QKDContext]]]:
        with ExitStack() as stack:

            def make(client_policy: str, server_policy: str) -> tuple[Server, QKDContext]:
                server = stack.enter_context(Server(lab.server(policy=server_policy)))
                context = lab.client(policy=client_policy)
                first = attempt(server, context)
                assert first.talked
                return server, context

            yield make

    @pytest.mark.parametrize(("client_policy", "server_policy"), POLICIES)
    def test_clients_kme_fails(
        self, pair: Any, kmes: RunningPair, client_policy: str, server_policy: str
    ) -> None:
        server, context = pair(client_policy, server_policy)
        kmes.faults("a").answer_with = (503, '{"message": "maintenance"}')
        seen = attempt(server, context)
        assert_by_policy(seen, client_policy, server_policy)
        if client_policy == "require":
            explained(seen.client_error, QKDUnavailable, "maintenance", kmes.url_a)
        elif server_policy == "require":
            explained(seen.client_error, QKDUnavailable, "insists on qkd-tls/1", "maintenance")
        # The association is as good as before.
        kmes.faults("a").answer_with = None
        again = attempt(server, context)
        assert again.talked
        assert isinstance(again.client, QKDInfo)
        assert again.client.path is HandshakePath.ASSOCIATED

    @pytest.mark.parametrize(("client_policy", "server_policy"), POLICIES)
    def test_servers_kme_fails(
        self, pair: Any, kmes: RunningPair, client_policy: str, server_policy: str
    ) -> None:
        """First the PSK is not taken, then the offer of the new bootstrap is rejected."""
        server, context = pair(client_policy, server_policy)
        kmes.faults("b").answer_with = (503, '{"message": "maintenance"}')
        seen = attempt(server, context)
        assert_by_policy(seen, client_policy, server_policy)
        if server_policy == "require":
            explained(seen.server_error, QKDUnavailable, "maintenance", kmes.url_b)


@pytest.mark.parametrize(("client_policy", "server_policy"), POLICIES)
@pytest.mark.parametrize("path", [HandshakePath.BOOTSTRAP, HandshakePath.ASSOCIATED])
def test_different_keys(
    lab: Lab, kmes: RunningPair, path: HandshakePath, client_policy: str, server_policy: str
) -> None:
    """An error on both sides that names the key, under every policy: somebody may be in between."""
    context = lab.client(policy=client_policy)
    with Server(lab.server(policy=server_policy)) as server:
        if path is HandshakePath.ASSOCIATED:
            assert attempt(server, context).talked
        before = set(kmes.deliveries)
        kmes.faults("b").corrupt_keys = True
        seen = attempt(server, context)
        kmes.faults("b").corrupt_keys = False
        (key_id,) = {delivery.key_id for delivery in set(kmes.deliveries) - before}
        for error, url in ((seen.client_error, kmes.url_a), (seen.server_error, kmes.url_b)):
            assert isinstance(error, QKDKeyMismatch)
            explained(error, QKDKeyMismatch, key_id, url, "somebody is in between")
            assert error.key_ids == (key_id,)
            assert error.kms == url
        assert not seen.fallback_warnings
        # Nothing is remembered that would spoil the next connection.
        assert attempt(server, context).talked


def test_slow_kme_with_default_time_limit(lab: Lab, kmes: RunningPair) -> None:
    """A KME that takes its time: the connection ends after the key manager's 5 seconds, and without its answer."""
    context = lab.client()
    kmes.faults("a").delay = 30.0
    start = time.monotonic()
    with Server(lab.server()) as server:
        seen = attempt(server, context)
    explained(seen.client_error, QKDUnavailable, "no complete answer within 5 seconds", kmes.url_a)
    assert time.monotonic() - start >= 5


# --- peers that do not speak qkd-tls/1


class TestPlainPeer:
    def test_client_requires(self, lab: Lab) -> None:
        with Server(lab.server(policy="off")) as server:
            seen = attempt(server, lab.client())
        explained(
            seen.client_error, QKDUnavailable, "localhost does not speak qkd-tls/1", "configure a key manager"
        )

    def test_client_prefers(self, lab: Lab) -> None:
        with Server(lab.server(policy="off")) as server:
            seen = attempt(server, lab.client(policy="prefer"))
        assert seen.talked
        assert isinstance(seen.client, QKDInfo)
        assert seen.client.protection is Protection.PQ_ONLY
        assert "does not speak qkd-tls/1" in (seen.client.fallback or "")
        assert seen.server.info is not None
        assert seen.server.info.fallback is None
        assert len(seen.fallback_warnings) == 1

    def test_server_requires(self, lab: Lab) -> None:
        with Server(lab.server()) as server:
            seen = attempt(server, lab.client(policy="off"))
        explained(seen.server_error, QKDUnavailable, "the client does not speak qkd-tls/1", "key manager")
        explained(seen.client_error, QKDUnavailable, "the server insists on qkd-tls/1", "'require'")

    def test_server_prefers(self, lab: Lab) -> None:
        with Server(lab.server(policy="prefer")) as server:
            seen = attempt(server, lab.client(policy="off"))
        assert seen.talked
        assert seen.server.info is not None
        assert "does not speak qkd-tls/1" in (seen.server.info.fallback or "")
        assert len(seen.fallback_warnings) == 1

    def test_server_names_an_sae_that_the_client_does_not_allow(self, lab: Lab) -> None:
        with Server(lab.server()) as server:
            seen = attempt(server, lab.client(peer_sae_id=None, allowed_peer_sae_ids=["SAE-C"]))
        explained(seen.client_error, QKDUnavailable, "SAE-B", "allowed_peer_sae_ids")
        assert seen.client_error.peer == "SAE-B"  # type: ignore[attr-defined]

    def test_server_is_another_sae_than_the_client_was_told(self, lab: Lab, kmes: RunningPair) -> None:
        """The keys are for another SAE, so the server's KME does not give them out."""
        manager = lab.manager("server", sae_id="SAE-OTHER")
        with Server(lab.server(key_manager=manager)) as server:
            seen = attempt(server, lab.client())
        explained(seen.client_error, QKDProtocolError, "SAE-OTHER", "SAE-B", "correct peer_sae_id")


# --- causes that lie with certificates: no policy gives them up


ALL_POLICIES = ["require", "prefer", "off"]


def refused(seen: Attempt) -> None:
    """No connection, and nobody has fallen back."""
    assert not seen.talked
    assert not seen.fallback_warnings
    for error in seen.errors:
        assert isinstance(error, ssl.SSLError)


@pytest.mark.parametrize("policy", ALL_POLICIES)
class TestServerCertificate:
    def attempt(self, lab: Lab, policy: str, hostname: str = "localhost", **issue: Any) -> Attempt:
        server_context = lab.server(policy=policy)
        if issue:
            issuer = issue.pop("issuer", lab.ca)
            issuer.issue("refused", **issue).load_into(server_context)
        with Server(server_context) as server:
            seen = attempt(server, lab.client(policy=policy), hostname)
        refused(seen)
        return seen

    def verification_error(self, seen: Attempt, code: int, *words: str) -> None:
        error = seen.client_error
        assert isinstance(error, ssl.SSLCertVerificationError)
        explained(error, ssl.SSLCertVerificationError, "certificate verify failed", *words)
        assert error.verify_code == code
        assert error.reason == "CERTIFICATE_VERIFY_FAILED"
        assert type(seen.server_error) is ssl.SSLError
        assert "alert" in str(seen.server_error)

    def test_wrong_host_name(self, lab: Lab, policy: str) -> None:
        seen = self.attempt(lab, policy, "elsewhere.example")
        self.verification_error(seen, 62, "Hostname mismatch", "'elsewhere.example'")

    def test_wrong_address(self, lab: Lab, policy: str) -> None:
        seen = self.attempt(lab, policy, "192.0.2.7")
        self.verification_error(seen, 64, "IP address mismatch", "'192.0.2.7'")

    def test_wrong_ca(self, lab: Lab, policy: str, tmp_path: Any) -> None:
        seen = self.attempt(lab, policy, issuer=Authority(tmp_path, "Another CA"))
        self.verification_error(seen, 20, "unable to get local issuer certificate")

    def test_expired(self, lab: Lab, policy: str) -> None:
        day = datetime.timedelta(days=1)
        seen = self.attempt(lab, policy, start=-2 * day, end=-day)
        self.verification_error(seen, 10, "certificate has expired")

    def test_not_yet_valid(self, lab: Lab, policy: str) -> None:
        day = datetime.timedelta(days=1)
        seen = self.attempt(lab, policy, start=day, end=2 * day)
        self.verification_error(seen, 9, "certificate is not yet valid")


@pytest.mark.parametrize("policy", ALL_POLICIES)
class TestClientCertificate:
    def attempt(self, lab: Lab, policy: str, issuer: Authority | None = None, **issue: Any) -> Attempt:
        context = lab.client(policy=policy)
        if issuer is not None:
            issuer.issue("refused", ["client.example"], **issue).load_into(context)
        with Server(lab.server(policy=policy, mutual=True)) as server:
            seen = attempt(server, context)
        refused(seen)
        # In TLS 1.3 a client learns it after its own handshake is complete: with the first answer.
        assert type(seen.client_error) is ssl.SSLError
        return seen

    def test_missing(self, lab: Lab, policy: str) -> None:
        seen = self.attempt(lab, policy)
        explained(
            seen.server_error,
            ssl.SSLError,
            "did not return a certificate",
            "this server requires a client certificate",
        )
        assert "certificate required" in str(seen.client_error)
        if policy != "off":
            assert "load_cert_chain()" in str(seen.client_error)

    def test_wrong_ca(self, lab: Lab, policy: str, tmp_path: Any) -> None:
        seen = self.attempt(lab, policy, Authority(tmp_path, "Another CA"))
        explained(seen.server_error, ssl.SSLCertVerificationError, "unable to get local issuer certificate")
        assert "unknown ca" in str(seen.client_error)

    def test_expired(self, lab: Lab, policy: str) -> None:
        day = datetime.timedelta(days=1)
        seen = self.attempt(lab, policy, lab.ca, start=-2 * day, end=-day)
        explained(seen.server_error, ssl.SSLCertVerificationError, "certificate has expired")
        assert "certificate expired" in str(seen.client_error)


# --- peers that are too old, or something else


@pytest.mark.parametrize("policy", ALL_POLICIES)
class TestUnsuitablePeer:
    def stock_client_error(self, server: Server, context: ssl.SSLContext) -> ssl.SSLError:
        with server.tcp() as raw, pytest.raises(ssl.SSLError) as caught:
            context.wrap_socket(raw, server_hostname="localhost")
        return caught.value

    def test_tls_1_2_client(self, lab: Lab, policy: str) -> None:
        old = lab.stock_client()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with Server(lab.server(policy=policy)) as server:
            self.stock_client_error(server, old)
            error = server.seen().error
        assert error is not None
        explained(error, ssl.SSLError, "unsupported protocol", "does not speak TLS 1.3")

    def test_tls_1_2_server(self, lab: Lab, policy: str) -> None:
        old = lab.stock_server()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with Server(old) as server:
            seen = attempt(server, lab.client(policy=policy))
        refused(seen)
        explained(seen.client_error, ssl.SSLError, "protocol version", "does not speak TLS 1.3")

    def test_client_without_ml_kem(self, lab: Lab, policy: str) -> None:
        classical = lab.stock_client()
        classical.set_ecdh_curve("prime256v1")
        with Server(lab.server(policy=policy)) as server:
            self.stock_client_error(server, classical)
            error = server.seen().error
        assert error is not None
        if policy == "require":
            explained(
                error, QKDUnavailable, "the client does not speak qkd-tls/1", "its groups are secp256r1"
            )
        else:
            explained(
                error,
                ssl.SSLError,
                "no key exchange group in common: the client offers secp256r1, this server has X25519MLKEM768",
                "a classical group has to be added by name",
            )

    def test_server_without_ml_kem(self, lab: Lab, policy: str) -> None:
        classical = lab.stock_server()
        classical.set_ecdh_curve("prime256v1")
        with Server(classical) as server:
            seen = attempt(server, lab.client(policy=policy))
        refused(seen)
        explained(seen.client_error, ssl.SSLError, "handshake failure", "it may lack X25519MLKEM768")

    def test_plain_http_client(self, lab: Lab, policy: str) -> None:
        with Server(lab.server(policy=policy)) as server, server.tcp() as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            error = server.seen().error
            assert error is not None
            explained(error, ssl.SSLError, "http request", "the client sent plain HTTP")

    @pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 64, b"\xff" * 64])
    def test_client_that_speaks_something_else(self, lab: Lab, policy: str, greeting: bytes) -> None:
        with Server(lab.server(policy=policy)) as server, server.tcp() as raw:
            raw.sendall(greeting)
            error = server.seen().error
        assert type(error) is ssl.SSLError

    def test_server_that_speaks_something_else(self, lab: Lab, policy: str) -> None:
        with one_answer(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
            with pytest.raises(ssl.SSLError, match="the server does not speak TLS on this port") as caught:
                connect(address, lab.client(policy=policy))
            assert type(caught.value) is ssl.SSLError

    def test_server_that_hangs_up(self, lab: Lab, policy: str) -> None:
        with one_answer(b"") as address, pytest.raises(ssl.SSLEOFError, match="EOF occurred in violation"):
            connect(address, lab.client(policy=policy))

    def test_client_that_hangs_up(self, lab: Lab, policy: str) -> None:
        with Server(lab.server(policy=policy)) as server:
            server.tcp().close()
            error = server.seen().error
        assert type(error) is ssl.SSLEOFError

    def test_server_that_does_not_answer(self, lab: Lab, policy: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            raw = socket.create_connection(silent.getsockname(), timeout=0.1)
            with pytest.raises(TimeoutError, match="handshake operation timed out"):
                lab.client(policy=policy).wrap_socket(raw, server_hostname="localhost")


@contextmanager
def one_answer(data: bytes) -> Iterator[tuple[str, int]]:
    """A server that reads something, sends these bytes and hangs up."""

    class Raw:
        """Looks like a context to `Server`; wraps nothing."""

        def wrap_socket(self, raw: socket.socket, **_: Any) -> None:
            with raw:
                raw.recv(1 << 16)
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                # Closing with bytes unread would be a reset, which is another story.
                while raw.recv(1 << 16):
                    pass
            raise ConnectionAbortedError

    with Server(Raw()) as server:  # type: ignore[arg-type]
        yield server.address
