"""Everything that can go wrong between a program and its KME, times every call, times every interface.

Each cell runs on real sockets, and is bounded in time and memory, ends in the error that the tables say, and shows no
key. Another interface is one more `Interface` in `INTERFACES`, with its own answers. What a pool and a failover manager
know after each fault is tested below.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import logging
import select
import socket
import ssl
import struct
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kms_client import (
    FailoverKeyManager,
    KeyManager,
    KeyPool,
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    SkipClient,
    UnknownKey,
    UnknownSAE,
)
from kms_client.breaker import BreakerState
from kms_client.emulator import DemoPKI, write_demo_pki
from kms_client.emulator.kme import server_context
from tests.support.kme_server import (
    Answer,
    ScriptedKME,
    client_of,
    container,
    everything_in,
    http,
    issue,
    spellings,
)
from tests.support.patience import PATIENCE

CALLS = ("status", "get", "get by ID")
IDS = ["550e8400-e29b-41d4-a716-446655440000", "650e8400-e29b-41d4-a716-446655440abc"]
THIRD = "750e8400-e29b-41d4-a716-446655440abc"  # not asked for
FAULTS = (
    "400", "401", "404", "500", "503 with a body", "503 without a body", "HTML", "deep JSON", "wrong encoding of keys",
    "short key", "duplicate IDs", "IDs not asked for", "more keys", "fewer keys", "no keys",
)  # fmt: skip
"""Of answers; those of the network are in `NETWORK`."""
KEYS = [bytes(range(200, 232)), bytes(range(100, 132)), bytes(range(60, 92))]
MOST_BYTES = 16 << 20  # allocated in a cell, beyond what there was; client and server together

KEYS_ARE_GIVEN = "keys"
"""In place of an error: for this call it is no fault."""

Expected = type[KMSError] | str
Fault = tuple[bytes, Mapping[str, Expected]]


@dataclass(frozen=True)
class Interface:
    """What a KME speaks: how a client of it is made, what it answers rightly, and what its faults are.

    The calls ask for two keys, or for those with `ids`. The fault comes in place of the last right answer to a call.
    """

    name: str
    client: Callable[..., KeyManager]  # of the demo PKI, a URL and time limits
    ids: list[str]
    right: Mapping[str, list[bytes]]  # the right answers to each call, one a request
    faults: Mapping[str, Fault]  # an answer, and what each call makes of it
    first: list[bytes] = field(default_factory=list)  # answers before a new client asks for keys
    no_meaning: Mapping[str, str] = field(default_factory=dict)  # faults that it cannot have, and why

    def answers(self, call: str) -> list[bytes]:
        """What a new client is to get for this call."""
        return [*([] if call == "status" else self.first), *self.right[call]]


def both(error: Expected) -> dict[str, Expected]:
    return dict.fromkeys(CALLS, error)


def each(status: Expected, get: Expected, get_by_id: Expected) -> dict[str, Expected]:
    return dict(zip(CALLS, (status, get, get_by_id), strict=True))


def etsi_keys(*entries: tuple[str, bytes]) -> bytes:
    return http(200, container(*entries))


SECRET_TEXT = base64.b64encode(KEYS[0]).decode()
ETSI_STATUS = {
    "source_KME_ID": "KME-A", "target_KME_ID": "KME-B", "master_SAE_ID": "SAE-A", "slave_SAE_ID": "SAE-B",
    "key_size": 256, "stored_key_count": 7, "max_key_count": 100, "max_key_per_request": 8, "max_key_size": 1024,
    "min_key_size": 64, "max_SAE_ID_count": 0,
}  # fmt: skip
ETSI_014 = Interface(
    "ETSI 014",
    client_of,
    IDS,
    right={
        "status": [http(200, ETSI_STATUS)],
        "get": [etsi_keys(*zip(IDS, KEYS, strict=False))],
        "get by ID": [etsi_keys(*zip(IDS, KEYS, strict=False))],
    },
    faults={
        "400": (http(400, {"message": "size shall be a multiple of 8"}), both(KMSRequestError)),
        "401": (http(401), both(KMSAuthenticationError)),
        "404": (http(404, {"message": "Not Found"}), each(UnknownSAE, UnknownSAE, UnknownKey)),
        "500": (http(500, {"message": f"crash with {SECRET_TEXT}"}), both(KMSUnavailable)),
        "503 with a body": (http(503, {"message": "link down"}), both(KMSUnavailable)),
        "503 without a body": (http(503), both(KMSUnavailable)),
        "HTML": (http(200, f"<html>{SECRET_TEXT}</html>"), both(KMSProtocolError)),
        "deep JSON": (http(200, '{"keys":' + "[" * 200_000), both(KMSProtocolError)),
        "wrong encoding of keys": (
            http(200, {"keys": [{"key_ID": i, "key": SECRET_TEXT[:-5] + "!*="} for i in IDS]}),
            both(KMSProtocolError),
        ),
        # By ID no size is asked for: whoever uses the keys knows it.
        "short key": (
            etsi_keys((IDS[0], KEYS[0]), (IDS[1], KEYS[1][:16])),
            each(KMSProtocolError, KMSProtocolError, KEYS_ARE_GIVEN),
        ),
        "duplicate IDs": (etsi_keys((IDS[0], KEYS[0]), (IDS[0], KEYS[1])), both(KMSProtocolError)),
        # A master has asked for any keys.
        "IDs not asked for": (
            etsi_keys((IDS[0], KEYS[0]), (THIRD, KEYS[1])),
            each(KMSProtocolError, KEYS_ARE_GIVEN, KMSProtocolError),
        ),
        "more keys": (
            etsi_keys((IDS[0], KEYS[0]), (IDS[1], KEYS[1]), (THIRD, KEYS[2])),
            both(KMSProtocolError),
        ),
        "fewer keys": (etsi_keys((IDS[0], KEYS[0])), each(KMSProtocolError, NoKeysLeft, UnknownKey)),
        "no keys": (etsi_keys(), each(KMSProtocolError, NoKeysLeft, UnknownKey)),
    },
)

HEX_IDS = [key_id.replace("-", "") for key_id in IDS]


def skip_key(key_id: str, secret: bytes | str) -> dict[str, str]:
    return {"keyId": key_id.replace("-", ""), "key": secret if isinstance(secret, str) else secret.hex()}


def skip_client(pki: DemoPKI, url: str, **limits: Any) -> SkipClient:
    return SkipClient(
        url,
        sae_id=pki.sae_a,
        cert=pki.sae_a_cert,
        key=pki.sae_a_key,
        ca=pki.kms_ca,
        **limits,
    )


CAPABILITIES = {
    "entropy": True, "key": True, "algorithm": "QKD", "localSystemID": "SAE-A", "remoteSystemID": ["SAE-[BC]"],
}  # fmt: skip
SKIP_KEYS = [http(200, skip_key(key_id, key)) for key_id, key in zip(IDS, KEYS, strict=False)]
# One key a request: the fault is in the answer for the second, when the first has come and is lost.
SKIP = Interface(
    "SKIP",
    skip_client,
    HEX_IDS,
    first=[http(200, CAPABILITIES)],
    right={"status": [http(200, CAPABILITIES)], "get": SKIP_KEYS, "get by ID": SKIP_KEYS},
    faults={
        # The draft's answer for an unknown key ID, too.
        "400": (http(400), each(KMSRequestError, KMSRequestError, UnknownKey)),
        "401": (http(401), both(KMSAuthenticationError)),
        "404": (http(404), each(KMSRequestError, KMSRequestError, UnknownKey)),
        "405": (http(405), both(KMSProtocolError)),
        "500": (http(500, {"message": f"crash with {KEYS[0].hex()}"}), both(KMSUnavailable)),
        "503 with a body": (
            http(503, {"message": "link down"}),
            each(KMSUnavailable, NoKeysLeft, KMSUnavailable),
        ),
        "503 without a body": (http(503), each(KMSUnavailable, NoKeysLeft, KMSUnavailable)),
        "HTML": (http(200, f"<html>{KEYS[0].hex()}</html>"), both(KMSProtocolError)),
        "deep JSON": (http(200, '{"key":' + "[" * 200_000), both(KMSProtocolError)),
        "wrong encoding of keys": (
            http(200, skip_key(IDS[1], KEYS[1].hex()[:-2] + "0g")),
            both(KMSProtocolError),
        ),
        "short key": (
            http(200, skip_key(IDS[1], KEYS[1][:16])),
            each(KMSProtocolError, KMSProtocolError, KEYS_ARE_GIVEN),
        ),
        # The second answer has the ID of the first.
        "duplicate IDs": (http(200, skip_key(IDS[0], KEYS[1])), both(KMSProtocolError)),
        "IDs not asked for": (
            http(200, skip_key(THIRD, KEYS[1])),
            each(KMSProtocolError, KEYS_ARE_GIVEN, KMSProtocolError),
        ),
        # An answer has the members of one key: several can only come as something that is no answer.
        "more keys": (
            http(200, json.dumps([skip_key(IDS[1], KEYS[1]), skip_key(THIRD, KEYS[2])])),
            both(KMSProtocolError),
        ),
        "no keys": (http(200, {}), both(KMSProtocolError)),
    },
    no_meaning={"fewer keys": "one key is asked for at a time, and fewer than one is none: see 'no keys'"},
)
INTERFACES = [ETSI_014, SKIP]


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.name)
def test_each_fault_is_tried_or_said_to_have_no_meaning(interface: Interface) -> None:
    assert not interface.faults.keys() & interface.no_meaning.keys()
    assert {*FAULTS} <= {*interface.faults, *interface.no_meaning}


# --- faults of the network, the same for all interfaces


@contextmanager
def refused(_pki: DemoPKI, _right: list[bytes]) -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def hangs_in_connect(_pki: DemoPKI, _right: list[bytes]) -> Iterator[int]:
    """A listener whose queue is full: the system answers no further connection."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listening.getsockname())
            if not select.select([], [filler], [], 0.2)[1]:
                break
        else:
            raise AssertionError("the queue was never full")
        yield listening.getsockname()[1]


