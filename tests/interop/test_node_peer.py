"""qkd-tls/1 between our implementation and the one of interop/node: both ways, and each with itself.

The peers of Node.js share no code with ours: they were written from docs/protocol.md and ask the KMEs themselves.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kms_client.emulator import Faults
from qkd_tls import KDF
from tests.support.interop.node_peer import (
    MAIN,
    Client,
    Failed,
    NodeClient,
    NodeProcess,
    NodeServer,
    OurClient,
    OurServer,
    Report,
    Serving,
    kme_settings,
    node,
)
from tests.support.paths import VECTORS
from tests.support.sockets import TIMEOUT, Authority, Lab, Proxy, talk
from tests.support.sockets import Server as StockServer

CIPHER = "TLS_AES_128_GCM_SHA256"
LARGE = 600_000
RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""What makes a ServerHello a HelloRetryRequest (RFC 8446 section 4.1.3)."""
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

    def hybrid(
        self, client: Client, server: Serving, path: str, size: int = 16, via: Proxy | None = None
    ) -> Report:
        """One hybrid connection. Both sides say the same of it, and each KME has delivered its key once.

        Returns what the client says.
        """
        mine, theirs = client.connect(via.address if via else server.address, size), server.outcome()
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

    def faults(self, side: str) -> Faults:
        """The switches of one site's KME."""
        assert self.lab.kmes is not None
        return self.lab.kmes.faults("a" if side == "client" else "b")

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
        with Proxy(server.address) as proxy:
            for path, retries in ("bootstrap", 2), ("associated", 3):
                assert pair.hybrid(client, server, path, via=proxy).group == "X25519"
                assert proxy.server_sent.count(RETRY) == retries

    def test_mutual_tls(self, pair: Pair) -> None:
        client, server = pair.client(mutual=True), pair.server(mutual=True)
        for path in ("bootstrap", "associated"):
            pair.hybrid(client, server, path)

    def test_cut_into_pieces(self, pair: Pair) -> None:
        """Neither TLS connection loses a byte to the other, wherever the network cuts them."""
        client, server = pair.client(announced=1), pair.server()
        with Proxy(server.address, piece=7) as proxy:
            for path in ("bootstrap", "associated"):
                pair.hybrid(client, server, path, 2000, via=proxy)

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

    def test_server_kme_gives_no_key_once(self, pair: Pair) -> None:
        """The key that the ClientHello names is lost; in the bootstrap that follows there is no key either."""
        client, server = pair.client(), pair.server()
        first = pair.hybrid(client, server, "bootstrap")
        before = pair.delivered()
        faults = pair.faults("server")
        faults.answer_with = 400, json.dumps({"message": "one or more keys specified are not found on KME"})
        with failing("unavailable", "unknown_key"):
            client.connect(server.address)
        with pytest.raises(Failed) as theirs:
            server.outcome()
        assert theirs.value.code == "unknown_key"
        assert pair.delivered() == before + 2, "to the client, for each of the two handshakes"
        faults.answer_with = None
        assert pair.hybrid(client, server, "bootstrap").association != first.association


@contextmanager
def failing(kind: str | None, code: str | None = None) -> Iterator[pytest.ExceptionInfo[Failed]]:
    with pytest.raises(Failed) as caught:
        yield caught
    assert (caught.value.kind, caught.value.code) == (kind, code), str(caught.value)


POLICIES = [("require", "require"), ("prefer", "require"), ("require", "prefer"), ("prefer", "prefer")]


