"""`QKDObject` behaves as the standard library's `ssl.SSLObject`: most tests here run on both."""

from __future__ import annotations

import array
import contextlib
import ssl
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kms_client import KMSUnavailable, LocalKeyManager, QKDKey
from qkd_tls import (
    HandshakePath,
    Protection,
    QKDContext,
    QKDFallbackWarning,
    QKDKeyMismatch,
    QKDUnavailable,
)
from qkd_tls.endpoint import HoldingDriver, KeysWanted, driver_in_charge
from qkd_tls.sslobject import QKDObject
from tests.support import objects
from tests.support.objects import Side, carry, shake_hands, sides
from tests.support.patience import eventually
from tests.support.sockets import TIMEOUT, Lab

pytestmark = pytest.mark.pure


@pytest.fixture
def pair(local: Lab) -> tuple[Side, Side]:
    client, server = sides(local.client(), local.server())
    shake_hands(client, server)
    return client, server


@pytest.fixture(params=["ours", "stock"])
def either(request: pytest.FixtureRequest, local: Lab) -> tuple[Side, Side]:
    """A connection of ours, and one of the standard library's: the same is true of both."""
    if request.param == "ours":
        client, server = sides(local.client(), local.server())
    else:
        client, server = sides(local.stock_client(), local.stock_server())
    shake_hands(client, server)
    # Its tickets.
    with contextlib.suppress(ssl.SSLWantReadError):
        client.tls.read(1)
    return client, server


