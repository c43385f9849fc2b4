"""qkd-tls/1 between our implementation and the one of interop/node: both ways, and each with itself.

The peers of Node.js share no code with ours: they were written from docs/protocol.md and ask the KMEs themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest
from node_peer import (
    Client,
    Failed,
    NodeClient,
    NodeProcess,
    NodeServer,
    OurClient,
    OurServer,
    Report,
    Serving,
)
from socket_support import Lab

CIPHER = "TLS_AES_128_GCM_SHA256"
LARGE = 600_000
PAIRS = ["node-ours", "ours-node", "node-node", "ours-ours"]


@pytest.fixture(scope="module")
def process() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@dataclass
class Pair:
    """Makes a client and a server, each of its own implementation, with settings that fit both."""

    client_is: str
    server_is: str
    lab: Lab
    process: NodeProcess
    stack: ExitStack = field(default_factory=ExitStack)

    def client(
        self,
        *,
        policy: str = "require",
        peer: str | None = "SAE-B",
        groups: Sequence[str] = ("X25519MLKEM768",),
        kem: str | None = None,
        announced: int = 0,
        pipelined: bool = True,
        alpn: Sequence[str] = (),
        mutual: bool = False,
    ) -> Client:
        if self.client_is == "ours":
            return OurClient(
                self.lab,
                policy=policy,
                peer_sae_id=peer,
                groups=groups,
                kem=kem,
                announced_keys=announced,
                pipelined=pipelined,
                alpn=list(alpn),
                mutual=mutual,
            )
        return NodeClient(
            self.process,
            self.lab,
            policy=policy,
            peerSaeId=peer,
            groups=groups,
            kem=kem,
            announcedKeys=announced,
            pipelined=pipelined,
            alpn=alpn,
            mutual=mutual,
        )

    def server(
        self,
        *,
        policy: str = "require",
        groups: Sequence[str] = ("X25519MLKEM768",),
        allowed: Sequence[str] | None = None,
        max_keys: int = 64,
        alpn: Sequence[str] = (),
        mutual: bool = False,
    ) -> Serving:
        if self.server_is == "ours":
            return self.stack.enter_context(
                OurServer(
                    self.lab,
                    policy=policy,
                    groups=groups,
                    allowed_peer_sae_ids=allowed,
                    max_keys=max_keys,
                    alpn=list(alpn),
                    mutual=mutual,
                )
            )
        return NodeServer(
            self.process,
            self.lab,
            policy=policy,
            groups=groups,
            peerSaeIds=allowed,
            maxKeys=max_keys,
            alpn=alpn,
            mutual=mutual,
        )

    def connect(self, client: Client, server: Serving, size: int = 16) -> tuple[Report, Report]:
        """One connection that works, as the client sees it and as the server does."""
        return client.connect(server.address, size), server.outcome()

    def hybrid(self, client: Client, server: Serving, path: str, size: int = 16) -> Report:
        """One hybrid connection. Both sides say the same of it, and each KME has delivered its key once.

        Returns what the client says.
        """
        mine, theirs = self.connect(client, server, size)
        assert mine.protection == "hybrid"
        assert mine.path == path
        assert mine.cipher == CIPHER
        assert (mine.client_sae, mine.server_sae) == ("SAE-A", "SAE-B")
        assert mine.fallback is None
        assert replace(mine, kme_requests=0) == replace(theirs, kme_requests=0)
        assert mine.kme_requests == theirs.kme_requests == (0 if mine.announced else 1)
        assert self.deliveries(mine.key_id) == {("SAE-A", "master"): 1, ("SAE-B", "slave"): 1}
        return mine

    def deliveries(self, key_id: str | None) -> Counter[tuple[str, str]]:
        """How often the KMEs have delivered a key, and to whom."""
        assert self.lab.kmes is not None
        return Counter((one.sae_id, one.role) for one in self.lab.kmes.deliveries if one.key_id == key_id)

    def delivered(self) -> int:
        """Deliveries so far."""
        assert self.lab.kmes is not None
        return len(self.lab.kmes.deliveries)


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, lab: Lab, process: NodeProcess) -> Iterator[Pair]:
    client, server = request.param.split("-")
    pair = Pair(client, server, lab, process)
    with pair.stack:
        yield pair


class TestHybrid:
    @pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "in steps"])
    def test_bootstrap_and_later_connections(self, pair: Pair, pipelined: bool) -> None:
        client, server = pair.client(pipelined=pipelined), pair.server()
        first = pair.hybrid(client, server, "bootstrap")
        later = [pair.hybrid(client, server, "associated") for _ in range(2)]
        assert {report.association for report in later} == {first.association}
        assert len({report.key_id for report in (first, *later)}) == 3

    def test_much_data_both_ways(self, pair: Pair) -> None:
        client, server = pair.client(), pair.server()
        for path in ("bootstrap", "associated"):
            pair.hybrid(client, server, path, LARGE)

    def test_server_is_asked_for_its_sae_id(self, pair: Pair) -> None:
        client, server = pair.client(peer=None), pair.server()
        for path in ("bootstrap", "associated"):
            pair.hybrid(client, server, path)

    def test_announced_keys(self, pair: Pair) -> None:
        client, server = pair.client(announced=2), pair.server()
        reports = [pair.hybrid(client, server, "bootstrap")]
        reports += [pair.hybrid(client, server, "associated") for _ in range(3)]
        assert [report.announced for report in reports] == [False, True, True, False]
        assert len({report.key_id for report in reports}) == 4

    def test_server_limits_announced_keys(self, pair: Pair) -> None:
        client, server = pair.client(announced=9, peer=None), pair.server(max_keys=2)
        reports = [pair.hybrid(client, server, "bootstrap")]
        reports += [pair.hybrid(client, server, "associated") for _ in range(2)]
        assert [report.announced for report in reports] == [False, True, False]

    @pytest.mark.parametrize("kem", ["ML-KEM-768", "ML-KEM-1024"])
    @pytest.mark.parametrize("peer", ["SAE-B", None], ids=["SAE ID known", "SAE ID asked for"])
    def test_explicit_kem(self, pair: Pair, kem: str, peer: str | None) -> None:
        client, server = pair.client(kem=kem, peer=peer), pair.server()
        for path in ("bootstrap", "associated"):
            report = pair.hybrid(client, server, path)
            assert (report.kem, report.group) == (kem, "X25519MLKEM768")

    @pytest.mark.filterwarnings("ignore::qkd_tls.ClassicalGroupWarning")
    def test_group_without_ml_kem_brings_the_explicit_kem(self, pair: Pair) -> None:
        client, server = pair.client(groups=["X25519"]), pair.server(groups=["X25519"])
        for path in ("bootstrap", "associated"):
            report = pair.hybrid(client, server, path)
            assert (report.kem, report.group) == ("ML-KEM-768", "X25519")

    @pytest.mark.filterwarnings("ignore::qkd_tls.ClassicalGroupWarning")
    def test_hello_retry_request(self, pair: Pair) -> None:
        """The client's key share is not for the server's group: it repeats its ClientHello with the same PSK."""
        client, server = pair.client(groups=["X25519MLKEM768", "X25519"]), pair.server(groups=["X25519"])
        for path in ("bootstrap", "associated"):
            assert pair.hybrid(client, server, path).group == "X25519"

    def test_mutual_tls(self, pair: Pair) -> None:
        client, server = pair.client(mutual=True), pair.server(mutual=True)
        for path in ("bootstrap", "associated"):
            pair.hybrid(client, server, path)

    @pytest.mark.parametrize(
        ("offered", "selected"), [(["h2", "http/1.1"], "http/1.1"), (["spdy"], None), ([], None)]
    )
    def test_application_protocol(self, pair: Pair, offered: list[str], selected: str | None) -> None:
        client, server = pair.client(alpn=offered), pair.server(alpn=["http/1.1"])
        for path in ("bootstrap", "associated"):
            assert pair.hybrid(client, server, path).alpn == selected


class TestHealing:
    def test_server_has_forgotten_the_association(self, pair: Pair) -> None:
        client, server = pair.client(announced=3), pair.server()
        first = pair.hybrid(client, server, "bootstrap")
        server.restart()
        mine, theirs = pair.connect(client, server)
        assert mine.path == theirs.path == "bootstrap"
        assert mine.key_id == theirs.key_id
        assert mine.association == theirs.association != first.association
        assert not mine.announced, "keys of the old association are gone with it"
        assert pair.hybrid(client, server, "associated").association == mine.association

    def test_server_kme_does_not_have_the_key(self, pair: Pair) -> None:
        """It answers once that it has no such key; the connection bootstraps anew with another key."""
        client, server = pair.client(pipelined=False), pair.server()
        first = pair.hybrid(client, server, "bootstrap")
        assert pair.lab.kmes is not None
        taken = pair.delivered()
        faults = pair.lab.kmes.faults("b")
        faults.answer_with = 400, json.dumps({"message": "one or more keys specified are not found on KME"})
        with pytest.raises(Failed) as caught:
            client.connect(server.address)
        assert caught.value.code == "unknown_key"
        with pytest.raises(Failed) as caught:
            server.outcome()
        assert pair.delivered() == taken + 2, "the client has got a key for each of the two handshakes"
        faults.answer_with = None
        assert pair.hybrid(client, server, "bootstrap").association != first.association


class TestRejected:
    def test_client_requires(self, pair: Pair) -> None:
        client, server = pair.client(), pair.server(allowed=["SAE-X"])
        with pytest.raises(Failed) as caught:
            client.connect(server.address)
        assert (caught.value.kind, caught.value.code) == ("unavailable", "unknown_sae")
        with pytest.raises(Failed) as caught:
            server.outcome()
        assert caught.value.kind == "unavailable"
