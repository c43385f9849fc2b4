"""An HTTPS client with QKD keys in its connections. Beyond an ordinary one: a key manager, its context, an adapter.

Try it with an emulated pair of KMEs and `examples/https_server.py`:

    python examples/https_client.py https://localhost:8443/ --kme URL_OF_KME_A --sae SAE-A \
        --sae-cert demo/sae-a.pem --sae-key demo/sae-a.key --kme-ca demo/kms-ca.pem --ca demo/app-ca.pem
"""

import argparse

import requests

import qkd_tls
from kms_client import Etsi014Client, SecureSite
from qkd_tls.adapters.requests import QKDAdapter, qkd_info


def main() -> None:
    """Send one request."""
    parser = argparse.ArgumentParser(description="HTTPS client with QKD keys in its connections")
    parser.add_argument("url")
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
    parser.add_argument("--ca", help="CA of the server's certificate (default: the system's CAs)")
    parser.add_argument("--peer-sae", metavar="ID", help="the server's SAE ID (default: the server is asked)")
    parser.add_argument("--policy", choices=list(qkd_tls.Policy), default=qkd_tls.Policy.REQUIRE)
    args = parser.parse_args()

    kme = Etsi014Client(
        args.kme,
        sae_id=args.sae,
        cert=args.sae_cert,
        key=args.sae_key,
        ca=args.kme_ca,
        site=SecureSite(args.kme_site),
    )
    context = qkd_tls.create_default_context(
        cafile=args.ca, key_manager=kme, policy=args.policy, peer_sae_id=args.peer_sae
    )

    session = requests.Session()
    session.mount("https://", QKDAdapter(context))
    try:
        response = session.get(args.url, timeout=30)
    except requests.exceptions.SSLError as error:
        raise SystemExit(f"no connection: {error}") from None
    qkd = qkd_info(response)
    print(f"{response.status_code}: {qkd.protection}, {qkd.group}, {qkd.path}, key {qkd.key_id}")
    print(response.text, end="")


if __name__ == "__main__":
    main()
