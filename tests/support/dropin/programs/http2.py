"""httpx with HTTP/2: against hypercorn, and against a peer that breaks off."""

from __future__ import annotations

import socket

import h2.config
import h2.connection
import h2.events
import httpx

from tests.support.dropin.harness import HALF, PATIENCE, Program, drain, end_cleanly, truncate
from tests.support.dropin.programs.http_clients import HTTPClient
from tests.support.dropin.programs.http_servers import run_hypercorn

__all__ = ["PROGRAMS"]


class HTTPXOverHTTP2(HTTPClient):
    name = "httpx, HTTP/2, against hypercorn"
    distribution = "httpx"
    how = "httpx.Client(verify=context, http2=True)"

    def start(self) -> None:
        self.port = run_hypercorn(self, "h2")
        self.breaking = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        """Answer a request with half a body; then do what its path says."""
        with self.ends.accept(raw) as tls:
            connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
            connection.initiate_connection()
            while True:
                tls.sendall(connection.data_to_send())
                for event in connection.receive_data(tls.recv(1 << 16)):
                    if isinstance(event, h2.events.RequestReceived):
                        stream = event.stream_id
                        path = dict(event.headers)[b":path"]
                        connection.send_headers(stream, [(":status", "200")])
                        connection.send_data(stream, HALF)
                        tls.sendall(connection.data_to_send())
                        {b"/silent": drain, b"/end": end_cleanly, b"/cut": truncate}[path](tls)
                        return

    def fetch(self, path: str, body: bytes | None = None, timeout: float = PATIENCE) -> bytes:
        port = self.breaking if path in ("/silent", "/end", "/cut") else self.port
        with (
            httpx.Client(verify=self.ends.client, timeout=timeout, trust_env=False, http2=True) as client,
            client.stream(
                "GET" if body is None else "POST", f"https://localhost:{port}{path}", content=body
            ) as response,
        ):
            assert response.http_version == "HTTP/2"
            self.ends.note(response.extensions["network_stream"].get_extra_info("ssl_object"))
            return response.read()


PROGRAMS: list[type[Program]] = [HTTPXOverHTTP2]
