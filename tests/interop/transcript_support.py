"""What the tests with the independent client and eavesdropper of `examples/rndl/` share."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from rndl.eavesdropper import ML_KEM, X25519, Eavesdropper, FutureComputer, Opened, Recording  # type: ignore[import-not-found,unused-ignore]
from rndl.hybrid import Association  # type: ignore[import-not-found,unused-ignore]
from rndl.recorder import RecordingProxy  # type: ignore[import-not-found,unused-ignore]
from rndl.victim import HybridClient, QKDKeyMaterial, connect_hybrid  # type: ignore[import-not-found,unused-ignore]
from socket_support import Lab, Seen, Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTION = b"what is the key of the vault?"


@dataclass
class Conversation:
    """One connection of the independent client with our server: what each side knows, and the recording."""

    recording: Recording
    client: HybridClient
    key: QKDKeyMaterial
    seen: Seen

    def opened(self, *, qkd_keys: bool = True, associations: tuple[Association, ...] = ()) -> list[Opened]:
        """What an eavesdropper reads with the ephemeral secrets and the QKD key; he must read all of it."""
        computer = FutureComputer((X25519, ML_KEM), self.client.ephemeral)
        results = Eavesdropper(computer, [self.key.secret] if qkd_keys else [], associations).read(
            self.recording
        )
        opened = [result for result in results if isinstance(result, Opened)]
        assert len(opened) == len(results), results
        return opened


@dataclass
class Site:
    """A server of ours that writes a key log, behind a tap."""

    lab: Lab
    server: Server
    tap: RecordingProxy
    keylog: Path

    def talk(self, *, association: Association | None = None, pipelined: bool = False) -> Conversation:
        """A connection with a new QKD key, on which a message comes back."""
        (delivered,) = self.lab.manager("client").get_keys("SAE-B")
        with delivered.use() as secret:
            key = QKDKeyMaterial(delivered.key_id, bytes(secret))
        client = connect_hybrid(
            socket.create_connection(self.tap.address, timeout=20),
            key,
            server_name="localhost",
            ca=self.lab.ca.certificate,
            association=association,
            pipelined=pipelined,
        )
        client.hybrid.send(QUESTION)
        assert client.hybrid.receive() == QUESTION
        client.hybrid.close()
        seen = self.server.seen()
        self.tap.wait()
        return Conversation(self.tap.recordings[-1], client, key, seen)

    def logged(self, client_random: bytes) -> dict[str, bytes]:
        """What OpenSSL logged of one TLS connection."""
        lines = [line.split() for line in self.keylog.read_text().splitlines() if not line.startswith("#")]
        return {
            label: bytes.fromhex(secret) for label, random, secret in lines if random == client_random.hex()
        }


@contextmanager
def site(lab: Lab, directory: Path, *, kind: str | None = None) -> Iterator[Site]:
    """Our server, with the laboratory's certificate or one of this kind."""
    context = lab.server()
    if kind is not None:
        lab.ca.issue("other", kind=kind).load_into(context)
    keylog = directory / "keys.log"
    context.keylog_filename = str(keylog)
    with Server(context) as server, RecordingProxy(server.address) as tap:
        yield Site(lab, server, tap, keylog)