@pytest.mark.filterwarnings("ignore::qkd_tls.QKDFallbackWarning")
class TestWithoutAKey:
    @pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "in steps"])
    def test_rejected_and_both_prefer(self, pair: Pair, pipelined: bool) -> None:
        """The bootstrap goes on with the application's data, behind the ClientHello that was skipped."""
        client = pair.client(policy="prefer", pipelined=pipelined, alpn=["h2", "http/1.1"])
        server = pair.server(policy="prefer", allowed=["SAE-X"], alpn=["http/1.1"])
        for _ in range(2):
            for report in pair.connect(client, server, LARGE):
                assert (report.protection, report.group) == ("pq-only", "X25519MLKEM768")
                assert report.alpn == "http/1.1"
                assert report.fallback is not None
                assert report.path is report.key_id is report.association is None

    @pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "in steps"])
    @pytest.mark.parametrize(("mine", "theirs"), POLICIES[:3])
    def test_rejected_and_one_side_requires(
        self, pair: Pair, mine: str, theirs: str, pipelined: bool
    ) -> None:
        client = pair.client(policy=mine, pipelined=pipelined)
        server = pair.server(policy=theirs, allowed=["SAE-X"])
        if mine == "require":
            with failing("unavailable", "unknown_sae"):
                client.connect(server.address)
        else:
            # It has no way to know that the server does not go on, but that the connection ends.
            with failing("ended"):
                client.connect(server.address)
        if theirs == "require":
            with failing("unavailable", "unknown_sae"):
                server.outcome()
        else:
            # Nor has the server, and its application sees no byte.
            assert server.outcome().protection == "pq-only"

    @pytest.mark.parametrize(("mine", "theirs"), POLICIES)
    def test_server_kme_is_down(self, pair: Pair, mine: str, theirs: str) -> None:
        client, server = pair.client(policy=mine), pair.server(policy=theirs)
        pair.faults("server").answer_with = 503, "{}"
        if mine == theirs == "prefer":
            assert [report.protection for report in pair.connect(client, server)] == ["pq-only"] * 2
            return
        with failing(*("ended",) if mine == "prefer" else ("unavailable", "kms_unavailable")):
            client.connect(server.address)
        if theirs == "require":
            with failing("unavailable", "kms_unavailable"):
                server.outcome()
        else:
            assert server.outcome().protection == "pq-only"

    def test_client_kme_is_down_and_both_prefer(self, pair: Pair) -> None:
        """An offer of no key in a bootstrap; with an association at hand an ordinary ClientHello."""
        client, server = pair.client(policy="prefer"), pair.server(policy="prefer")
        faults = pair.faults("client")
        faults.answer_with = 503, "{}"
        assert [report.protection for report in pair.connect(client, server)] == ["pq-only"] * 2
        faults.answer_with = None
        first = pair.hybrid(client, server, "bootstrap")
        faults.answer_with = 503, "{}"
        assert [report.protection for report in pair.connect(client, server)] == ["pq-only"] * 2
        faults.answer_with = None
        assert pair.hybrid(client, server, "associated").association == first.association

    def test_client_kme_is_down_and_the_client_requires(self, pair: Pair) -> None:
        client, server = pair.client(), pair.server(policy="prefer")
        pair.faults("client").answer_with = 503, "{}"
        with pytest.raises(Failed) as caught:
            client.connect(server.address)
        assert caught.value.kind == "unavailable"
        with pytest.raises(Failed, match="close"):
            server.outcome()


class TestKeyMismatch:
    """The server's KME gives another key than the client's. Nothing ever goes on from there."""

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_in_a_bootstrap(self, pair: Pair, policy: str) -> None:
        client, server = pair.client(policy=policy), pair.server(policy=policy)
        pair.faults("server").corrupt_keys = True
        self.mismatch(pair, client, server)

    @pytest.mark.parametrize("policy", ["require", "prefer"])
    def test_on_a_later_connection(self, pair: Pair, policy: str) -> None:
        client, server = pair.client(policy=policy), pair.server(policy=policy)
        pair.hybrid(client, server, "bootstrap")
        faults = pair.faults("server")
        faults.corrupt_keys = True
        self.mismatch(pair, client, server)
        faults.corrupt_keys = False
        pair.hybrid(client, server, "associated")

    @staticmethod
    def mismatch(pair: Pair, client: Client, server: Serving) -> None:
        with failing("mismatch") as mine:
            client.connect(server.address)
        with failing("mismatch") as theirs:
            server.outcome()
        key_id = mine.value.key_id
        assert key_id is not None
        assert key_id == theirs.value.key_id
        assert key_id in str(mine.value)
        assert key_id in str(theirs.value)
        assert pair.deliveries(key_id) == {("SAE-A", "master"): 1, ("SAE-B", "slave"): 1}


class TestCertificates:
    """What TLS checks is checked, and no key is asked for."""

    def test_server_of_an_unknown_issuer(self, pair: Pair, tmp_path: Path) -> None:
        client, server = pair.client(), pair.server()
        pair.lab = replace(pair.lab, ca=Authority(tmp_path, "Another CA"))
        stranger = pair.client()
        before = pair.delivered()
        with failing(None):
            stranger.connect(server.address)
        with pytest.raises(Failed):
            server.outcome()
        assert pair.delivered() == before
        pair.hybrid(client, server, "bootstrap")

    def test_server_of_another_name(self, pair: Pair) -> None:
        pair.lab = replace(pair.lab, server_identity=pair.lab.ca.issue("elsewhere", ["elsewhere.example"]))
        client, server = pair.client(), pair.server()
        before = pair.delivered()
        with failing(None):
            client.connect(server.address)
        with pytest.raises(Failed):
            server.outcome()
        assert pair.delivered() == before

    def test_client_of_an_unknown_issuer(self, pair: Pair, tmp_path: Path) -> None:
        server = pair.server(mutual=True)
        pair.lab = replace(pair.lab, client_identity=Authority(tmp_path, "Another CA").issue("client"))
        with pytest.raises(Failed):
            pair.client(mutual=True).connect(server.address)
        with failing(None) as theirs:
            server.outcome()
        assert "certificate" in str(theirs.value)

    def test_client_without_a_certificate(self, pair: Pair) -> None:
        """A client of TLS 1.3 is done before the server refuses it; it may have asked its KME by then."""
        client, server = pair.client(), pair.server(mutual=True)
        with pytest.raises(Failed):
            client.connect(server.address)
        with failing(None):
            server.outcome()


