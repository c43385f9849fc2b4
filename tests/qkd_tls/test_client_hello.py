"""The ClientHello parser: on real ones, cut and damaged at every place, and on anything at all."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL

from qkd_tls.client_hello import (
    ClientHello,
    ClientHelloError,
    ClientHelloReader,
    group_names,
    parse_client_hello,
)
from qkd_tls.records import RecordBuffer
from tests.support.client_hellos import extension, hello, psk, read, record, records, sni, v8, v16, v24

pytestmark = pytest.mark.pure


def stdlib_stream(server_name: str | None, alpn: list[str]) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(alpn)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=server_name).do_handshake()
    return outgoing.read()


def openssl_stream(configure: Callable[[SSL.Context], None] = lambda _: None) -> bytes:
    context = SSL.Context(SSL.TLS_METHOD)
    configure(context)
    connection = SSL.Connection(context)
    connection.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        connection.do_handshake()
    return connection.bio_read(65536)


def only_tls12(context: SSL.Context) -> None:
    context.set_max_proto_version(SSL.TLS1_2_VERSION)


def parsed(stream: bytes) -> ClientHello:
    message, rest = read(stream)
    assert message is not None
    assert not rest
    return parse_client_hello(message)


STREAMS = {
    "stdlib": stdlib_stream(None, []),
    "stdlib, SNI": stdlib_stream("server.example", []),
    "stdlib, SNI, ALPN": stdlib_stream("server.example", ["qkd-tls/1", "h2"]),
    "pyOpenSSL": openssl_stream(),
    "pyOpenSSL, ALPN": openssl_stream(lambda context: context.set_alpn_protos([b"http/1.1"])),
    "pyOpenSSL, TLS 1.2": openssl_stream(only_tls12),
    "PSK": records(
        hello(
            sni((0, b"server.example")),
            extension(43, v8(b"\x03\x04")),
            extension(45, v8(b"\x01")),
            psk([b"qkd1.x", b"another"], [bytes(48), bytes(32)]),
        ),
        100,
    ),
}
every_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


class TestRealClients:
    def test_standard_library(self) -> None:
        result = parsed(STREAMS["stdlib, SNI, ALPN"])
        assert result.server_name == "server.example"
        assert result.alpn == (b"qkd-tls/1", b"h2")
        assert result.psk_identities == ()
        assert result.versions[0] == 0x0304

    def test_without_sni_and_alpn(self) -> None:
        result = parsed(STREAMS["stdlib"])
        assert (result.server_name, result.alpn) == (None, ())

    def test_pyopenssl(self) -> None:
        result = parsed(STREAMS["pyOpenSSL, ALPN"])
        assert result.alpn == (b"http/1.1",)
        # OpenSSL 3.5 and newer send this share by default, which also makes the message a long one.
        assert 4588 in result.groups
        assert "X25519MLKEM768" in group_names(result.groups)

    def test_tls_1_2(self) -> None:
        result = parsed(STREAMS["pyOpenSSL, TLS 1.2"])
        assert result.versions == (0x0303,)

    def test_psk(self) -> None:
        result = parsed(STREAMS["PSK"])
        assert result.psk_identities == (b"qkd1.x", b"another")
        assert result.versions == (0x0304,)
        assert result.server_name == "server.example"


class TestReading:
    @every_stream
    def test_cut_anywhere(self, stream: bytes) -> None:
        for end in range(len(stream)):
            assert read(stream[:end])[0] is None

    @every_stream
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 100, 16384])
    def test_any_record_size(self, stream: bytes, size: int) -> None:
        message, _ = read(stream)
        assert message is not None
        assert read(records(message, size)) == (message, 0)

    @every_stream
    @pytest.mark.parametrize("size", [1, 5, 16384])
    def test_each_byte_is_touched_a_few_times(
        self, stream: bytes, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However small the pieces are that it comes in; each look is at a few bytes."""
        message, _ = read(stream)
        assert message is not None
        peeked = 0
        peek = RecordBuffer.peek

        def counting(buffer: RecordBuffer, size: int) -> bytes:
            nonlocal peeked
            found = peek(buffer, size)
            peeked += len(found)
            return found

        monkeypatch.setattr(RecordBuffer, "peek", counting)
        buffer, reader, split = RecordBuffer(), ClientHelloReader(), records(message, size)
        for number in range(len(split)):
            assert reader.read(buffer) is None
            buffer.feed(split[number : number + 1])
        assert reader.read(buffer) == message
        assert peeked <= 20 * len(split)

    @every_stream
    def test_given_back(self, stream: bytes) -> None:
        message, _ = read(stream)
        assert message is not None
        buffer, reader = RecordBuffer(), ClientHelloReader()
        buffer.feed(records(message, 3) + b"next")
        assert reader.read(buffer) == message
        reader.give_back(buffer)
        assert read(buffer.take_all()[:-4]) == (message, 0)

    @every_stream
    def test_what_follows_is_left(self, stream: bytes) -> None:
        assert read(stream + b"\x17\x03\x03next") == (read(stream)[0], 7)

    @pytest.mark.parametrize(
        ("stream", "reason"),
        [
            (b"GET /", "not TLS: a record of type 71"),
            (b"\x80\0\0\0\0", "not TLS: a record of type 128"),
            (b"\x15\x03\x01\0\0", "record of type 21"),
            (b"\x17\x03\x01\0\0", "record of type 23"),
            (b"\x16\x02\0\0\0", "major version 2"),
            (b"\x16\x03\x01\0\0", "record of 0 bytes"),
            (b"\x16\x03\x01\x40\x01", "record of 16385 bytes"),
            (b"\x16\x03\x01\0\x05\x02", "message of type 2"),
            (b"\x16\x03\x01\0\x05\x01\0\xff\xfc", "ClientHello of 65536 bytes"),
            (b"\x16\x03\x01\0\x05\x01\0\0\0", "goes on after the ClientHello"),
            (record(hello() + b"\0")[:9], "goes on after the ClientHello"),
            (record(hello()[:20]) + record(hello()[20:] + b"\0")[:5], "goes on after the ClientHello"),
            (record(hello()[:20]) + b"\x14\x03\x01\0\1", "record of type 20"),
            (record(hello()[:20]) + b"\x16\x03\x03\0\0", "record of 0 bytes"),
        ],
    )
    def test_refused_as_early_as_possible(self, stream: bytes, reason: str) -> None:
        with pytest.raises(ClientHelloError, match=reason):
            read(stream)
        assert read(stream[:-1])[0] is None

    def test_longest(self) -> None:
        longest = hello(extension(21, bytes(65535 - len(hello()) - 4)))
        assert len(longest) == 65535
        assert read(records(longest)) == (longest, 0)
        assert parse_client_hello(longest).server_name is None

    def test_nothing_yet(self) -> None:
        assert read(b"") == (None, 0)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        try:
            message, rest = read(data)
        except ClientHelloError:
            return
        assert message is None or len(message) + rest < len(data)


