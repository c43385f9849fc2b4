"""Two sites in memory: their certificates, KMSs and clock, and two engines that talk without a socket.

A `World` makes `Conversation`s between a client and a server engine. A conversation can be run with whole flights or
in pieces, cut at any byte, or tampered with. Everything beneath is real: OpenSSL, the key managers, the key schedule.
"""

from __future__ import annotations

import contextlib
import functools
import json
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kms_client import KMSError, LocalKeyManager, QKDKey
from qkd_tls import control
from qkd_tls.association import Association, AssociationStore
from qkd_tls.endpoint import fetch_keys
from qkd_tls.engine import (
    ALPN_PROTOCOL,
    ChooseContext,
    ClientEngine,
    Engine,
    EngineConfig,
    Established,
    Event,
    FetchKeys,
    FetchKeysByID,
    ServerEngine,
    State,
)
from qkd_tls.info import QKDInfo
from qkd_tls.openssl import Credentials, TLSConnection, TLSContext, TLSSettings
from qkd_tls.policy import Policy

HOST = "server.example"
SAE_A, SAE_B = "SAE-A", "SAE-B"
"""The client's and the server's SAE ID."""

HYBRID_GROUP = "X25519MLKEM768"


# --- certificates


@dataclass(frozen=True)
class PKI:
    """One CA, a server for `HOST` and two addresses, and a client."""

    ca: bytes
    server: Credentials
    client: Credentials


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def credentials(leaf: trustme.LeafCert) -> Credentials:
    chain = [der(blob.bytes()) for blob in leaf.cert_chain_pems]
    return Credentials.load(chain, leaf.private_key_pem.bytes(), None)


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def pki() -> PKI:
    ca = authority()
    return PKI(
        der(ca.cert_pem.bytes()),
        credentials(ca.issue_cert(HOST, "127.0.0.1", "::1")),
        credentials(ca.issue_cert("client.example")),
    )


# --- the two KMSs


class KMS(LocalKeyManager):
    """A key manager that counts, remembers what it gave, and fails or cheats when told to."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.calls = 0
        self.behave()

    def behave(self) -> None:
        """Neither fail nor cheat, from here on; what was given before is forgotten."""
        self.given: list[QKDKey] = []
        self._failure: KMSError | None = None
        self._times: int | None = None
        self.cheat: Callable[[list[QKDKey]], list[QKDKey]] = list

    def fail(self, error: KMSError, times: int | None = None) -> None:
        """Answer with an error: so many times, or always."""
        self._failure, self._times = error, times

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        self._called()
        return self._given(super().get_keys(peer_sae_id, number, size))

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        self._called()
        return self._given(super().get_keys_by_id(peer_sae_id, key_ids))

    def _called(self) -> None:
        self.calls += 1
        if self._failure is not None and self._times != 0:
            self._times = None if self._times is None else self._times - 1
            raise self._failure

    def _given(self, keys: list[QKDKey]) -> list[QKDKey]:
        keys = self.cheat(keys)
        self.given += keys
        return keys


def link() -> tuple[KMS, KMS]:
    a, b = KMS.pair(SAE_A, SAE_B)
    assert isinstance(a, KMS)
    assert isinstance(b, KMS)
    return a, b


# --- engines that say which transitions they take


class _Recorded(Engine):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.steps: list[tuple[State, Event]] = []
        super().__init__(*arguments, **named)

    def _go(self, event: Event) -> None:
        self.steps.append((self.state, event))
        super()._go(event)


class RecordedClient(_Recorded, ClientEngine):
    pass


class RecordedServer(_Recorded, ServerEngine):
    pass


# --- one end


@dataclass
class Side:
    """An engine, its KMS, and how it ended."""

    engine: _Recorded
    kms: KMS
    info: QKDInfo | None = None
    error: OSError | None = None
    late_error: OSError | None = None
    """What a read of the established connection met."""
    received: bytearray = field(default_factory=bytearray)
    """The application's data."""
    _out: bytearray = field(default_factory=bytearray)

    def pump(self) -> Self:
        """Let the engine do all that it can do without more bytes."""
        while not self.over:
            try:
                action = self.engine.next_action()
            except OSError as error:
                self.error = error
                break
            if isinstance(action, FetchKeys | FetchKeysByID):
                self.engine.keys(fetch_keys(action, self.kms))
            elif isinstance(action, ChooseContext):
                assert isinstance(self.engine, ServerEngine)
                self.engine.choose(self.engine._config)
            elif isinstance(action, Established):
                self.info = action.info
                self._read()
            else:
                break
        self._out += self.engine.data_to_send()
        return self

    def flight(self) -> bytes:
        """What it has to send."""
        self.pump()
        flight = bytes(self._out)
        self._out.clear()
        return flight

    def deliver(self, data: bytes, piece: int | None = None) -> None:
        """Bytes from the transport, `piece` at a time."""
        step = piece or len(data) or 1
        for start in range(0, len(data), step):
            part = data[start : start + step]
            if self.info is not None:
                self.engine.connection.feed(part)
                self._read()
            else:
                self.engine.receive_data(part)
                self.pump()

    def end_of_stream(self) -> None:
        """The transport has ended."""
        if not self.over:
            self.engine.receive_data(b"")
            self.pump()

    def write(self, data: bytes) -> None:
        """Send data of the application."""
        write_all(self.engine.connection, data)

    def _read(self) -> None:
        try:
            while True:
                self.received += self.engine.connection.read(1 << 14)
        except ssl.SSLWantReadError:
            pass
        except OSError as error:
            self.late_error = error

    @property
    def over(self) -> bool:
        return self.info is not None or self.error is not None

    @property
    def end(self) -> str:
        """How it ended, in a word: the path, the protection without a QKD key, or the error's class and code."""
        if self.error is not None:
            code = getattr(self.error, "code", None)
            return type(self.error).__name__ + (f" {code}" if code else "")
        if self.info is not None:
            return str(self.info.path or self.info.protection)
        return "unfinished"


