"""An echo server on asyncio: one import and one context beyond an ordinary program.

    python examples/asyncio_server.py DIRECTORY PORT KME-URL

DIRECTORY has the certificates that `qkd-kme pair --dir` writes. PORT may be 0.
"""

import asyncio
import ssl
import sys
from pathlib import Path

import qkd_tls
from kms_client import Etsi014Client
from qkd_tls import aio


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send every line back."""
    print("connection:", writer.get_extra_info("ssl_object").qkd.protection, flush=True)
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


async def main(directory: Path, port: int, kme_url: str) -> None:
    """Serve until interrupted."""
    kme = Etsi014Client(
        kme_url,
        sae_id="SAE-B",
        cert=directory / "sae-b.pem",
        key=directory / "sae-b.key",
        ca=directory / "kms-ca.pem",
    )
    context = qkd_tls.create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=kme)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    server = await aio.start_server(echo, "127.0.0.1", port, ssl=context)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
