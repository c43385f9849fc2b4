"""What the parser of ClientHellos refuses never becomes a ServerHello, whatever OpenSSL thinks of it.

The generated ClientHellos are those of a real client, changed as OpenSSL may still take them: extensions twice, unknown
or in another order, other names, longer lists, other records. OpenSSL itself is asked, too: where it objects, it is its
alert that the client gets.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_tls import Policy
from qkd_tls.client_hello import ClientHelloError, ClientHelloReader, parse_client_hello
from qkd_tls.engine import ChooseContext
from qkd_tls.openssl import TLSConnection
from qkd_tls.records import RecordBuffer
from tests.support.memory import World
from tests.support.sizes import sized

_HANDSHAKE_FAILURE = 40
_ALERT = 21

Extensions = list[tuple[int, bytes]]


def _v16(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _server_name(*names: tuple[int, bytes]) -> bytes:
    return _v16(b"".join(bytes([kind]) + _v16(name) for kind, name in names))


def _real_hello() -> tuple[bytes, Extensions]:
    """Return a client's ClientHello up to its extensions, and these."""
    tls = TLSConnection(World().client_context, server_hostname="server.example", alpn=("http/1.1",))
    tls.handshake()
    message = tls.take()[5:]
    position = 4 + 2 + 32
    position += 1 + message[position]
    position += 2 + int.from_bytes(message[position : position + 2], "big")
    position += 1 + message[position]
    start, found = message[4:position], []
    position += 2
    while position < len(message):
        kind, size = struct.unpack_from(">HH", message, position)
        found.append((kind, message[position + 4 : position + 4 + size]))
        position += 4 + size
    return start, found


START, EXTENSIONS = _real_hello()

_names = st.one_of(
    st.sampled_from([b"", b"a b", b"a\n", b"\x80", b"a\0b", b"a.example", b"x" * 300]), st.binary(max_size=5)
)
_binder_sizes = st.lists(st.sampled_from([0, 31, 32, 48, 255]), max_size=3)


@st.composite
def _psks(draw: st.DrawFn) -> bytes:
    identities = draw(st.lists(st.binary(max_size=6), max_size=3))
    binders = [bytes(size) for size in draw(_binder_sizes)]
    return _v16(b"".join(_v16(identity) + bytes(4) for identity in identities)) + _v16(
        b"".join(bytes([len(binder)]) + binder for binder in binders)
    )


@st.composite
def _changed(draw: st.DrawFn) -> Extensions:
    """Change a real client's extensions a few times."""
    extensions = list(EXTENSIONS)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(extensions) - 1))
        kind, content = extensions[place]
        change = draw(
            st.sampled_from(
                ["twice", "unknown", "many", "move", "name", "alpn", "groups", "cut", "longer", "psk"]
            )
        )
        if change == "twice":
            extensions.insert(draw(st.integers(0, len(extensions))), (kind, content))
        elif change == "unknown":
            extensions[place:place] = [(0x7777, b"x")] * draw(st.integers(1, 2))
        elif change == "many":
            extensions[place:place] = [
                (0x7000 + number, b"") for number in range(draw(st.integers(200, 300)))
            ]
        elif change == "move":
            extensions.insert(draw(st.integers(0, len(extensions) - 1)), extensions.pop(place))
        elif change == "name":
            names = draw(st.lists(st.tuples(st.sampled_from([0, 0, 1]), _names), max_size=2))
            extensions[place] = (0, _server_name(*names))
        elif change == "alpn":
            protocols = draw(st.lists(st.sampled_from([b"", b"h2", b"qkd-tls/1"]), max_size=3))
            copies = draw(st.sampled_from([1, 1, 200]))
            extensions[place] = (16, _v16(b"".join(bytes([len(p)]) + p for p in protocols) * copies))
        elif change == "groups":
            extensions[place] = (10, _v16(draw(st.sampled_from([b"", b"\0", b"\x11\xec", bytes(1000)]))))
        elif change == "cut":
            extensions[place] = (kind, content[: draw(st.integers(0, len(content)))])
        elif change == "longer":
            extensions[place] = (kind, content + b"\0")
        else:
            extensions.append((41, draw(_psks())))
    return extensions


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """Make a stream of such a ClientHello, in records of any size."""
    block = b"".join(struct.pack(">HH", kind, len(content)) + content for kind, content in draw(_changed()))
    body = START + _v16(block) + draw(st.sampled_from([b"", b"", b"", b"\0"]))
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    size = draw(st.sampled_from([16384, 16384, 1000, 3, 1]))
    records = [message[start : start + size] for start in range(0, len(message), size)]
    if draw(st.integers(0, 5)) == 0:
        records.insert(draw(st.integers(0, len(records) - 1)), b"")
    return b"".join(b"\x16\x03\x01" + _v16(record) for record in records)


def _refusal(stream: bytes) -> ClientHelloError | None:
    buffer = RecordBuffer()
    buffer.feed(stream)
    try:
        message = ClientHelloReader().read(buffer)
        if message is not None:
            parse_client_hello(message)
    except ClientHelloError as error:
        return error
    return None


def _openssl(world: World, stream: bytes) -> bytes:
    """Return what OpenSSL's server says."""
    tls = TLSConnection(world.server_context)
    tls.feed(stream)
    with contextlib.suppress(ssl.SSLError):
        tls.handshake()
    return tls.take()


@pytest.mark.parametrize("policy", Policy)
@settings(max_examples=sized(3000, 300))
@given(stream=_streams(), named=st.booleans())
def test_no_answer_but_an_alert(policy: Policy, stream: bytes, named: bool) -> None:
    settings: dict[str, Any] = {"policy": policy, "chooses_by_name": named}
    world = World(server=settings)
    refusal = _refusal(stream)
    side = world.new_server()
    side.engine.receive_data(stream)
    if refusal is None:
        # OpenSSL may still object, once the program has chosen.
        with contextlib.suppress(ssl.SSLError):
            assert isinstance(side.engine.next_action(), ChooseContext) == named
        return
    with pytest.raises(ssl.SSLError):
        side.engine.next_action()
    said, expected = side.engine.data_to_send(), _openssl(world, stream)
    if expected[:1] == bytes([_ALERT]) and expected[6] != _HANDSHAKE_FAILURE:
        assert said == expected
    else:
        assert said == bytes([_ALERT, 3, 3, 0, 2, 2, refusal.alert])