# --- both ends


@dataclass
class Conversation:
    """What went over the wire: (who sent, bytes), one entry a flight."""

    client: Side
    server: Side
    flights: list[tuple[str, bytes]] = field(default_factory=list)
    round_trips: float | None = None
    """Until the client could send its first byte of the application's data."""

    def each_flight(self) -> Iterator[tuple[Side, bytes]]:
        """The receiver and the bytes of each flight; whoever iterates delivers them."""
        ends = ("client", self.client, self.server), ("server", self.server, self.client)
        silent = 0
        while silent < 2:
            for name, sender, receiver in ends:
                flight = sender.flight()
                if self.client.info is not None and self.round_trips is None:
                    self.round_trips = len(self.flights) / 2
                silent = 0 if flight else silent + 1
                if flight:
                    self.flights.append((name, flight))
                    yield receiver, flight

    def run(self, piece: int | None = None) -> Self:
        """Exchange flights until nobody has anything to send; then the transport ends for whoever still waits."""
        for receiver, flight in self.each_flight():
            receiver.deliver(flight, piece)
        return self.hang_up()

    def hang_up(self) -> Self:
        self.client.end_of_stream()
        self.server.end_of_stream()
        return self

    def talk(self) -> None:
        """Both established: what one writes the other reads."""
        for sender, receiver, text in (
            (self.client, self.server, b"request"),
            (self.server, self.client, b"response"),
        ):
            receiver.received.clear()
            sender.write(text)
            receiver.deliver(sender.flight())
            assert receiver.received == text

    @property
    def ends(self) -> tuple[str, str]:
        return self.client.end, self.server.end

    @property
    def infos(self) -> tuple[QKDInfo, QKDInfo]:
        assert self.client.info is not None, self.client.error
        assert self.server.info is not None, self.server.error
        return self.client.info, self.server.info

    @property
    def errors(self) -> tuple[OSError, OSError]:
        assert self.client.error is not None
        assert self.server.error is not None
        return self.client.error, self.server.error


# --- the two sites


Changes = dict[str, Any]


@functools.lru_cache(maxsize=256)
def compiled(settings: TLSSettings) -> TLSContext:
    return TLSContext(settings)


@dataclass
class World:
    """Two sites; `client`, `server`, `client_tls` and `server_tls` change their EngineConfig and TLSSettings."""

    client: Changes = field(default_factory=dict)
    server: Changes = field(default_factory=dict)
    client_tls: Changes = field(default_factory=dict)
    server_tls: Changes = field(default_factory=dict)
    host: str | None = HOST
    peer_sae_id: str | None = SAE_B
    now: float = field(default_factory=time.time)
    stores: tuple[AssociationStore, AssociationStore] = field(
        default_factory=lambda: (AssociationStore(), AssociationStore())
    )
    kms: tuple[KMS, KMS] = field(default_factory=link)

    def connect(self, piece: int | None = None) -> Conversation:
        """A connection, run to its end."""
        return self.conversation().run(piece)

    def established(self, end: str) -> Conversation:
        """A connection that has to end so at both sides."""
        conversation = self.connect()
        assert conversation.ends == (end, end), (conversation.client.error, conversation.server.error)
        return conversation

    def conversation(self) -> Conversation:
        """A connection on which nothing has been delivered yet."""
        return Conversation(self.new_client(), self.new_server())

    def new_client(self) -> Side:
        engine = RecordedClient(
            self.config(0, self.client_context, self.client),
            server_hostname=self.host,
            server_port=443,
            server_sae_id=self.peer_sae_id,
        )
        return Side(engine, self.kms[0])

    def new_server(self) -> Side:
        return Side(RecordedServer(self.config(1, self.server_context, self.server)), self.kms[1])

    @property
    def client_context(self) -> TLSContext:
        # Compiled once for equal settings, as a QKDContext does it: the fingerprint is part of an association's scope.
        return compiled(
            TLSSettings(
                **{
                    "server_side": False,
                    "trusted": (pki().ca,),
                    "verify_mode": ssl.CERT_REQUIRED,
                    "check_hostname": self.host is not None,
                    **self.client_tls,
                }
            )
        )

    @property
    def server_context(self) -> TLSContext:
        return compiled(TLSSettings(**{"server_side": True, "credentials": pki().server, **self.server_tls}))

    def config(self, site: int, context: TLSContext, changes: Changes) -> EngineConfig:
        kms = self.kms[site]
        return EngineConfig(
            **{
                "context": context,
                "policy": Policy.REQUIRE,
                "associations": self.stores[site],
                "kms": kms.name,
                "kms_protocol": kms.protocol,
                "sae_id": kms.sae_id,
                "alpn": ("http/1.1",),
                "clock": lambda: self.now,
                **changes,
            }
        )

    def restart(self) -> None:
        """Both sites forget their associations."""
        for store in self.stores:
            store.clear()

    def association(self, site: int) -> Association:
        """The only association of the client (0) or the server (1)."""
        (association,) = self.stores[site]._by_id.values()
        return association

    def loose_keys(self) -> list[QKDKey]:
        """Keys that a KMS gave and that are neither used nor announced in an association that lives."""
        announced = {
            id(key)
            for store in self.stores
            for association in store._by_id.values()
            for key in association._announced.values()
        }
        return [key for kms in self.kms for key in kms.given if not key.used and id(key) not in announced]


