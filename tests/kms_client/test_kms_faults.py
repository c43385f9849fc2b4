"""Everything that can go wrong between a program and its KME, times every call, times every interface.

Each cell runs on real sockets, and is bounded in time and memory, ends in the error that the tables say, and shows no
key. Another interface is one more `Interface` in `INTERFACES`, with its own answers.
"""

from __future__ import annotations

import base64
import contextlib
import gc
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
from dataclasses import dataclass
from typing import Any

import pytest
from kms_support import Answer, ScriptedKME, client_of, container, everything_in, http, issue, spellings

from kms_client import (
    KeyManager,
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    UnknownKey,
    UnknownSAE,
)
from kms_client.emulator import DemoPKI, write_demo_pki
from kms_client.emulator.kme import server_context

CALLS = ("status", "get", "get by ID")
IDS = ["550e8400-e29b-41d4-a716-446655440000", "650e8400-e29b-41d4-a716-446655440abc"]
THIRD = "750e8400-e29b-41d4-a716-446655440abc"
KEYS = [bytes(range(200, 232)), bytes(range(100, 132)), bytes(range(60, 92))]
MOST_SECONDS = 10.0  # of a cell; its time limits are far below, the machine may be slow
MOST_BYTES = 16 << 20  # allocated in a cell, beyond what there was; client and server together

KEYS_ARE_GIVEN = "keys"
"""In place of an error: for this call it is no fault."""

Expected = type[KMSError] | str
Fault = tuple[bytes, Mapping[str, Expected]]


@dataclass(frozen=True)
class Interface:
    """What a KME speaks: how a client of it is made, what it answers rightly, and what its faults are.

    The calls ask for two keys, or for those with `IDS`.
    """

    name: str
    client: Callable[[DemoPKI, str], KeyManager]
    right: Mapping[str, bytes]  # the right answer to each call
    faults: Mapping[str, Fault]  # an answer, and what each call makes of it


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
    lambda pki, url: client_of(pki, url, connect_timeout=0.4, read_timeout=0.5),
    right=dict(
        zip(CALLS, [http(200, ETSI_STATUS), *[etsi_keys(*zip(IDS, KEYS, strict=False))] * 2], strict=True)
    ),
    faults={
        "400": (http(400, {"message": "size shall be a multiple of 8"}), both(KMSRequestError)),
        "401": (http(401), both(KMSAuthenticationError)),
        "404": (http(404, {"message": "Not Found"}), each(UnknownSAE, UnknownSAE, UnknownKey)),
        "500": (http(500, {"message": f"crash with {SECRET_TEXT}"}), both(KMSUnavailable)),
        "503 with a body": (http(503, {"message": "link down"}), both(KMSUnavailable)),
        "503 without a body": (http(503), both(KMSUnavailable)),
        "HTML": (http(200, f"<html>{SECRET_TEXT}</html>"), both(KMSProtocolError)),
        "deep JSON": (http(200, '{"keys":' + "[" * 200_000), both(KMSProtocolError)),
        "wrong base64": (
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
INTERFACES = [ETSI_014]


# --- faults of the network, the same for all interfaces


@contextmanager
def refused(_pki: DemoPKI, _right: bytes) -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def hangs_in_connect(_pki: DemoPKI, _right: bytes) -> Iterator[int]:
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
def hangs_in_handshake(_pki: DemoPKI, _right: bytes) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield silent.getsockname()[1]


@contextmanager
def serving(context: ssl.SSLContext, answer: Answer) -> Iterator[int]:
    server = ScriptedKME(context, [answer])
    try:
        yield server.port
    finally:
        server.close()


def stalling(start: Callable[[bytes], bytes], pause: float | None) -> Any:
    """Sends the start of the right answer, then nothing more, or a space now and then."""

    @contextmanager
    def fault(pki: DemoPKI, right: bytes) -> Iterator[int]:
        over = threading.Event()

        def answer(sock: ssl.SSLSocket) -> None:
            sock.sendall(start(right))
            while not over.wait(pause):
                sock.sendall(b" ")

        with serving(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), answer) as port:
            try:
                yield port
            finally:
                over.set()

    return fault


def head(right: bytes) -> bytes:
    return right[: right.index(b"\r\n\r\n") + 4]


@contextmanager
def reset_mid_body(pki: DemoPKI, right: bytes) -> Iterator[int]:
    def answer(sock: ssl.SSLSocket) -> None:
        sock.sendall(right[:-5])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with serving(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), answer) as port:
        yield port