class TestClientHelloOfSomebodyElse:
    """An attacker on the path has caught a ClientHello of an association before it came to the server."""

    def test_what_the_server_takes(self, pair: Pair) -> None:
        client, server = pair.client(), pair.server()
        with Proxy(server.address) as proxy:
            pair.hybrid(client, server, "bootstrap", via=proxy)
            proxy.hold("client")
            waiting = threading.Thread(target=connect_in_vain, args=(client, proxy.address))
            waiting.start()
            hello = held_client_hello(proxy)
            for change in change_tag, change_key_id, change_association, change_server_name:
                assert not takes_psk(server.address, change(hello)), change.__name__
            key_id = identity_of(hello)[3].decode()
            assert pair.deliveries(key_id) == {("SAE-A", "master"): 1}, "the server's KME was not asked"
            assert takes_psk(server.address, hello)
            assert pair.deliveries(key_id) == {("SAE-A", "master"): 1, ("SAE-B", "slave"): 1}
            assert not takes_psk(server.address, hello), "a key ID is good for one connection"
        waiting.join(TIMEOUT)
        assert not waiting.is_alive()
        if isinstance(server, NodeServer):
            assert server.kme_requests() == 2, "in the bootstrap, and for the ClientHello as it was"


def connect_in_vain(client: Client, address: tuple[str, int]) -> None:
    with suppress(Failed, OSError):
        client.connect(address)


def held_client_hello(proxy: Proxy) -> bytes:
    """The first handshake record that is held; before it may be the close_notify of an earlier connection."""
    start = 0
    while True:
        kind, _, size = struct.unpack_from("!BHH", proxy.held("client", start + 5), start)
        end = start + 5 + size
        if kind == 22:
            return bytes(proxy.held("client", end)[start:end])
        start = end


def identity_of(hello: bytes) -> list[bytes]:
    """Hash, association, tag and key ID of the identity in a ClientHello."""
    found = re.search(rb"qkd1\.(sha256)\.([\w-]{22})\.([\w-]{12})\.([0-9a-f-]{36})", hello)
    assert found is not None
    return list(found.groups())


def change_tag(hello: bytes) -> bytes:
    tag = identity_of(hello)[2]
    return hello.replace(tag, tag[::-1])


def change_key_id(hello: bytes) -> bytes:
    key_id = identity_of(hello)[3]
    return hello.replace(key_id, b"00000000" + key_id[8:])


def change_association(hello: bytes) -> bytes:
    association = identity_of(hello)[1]
    return hello.replace(association, b"A" * 21 + association[21:])


def change_server_name(hello: bytes) -> bytes:
    return hello.replace(b"localhost", b"localhoax")


def takes_psk(address: tuple[str, int], hello: bytes) -> bool:
    """Send a ClientHello; whether the ServerHello has the extension pre_shared_key (41)."""
    with socket.create_connection(address, timeout=TIMEOUT) as raw, raw.makefile("rb") as stream:
        raw.sendall(hello)
        kind, _, size = struct.unpack("!BHH", stream.read(5))
        message = stream.read(size)
    assert (kind, message[0]) == (22, 2)
    extensions = message[4 + 2 + 32 + 1 + message[38] + 2 + 1 + 2 :]
    types = set()
    while extensions:
        number, length = struct.unpack_from("!HH", extensions)
        types.add(number)
        extensions = extensions[4 + length :]
    assert 51 in types, "no key_share"
    return 41 in types


# --- Node.js alone