@contextmanager
def hangs_in_handshake(_pki: DemoPKI, _right: list[bytes]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


@contextmanager
def serving(context: ssl.SSLContext, *answers: Answer) -> Iterator[int]:
    server = ScriptedKME(context, [*answers])
    try:
        yield server.port
    finally:
        server.close()


def stalling(start: Callable[[bytes], bytes], pause: float | None) -> Any:
    """Sends the start of the right answer, then nothing more, or a space now and then."""

    @contextmanager
    def fault(pki: DemoPKI, right: list[bytes]) -> Iterator[int]:
        over = threading.Event()

        def answer(sock: ssl.SSLSocket) -> None:
            sock.sendall(start(right[-1]))
            while not over.wait(pause):
                sock.sendall(b" ")

        with serving(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), *right[:-1], answer) as port:
            try:
                yield port
            finally:
                over.set()

    return fault


def head(right: bytes) -> bytes:
    return right[: right.index(b"\r\n\r\n") + 4]


@contextmanager
def reset_mid_body(pki: DemoPKI, right: list[bytes]) -> Iterator[int]:
    def answer(sock: ssl.SSLSocket) -> None:
        sock.sendall(right[-1][:-5])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), *right[:-1], answer) as port:
        yield port


@contextmanager
def wrong_name(pki: DemoPKI, right: list[bytes]) -> Iterator[int]:
    files = issue(pki, pki.directory / "other-name", "kme.example", "kme.example")
    with serving(server_context(*files, pki.kms_ca), *right) as port:
        yield port


