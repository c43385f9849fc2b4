"""kafka-python and aiokafka against a Kafka broker of a few lines."""

from __future__ import annotations

import gc
import socket
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import aiokafka  # type: ignore[import-untyped]

from tests.support.dropin.harness import (
    DIGEST,
    HALF,
    LIMIT,
    PATIENCE,
    PAYLOAD,
    Program,
    digest,
    drain,
    end_cleanly,
    truncate,
)

with warnings.catch_warnings():
    # It reads its files by importlib.resources.read_text.
    warnings.simplefilter("ignore", DeprecationWarning)
    import kafka  # type: ignore[import-untyped]

__all__ = ["PROGRAMS"]

_PRODUCE, _FETCH, _OFFSETS, _METADATA, _VERSIONS = 0, 1, 2, 3, 18
_SPOKEN: Final = {_PRODUCE: 3, _FETCH: 4, _OFFSETS: 1, _METADATA: 1, _VERSIONS: 0}
"""The one version that the broker speaks of each kind of request."""


def string(text: str) -> bytes:
    return struct.pack("!h", len(text)) + text.encode()


def array(*items: bytes) -> bytes:
    return struct.pack("!i", len(items)) + b"".join(items)


class Reader:
    """Takes a request apart."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"!{form}", self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def data(self, form: str) -> bytes:
        size = max(0, self.take(form))
        self._at += size
        return self._data[self._at - size : self._at]

    def partitions(self) -> Iterator[str]:
        """The topic of each partition; the caller takes what follows its number."""
        for _ in range(self.take("i")):
            topic = self.data("h").decode()
            for _ in range(self.take("i")):
                self.take("i")
                yield topic


class KafkaClient(Program):
    def start(self) -> None:
        self.stored = b""
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        """A broker that keeps the last batch of records. Of some topics it tells the half of an answer."""
        with self.ends.accept(raw) as tls, tls.makefile("rb") as file:
            while head := file.read(4):
                request = Reader(file.read(*struct.unpack("!i", head)))
                kind, version, number = request.take("h"), request.take("h"), request.take("i")
                request.data("h")
                answer = self.answers()[kind](request, version)
                if isinstance(answer, str):
                    tls.sendall(struct.pack("!ii", 100, number) + HALF)
                    file.close()
                    {"silent": drain, "end": end_cleanly, "cut": truncate}[answer](tls)
                    return
                tls.sendall(struct.pack("!ii", len(answer) + 4, number) + answer)

    def answers(self) -> dict[int, Callable[[Reader, int], bytes | str]]:
        return {
            _VERSIONS: self.versions,
            _METADATA: self.metadata,
            _PRODUCE: self.produce,
            _OFFSETS: self.offsets,
            _FETCH: self.fetch,
        }

    def versions(self, _: Reader, version: int) -> bytes:
        unsupported = 35 if version else 0
        return struct.pack("!h", unsupported) + array(
            *(struct.pack("!hhh", kind, spoken, spoken) for kind, spoken in _SPOKEN.items())
        )

    def metadata(self, request: Reader, _: int) -> bytes:
        topics = [request.data("h").decode() for _ in range(request.take("i"))]
        broker = struct.pack("!i", 0) + string("localhost") + struct.pack("!ih", self.port, -1)
        partition = struct.pack("!hii", 0, 0, 0) + array(struct.pack("!i", 0)) * 2
        return (
            array(broker)
            + struct.pack("!i", 0)
            + array(*(struct.pack("!h", 0) + string(topic) + b"\0" + array(partition) for topic in topics))
        )

    def produce(self, request: Reader, _: int) -> bytes | str:
        request.data("h"), request.take("h"), request.take("i")
        for topic in request.partitions():
            if topic != "payload":
                return topic
            self.stored = request.data("i")
        return array(string("payload") + array(struct.pack("!ihqq", 0, 0, 0, -1))) + struct.pack("!i", 0)

    def offsets(self, _: Reader, __: int) -> bytes:
        return array(string("payload") + array(struct.pack("!ihqq", 0, 0, -1, 0)))

    def fetch(self, request: Reader, _: int) -> bytes:
        for form in "iiiib":
            request.take(form)
        records = b""
        for _topic in request.partitions():
            offset, _size = request.take("q"), request.take("i")
            records = self.stored if offset == 0 else b""
        partition = struct.pack("!ihqqii", 0, 0, 1, 1, -1, len(records)) + records
        return struct.pack("!i", 0) + array(string("payload") + array(partition))

    def put(self, topic: str, message: bytes, timeout: float) -> object:
        raise NotImplementedError

    def get(self) -> bytes:
        raise NotImplementedError

    def common(self) -> dict[str, Any]:
        return {
            "bootstrap_servers": f"localhost:{self.port}",
            "security_protocol": "SSL",
            "ssl_context": self.ends.client,
        }

    def producer(self, timeout: float) -> dict[str, Any]:
        return {
            **self.common(),
            "max_request_size": 20_000_000,
            "enable_idempotence": False,
            "request_timeout_ms": int(timeout * 1000),
        }

    def consumer(self) -> dict[str, Any]:
        return {
            **self.common(),
            "auto_offset_reset": "earliest",
            "max_partition_fetch_bytes": 20_000_000,
            "check_crcs": False,
        }

    def connects(self) -> object:
        self.put("payload", b"hello", PATIENCE)
        return self.get() == b"hello"

    def up(self) -> object:
        self.put("payload", PAYLOAD, PATIENCE)
        return PAYLOAD in self.stored

    def down(self) -> object:
        return digest(self.get()) == DIGEST

    def timeout(self) -> object:
        return self.put("silent", b"hello", LIMIT)

    def eof(self) -> object:
        return self.put("end", b"hello", 1)

    def truncation(self) -> object:
        return self.put("cut", b"hello", 1)


class KafkaPython(KafkaClient):
    name = distribution = "kafka-python"
    how = 'KafkaProducer(security_protocol="SSL", ssl_context=context)'

    def start(self) -> None:
        # It leaves sockets to the garbage collector, with the standard library's context too.
        self.stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)
        self.stack.callback(gc.collect)
        super().start()

    def put(self, topic: str, message: bytes, timeout: float) -> object:
        producer = kafka.KafkaProducer(**self.producer(timeout), retries=0)
        try:
            return producer.send(topic, message).get(timeout=PATIENCE)
        finally:
            producer.close()

    def get(self) -> bytes:
        consumer = kafka.KafkaConsumer(**self.consumer())
        try:
            partition = kafka.TopicPartition("payload", 0)
            consumer.assign([partition])
            return bytes(next(consumer).value)
        finally:
            consumer.close()


class AIOKafka(KafkaClient):
    name = distribution = "aiokafka"
    how = 'AIOKafkaProducer(security_protocol="SSL", ssl_context=context)'

    def put(self, topic: str, message: bytes, timeout: float) -> object:
        async def run() -> object:
            async with aiokafka.AIOKafkaProducer(**self.producer(timeout)) as producer:
                return await producer.send_and_wait(topic, message)

        return self.run(run())

    def get(self) -> bytes:
        async def run() -> bytes:
            consumer = aiokafka.AIOKafkaConsumer(**self.consumer())
            consumer.assign([aiokafka.TopicPartition("payload", 0)])
            async with consumer:
                return bytes((await consumer.getone()).value)

        return self.run(run())


PROGRAMS: list[type[Program]] = [KafkaPython, AIOKafka]