def test_the_parts_by_themselves() -> None:
    """Derivation with the vectors of the project, control messages and ClientHellos: Node.js' own test runner."""
    command = [node(), "--test", "--test-reporter=tap", *map(str, sorted(MAIN.parent.glob("*.test.mjs")))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stdout
    vectors = json.loads((VECTORS / "hybrid_psk_v1.json").read_text())["cases"]
    assert len(re.findall(r"^ok .* - vector ", run.stdout, re.MULTILINE)) == len(vectors)


@pytest.fixture
def node_to_node(lab: Lab, process: NodeProcess) -> Iterator[Pair]:
    pair = Pair("node", "node", lab, process)
    with pair.stack:
        yield pair


class TestStockPeers:
    """Peers of the Node.js implementation that know nothing of qkd-tls/1: the standard library's ssl, over X25519."""

    def test_server(self, node_to_node: Pair) -> None:
        with StockServer(node_to_node.lab.stock_server()) as server:
            client = node_to_node.client(policy="prefer", groups=["X25519"])
            report = client.connect(server.address)
            assert (report.protection, report.group, report.key_id) == ("classical", "X25519", None)
            assert "does not speak qkd-tls/1" in (report.fallback or "")
            with failing("unavailable"):
                node_to_node.client(groups=["X25519"]).connect(server.address)

    def test_client(self, node_to_node: Pair) -> None:
        context = node_to_node.lab.stock_client()
        context.set_alpn_protocols(["http/1.1"])
        server = node_to_node.server(policy="prefer", groups=["X25519"], alpn=["http/1.1"])
        with (
            socket.create_connection(server.address, timeout=TIMEOUT) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as client,
        ):
            talk(client)
            assert client.selected_alpn_protocol() == "http/1.1"
        report = server.outcome()
        assert (report.protection, report.alpn) == ("classical", "http/1.1")
        required = node_to_node.server(groups=["X25519"], alpn=["http/1.1"])
        with (
            socket.create_connection(required.address, timeout=TIMEOUT) as raw,
            pytest.raises(ssl.SSLError, match="no application protocol"),
        ):
            context.wrap_socket(raw, server_hostname="localhost")
        with failing("unavailable"):
            required.outcome()

    def test_tickets_resume_nothing(self, node_to_node: Pair) -> None:
        """Node.js' server sends tickets, too; what a client does with them ends in a full handshake."""
        context = node_to_node.lab.stock_client()
        server = node_to_node.server(policy="prefer", groups=["X25519"])
        session: ssl.SSLSession | None = None
        for _ in range(3):
            with (
                socket.create_connection(server.address, timeout=TIMEOUT) as raw,
                context.wrap_socket(raw, server_hostname="localhost", session=session) as client,
            ):
                talk(client)
                assert not client.session_reused
                session = client.session
                assert session is not None
                assert session.has_ticket
            assert server.outcome().protection == "classical"


def test_psk_of_sha384_is_beyond_nodejs(lab: Lab, process: NodeProcess) -> None:
    """The one case that README.md of interop/node names: the client has to be told to use SHA-256."""
    server = NodeServer(process, lab)
    with failing("unavailable") as caught:
        OurClient(lab, kdf=KDF.SHA384).connect(server.address)
    assert "accepted key" in str(caught.value)
    assert "did not use it" in str(caught.value)
    with failing("closed"):
        server.outcome()


class TestPrograms:
    """`main.mjs` as a person runs it."""

    def test_version(self) -> None:
        run = subprocess.run([node(), str(MAIN), "version"], capture_output=True, text=True, check=True)
        version = json.loads(run.stdout)
        assert int(version["node"].split(".")[0]) >= 26
        assert tuple(int(part) for part in version["openssl"].split(".")[:2]) >= (3, 5)

    def test_usage(self) -> None:
        run = subprocess.run([node(), str(MAIN), "fly"], capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert "usage: main.mjs" in run.stderr

    def test_a_pairing_by_hand(self, lab: Lab, tmp_path: Path) -> None:
        client, server = tmp_path / "client.json", tmp_path / "server.json"
        client.write_text(
            json.dumps(
                {
                    "saeId": "SAE-A",
                    "peerSaeId": "SAE-B",
                    "kme": kme_settings(lab, "client"),
                    "ca": str(lab.ca.file),
                }
            )
        )
        identity = lab.server_identity
        server.write_text(
            json.dumps(
                {
                    "saeId": "SAE-B",
                    "kme": kme_settings(lab, "server"),
                    "cert": str(identity.cert_file),
                    "key": str(identity.key_file),
                }
            )
        )
        with subprocess.Popen(
            [node(), str(MAIN), "serve", str(server)], stdout=subprocess.PIPE, text=True
        ) as serving:
            assert serving.stdout is not None
            try:
                port = json.loads(serving.stdout.readline())["port"]
                command = [node(), str(MAIN), "connect", str(client), "localhost", str(port)]
                run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
                mine, theirs = json.loads(run.stdout), json.loads(serving.stdout.readline())
            finally:
                serving.terminate()
        assert mine["info"]["protection"] == theirs["info"]["protection"] == "hybrid"
        assert mine["info"]["keyId"] == theirs["info"]["keyId"]
        assert mine["echo"] == {"bytes": 16, "same": True}
