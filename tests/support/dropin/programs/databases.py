"""redis-py, pg8000, psycopg and paho-mqtt against real servers."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import paho.mqtt.client as mqtt
import pg8000.native  # type: ignore[import-untyped]
import psycopg
import redis
from paho.mqtt.enums import CallbackAPIVersion
from redis.backoff import NoBackoff
from redis.connection import SSLConnection
from redis.retry import Retry

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
from tests.support.dropin.tunnelled import TunnelledProgram, binary, free_port, server_tunnel, service

__all__ = ["PROGRAMS"]


# --- redis


def redis_server(program: Program, *tls: str) -> int:
    """A real server; its port."""
    port = free_port()
    folder = program.stack.enter_context(tempfile.TemporaryDirectory())
    ports = ["--port", "0", "--tls-port", str(port), *tls] if tls else ["--port", str(port)]
    command = [
        binary("redis-server", "redis-server"),
        *ports,
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        folder,
    ]
    service(program, command, port)
    return port


class RedisTunnelled(TunnelledProgram):
    name = "redis-py, redis-server"
    distribution = "redis"

    def server(self) -> int:
        return redis_server(self)

    def client(self, timeout: float = PATIENCE) -> redis.Redis:
        return redis.Redis(
            host="localhost", port=self.port, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )

    def connects(self) -> object:
        with self.client() as client:
            return client.ping()

    def up(self) -> object:
        with self.client() as client:
            client.set("payload", PAYLOAD)
            return client.strlen("payload") == len(PAYLOAD)

    def down(self) -> object:
        with self.client() as client:
            value: Any = client.get("payload")
            return digest(value) == DIGEST

    def interrupted(self) -> object:
        with self.client(LIMIT) as client:
            client.ping()
            self.interrupt()
            return client.ping()


class RedisDirect(RedisTunnelled):
    name = "redis-py, direct, redis-server behind a server tunnel"
    role = "client"
    how = "class HybridConnection(SSLConnection): _wrap_socket_with_ssl = lambda self, sock: context.wrap_socket(...)"
    notes: ClassVar[Mapping[str, str]] = {
        "connects": "redis-py makes its own context. The other run is against redis-server's own TLS.",
    }

    def start(self) -> None:
        identity = self.ends.sites.server
        if self.ends.hybrid:
            # A client with a context of its own has no certificate here.
            self.port = server_tunnel(self, redis_server(self), tls='verify_client = "none"\n')
        else:
            self.port = redis_server(
                self,
                *("--tls-cert-file", str(identity.cert_file), "--tls-key-file", str(identity.key_file)),
                *("--tls-ca-cert-file", str(self.ends.sites.ca.file), "--tls-auth-clients", "no"),
            )

    def client(self, timeout: float = PATIENCE, port: int | None = None) -> redis.Redis:
        common: dict[str, Any] = {
            "host": "localhost",
            "port": port or self.port,
            "socket_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
        }
        if not self.ends.hybrid:
            return redis.Redis(ssl=True, ssl_ca_certs=str(self.ends.sites.ca.file), **common)
        ends = self.ends

        class HybridConnection(SSLConnection):
            def _wrap_socket_with_ssl(self, sock: socket.socket) -> Any:
                return ends.note(ends.client.wrap_socket(sock, server_hostname=self.host))

        # A client that is given its pool this way closes it, too.
        return redis.Redis.from_pool(redis.ConnectionPool(connection_class=HybridConnection, **common))

    def scripted(self, end: Callable[[Any], None]) -> object:
        def serve(raw: socket.socket) -> None:
            with self.ends.accept(raw) as tls, tls.makefile("rb") as file:
                while line := file.readline():
                    words = []
                    for _ in range(int(line[1:])):
                        size = int(file.readline()[1:])
                        words.append(file.read(size + 2)[:-2])
                    match words[0]:
                        case b"HELLO":
                            tls.sendall(b"%1\r\n+proto\r\n:3\r\n")
                        case b"GET":
                            tls.sendall(b"$10\r\n" + HALF)
                            file.close()
                            end(tls)
                            return
                        case _:
                            tls.sendall(b"+OK\r\n")

        with self.client(LIMIT, self.peer(serve)) as client:
            return client.get("x")

    def timeout(self) -> object:
        return self.scripted(drain)

    def eof(self) -> object:
        return self.scripted(end_cleanly)

    def truncation(self) -> object:
        return self.scripted(truncate)


# --- PostgreSQL


def postgresql(program: Program) -> int:
    """A real server; its port."""
    initdb, postgres, ready = (binary(name, "postgresql") for name in ("initdb", "postgres", "pg_isready"))
    folder = Path(program.stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    data = folder / "data"
    data.mkdir()
    as_user: list[str] = []
    if os.geteuid() == 0:
        # It refuses to run as root.
        as_user = [
            binary("setpriv", "util-linux"),
            "--reuid",
            "postgres",
            "--regid",
            "postgres",
            "--clear-groups",
        ]
        folder.chmod(0o755)
        shutil.chown(data, "postgres", "postgres")
    subprocess.run(
        [*as_user, initdb, "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    port = free_port()
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": str(data),
        "fsync": "off",
        "port": str(port),
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    service(program, [*as_user, postgres, "-D", str(data), *options], port, stop_by=signal.SIGINT, cwd="/")
    # It takes connections, and refuses them, before it has started up.
    deadline = time.monotonic() + PATIENCE
    while subprocess.run([ready, "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode:
        assert time.monotonic() < deadline, "PostgreSQL does not start up"
        time.sleep(0.05)
    return port


class PostgreSQL(TunnelledProgram):
    def server(self) -> int:
        return postgresql(self)

    @contextlib.contextmanager
    def session(self, timeout: float = PATIENCE) -> Iterator[Callable[..., list[Any]]]:
        """A function that runs SQL with a value for `%s` and returns the rows."""
        raise NotImplementedError

    def connects(self) -> object:
        with self.session() as run:
            run("CREATE TABLE payload (data bytea)")
            return run("SELECT 1")[0][0] == 1

    def up(self) -> object:
        with self.session() as run:
            run("INSERT INTO payload VALUES ({})", PAYLOAD)
            return run("SELECT encode(sha256(data), 'hex') FROM payload")[0][0] == DIGEST

    def down(self) -> object:
        with self.session() as run:
            return digest(bytes(run("SELECT data FROM payload")[0][0])) == DIGEST

    def interrupted(self) -> object:
        with self.session(LIMIT) as run:
            self.interrupt()
            return str(run("SELECT 1"))


class PG8000(PostgreSQL):
    name = "pg8000, PostgreSQL"
    distribution = "pg8000"

    @contextlib.contextmanager
    def session(self, timeout: float = PATIENCE) -> Iterator[Callable[..., list[Any]]]:
        connection = pg8000.native.Connection(
            "postgres", host="localhost", port=self.port, ssl_context=False, timeout=PATIENCE
        )
        connection._usock.settimeout(timeout)

        def run(sql: str, value: bytes | None = None) -> list[Any]:
            return list(connection.run(sql.format(":value"), value=value) or [])

        try:
            yield run
        finally:
            with contextlib.suppress(Exception):
                connection.close()


class Psycopg(PostgreSQL):
    name = "psycopg, PostgreSQL"
    distribution = "psycopg"
    notes: ClassVar[Mapping[str, str]] = {
        "timeout": "libpq limits how long it connects, no more: `connect_timeout`."
    }

    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres sslmode=disable gssencmode=disable"

    @contextlib.contextmanager
    def session(self, timeout: float = PATIENCE) -> Iterator[Callable[..., list[Any]]]:
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:

            def run(sql: str, value: bytes | None = None) -> list[Any]:
                arguments = None if value is None else (value,)
                cursor = connection.execute(sql.format("%s").encode(), arguments, binary=True)
                return cursor.fetchall() if cursor.description else []

            yield run

    def __exit__(self, *details: object) -> None:
        # psycopg leaves a connection that timed out to the garbage collector.
        gc.collect()
        super().__exit__(*details)

    def timeout(self) -> object:
        self.relay.do_instead_of_an_answer(drain, when_new=True)
        return str(psycopg.connect(self.conninfo(), connect_timeout=1))


# --- MQTT


class Paho(TunnelledProgram):
    name = "paho-mqtt, mosquitto"
    distribution = "paho-mqtt"
    notes: ClassVar[Mapping[str, str]] = {"timeout": "`keepalive` is in whole seconds."}

    def server(self) -> int:
        port = free_port()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest none\n"
        )
        folder.chmod(0o755)
        service(self, [binary("mosquitto", "mosquitto"), "-c", str(config)], port)
        return port

    @contextlib.contextmanager
    def session(self) -> Iterator[tuple[mqtt.Client, queue.Queue[Any]]]:
        events: queue.Queue[Any] = queue.Queue()
        client = mqtt.Client(CallbackAPIVersion.VERSION2, reconnect_on_failure=False)
        client.on_connect = lambda *event: events.put(str(event[3]))
        client.on_disconnect = lambda *event: events.put(str(event[3]))
        client.on_subscribe = lambda *event: events.put("subscribed")
        client.on_message = lambda client, userdata, message: events.put(message.payload)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        try:
            assert events.get(timeout=PATIENCE) == "Success"
            yield client, events
        finally:
            client.disconnect()
            client.loop_stop()

    def connects(self) -> object:
        with self.session() as (client, _):
            return client.is_connected()

    def up(self) -> object:
        with self.session() as (client, _):
            # Kept by the server, which confirms that it has it.
            message = client.publish("payload", PAYLOAD, qos=1, retain=True)
            message.wait_for_publish(PATIENCE)
            return message.is_published()

    def down(self) -> object:
        with self.session() as (client, events):
            client.subscribe("payload")
            assert events.get(timeout=PATIENCE) == "subscribed"
            return digest(events.get(timeout=PATIENCE)) == DIGEST

    def interrupted(self) -> object:
        with self.session() as (client, events):
            # Not told to the broker, which would end a client that is late on a busy machine.
            client._keepalive = 1
            self.interrupt()
            return events.get(timeout=PATIENCE)


PROGRAMS: list[type[Program]] = [RedisDirect, RedisTunnelled, PG8000, Psycopg, Paho]
