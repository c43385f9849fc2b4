"""Say hello to examples/asyncio_server.py, three times on three connections.

    python examples/asyncio_client.py DIRECTORY PORT KME-URL

DIRECTORY has the certificates that `qkd-kme pair --dir` writes.
"""

import asyncio
import sys
from pathlib import Path

import qkd_tls
from kms_client import Etsi014Client
from qkd_tls import aio


async def main(directory: Path, port: int, kme_url: str) -> None:
    """Connect, say hello, and show what protected the connection."""
    kme = Etsi014Client(
        kme_url,
        sae_id="SAE-A",
        cert=directory / "sae-a.pem",
        key=directory / "sae-a.key",
        ca=directory / "kms-ca.pem",
    )
    context = qkd_tls.create_default_context(cafile=directory / "app-ca.pem", key_manager=kme)
    for _ in range(3):
        reader, writer = await aio.open_connection("localhost", port, ssl=context)
        writer.write(b"hello\n")
        answer = await reader.readline()
        info = writer.get_extra_info("ssl_object").qkd
        print(answer.decode().strip(), info.protection, info.path, info.key_id)
        writer.close()
        await writer.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
