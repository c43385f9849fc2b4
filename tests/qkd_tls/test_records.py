"""TLS records, one at a time: whatever the pieces they come in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_tls.records import RecordBuffer, alert, handshake_records

pytestmark = pytest.mark.pure


def record(content: bytes, kind: int = 23, minor: int = 3) -> bytes:
    return bytes([kind, 3, minor]) + len(content).to_bytes(2, "big") + content


RECORDS = st.lists(
    st.builds(record, st.binary(max_size=50), st.sampled_from([20, 21, 22, 23]), st.integers(0, 4)),
    max_size=6,
)


@given(records=RECORDS, data=st.data())
def test_records_come_out_as_they_went_in(records: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(records)
    buffer = RecordBuffer()
    found = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        buffer.feed(stream[:size])
        stream = stream[size:]
        while (one := buffer.next_record()) is not None:
            found.append(one)
    assert found == records
    assert not buffer


def test_nothing_is_there_yet() -> None:
    buffer = RecordBuffer()
    assert buffer.next_record() is None
    whole = record(b"content")
    for size in range(len(whole)):
        buffer = RecordBuffer()
        buffer.feed(whole[:size])
        assert buffer.next_record() is None
        assert len(buffer) == size


def test_only_the_first_is_taken() -> None:
    buffer = RecordBuffer()
    buffer.feed(bytearray(record(b"one") + record(b"two")))
    assert buffer.next_record() == record(b"one")
    assert buffer.peek(100) == record(b"two")
    assert len(buffer) == len(record(b"two"))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"G",
        b"\x00",
        bytes([24, 3, 3, 0, 0]),
        bytes([22, 2]),
        bytes([22, 3, 1, 0x41, 1]),
        bytes([23, 3, 3, 0xFF, 0xFF]) + bytes(9),
    ],
    ids=repr,
)
def test_what_cannot_be_a_record_comes_back_at_once(data: bytes) -> None:
    """OpenSSL says what is wrong with it; nobody waits for 65,535 bytes."""
    buffer = RecordBuffer()
    buffer.feed(data)
    assert buffer.next_record() == data
    assert not buffer


def test_the_largest_record() -> None:
    """2^14 bytes of content and 256 for the encryption (RFC 8446 5.2)."""
    largest = record(bytes((1 << 14) + 256))
    buffer = RecordBuffer()
    buffer.feed(memoryview(largest)[:-1])
    assert buffer.next_record() is None
    buffer.feed(largest[-1:])
    assert buffer.next_record() == largest


def test_peek_put_back_and_take_all() -> None:
    buffer = RecordBuffer()
    buffer.feed(b"cdef")
    assert buffer.peek(2) == b"cd"
    buffer.put_back(b"ab")
    assert len(buffer) == 6
    assert buffer.take_all() == b"abcdef"
    assert buffer.take_all() == b""


@pytest.mark.parametrize("size", [1, 16384, 16385, 40000])
def test_a_message_in_records(size: int) -> None:
    message = bytes(number % 251 for number in range(size))
    buffer = RecordBuffer()
    buffer.feed(handshake_records(message))
    contents = []
    while (one := buffer.next_record()) is not None:
        assert one[:3] == b"\x16\x03\x01"
        contents.append(one[5:])
    assert b"".join(contents) == message
    assert [len(content) for content in contents[:-1]] == [16384] * (len(contents) - 1)


def test_alert() -> None:
    assert alert(120) == bytes.fromhex("15 0303 0002 02 78")
