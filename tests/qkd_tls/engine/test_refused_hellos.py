"""What the parser of ClientHellos refuses never becomes a ServerHello, whatever OpenSSL thinks of it.

The generated ClientHellos are those of a real client, changed as OpenSSL may still take them: extensions twice, unknown
or in another order, other names, longer lists, other records. OpenSSL itself is asked, too: where it objects, it is its
alert that the client gets.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_tls import Policy
from qkd_tls.client_hello import ClientHelloError, parse_client_hello
from qkd_tls.engine import ChooseContext
from qkd_tls.openssl import TLSConnection
from tests.support.attacks import extensions
from tests.support.client_hellos import extension, psk, read, record, records, sni, v8, v16, v24
from tests.support.memory import World
from tests.support.sizes import sized

_HANDSHAKE_FAILURE = 40
_ALERT = 21
CHANGES = "twice", "unknown", "many", "move", "name", "alpn", "groups", "shares", "cut", "longer", "psk"

_tls = TLSConnection(World().client_context, server_hostname="server.example", alpn=("http/1.1",))
_tls.handshake()
START, EXTENSIONS = extensions(_tls.take())
"""A client's ClientHello up to its extensions, and these."""

_names = st.one_of(
    st.sampled_from([b"", b"a b", b"a\n", b"\x80", b"a\0b", b"a.example", b"x" * 300]), st.binary(max_size=5)
)
_binder_sizes = st.lists(st.sampled_from([0, 31, 32, 48, 255]), max_size=3)


_psks = st.builds(
    psk,
    st.lists(st.binary(max_size=6), max_size=3),
    _binder_sizes.map(lambda sizes: [bytes(size) for size in sizes]),
)


@st.composite
def _changed(draw: st.DrawFn) -> list[bytes]:
    """Change a real client's extensions a few times."""
    changed = [extension(kind, content) for kind, content in EXTENSIONS.items()]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(changed) - 1))
        kind, content = int.from_bytes(changed[place][:2], "big"), changed[place][4:]
        change = draw(st.sampled_from(CHANGES))
        if change == "twice":
            changed.insert(draw(st.integers(0, len(changed))), changed[place])
        elif change == "unknown":
            changed[place:place] = [extension(0x7777, b"x")] * draw(st.integers(1, 2))
        elif change == "many":
            number = draw(st.integers(200, 300))
            changed[place:place] = [extension(0x7000 + kind, b"") for kind in range(number)]
        elif change == "move":
            changed.insert(draw(st.integers(0, len(changed) - 1)), changed.pop(place))
        elif change == "name":
            changed[place] = sni(*draw(st.lists(st.tuples(st.sampled_from([0, 0, 1]), _names), max_size=2)))
        elif change == "alpn":
            protocols = draw(st.lists(st.sampled_from([b"", b"h2", b"qkd-tls/1"]), max_size=3))
            changed[place] = extension(16, v16(*map(v8, protocols * draw(st.sampled_from([1, 1, 200])))))
        elif change == "groups":
            changed[place] = extension(10, v16(draw(st.sampled_from([b"", b"\0", b"\x11\xec", bytes(1000)]))))
        elif change == "shares":
            # An empty list asks for a HelloRetryRequest.
            changed = [one for one in changed if one[:2] != b"\0\x33"]
            changed.insert(0, extension(51, v16()))
        elif change == "cut":
            changed[place] = extension(kind, content[: draw(st.integers(0, len(content)))])
        elif change == "longer":
            changed[place] = extension(kind, content + b"\0")
        else:
            changed.append(draw(_psks))
    return changed


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """Make a stream of such a ClientHello, in records of any size, and what follows it."""
    message = b"\x01" + v24(START, v16(*draw(_changed())), draw(st.sampled_from([b"", b"", b"", b"\0"])))
    size = draw(st.sampled_from([16384, 16384, 1000, 3, 1]))
    pieces = [message[start : start + size] for start in range(0, len(message), size)]
    if draw(st.integers(0, 5)) == 0:
        pieces.insert(draw(st.integers(0, len(pieces) - 1)), b"")
    behind = draw(st.sampled_from([b"", b"", record(b""), records(message), b"\x17\x03\x03\0\1x"]))
    return b"".join(map(record, pieces)) + behind


def _refusal(stream: bytes) -> ClientHelloError | None:
    try:
        message, _ = read(stream)
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
