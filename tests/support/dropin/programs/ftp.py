"""ftplib with explicit TLS against pyftpdlib, whose TLS is pyOpenSSL's: a small class stands between."""

from __future__ import annotations

import contextlib
import ftplib
import io
import logging
import ssl
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from OpenSSL import SSL

from tests.support.dropin.harness import (
    HALF,
    PATIENCE,
    PAYLOAD,
    BrokenOff,
    Program,
    drain,
    end_cleanly,
    truncate,
)

with warnings.catch_warnings():
    # It imports asyncore, which Python 3.12 does not have.
    warnings.simplefilter("ignore", DeprecationWarning)
    from pyftpdlib.authorizers import DummyAuthorizer  # type: ignore[import-untyped]
    from pyftpdlib.handlers import TLS_DTPHandler, TLS_FTPHandler  # type: ignore[import-untyped]
    from pyftpdlib.ioloop import IOLoop  # type: ignore[import-untyped]
    from pyftpdlib.servers import FTPServer  # type: ignore[import-untyped]

__all__ = ["PROGRAMS"]


@contextlib.contextmanager
def pyopenssl_errors() -> Iterator[None]:
    try:
        yield
    except ssl.SSLWantReadError:
        raise SSL.WantReadError from None
    except ssl.SSLWantWriteError:
        raise SSL.WantWriteError from None
    except ssl.SSLEOFError:
        raise SSL.SysCallError(-1, "Unexpected EOF") from None
    except ssl.SSLError as error:
        raise SSL.Error(str(error)) from None


class Connection(SSL.Connection):
    """An `ssl.SSLContext`'s connection with the methods of pyOpenSSL's that pyftpdlib calls."""

    def __init__(self, context: Any, sock: Any) -> None:
        self._tls: Any = context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        # What is not here, pyOpenSSL asks the socket.
        self._socket = self._tls
        self._shutdown = 0

    def set_accept_state(self) -> None:
        pass

    def do_handshake(self) -> None:
        with pyopenssl_errors():
            self._tls.do_handshake()

    def send(self, data: Any, flags: int = 0) -> int:
        with pyopenssl_errors():
            return int(self._tls.send(data))

    def recv(self, size: int, flags: int | None = None) -> bytes:
        with pyopenssl_errors():
            data = bytes(self._tls.recv(size))
        if not data:
            raise SSL.ZeroReturnError
        return data

    def pending(self) -> int:
        return int(self._tls.pending())

    def get_shutdown(self) -> int:
        return self._shutdown

    def set_shutdown(self, state: int) -> None:
        self._shutdown = state

    def shutdown(self) -> bool:
        # pyftpdlib says that it does not wait for the other side's.
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()
        return True


class Secured:
    socket: Any
    _ssl_requested: bool
    _ssl_accepting: bool

    def secure_connection(self, context: Any) -> None:
        self._ssl_requested = True
        self.socket = Connection(context, self.socket)
        self._ssl_accepting = True


class FTPClient(Program):
    name = "ftplib, explicit TLS, against pyftpdlib"
    how = "FTP_TLS(context=context)"
    notes: ClassVar[Mapping[str, str]] = {
        "connects": "Control and data connections are both protected (`PROT P`). pyftpdlib's TLS is pyOpenSSL's: the"
        " test gives it a class of ours with pyOpenSSL's methods and our context's connections."
    }

    def start(self) -> None:
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        authorizer = DummyAuthorizer()
        authorizer.add_user("user", "secret", str(self.folder), perm="elradfmw")
        ends = self.ends

        class Data(Secured, TLS_DTPHandler):  # type: ignore[misc]
            def handle_ssl_established(self) -> None:
                ends.note(self.socket._tls)

        class Handler(Secured, TLS_FTPHandler):  # type: ignore[misc]
            ssl_context = ends.server
            tls_control_required = tls_data_required = True
            dtp_handler = Data

            def handle_ssl_established(self) -> None:
                ends.note(self.socket._tls)

        Handler.authorizer = authorizer
        logging.getLogger("pyftpdlib").setLevel(logging.ERROR)
        loop = IOLoop()
        server = FTPServer(("127.0.0.1", 0), Handler, ioloop=loop)
        self.port = server.address[1]
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                loop.loop(timeout=0.02, blocking=False)
            server.close_all()

        thread = threading.Thread(target=run)
        thread.start()

        def stop() -> None:
            ended.set()
            thread.join()

        self.stack.callback(stop)

    @contextlib.contextmanager
    def client(self) -> Iterator[ftplib.FTP_TLS]:
        with ftplib.FTP_TLS(context=self.ends.client, timeout=PATIENCE) as client:
            # The certificate is for this name.
            client.connect("localhost", self.port)
            client.login("user", "secret")
            client.prot_p()
            yield client

    def connects(self) -> object:
        with self.client() as client:
            return client.pwd() == "/"

    def up(self) -> object:
        with self.client() as client:
            client.storbinary("STOR up", io.BytesIO(PAYLOAD))
        return (self.folder / "up").read_bytes() == PAYLOAD

    def down(self) -> object:
        (self.folder / "down").write_bytes(PAYLOAD)
        received = io.BytesIO()
        with self.client() as client:
            client.retrbinary("RETR down", received.write)
        return received.getvalue() == PAYLOAD

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        """What a client makes of a server that does not answer NOOP in full."""

        def serve(raw: Any) -> None:
            raw.sendall(b"220 ready\r\n")
            raw.recv(100)
            raw.sendall(b"234 go\r\n")
            with self.ends.accept(raw) as tls:
                tls.recv(100)
                tls.sendall(b"200-" + HALF)
                {"silent": drain, "end": end_cleanly, "cut": truncate}[how](tls)

        with contextlib.closing(ftplib.FTP_TLS(context=self.ends.client, timeout=timeout)) as client:
            client.connect("localhost", self.peer(serve))
            client.auth()
            return client.voidcmd("NOOP")


PROGRAMS: list[type[Program]] = [FTPClient]
