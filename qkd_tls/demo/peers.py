"""The HTTPS server and the HTTPS client of the demo, each a process: `python -m qkd_tls.demo.peers server ...`.

Each reports on standard output what protected its connections, in lines of JSON. Neither sees the other's
report.
"""

from __future__ import annotations

import argparse
import json
import ssl
import time
import warnings
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests

from kms_client import Etsi014Client
from qkd_tls.adapters.requests import QKDAdapter, qkd_info
from qkd_tls.context import create_default_context
from qkd_tls.errors import QKDError
from qkd_tls.policy import Policy

__all__ = ["main"]


class _Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds; a silent client does not hold its thread for ever
    wbufsize = -1  # the answer in one piece

    def do_GET(self) -> None:
        # Before the answer: whoever has the answer can rely on the report.
        _report(path=self.path, port=self.client_address[1], qkd=self.connection.qkd.as_dict())
        body = b"hello\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the report says it all."""


def _serve(arguments: argparse.Namespace) -> None:
    directory: Path = arguments.dir
    context = create_default_context(
        ssl.Purpose.CLIENT_AUTH, key_manager=_key_manager(arguments, "b"), policy=Policy.PREFER
    )
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        # The handshake is for the connection's own thread, not for the one that accepts connections.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        _report(port=server.server_port)
        server.serve_forever()


def _request(arguments: argparse.Namespace) -> None:
    context = create_default_context(
        cafile=arguments.dir / "app-ca.pem",
        key_manager=_key_manager(arguments, "a"),
        peer_sae_id="SAE-B",
        policy=arguments.policy,
        announced_keys=arguments.announced_keys,
    )
    with requests.Session() as session:
        session.mount("https://", QKDAdapter(context))
        session.headers["Connection"] = "close"
        for number in range(1, arguments.requests + 1):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outcome = _outcome(session, f"{arguments.url}/{number}")
            _report(path=f"/{number}", warnings=[warning.category.__name__ for warning in caught], **outcome)


def _outcome(session: requests.Session, url: str) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        response = session.get(url, timeout=20)
    except requests.exceptions.SSLError as error:
        cause = error.__cause__
        if not isinstance(cause, QKDError):
            raise
        return {
            "error": type(cause).__name__,
            "kms": cause.kms,
            "text": cause.strerror,
            "hint": cause.hint,
        }
    milliseconds = 1000 * (time.perf_counter() - begin)
    response.raise_for_status()
    return {"qkd": qkd_info(response).as_dict(), "ms": milliseconds}


def _key_manager(arguments: argparse.Namespace, side: str) -> Etsi014Client:
    directory: Path = arguments.dir
    return Etsi014Client(
        arguments.kme,
        sae_id=f"SAE-{side.upper()}",
        cert=directory / f"sae-{side}.pem",
        key=directory / f"sae-{side}.key",
        ca=directory / "kms-ca.pem",
    )


def _report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server or the client."""
    parser = argparse.ArgumentParser(prog="python -m qkd_tls.demo.peers", description=__doc__)
    roles = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dir", type=Path, required=True, help="demo PKI, as written by qkd-kme")
    common.add_argument("--kme", required=True, help="URL of this side's KME")
    server = roles.add_parser("server", parents=[common])
    server.set_defaults(run=_serve)
    client = roles.add_parser("client", parents=[common])
    client.add_argument("--url", required=True)
    client.add_argument("--policy", type=Policy, required=True)
    client.add_argument("--requests", type=int, default=1)
    client.add_argument("--announced-keys", type=int, default=0)
    client.set_defaults(run=_request)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
