"""What the tests with the independent client and eavesdropper of `examples/rndl/` share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rndl import wire
from rndl.eavesdropper import ML_KEM, X25519, Eavesdropper, FutureComputer, Opened, Recording
from rndl.hybrid import ALPN_NAME, Association
from rndl.recorder import RecordingProxy
from rndl.tls13 import KeySchedule
from rndl.victim import Client, HybridClient, QKDKeyMaterial, connect_hybrid
from tests.support.sockets import Lab, Seen, Server

QUESTION = b"what is the key of the vault?"


class Sha256Client(Client):
    """As a TLS stack that fixes the hash of external PSKs to SHA-256: the PSK is of that length."""

    def _client_hello(self, group: int, alpn: Sequence[str]) -> bytes:
        assert self._psk is not None
        identity, psk = self._psk
        hello = wire.client_hello(
            random=os.urandom(32),
            server_name=self._server_name,
            alpn=alpn,
            suites=[0x1301],  # TLS_AES_128_GCM_SHA256
            group=group,
            share=self.ephemeral.share,
            psk_identity=identity,
            binder_length=32,
        )
        offered = wire.parse_client_hello(hello).psk
        assert offered is not None
        return hello[:-32] + KeySchedule("sha256", psk).binder(hello[: offered.binder_offset])


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
        key = self._new_key()
        client = connect_hybrid(
            self._transport(),
            key,
            server_name="localhost",
            ca=self.lab.ca.certificate,
            association=association,
            pipelined=pipelined,
        )
        return self._exchange(client, key)

    def talk_with_sha256(self, association: Association) -> Conversation:
        """An associated connection whose PSK is of SHA-256."""
        key = self._new_key()
        identity = association.identity(key.key_id, "sha256")
        client = Sha256Client(
            self._transport(),
            server_name="localhost",
            ca=self.lab.ca.certificate,
            alpn=(ALPN_NAME,),
            psk=(identity, association.psk(identity, key.secret)),
        )
        client.connect()
        return self._exchange(HybridClient(association, client), key)

    def _transport(self) -> socket.socket:
        return socket.create_connection(self.tap.address, timeout=20)

    def _new_key(self) -> QKDKeyMaterial:
        (delivered,) = self.lab.manager("client").get_keys("SAE-B")
        with delivered.use() as secret:
            return QKDKeyMaterial(delivered.key_id, bytes(secret))

    def _exchange(self, client: HybridClient, key: QKDKeyMaterial) -> Conversation:
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
