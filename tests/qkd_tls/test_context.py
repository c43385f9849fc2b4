"""`QKDContext` in the hands of programs: what it takes, what it refuses, and what it never tells."""

from __future__ import annotations

import gc
import http.client
import http.server
import logging
import socket
import ssl
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kms_client import LocalKeyManager, QKDKey
from kms_client.emulator import RunningPair
from qkd_tls import (
    KDF,
    HandshakePath,
    Policy,
    QKDContext,
    QKDFallbackWarning,
    QKDSocket,
    create_default_context,
)
from qkd_tls.association import Association
from qkd_tls.psk import PSK
from tests.support.sockets import TIMEOUT, Lab, Server, StealingManager, spellings, talk


def manager() -> LocalKeyManager:
    return LocalKeyManager.pair("SAE-A", "SAE-B")[0]


class TestArguments:
    @pytest.mark.parametrize("policy", ["require", "prefer", Policy.REQUIRE])
    def test_policies_that_need_a_key_manager(self, policy: str) -> None:
        with pytest.raises(ValueError, match="needs a key_manager; without QKD keys say so: policy='off'"):
            QKDContext(policy=policy)

    def test_require_is_the_default(self) -> None:
        assert QKDContext(key_manager=manager()).policy is Policy.REQUIRE
        with pytest.raises(ValueError, match="key_manager"):
            create_default_context()

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"policy": "perhaps"}, "perhaps"),
            ({"kem": "ML-KEM-512-typo"}, "these are: .*ML-KEM-768"),
            ({"announced_keys": -1}, "announced_keys must be 0 to 63"),
            ({"announced_keys": 64}, "announced_keys must be 0 to 63"),
            ({"association_lifetime": 0}, "must be 1 or more"),
            ({"max_keys": 0}, "must be 1 or more"),
        ],
    )
    def test_values_that_cannot_be(self, arguments: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            QKDContext(key_manager=manager(), **arguments)

    @pytest.mark.parametrize("protocol", [ssl.PROTOCOL_TLS, ssl.PROTOCOL_TLSv1_2])
    def test_protocols(self, protocol: int) -> None:
        with pytest.raises(ValueError, match=r"PROTOCOL_TLS_CLIENT or ssl\.PROTOCOL_TLS_SERVER"):
            QKDContext(protocol, key_manager=manager())

    def test_every_explicit_kem_and_hash(self) -> None:
        for kdf in KDF:
            QKDContext(key_manager=manager(), kdf=kdf, kem="ML-KEM-1024")


class TestDefaultContext:
    def test_mirrors_the_standard_library(self) -> None:
        for purpose in (ssl.Purpose.SERVER_AUTH, ssl.Purpose.CLIENT_AUTH):
            ours, stock = create_default_context(purpose, policy="off"), ssl.create_default_context(purpose)
            assert isinstance(ours, ssl.SSLContext)
            assert ours.protocol == stock.protocol
            assert ours.verify_mode == stock.verify_mode
            assert ours.check_hostname == stock.check_hostname
            assert ours.verify_flags == stock.verify_flags

    def test_purpose_has_to_be_one(self) -> None:
        with pytest.raises(TypeError):
            create_default_context("server", policy="off")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            create_default_context(policy="off").load_default_certs("server")  # type: ignore[arg-type]

    def test_trusts_the_system_where_nothing_is_given(self) -> None:
        context = create_default_context(policy="off")
        assert len(context.get_ca_certs()) == len(ssl.create_default_context().get_ca_certs())

    def test_trusts_nothing_else_where_something_is_given(self, local: Lab) -> None:
        context = create_default_context(cafile=str(local.ca.file), policy="off")
        assert context.get_ca_certs(binary_form=True) == [local.ca.der]


class TestSettings:
    """What programs set on each connection, and expect to read back."""

    @pytest.fixture
    def context(self) -> QKDContext:
        return QKDContext(key_manager=manager())

    def test_versions(self, context: QKDContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
        context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
        with pytest.raises(ValueError, match="lower maximum_version cannot be had"):
            context.maximum_version = ssl.TLSVersion.TLSv1_2

    def test_options(self, context: QKDContext) -> None:
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
        assert context.options & ssl.OP_NO_TICKET
        with pytest.raises(ValueError, match="OP_NO_TLSv1_3 cannot be had"):
            context.options |= ssl.OP_NO_TLSv1_3
        assert not context.options & ssl.OP_NO_TLSv1_3

    def test_ciphers(self, context: QKDContext) -> None:
        context.set_ciphers("ECDHE+AESGCM")
        assert {cipher["protocol"] for cipher in context.get_ciphers()} == {"TLSv1.3"}

    def test_verification(self, context: QKDContext) -> None:
        with pytest.raises(ValueError, match="check_hostname"):
            context.verify_mode = ssl.CERT_NONE
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # As in the standard library, checking the name turns checking the certificate on.
        context.check_hostname = True
        assert context.verify_mode is ssl.CERT_REQUIRED

    def test_alpn(self, context: QKDContext) -> None:
        context.set_alpn_protocols(["h2", "http/1.1"])
        with pytest.raises(ValueError, match="it is offered by itself"):
            context.set_alpn_protocols(["qkd-tls/1"])
        for wrong in ("", "x" * 256):
            with pytest.raises(ssl.SSLError, match="1 to 255 bytes"):
                context.set_alpn_protocols([wrong])

    @pytest.mark.parametrize(
        "call",
        [
            lambda context: context.set_ecdh_curve("prime256v1"),
            lambda context: context.load_dh_params("dh.pem"),
            lambda context: context.set_npn_protocols(["h2"]),
            lambda context: context.set_psk_client_callback(print),
            lambda context: context.set_psk_server_callback(print),
        ],
    )
    def test_what_cannot_be_honoured_says_so(
        self, context: QKDContext, call: Callable[[QKDContext], object]
    ) -> None:
        with pytest.raises(NotImplementedError, match="QKDContext has no "):
            call(context)

    def test_the_same_set_to_what_it_is(self, context: QKDContext) -> None:
        """Programs that copy settings from one context to another."""
        context.keylog_filename = None  # type: ignore[assignment]
        context.post_handshake_auth = False
        context.num_tickets = 0
        assert context.sni_callback is None
        assert context.keylog_filename is None
        assert context.post_handshake_auth is False
        assert context.num_tickets == 0
        with pytest.raises(ValueError, match="ever resumed"):
            context.num_tickets = 2

    def test_changes_act_on_later_connections(self, local: Lab) -> None:
        client, server_context = local.client(), local.server()
        with Server(server_context) as server:
            with server.connect(client) as before:
                server_context.set_alpn_protocols(["h2"])
                client.set_alpn_protocols(["h2"])
                talk(before)
                assert before.selected_alpn_protocol() is None
            with server.connect(client) as after:
                talk(after)
                assert after.selected_alpn_protocol() == "h2"


def test_programs_of_the_standard_library(local: Lab, tmp_path: Path) -> None:
    """http.server with its listening socket wrapped, http.client with a context: no word of QKD in either."""
    protocols = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assert isinstance(self.connection, QKDSocket)
            protocols.append(self.connection.qkd)
            body = b"x" * 100_000
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = local.server().wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        context = local.client()
        for _ in range(2):
            client = http.client.HTTPSConnection(
                "localhost", server.server_port, context=context, timeout=TIMEOUT
            )
            for _ in range(2):
                client.request("GET", "/")
                assert client.getresponse().read() == b"x" * 100_000
            assert isinstance(client.sock, QKDSocket)
            assert client.sock.qkd is not None
            client.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [info.path for info in protocols if info is not None] == [HandshakePath.BOOTSTRAP] * 2 + [
        HandshakePath.ASSOCIATED
    ] * 2


# --- secrets stay where they are


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every QKD key, every association secret and every PSK that is made during the test."""
    found: list[bytes] = []
    monkeypatch.setattr(QKDKey, "__init__", recording(QKDKey.__init__, found, lambda args: bytes(args[2])))
    monkeypatch.setattr(
        Association,
        "__post_init__",
        recording(Association.__post_init__, found, lambda args: bytes(args[0].secret)),
    )
    monkeypatch.setattr(PSK, "__init__", recording(PSK.__init__, found, lambda args: bytes(args[2])))
    return found


def recording(
    method: Callable[..., None], found: list[bytes], secret: Callable[[tuple[Any, ...]], bytes]
) -> Callable[..., None]:
    def wrapper(*args: Any, **settings: Any) -> None:
        found.append(secret(args))
        method(*args, **settings)

    return wrapper


def everything_in(error: BaseException | None) -> str:
    """What error reporters get at: texts, attributes, and the local variables of the libraries' frames."""
    texts = []
    seen = set()
    pending = [error]
    while pending:
        link = pending.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        texts += [str(link), repr(link), repr(vars(link)), "".join(traceback.format_exception(link))]
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if "tests" not in frame.f_code.co_filename:
                texts += [repr(value) for value in frame.f_locals.values()]
        pending += [link.__cause__, link.__context__]
    return "\n".join(texts)


def test_no_secret_is_told(
    lab: Lab, kmes: RunningPair, secrets: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that work and connections that do not, with logging at its most talkative."""
    caplog.set_level(logging.DEBUG)
    told: list[str] = []

    def attempt(server: Server, client: QKDContext) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with server.connect(client) as sock:
                    talk(sock)
                    told.extend(
                        map(repr, (sock, sock.qkd, sock.qkd.as_dict() if sock.qkd else "", vars(sock)))
                    )
            except OSError as error:
                told.append(everything_in(error))
            seen = server.seen()
            told.extend([repr(seen), everything_in(seen.error)])
        told.extend(str(one.message) for one in caught)

    def remember_objects() -> None:
        # Whatever a debugger or an error reporter could print.
        kinds = (QKDKey, Association, PSK, QKDContext, QKDSocket)
        told.extend(repr(one) for one in gc.get_objects() if isinstance(one, kinds))
        told.extend(repr(vars(one)) for one in gc.get_objects() if isinstance(one, QKDContext))

    with Server(lab.server()) as server:
        client = lab.client(announced_keys=2)
        for _ in range(4):
            attempt(server, client)
            remember_objects()
        kmes.faults("b").corrupt_keys = True
        attempt(server, lab.client())
        kmes.faults("b").corrupt_keys = False
        attempt(server, lab.client(kem="ML-KEM-768"))
        kmes.faults("b").answer_with = (200, '{"keys": [{"key_ID": "x", "key": "AAAA"}]}')
        attempt(server, lab.client())
        kmes.faults("b").answer_with = None
        thief = StealingManager(lab.manager("client"), lab.manager("server"))
        thief.steal = 1
        attempt(server, lab.client(key_manager=thief))
        attempt(server, lab.client(peer_sae_id="SAE-X"))
    impatient = lab.manager("server", read_timeout=0.2)
    with Server(lab.server(policy="prefer", key_manager=impatient)) as server:
        kmes.faults("b").delay = 10
        attempt(server, lab.client(policy="prefer"))
    remember_objects()
    told.append(caplog.text)
    told += [repr(vars(record)) for record in caplog.records]

    assert any(QKDFallbackWarning.__name__ in text or "no QKD key" in text for text in told)
    assert caplog.records, "nothing was logged at all: the test looks in the wrong place"
    assert len(secrets) > 20
    everything = "\n".join(told)
    # Ends of keys too: half a key is a leak.
    for secret in {secret for secret in secrets if any(secret)}:
        for part in (secret, secret[:16], secret[-16:]):
            for spelling in spellings(part):
                assert spelling not in everything


@pytest.mark.parametrize(
    ("hostname", "error"),
    [
        ("", ValueError),
        (".example", ValueError),
        ("a\0b", TypeError),
        ("x" * 254, ValueError),
    ],
)
def test_host_names_that_cannot_be(hostname: str, error: type[Exception]) -> None:
    context = QKDContext(policy="off")
    with socket.socket() as sock, pytest.raises(error):
        context.wrap_socket(sock, server_hostname=hostname)


def test_memory_bios_are_checked() -> None:
    context = QKDContext(policy="off")
    context.check_hostname = False
    with pytest.raises(TypeError, match="MemoryBIO"):
        context.wrap_bio(bytearray(), ssl.MemoryBIO())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="session must be None"):
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), session=object())  # type: ignore[arg-type]