@contextmanager
def wrong_ca(pki: DemoPKI, right: list[bytes]) -> Iterator[int]:
    other = write_demo_pki(pki.directory / "foreign")
    with serving(server_context(other.kme_a_cert, other.kme_a_key, pki.kms_ca), *right) as port:
        yield port


@contextmanager
def expired(pki: DemoPKI, right: list[bytes]) -> Iterator[int]:
    files = issue(pki, pki.directory / "expired", "KME-A", "127.0.0.1", days=(-30, -1))
    with serving(server_context(*files, pki.kms_ca), *right) as port:
        yield port


@contextmanager
def hundred_megabytes(pki: DemoPKI, right: list[bytes]) -> Iterator[int]:
    entry = b'{"key_ID": "x", "key": "' + SECRET_TEXT.encode() + b'"},'
    block = entry * (65536 // len(entry))
    blocks = 100_000_000 // len(block) + 1

    def answer(sock: ssl.SSLSocket) -> None:
        length = len(b'{"keys": [') + blocks * len(block) + len(b"{}]}")
        sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{"keys": [' % length)
        for _ in range(blocks):
            sock.sendall(block)
        sock.sendall(b"{}]}")

    with serving(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), *right[:-1], answer) as port:
        yield port


NETWORK: dict[str, tuple[Any, type[KMSError], str]] = {
    "refused": (refused, KMSUnavailable, "Connection refused"),
    "hangs in connect": (hangs_in_connect, KMSTimeout, "no connection within"),
    "hangs in handshake": (hangs_in_handshake, KMSTimeout, "no connection within"),
    "hangs before headers": (stalling(lambda _: b"", None), KMSTimeout, "no complete answer within"),
    "hangs after headers": (stalling(head, None), KMSTimeout, "no complete answer within"),
    "slow body": (stalling(lambda right: right[:-50], 0.05), KMSTimeout, "no complete answer within"),
    "reset mid-body": (reset_mid_body, KMSUnavailable, "the connection was lost"),
    "wrong certificate: name": (wrong_name, KMSAuthenticationError, "certificate was refused"),
    "wrong certificate: CA": (wrong_ca, KMSAuthenticationError, "certificate was refused"),
    "expired certificate": (expired, KMSAuthenticationError, "expired"),
    "100 MB of JSON": (hundred_megabytes, KMSProtocolError, "larger than"),
}


UNCONNECTED = {name for name, (fault, *_) in NETWORK.items() if fault in (
    refused, hangs_in_connect, hangs_in_handshake, wrong_name, wrong_ca, expired
)}  # fmt: skip
# One limit is short if the fault is to reach it. The others are never reached, however slow the machine is.
LONG = {"connect_timeout": PATIENCE, "read_timeout": PATIENCE}
LIMITS: dict[str, dict[str, float]] = {
    **dict.fromkeys(("hangs in connect", "hangs in handshake"), LONG | {"connect_timeout": 0.4}),
    **dict.fromkeys(
        ("hangs before headers", "hangs after headers", "slow body"), LONG | {"read_timeout": 1.0}
    ),
}
NO_KEY_TAKEN = {*UNCONNECTED, "400", "401", "404", "503 with a body", "503 without a body", "no keys"}
"""In all others the KME may have taken keys out of its store."""


# --- the cells


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


def ask(manager: KeyManager, call: str, ids: list[str]) -> Any:
    if call == "status":
        return manager.status("SAE-B")
    return manager.get_keys("SAE-B", 2, 256) if call == "get" else manager.get_keys_by_id("SAE-B", ids)


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if time or memory are not bounded."""
    gc.collect()
    tracemalloc.start()
    began = time.monotonic()
    try:
        yield
        assert time.monotonic() - began < PATIENCE
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def check(
    error: KMSError, manager: KeyManager, interface: Interface, call: str, fault: str, logged: str
) -> None:
    """The error names KME, peer and keys, says what to do and whether keys may be lost, and shows no key."""
    assert (error.kms, error.peer) == (manager.name, "SAE-B")
    assert error.hint
    if call == "get by ID":
        assert set(error.key_ids) & {*interface.ids, THIRD}
    earlier = len(interface.right[call]) > 1 and fault not in UNCONNECTED  # a key that came before
    assert error.keys_may_be_lost is (call != "status" and (earlier or fault not in NO_KEY_TAKEN))
    text = everything_in(error) + "".join(traceback.format_exception(error)) + repr(manager) + logged
    assert [spelling for key in KEYS for spelling in spellings(key) if spelling in text] == []


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.name)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", NETWORK)
def test_the_network(
    pki: DemoPKI, caplog: pytest.LogCaptureFixture, interface: Interface, call: str, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    build, kind, says = NETWORK[fault]
    with build(pki, interface.answers(call)) as port:
        manager = interface.client(pki, f"https://127.0.0.1:{port}", **LIMITS.get(fault, LONG))
        try:
            with bounded(), pytest.raises(KMSError, match=says) as caught:
                ask(manager, call, interface.ids)
        finally:
            manager.close()
    assert type(caught.value) is kind
    check(caught.value, manager, interface, call, fault, caplog.text)


CELLS = [(interface, fault) for interface in INTERFACES for fault in interface.faults]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("interface", "fault"), CELLS, ids=[f"{i.name}: {fault}" for i, fault in CELLS])
def test_answers(
    pki: DemoPKI, caplog: pytest.LogCaptureFixture, interface: Interface, call: str, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    answer, expected = interface.faults[fault]
    kind = expected[call]
    answers: list[Answer] = [*interface.answers(call)[:-1], answer]
    server = ScriptedKME(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), answers)
    manager = interface.client(pki, f"https://127.0.0.1:{server.port}", **LONG)
    try:
        with bounded():
            if isinstance(kind, str):
                assert len(ask(manager, call, interface.ids)) == 2
                return
            with pytest.raises(KMSError) as caught:
                ask(manager, call, interface.ids)
        assert type(caught.value) is kind
        check(caught.value, manager, interface, call, fault, caplog.text)
        # Nothing is left of it: the next call is served.
        server.answers[:] = [renamed(answer) for answer in interface.right[call]]
        assert ask(manager, call, [renamed(key_id.encode()).decode() for key_id in interface.ids])
    finally:
        manager.close()
        server.close()


def renamed(answer: bytes) -> bytes:
    """The same keys under IDs of the same length that were never delivered."""
    return answer.replace(b"50e8400", b"50e8499")


# --- a pool and a failover manager around the client

ETSI_PAIRS = http(200, {**ETSI_STATUS, "max_key_per_request": 2})


@contextmanager
def faulty(pki: DemoPKI, fault: str, *before: bytes) -> Iterator[str]:
    """The URL of a KME that gives these answers before it has a fault, which it has for ever."""
    if fault in NETWORK:
        with NETWORK[fault][0](pki, [*before, *ETSI_014.right["get"]]) as port:
            yield f"https://127.0.0.1:{port}"
    else:
        context = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
        with serving(context, *before, ETSI_014.faults[fault][0]) as port:
            yield f"https://127.0.0.1:{port}"


PAUSE = 10.0 * PATIENCE  # longer than anybody waits: each request is made once


def pool_of(manager: KeyManager) -> KeyPool:
    return KeyPool(manager, timeout=PATIENCE, min_backoff=PAUSE, max_backoff=PAUSE)


def failover_of(members: list[KeyManager]) -> FailoverKeyManager:
    return FailoverKeyManager(members, threshold=1, min_backoff=PAUSE, max_backoff=PAUSE)


@pytest.mark.parametrize("fault", [*NETWORK, *ETSI_014.faults])
def test_what_a_pool_knows_afterwards(pki: DemoPKI, fault: str) -> None:
    kind = NETWORK[fault][1] if fault in NETWORK else ETSI_014.faults[fault][1]["get"]
    # It asks for the status first, then for keys.
    with (
        faulty(pki, fault, ETSI_PAIRS) as url,
        contextlib.closing(pool_of(ETSI_014.client(pki, url, **LIMITS.get(fault, LONG)))) as pool,
    ):
        if isinstance(kind, str):
            assert len(pool.get_keys("SAE-B", 2)) == pool.statistics.delivered == 2
            return
        with pytest.raises(kind) as caught:
            pool.get_keys("SAE-B", 2)
        assert type(caught.value) is kind
        found = pool.statistics
    assert (found.pooled, found.waiting, found.fetched, found.delivered) == (0, 0, 0, 0)
    assert (found.requests, found.failures) == (fault not in UNCONNECTED, 1)
    assert found.possibly_lost == (0 if fault in NO_KEY_TAKEN else 2)
    # What the KME has answered counts against the peer.
    answered = caught.value.status is not None or issubclass(kind, (NoKeysLeft, KMSRequestError))
    assert found.breaker is (BreakerState.CLOSED if answered else BreakerState.OPEN)


@pytest.mark.parametrize("fault", [*NETWORK, *ETSI_014.faults])
def test_what_a_failover_manager_knows_afterwards(pki: DemoPKI, fault: str) -> None:
    kind = NETWORK[fault][1] if fault in NETWORK else ETSI_014.faults[fault][1]["get"]
    right = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca)
    with faulty(pki, fault) as url, serving(right, *map(renamed, ETSI_014.right["get"])) as port:
        members = [
            ETSI_014.client(pki, url, **LIMITS.get(fault, LONG)),
            ETSI_014.client(pki, f"https://127.0.0.1:{port}", **LONG),
        ]
        with contextlib.closing(failover_of(members)) as failover:
            keys = failover.get_keys("SAE-B", 2)
            served_by = {failover.served_by(key.key_id) for key in keys}
            first, second = failover.health
    assert len(keys) == 2
    assert (second.breaker, second.failures, second.possibly_lost) == (BreakerState.CLOSED, 0, 0)
    if isinstance(kind, str):
        assert (first.served, second.served, served_by) == (2, 0, {first.name})
        assert (first.breaker, first.failures, first.last_error) == (BreakerState.CLOSED, 0, "")
        return
    assert (first.served, second.served, served_by) == (0, 2, {second.name})
    assert (first.failures, first.possibly_lost) == (1, 0 if fault in NO_KEY_TAKEN else 2)
    assert url in first.last_error
    well = issubclass(kind, (NoKeysLeft, KMSRequestError))  # the KME works
    assert first.breaker is (BreakerState.CLOSED if well else BreakerState.OPEN)


def test_kmes_that_answer_with_no_keys_are_asked_for_one_after_the_other(pki: DemoPKI) -> None:
    context, nothing = server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), etsi_keys()
    one, two = (etsi_keys((key_id, key)) for key_id, key in zip(IDS, KEYS, strict=False))
    with serving(context, nothing, one, nothing) as first, serving(context, nothing, two) as second:
        members = [ETSI_014.client(pki, f"https://127.0.0.1:{port}") for port in (first, second)]
        with contextlib.closing(failover_of(members)) as failover:
            keys = failover.get_keys_by_id("SAE-B", IDS)
            health = failover.health
    assert [key.key_id for key in keys] == IDS
    assert [(member.served, member.possibly_lost) for member in health] == [(1, 0), (1, 0)]
