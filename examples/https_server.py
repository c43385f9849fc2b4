"""An HTTPS server with QKD keys in its connections. Beyond an ordinary one: a key manager and its context.

Try it with an emulated pair of KMEs: `qkd-kme pair --dir demo` prints their URLs, then

    python examples/https_server.py --kme URL_OF_KME_B --sae SAE-B --sae-cert demo/sae-b.pem --sae-key demo/sae-b.key \
        --kme-ca demo/kms-ca.pem --cert demo/server.pem --key demo/server.key
"""

import argparse
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import qkd_tls
from kms_client import Etsi014Client, SecureSite


class Handler(BaseHTTPRequestHandler):
    """A handler that answers every GET and prints what protected the connection."""

    timeout = 30  # seconds, also for the handshake

    def do_GET(self) -> None:
        """Answer a GET."""
        qkd = self.connection.qkd
        print(f"{self.path}: {qkd.protection}, {qkd.group}, {qkd.path}, key {qkd.key_id}", flush=True)
        body = f"Hello over a connection with protection {qkd.protection}.\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="HTTPS server with QKD keys in its connections")
    parser.add_argument("--kme", required=True, metavar="URL", help="this side's KME (ETSI GS QKD 014)")
    parser.add_argument("--sae", required=True, metavar="ID", help="this side's SAE ID")
    parser.add_argument("--sae-cert", required=True, help="certificate that the KME knows this SAE by")
    parser.add_argument("--sae-key", required=True)
    parser.add_argument("--kme-ca", required=True, help="CA of the KME's certificate")
    parser.add_argument(
        "--kme-site",
        nargs="+",
        default=[],
        metavar="NETWORK",
        help="where the KME may be (default: this host)",
    )
    parser.add_argument("--cert", required=True, help="certificate chain of this server")
    parser.add_argument("--key", required=True)
    parser.add_argument("--policy", choices=list(qkd_tls.Policy), default=qkd_tls.Policy.REQUIRE)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8443, help="0 for a free one")
    args = parser.parse_args()

    kme = Etsi014Client(
        args.kme,
        sae_id=args.sae,
        cert=args.sae_cert,
        key=args.sae_key,
        ca=args.kme_ca,
        site=SecureSite(args.kme_site),
    )
    context = qkd_tls.create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=kme, policy=args.policy)
    context.load_cert_chain(args.cert, args.key)

    server = ThreadingHTTPServer((args.host, args.port), Handler)
    # Without the handshake on connect: a slow client then keeps its own thread waiting, not all clients.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    print(f"serving on port {server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