@contextmanager
def wrong_name(pki: DemoPKI, right: bytes) -> Iterator[int]:
    files = issue(pki, pki.directory / "other-name", "kme.example", "kme.example")
    with serving(server_context(*files, pki.kms_ca), right) as port:
        yield port


@contextmanager
def wrong_ca(pki: DemoPKI, right: bytes) -> Iterator[int]:
    other = write_demo_pki(pki.directory / "foreign")
    with serving(server_context(other.kme_a_cert, other.kme_a_key, pki.kms_ca), right) as port:
        yield port


@contextmanager
def expired(pki: DemoPKI, right: bytes) -> Iterator[int]:
    files = issue(pki, pki.directory / "expired", "KME-A", "127.0.0.1", days=(-30, -1))
    with serving(server_context(*files, pki.kms_ca), right) as port:
        yield port


@contextmanager
def hundred_megabytes(pki: DemoPKI, _right: bytes) -> Iterator[int]:
    entry = b'{"key_ID": "x", "key": "' + SECRET_TEXT.encode() + b'"},'
    block = entry * (65536 // len(entry))
    blocks = 100_000_000 // len(block) + 1

    def answer(sock: ssl.SSLSocket) -> None:
        length = len(b'{"keys": [') + blocks * len(block) + len(b"{}]}")
        sock.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{"keys": [' % length)
        for _ in range(blocks):
            sock.sendall(block)
        sock.sendall(b"{}]}")

    with serving(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), answer) as port:
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


# --- the cells


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


def ask(manager: KeyManager, call: str) -> Any:
    if call == "status":
        return manager.status("SAE-B")
    return manager.get_keys("SAE-B", 2, 256) if call == "get" else manager.get_keys_by_id("SAE-B", IDS)


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where time or memory are not bounded."""
    gc.collect()
    tracemalloc.start()
    began = time.monotonic()
    try:
        yield
        assert time.monotonic() - began < MOST_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def check(error: KMSError, manager: KeyManager, call: str, logged: str) -> None:
    """The error names KME, peer and keys, says what to do, and shows no key."""
    assert (error.kms, error.peer) == (manager.name, "SAE-B")
    assert error.hint
    if call == "get by ID":
        assert set(error.key_ids) & {*IDS, THIRD}
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
    with build(pki, interface.right[call]) as port:
        manager = interface.client(pki, f"https://127.0.0.1:{port}")
        try:
            with bounded(), pytest.raises(KMSError, match=says) as caught:
                ask(manager, call)
        finally:
            manager.close()
    assert type(caught.value) is kind
    check(caught.value, manager, call, caplog.text)


CELLS = [(interface, fault) for interface in INTERFACES for fault in interface.faults]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("interface", "fault"), CELLS, ids=[f"{i.name}: {fault}" for i, fault in CELLS])
def test_answers(
    pki: DemoPKI, caplog: pytest.LogCaptureFixture, interface: Interface, call: str, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    answer, expected = interface.faults[fault]
    kind = expected[call]
    server = ScriptedKME(server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca), [answer])
    manager = interface.client(pki, f"https://127.0.0.1:{server.port}")
    try:
        with bounded():
            if isinstance(kind, str):
                assert len(ask(manager, call)) == 2
                return
            with pytest.raises(KMSError) as caught:
                ask(manager, call)
        assert type(caught.value) is kind
        check(caught.value, manager, call, caplog.text)
        # Nothing is left of it: the next call is served.
        server.answers[:] = [renamed(interface.right[call]) if call == "get" else interface.right[call]]
        assert ask(manager, call)
    finally:
        manager.close()
        server.close()


def renamed(answer: bytes) -> bytes:
    """The same keys under IDs of the same length that were never delivered."""
    return answer.replace(b"50e8400-", b"50e8499-")