class TestLikeTheStandardLibrary:
    def test_read(self, either: tuple[Side, Side]) -> None:
        client, server = either
        assert server.tls.write(bytes(range(100)) * 100) == 10_000
        with pytest.raises(ssl.SSLWantReadError) as caught:
            client.tls.read(1)
        assert caught.value.errno == ssl.SSL_ERROR_WANT_READ
        assert type(caught.value) is ssl.SSLWantReadError
        carry(server, client)
        assert client.tls.pending() == 0
        assert client.tls.read(1) == b"\0"
        assert client.tls.pending() == 9_999
        assert len(client.tls.read()) == 1024
        assert client.tls.read(0) == b""
        assert client.tls.read(0, bytearray()) == 0
        buffer = bytearray(10)
        assert client.tls.read(4, buffer) == 4
        assert client.tls.read(0, buffer) == client.tls.read(-5, buffer) == client.tls.read(99, buffer) == 10
        numbers = array.array("I", [0, 0])
        assert client.tls.read(1 << 20, numbers) == 8
        with pytest.raises(ValueError, match="size should not be negative"):
            client.tls.read(-1)
        for wrong in (b"read only", "text", 5):
            with pytest.raises((TypeError, BufferError, ValueError)):
                client.tls.read(1, wrong)
        assert len(client.tls.read(1 << 20)) == 10_000 - 1 - 1024 - 4 - 30 - 8

    def test_write(self, either: tuple[Side, Side]) -> None:
        client, server = either
        numbers = array.array("Q", [1, 2, 3])
        for data, size in ((b"abc", 3), (bytearray(b"de"), 2), (memoryview(numbers), 24), (b"", 0)):
            assert client.tls.write(data) == size
        for wrong in ("text", 5, None):
            with pytest.raises(TypeError):
                client.tls.write(wrong)
        carry(client, server)
        received = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                received += server.tls.read()
        assert received == b"abcde" + numbers.tobytes()

    def test_unwrap(self, either: tuple[Side, Side]) -> None:
        client, server = either
        with pytest.raises(ssl.SSLWantReadError):
            client.tls.unwrap()
        with pytest.raises(ssl.SSLWantReadError):
            client.tls.unwrap()
        carry(client, server)
        assert server.tls.read() == b""
        assert server.tls.read() == b""
        assert server.tls.unwrap() is None
        carry(server, client)
        assert client.tls.unwrap() is None
        for side in either:
            with pytest.raises(ssl.SSLError) as caught:
                side.tls.write(b"too late")
            assert caught.value.reason == "PROTOCOL_IS_SHUTDOWN"

    def test_unwrap_with_data_on_the_way(self, either: tuple[Side, Side]) -> None:
        client, server = either
        server.tls.write(b"data")
        carry(server, client)
        with pytest.raises(ssl.SSLError) as caught:
            client.tls.unwrap()
        assert caught.value.reason == "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"

    def test_writing_goes_on_after_the_peers_close_notify(self, either: tuple[Side, Side]) -> None:
        client, server = either
        with pytest.raises(ssl.SSLWantReadError):
            client.tls.unwrap()
        carry(client, server)
        assert server.tls.read() == b""
        assert server.tls.write(b"one more thing") == 14

    def test_end_of_transport(self, either: tuple[Side, Side]) -> None:
        client, server = either
        server.tls.write(b"last")
        carry(server, client)
        client.incoming.write_eof()
        assert client.tls.read() == b"last"
        for _ in range(2):
            with pytest.raises(ssl.SSLEOFError) as caught:
                client.tls.read()
            assert "EOF occurred in violation of protocol" in str(caught.value)
            assert caught.value.errno == ssl.SSL_ERROR_EOF

    def test_unwrap_at_the_end_of_the_transport(self, either: tuple[Side, Side]) -> None:
        client, _ = either
        client.incoming.write_eof()
        with pytest.raises(ssl.SSLEOFError):
            client.tls.unwrap()

    def test_damaged_record(self, either: tuple[Side, Side]) -> None:
        client, server = either
        server.tls.write(b"data")
        record = bytearray(server.outgoing.read())
        record[-1] ^= 1
        client.incoming.write(record)
        with pytest.raises(ssl.SSLError) as caught:
            client.tls.read()
        assert type(caught.value) is ssl.SSLError
        assert caught.value.library == "SSL"
        assert caught.value.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
        # The alert is there to be carried to the peer.
        assert carry(client, server)
        with pytest.raises(ssl.SSLError, match="bad record mac"):
            server.tls.read()

    def test_what_it_is(self, either: tuple[Side, Side]) -> None:
        client, server = either
        for side, server_side in ((client, False), (server, True)):
            tls = side.tls
            assert issubclass(type(tls), ssl.SSLObject)
            assert tls.server_side is server_side
            assert tls.server_hostname == (None if server_side else "localhost")
            assert tls.version() == "TLSv1.3"
            assert tls.cipher()[1:] == ("TLSv1.3", 256)
            assert tls.compression() is None
            assert tls.selected_alpn_protocol() is None
            assert tls.session_reused is False
            assert tls.do_handshake() is None
            assert isinstance(tls.context, ssl.SSLContext)
        assert client.tls.shared_ciphers() is None
        assert client.tls.cipher() in server.tls.shared_ciphers()

    def test_handshake_with_a_peer_that_is_gone(self, local: Lab) -> None:
        for context in (local.client(), local.stock_client()):
            side = Side(context, server_hostname="localhost")
            with pytest.raises(ssl.SSLWantReadError):
                side.tls.do_handshake()
            side.incoming.write_eof()
            with pytest.raises(ssl.SSLEOFError, match="EOF occurred in violation of protocol"):
                side.tls.do_handshake()

    def test_not_tls(self, local: Lab) -> None:
        for context in (local.server(), local.stock_server()):
            side = Side(context, server_side=True)
            side.incoming.write(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ssl.SSLError) as caught:
                side.tls.do_handshake()
            assert caught.value.reason == "HTTP_REQUEST"

    def test_before_the_handshake(self, local: Lab) -> None:
        for context in (local.client(), local.stock_client()):
            tls = Side(context, server_hostname="localhost").tls
            assert tls.version() is tls.cipher() is tls.selected_alpn_protocol() is None
            assert tls.pending() == 0
            with pytest.raises(ValueError, match="handshake not done yet"):
                tls.getpeercert()

    def test_the_first_read_or_write_shakes_hands(self, local: Lab) -> None:
        for client, server in (
            sides(local.client(), local.server()),
            sides(local.stock_client(), local.stock_server()),
        ):
            assert client.do(lambda tls: tls.write(b"hello"), server) == 5
            carry(client, server)
            assert server.do(lambda tls: tls.read(5), client) == b"hello"

    def test_no_public_constructor(self) -> None:
        for kind in (QKDObject, ssl.SSLObject):
            with pytest.raises(TypeError, match="public constructor"):
                kind()


class TestInterface:
    def test_every_public_name_is_overridden(self) -> None:
        public = {name for name in vars(ssl.SSLObject) if not name.startswith("_")}
        before = QKDObject.__mro__[: QKDObject.__mro__.index(ssl.SSLObject)]
        assert public - {name for one in before for name in vars(one)} == set()

    def test_session(self, pair: tuple[Side, Side]) -> None:
        tls = pair[0].tls
        assert tls.session is None
        with pytest.raises(ValueError, match="ever resumed"):
            tls.session = object()

    def test_context(self, local: Lab, pair: tuple[Side, Side]) -> None:
        with pytest.raises(TypeError, match="must be a QKDContext"):
            pair[0].tls.context = local.stock_client()
        other = local.client()
        pair[0].tls.context = other
        assert pair[0].tls.context is other

    def test_channel_binding(self, pair: tuple[Side, Side]) -> None:
        client, server = pair
        assert client.tls.get_channel_binding() == server.tls.get_channel_binding("tls-exporter")
        assert len(client.tls.get_channel_binding()) == 32
        with pytest.raises(ValueError, match="not implemented"):
            client.tls.get_channel_binding("tls-unique")

    def test_what_is_not_implemented(self, pair: tuple[Side, Side]) -> None:
        for name in ("get_verified_chain", "get_unverified_chain"):
            assert hasattr(pair[0].tls, name) is hasattr(ssl.SSLObject, name)
            if hasattr(ssl.SSLObject, name):
                with pytest.raises(NotImplementedError, match=r"getpeercert\(True\)"):
                    getattr(pair[0].tls, name)()
        assert pair[0].tls.selected_npn_protocol() is None

    def test_subclasses(self, local: Lab) -> None:
        class Object(QKDObject):
            pass

        class Context(QKDContext):
            sslobject_class = Object

        context = Context(policy="off")
        assert type(context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x")) is Object


def test_name_to_check_is_needed(local: Lab) -> None:
    """The standard library's objects check no name then; its sockets refuse, as ours both do."""
    with pytest.raises(ValueError, match="check_hostname requires server_hostname"):
        local.client().wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())