class TestParsing:
    @every_stream
    def test_cut_anywhere(self, stream: bytes) -> None:
        message, _ = read(stream)
        assert message is not None
        for end in range(len(message)):
            with pytest.raises(ClientHelloError):
                parse_client_hello(message[:end])
            # The same with the length set right, so that what is inside is cut.
            if end >= 4:
                try_to_parse(b"\x01" + v24(message[4:end]))

    @every_stream
    def test_damaged_anywhere(self, stream: bytes) -> None:
        message, _ = read(stream)
        assert message is not None
        chance = random.Random(1)
        for position in range(len(message)):
            damaged = bytearray(message)
            damaged[position] = chance.choice([0, 1, 0xFF, damaged[position] ^ 1])
            try_to_parse(bytes(damaged))

    @given(st.binary(max_size=300))
    def test_any_bytes(self, data: bytes) -> None:
        try_to_parse(data)
        try_to_parse(b"\x01" + v24(data))
        try_to_parse(hello(tail=data))

    @given(
        st.lists(
            st.tuples(st.sampled_from([0, 10, 13, 16, 41, 43, 45, 51]), st.binary(max_size=40)), max_size=4
        )
    )
    def test_any_extensions(self, extensions: list[tuple[int, bytes]]) -> None:
        try_to_parse(hello(*(extension(kind, data) for kind, data in extensions)))

    def test_without_extensions(self) -> None:
        for tail in (b"", b"\0\0"):
            result = parse_client_hello(hello(tail=tail))
            assert (result.server_name, result.alpn, result.psk_identities) == (None, (), ())
            assert result.groups == ()
            assert result.versions == (0x0303,)

    def test_names_of_other_types_are_skipped(self) -> None:
        assert parse_client_hello(hello(sni((1, b"\xff"), (0, b"a.example")))).server_name == "a.example"
        assert parse_client_hello(hello(sni((1, b"\xff")))).server_name is None

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            (b"", "handshake type is truncated"),
            (b"\x02" + hello()[1:], "not a ClientHello"),
            (hello() + b"\0", "bytes after the end of ClientHello"),
            (hello(tail=b"\0\0\0"), "bytes after the end of ClientHello"),
            (hello(tail=b"\0"), "extensions is truncated"),
            (b"\x01" + v24(b"\x03\x03", bytes(32), v8(bytes(33))), "legacy_session_id longer"),
            (b"\x01" + v24(b"\x03\x03", bytes(32), v8(), v16()), "cipher_suites has 0 bytes"),
            (b"\x01" + v24(b"\x03\x03", bytes(32), v8(), v16(bytes(3))), "cipher_suites has 3 bytes"),
            (b"\x01" + v24(b"\x03\x03", bytes(32), v8(), v16(bytes(2)), v8()), "compression_methods has 0"),
            (hello(extension(5, b""), extension(5, b"")), "extension 5 appears twice"),
            (hello(psk([b"x"], [bytes(32)]), extension(5, b"")), "pre_shared_key is not the last"),
            (hello(psk([b"x"], [bytes(32)]), psk([b"x"], [bytes(32)])), "pre_shared_key is not the last"),
            (hello(psk([], [])), "empty list"),
            (hello(psk([b""], [bytes(32)])), "empty identity"),
            (hello(psk([b"x"], [])), "1 PSK identities but 0 binders"),
            (hello(psk([b"x"], [bytes(32)] * 2)), "1 PSK identities but 2 binders"),
            (hello(psk([b"x"], [bytes(31)])), "shorter than 32"),
            (hello(extension(41, v16(v16(b"x") + bytes(3)) + v16(v8(bytes(32))))), "age is truncated"),
            (
                hello(extension(41, v16(v16(b"x"), bytes(4)) + v16(v8(bytes(32))) + b"\0")),
                "end of pre_shared",
            ),
            (hello(extension(0, b"")), "server_name is truncated"),
            (hello(extension(0, v16())), "server_name is empty"),
            (hello(extension(0, v16(b"\0" + v16(b"a")) + b"\0")), "after the end of server_name"),
            (hello(sni((0, b"a"), (0, b"b"))), "two host names"),
            (hello(sni((0, b""))), "not a host name"),
            (hello(sni((0, b"a\0b"))), "not a host name"),
            (hello(sni((0, "é.example".encode()))), "not a host name"),
            (hello(extension(16, v16())), "ALPN has an empty list"),
            (hello(extension(16, v16(v8()))), "empty name"),
            (hello(extension(16, v16(v8(b"h2")) + b"\0")), "after the end of ALPN"),
            (hello(extension(10, v16())), "supported_groups has 0 bytes"),
            (hello(extension(10, v16(b"\0"))), "supported_groups has 1 bytes"),
            (hello(extension(10, v16(b"\0\x1d") + b"\0")), "after the end of supported_groups"),
            (hello(extension(43, v8())), "supported_versions has 0 bytes"),
            (hello(*(extension(1000 + number, b"") for number in range(257))), "more than 256 extensions"),
            (hello(extension(10, v16(bytes(514)))), "more than 256 supported_groups"),
            (hello(extension(16, v16(v8(b"x") * 257))), "more than 256 ALPN protocols"),
            (hello(psk([b"x"] * 257, [bytes(32)] * 257)), "more than 256 PSK identities"),
        ],
    )
    def test_named(self, message: bytes, reason: str) -> None:
        with pytest.raises(ClientHelloError, match=reason):
            parse_client_hello(message)


def try_to_parse(message: bytes) -> None:
    """Parse it or raise ClientHelloError, nothing else."""
    try:
        result = parse_client_hello(message)
    except ClientHelloError:
        return
    assert all(result.alpn)
    for numbers in (result.groups, result.versions):
        assert all(isinstance(number, int) for number in numbers)


def test_group_names() -> None:
    assert group_names([4588, 29, 23]) == "X25519MLKEM768, X25519, secp256r1"
    assert group_names([0x0A0A]) == "0x0a0a"
    assert group_names([]) == "none"