# --- the wire


def records(data: bytes) -> list[bytes]:
    """TLS records with their headers; the last one may be incomplete."""
    found = []
    while data:
        size = 5 + int.from_bytes(data[3:5], "big")
        found.append(data[:size])
        data = data[size:]
    return found


def only_alerts(data: bytes) -> bool:
    """Whether these records can be nothing but alerts: in the clear, or encrypted and of an alert's size."""
    return all(
        record[0] == 21 or (record[0] == 23 and len(record) == 5 + 2 + 1 + 16) for record in records(data)
    )


# --- a peer driven by hand


class Hand:
    """A TLS peer that says on the bootstrap channel whatever a test wants, to an engine at the other end."""

    def __init__(self, tls: TLSConnection, side: Side) -> None:
        self.tls = tls
        self.side = side
        self.raw = bytearray()
        """What is not for this TLS connection: the ClientHello of the engine's second handshake."""
        self._done = False
        self._encrypted = False
        self._plain = bytearray()

    def shake_hands(self) -> Self:
        """The bootstrap's handshake; returns when neither end has more to say."""
        while not self.side.over:
            self._done = self._done or self.tls.handshake()
            ours = self.tls.take()
            self.side.deliver(ours)
            theirs = self.side.flight()
            self._take_in(theirs)
            if not ours and not theirs:
                break
        return self

    def send(self, *frames: control.Message | bytes | dict[str, Any], after: bytes = b"") -> Self:
        """Messages, JSON objects or raw bytes, together; `after` follows in the clear, in the same flight."""
        write_all(self.tls, b"".join(map(frame_of, frames)))
        self.side.deliver(self.tls.take() + after)
        self._take_in(self.side.flight())
        return self

    def messages(self) -> list[control.Message]:
        """What the engine has said on the bootstrap channel since the last time."""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while True:
                self._plain += self.tls.read(1 << 14)
        reader = control.FrameReader()
        reader.feed(self._plain)
        self._plain.clear()
        return list(iter(reader.next, None))

    def closed(self) -> bool:
        """Whether the engine has closed the bootstrap channel with close_notify."""
        self.messages()
        return self.tls.close_notify_received

    def _take_in(self, data: bytes) -> None:
        for record in records(data):
            # A handshake record in the clear, behind encrypted ones, begins the second handshake.
            if record[0] == 22 and self._encrypted:
                self.raw += record
            else:
                self._encrypted = self._encrypted or record[0] == 23
                self.tls.feed(record)


def write_all(tls: TLSConnection, data: bytes) -> None:
    while data:
        data = data[tls.write(data) :]


def frame_of(content: control.Message | bytes | dict[str, Any]) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, dict):
        body = json.dumps(content).encode()
        return len(body).to_bytes(2, "big") + body
    return control.encode(content)


def hand_driven_client(world: World, *, alpn: tuple[str, ...] = (ALPN_PROTOCOL, "http/1.1")) -> Hand:
    """A client that has shaken hands with a server engine and may speak next."""
    tls = TLSConnection(world.client_context, server_hostname=world.host, alpn=alpn)
    return Hand(tls, world.new_server()).shake_hands()


def hand_driven_server(world: World, *, selects: bytes | None = ALPN_PROTOCOL.encode()) -> Hand:
    """A server that has shaken hands with a client engine, which has said its first message."""
    tls = TLSConnection(world.server_context, select_alpn=lambda _tls, _offered: selects)
    return Hand(tls, world.new_client()).shake_hands()