class TestHandshake:
    def test_bootstrap_then_associated(self, local: Lab) -> None:
        client_context, server_context = local.client(announced_keys=1), local.server()
        for path, announced in (
            (HandshakePath.BOOTSTRAP, False),
            (HandshakePath.ASSOCIATED, True),
            (HandshakePath.ASSOCIATED, False),
        ):
            client, server = sides(client_context, server_context)
            shake_hands(client, server)
            assert client.tls.qkd.protection is server.tls.qkd.protection is Protection.HYBRID
            assert client.tls.qkd.key_id == server.tls.qkd.key_id
            assert client.tls.qkd.path is server.tls.qkd.path is path
            assert client.tls.qkd.announced is announced
            assert client.tls.getpeercert(True) == local.server_identity.der

    @pytest.mark.parametrize("settings", [{}, {"peer_sae_id": None}, {"kem": "ML-KEM-1024"}])
    def test_byte_by_byte(self, local: Lab, settings: dict[str, Any]) -> None:
        client, server = sides(local.client(**settings), local.server())
        unfinished = {id(client): client, id(server): server}
        for _ in range(20_000):
            for one, other in ((client, server), (server, client)):
                with contextlib.suppress(ssl.SSLWantReadError):
                    one.tls.do_handshake()
                    unfinished.pop(id(one), None)
                other.incoming.write(one.outgoing.read(1))
            if not unfinished and not client.outgoing.pending and not server.outgoing.pending:
                break
        assert client.tls.qkd.key_id == server.tls.qkd.key_id is not None

    def test_data_in_the_last_flight(self, local: Lab) -> None:
        """The client writes at once; the server's memory holds Finished, data and close_notify in one piece."""
        client, server = sides(local.client(policy="off"), local.server(policy="off"))
        with pytest.raises(ssl.SSLWantReadError):
            client.tls.do_handshake()
        carry(client, server)
        with pytest.raises(ssl.SSLWantReadError):
            server.tls.do_handshake()
        carry(server, client)
        client.tls.do_handshake()
        client.tls.write(b"at once")
        with pytest.raises(ssl.SSLWantReadError):
            client.tls.unwrap()
        carry(client, server)
        client.outgoing.write_eof()
        server.incoming.write_eof()
        server.tls.do_handshake()
        assert server.tls.read() == b"at once"
        assert server.tls.read() == b""

    def test_an_error_is_raised_again(self, local: Lab) -> None:
        client, server = (
            Side(local.client(), server_hostname="elsewhere.example"),
            Side(local.server(), server_side=True),
        )
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(client, server)
        for call in (client.tls.do_handshake, client.tls.read, lambda: client.tls.write(b"secret")):
            with pytest.raises(ssl.SSLCertVerificationError):
                call()
        assert client.tls.qkd is None
        # The peer learns why.
        carry(client, server)
        with pytest.raises(ssl.SSLError, match=r"bad certificate|certificate unknown"):
            server.tls.do_handshake()

    def test_keys_that_differ(self, local: Lab) -> None:
        class Wrong(LocalKeyManager):
            def get_keys_by_id(self, peer_sae_id: str, key_ids: Any) -> list[QKDKey]:
                return [QKDKey(key_id, bytes(32)) for key_id in key_ids]

        client, server = sides(local.client(), local.server(key_manager=Wrong("SAE-B")))
        with pytest.raises(QKDKeyMismatch):
            shake_hands(client, server)
        carry(server, client)
        with pytest.raises(QKDKeyMismatch):
            client.tls.do_handshake()

    def test_warnings(self, local: Lab) -> None:
        """They point at the program that shakes hands, and may be errors."""
        closed = LocalKeyManager.pair("SAE-A", "SAE-B")[0]
        closed.close()
        client, server = sides(
            local.client(key_manager=closed, policy="prefer"), local.server(policy="prefer")
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            shake_hands(client, server)
        assert {one.category for one in caught} == {QKDFallbackWarning}
        assert {one.filename for one in caught} == {objects.__file__}
        assert client.tls.qkd.protection is Protection.PQ_ONLY
        client, server = sides(
            local.client(key_manager=closed, policy="prefer"), local.server(policy="prefer")
        )
        with pytest.raises(QKDFallbackWarning, match="no QKD key"):
            shake_hands(client, server)

    def test_a_classical_group_is_warned_of(self, local: Lab) -> None:
        from qkd_tls import ClassicalGroupWarning

        client, server = sides(local.client(groups=["X25519"]), local.server(groups=["X25519"]))
        with pytest.warns(ClassicalGroupWarning, match="ML-KEM-768 is mixed in beside it"):
            shake_hands(client, server)
        assert client.tls.qkd.protection is Protection.HYBRID

    def test_somebody_else_asks_the_kms(self, local: Lab) -> None:
        """As `qkd_tls.aio` does it."""
        asked = []

        class Asking(HoldingDriver):
            def fetch(self, request: Any, manager: Any) -> Any:
                asked.append(request)
                raise KeysWanted(request)

        driver = Asking()
        token = driver_in_charge.set(driver)
        client = Side(local.client(), server_hostname="localhost")
        driver_in_charge.reset(token)
        server = Side(local.server(), server_side=True)
        with pytest.raises(KeysWanted, match="waiting for the KMS"):
            shake_hands_until_asked(client, server)
        assert len(asked) == 1
        assert driver.deliver(KMSUnavailable("it burns", kms="KME", peer="SAE-B"))
        with pytest.raises(QKDUnavailable, match="it burns"):
            client.tls.do_handshake()


def shake_hands_until_asked(client: Side, server: Side) -> None:
    for _ in range(100):
        for one, other in ((client, server), (server, client)):
            try:
                one.tls.do_handshake()
            except KeysWanted:
                raise
            except ssl.SSLWantReadError:
                pass
            carry(one, other)


class TestKeysAreWiped:
    @pytest.fixture
    def remembering(self, local: Lab) -> tuple[Any, list[QKDKey]]:
        inner, given = local.manager("client"), []

        class Manager:
            protocol, name, sae_id = inner.protocol, inner.name, inner.sae_id

            def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
                keys: list[QKDKey] = inner.get_keys(peer_sae_id, number, size)
                given.extend(keys)
                return keys

        return Manager(), given

    def test_where_the_peer_goes_away(self, local: Lab, remembering: tuple[Any, list[QKDKey]]) -> None:
        manager, given = remembering
        client, server = sides(local.client(key_manager=manager, announced_keys=2), local.server())
        while not given:
            for one, other in ((client, server), (server, client)):
                with contextlib.suppress(ssl.SSLWantReadError):
                    one.tls.do_handshake()
                carry(one, other)
        client.incoming.write_eof()
        client.incoming.read()
        with pytest.raises(ssl.SSLEOFError):
            client.tls.do_handshake()
        assert len(given) == 3
        assert all(key.used for key in given)

    def test_where_a_callback_fails(self, local: Lab, remembering: tuple[Any, list[QKDKey]]) -> None:
        manager, given = remembering
        context = local.client(key_manager=manager, announced_keys=2)

        def fail(step: Any) -> None:
            if given:
                raise ZeroDivisionError

        context.observer = fail
        client, server = sides(context, local.server())
        with pytest.raises(ZeroDivisionError):
            shake_hands(client, server)
        assert len(given) == 3
        assert all(key.used for key in given)


class TestThreads:
    def test_questions_while_the_kms_is_slow(self, local: Lab) -> None:
        """Nothing but the handshake waits for it."""
        inner, may_answer, asked = local.manager("client"), threading.Event(), threading.Event()

        class Slow:
            protocol, name, sae_id = inner.protocol, inner.name, inner.sae_id

            def get_keys(self, *arguments: Any) -> list[QKDKey]:
                asked.set()
                assert may_answer.wait(TIMEOUT)
                keys: list[QKDKey] = inner.get_keys(*arguments)
                return keys

        client, server = sides(local.client(key_manager=Slow()), local.server())
        with ThreadPoolExecutor(1) as threads:
            shaking = threads.submit(shake_hands, client, server)
            assert asked.wait(TIMEOUT)
            tls = client.tls
            assert tls.pending() == 0
            assert tls.version() is tls.cipher() is tls.qkd is tls.get_channel_binding() is None
            with pytest.raises(ValueError, match="handshake is not complete"):
                tls.verify_client_post_handshake()
            may_answer.set()
            shaking.result(TIMEOUT)
        eventually(lambda: client.tls.qkd is not None, "the handshake")
