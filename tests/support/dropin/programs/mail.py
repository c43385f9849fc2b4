"""Clients of aiosmtpd and of a small IMAP server, with TLS from the first byte and after STARTTLS."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import imaplib
import smtplib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, ClassVar, Final

import aiosmtplib
import imapclient  # type: ignore[import-untyped]
from aiosmtpd.smtp import SMTP

from tests.support.dropin.harness import (
    HALF,
    PATIENCE,
    PAYLOAD,
    BrokenOff,
    Program,
    digest,
    drain,
    end_cleanly,
    truncate,
)
from tests.support.dropin.programs.http_servers import run_in_thread

__all__ = ["PROGRAMS"]

MESSAGE: Final = b"Subject: test\r\n\r\n" + base64.encodebytes(PAYLOAD[:7_400_000]).replace(b"\n", b"\r\n")
"""10 MB of lines."""

_BREAKS: Final[dict[str, Callable[[Any], None]]] = {"silent": drain, "end": end_cleanly, "cut": truncate}


class SMTPClient(Program):
    starttls = False
    name = "smtplib, TLS from the start, against aiosmtpd"
    how = "SMTP_SSL(host, port, context=context)"
    notes: ClassVar[Mapping[str, str]] = {"down": "SMTP has no way to send 10 MB to a client."}
    without = frozenset({"down"})

    def start(self) -> None:
        self.received: list[bytes] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        run_in_thread(self, self.run_aiosmtpd)

    async def run_aiosmtpd(self, ended: asyncio.Event) -> None:
        received, ends, starttls = self.received, self.ends, self.starttls

        class Handler:
            async def handle_DATA(self, server: SMTP, session: Any, envelope: Any) -> str:
                assert server.transport is not None
                ends.note(server.transport.get_extra_info("ssl_object"))
                received.append(envelope.content)
                return "250 OK"

        def factory() -> SMTP:
            return SMTP(
                Handler(),
                data_size_limit=20_000_000,
                tls_context=ends.server if starttls else None,
                require_starttls=starttls,
                loop=asyncio.get_running_loop(),
                hostname="localhost",
                enable_SMTPUTF8=False,
            )

        loop = asyncio.get_running_loop()
        context = None if starttls else ends.server
        async with await loop.create_server(factory, sock=self.listening, ssl=context):
            await ended.wait()

    def noop(self, port: int, timeout: float) -> int:
        """Ask for nothing; the code of the answer."""
        with contextlib.closing(self.client(port, timeout)) as client:
            self.ends.note(client.sock)
            return client.noop()[0]

    def send(self, message: bytes) -> None:
        with self.client(self.port) as client:
            client.sendmail("a@example.org", ["b@example.org"], message)

    def client(self, port: int, timeout: float = PATIENCE) -> smtplib.SMTP:
        if not self.starttls:
            return smtplib.SMTP_SSL("localhost", port, context=self.ends.client, timeout=timeout)
        client = smtplib.SMTP("localhost", port, timeout=timeout)
        try:
            client.starttls(context=self.ends.client)
        except BaseException:
            client.close()
            raise
        return client

    def connects(self) -> object:
        return self.noop(self.port, PATIENCE) == 250

    def up(self) -> object:
        self.send(MESSAGE)
        return [digest(message) for message in self.received] == [digest(MESSAGE)]

    def down(self) -> object:
        return "none"

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        """What a client makes of a server that does not answer NOOP in full."""

        def serve(raw: socket.socket) -> None:
            if self.starttls:
                raw.sendall(b"220 localhost\r\n")
                raw.recv(100)
                raw.sendall(b"250-localhost\r\n250 STARTTLS\r\n")
                raw.recv(100)
                raw.sendall(b"220 go\r\n")
            tls = self.ends.accept(raw)
            if not self.starttls:
                tls.sendall(b"220 localhost\r\n")
            with tls:
                tls.recv(100)
                tls.sendall(b"250-" + HALF)
                _BREAKS[how](tls)

        return self.noop(self.peer(serve), timeout)


class SMTPStartTLS(SMTPClient):
    name = "smtplib, STARTTLS, against aiosmtpd"
    how = "smtp.starttls(context=context)"
    starttls = True


class AIOSMTPLib(SMTPClient):
    name = "aiosmtplib, TLS from the start, against aiosmtpd"
    distribution = "aiosmtplib"
    how = "aiosmtplib.SMTP(hostname=host, port=port, use_tls=True, tls_context=context)"

    def noop(self, port: int, timeout: float) -> int:
        return self.run(self._noop(port, timeout))

    async def _noop(self, port: int, timeout: float) -> int:
        async with self.closing(self.aio_client(port, timeout)) as client:
            assert client.transport is not None
            self.ends.note(client.transport.get_extra_info("ssl_object"))
            return (await client.noop()).code

    @contextlib.asynccontextmanager
    async def closing(self, client: aiosmtplib.SMTP) -> AsyncIterator[aiosmtplib.SMTP]:
        """Wait for what the client only begins: its transport says close_notify, and closes later."""
        sock = None
        try:
            async with client:
                assert client.transport is not None
                sock = client.transport.get_extra_info("socket")
                yield client
        finally:
            async with asyncio.timeout(PATIENCE):
                while sock is not None and sock.fileno() >= 0:
                    await asyncio.sleep(0.001)

    def send(self, message: bytes) -> None:
        self.run(self._send(message))

    async def _send(self, message: bytes) -> None:
        async with self.closing(self.aio_client(self.port, PATIENCE)) as client:
            await client.sendmail("a@example.org", ["b@example.org"], message)

    def aio_client(self, port: int, timeout: float) -> aiosmtplib.SMTP:
        return aiosmtplib.SMTP(
            hostname="localhost",
            port=port,
            use_tls=not self.starttls,
            start_tls=self.starttls,
            tls_context=self.ends.client,
            timeout=timeout,
        )


class AIOSMTPLibStartTLS(AIOSMTPLib):
    name = "aiosmtplib, STARTTLS, against aiosmtpd"
    how = "aiosmtplib.SMTP(hostname=host, port=port, start_tls=True, tls_context=context)"
    starttls = True


class IMAPClient(Program):
    starttls = False
    name = "imaplib, TLS from the start"
    how = "IMAP4_SSL(host, port, ssl_context=context)"

    def start(self) -> None:
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        """An IMAP server with one mailbox of one message."""
        if self.starttls:
            self.serve_starttls(raw)
        with self.ends.accept(raw) as tls, tls.makefile("rb") as file:
            if not self.starttls:
                tls.sendall(b"* OK ready\r\n")
            message = MESSAGE
            while line := file.readline():
                tag, command, *rest = line.split()
                match command.upper():
                    case b"CAPABILITY":
                        tls.sendall(b"* CAPABILITY IMAP4REV1\r\n")
                    case b"LOGIN" if rest[0] in (b"silent", b"end", b"cut"):
                        tls.sendall(b"* OK " + HALF)
                        file.close()
                        _BREAKS[rest[0].decode()](tls)
                        return
                    case b"SELECT":
                        tls.sendall(b"* 1 EXISTS\r\n")
                    case b"APPEND":
                        tls.sendall(b"+ go on\r\n")
                        message = file.read(int(rest[-1].strip(b"{}")))
                        file.readline()
                        tls.sendall(f"* OK {digest(message)}\r\n".encode())
                    case b"FETCH":
                        tls.sendall(b"* 1 FETCH (RFC822 {%d}\r\n%b)\r\n" % (len(message), message))
                    case b"LOGOUT":
                        tls.sendall(b"* BYE\r\n")
                tls.sendall(tag + b" OK done\r\n")

    def serve_starttls(self, raw: socket.socket) -> None:
        with raw.makefile("rb") as file:
            raw.sendall(b"* OK ready\r\n")
            while True:
                tag, command = file.readline().split()
                if command.upper() == b"STARTTLS":
                    raw.sendall(tag + b" OK go\r\n")
                    return
                raw.sendall(b"* CAPABILITY IMAP4REV1 STARTTLS\r\n" + tag + b" OK done\r\n")

    def client(self, user: str = "user", timeout: float = PATIENCE) -> imaplib.IMAP4:
        client: imaplib.IMAP4
        if self.starttls:
            client = imaplib.IMAP4("localhost", self.port, timeout)
            client.starttls(self.ends.client)
        else:
            client = imaplib.IMAP4_SSL("localhost", self.port, ssl_context=self.ends.client, timeout=timeout)
        self.ends.note(client.sock)
        try:
            client.login(user, "secret")
        except BaseException:
            client.shutdown()
            raise
        return client

    def connects(self) -> object:
        with self.client() as client:
            return client.select() == ("OK", [b"1"])

    def up(self) -> object:
        with self.client() as client:
            client.append("INBOX", "", "", MESSAGE)
            return digest(MESSAGE).encode() in client.response("OK")[1]

    def down(self) -> object:
        with self.client() as client:
            client.select()
            answer: Any = client.fetch("1", "(RFC822)")
            return bool(answer[1][0][1] == MESSAGE)

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        return str(self.client(how, timeout))


class IMAPStartTLS(IMAPClient):
    name = "imaplib, STARTTLS"
    how = "imap.starttls(context)"
    starttls = True


class IMAPClientPackage(IMAPClient):
    name = "imapclient, TLS from the start"
    distribution = "imapclient"
    how = "IMAPClient(host, port, ssl_context=context)"

    @contextlib.contextmanager
    def session(self, user: str = "user", timeout: float = PATIENCE) -> Iterator[Any]:
        context = self.ends.client
        client = imapclient.IMAPClient(
            "localhost",
            self.port,
            use_uid=False,
            ssl=not self.starttls,
            ssl_context=None if self.starttls else context,
            timeout=timeout,
        )
        try:
            if self.starttls:
                client.starttls(context)
            self.ends.note(client.socket())
            client.login(user, "secret")
            yield client
        finally:
            client.shutdown()

    def connects(self) -> object:
        with self.session() as client:
            return client.select_folder("INBOX")[b"EXISTS"] == 1

    def up(self) -> object:
        with self.session() as client:
            client.append("INBOX", MESSAGE)
            return digest(MESSAGE).encode() in client._imap.untagged_responses["OK"]

    def down(self) -> object:
        with self.session() as client:
            client.select_folder("INBOX")
            return bool(client.fetch([1], ["RFC822"])[1][b"RFC822"] == MESSAGE)

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        with self.session(how, timeout):
            return "answered"


class IMAPClientPackageStartTLS(IMAPClientPackage):
    name = "imapclient, STARTTLS"
    how = "client.starttls(context)"
    starttls = True


PROGRAMS: list[type[Program]] = [
    SMTPClient,
    SMTPStartTLS,
    AIOSMTPLib,
    AIOSMTPLibStartTLS,
    IMAPClient,
    IMAPStartTLS,
    IMAPClientPackage,
    IMAPClientPackageStartTLS,
]
