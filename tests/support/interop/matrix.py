"""Each stock stack in both roles, with our library as the peer: what works, and what comes instead."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qkd_tls import KDF, Protection, QKDInfo
from qkd_tls.psk_export import export_psk
from tests.support.attacks import extensions
from tests.support.interop.node_peer import NodeClient, NodeProcess, NodeServer, OurClient, OurServer
from tests.support.interop.stacks import HELLO, STACKS, Given, Stack, answer
from tests.support.requirements import Missing
from tests.support.sockets import Lab, Proxy, Server

__all__ = ["COLUMNS", "PAIRS", "ROLES", "Outcome", "connection", "every_row", "missing", "pairing", "row"]

ROLES: Final = ("client", "server")
PAIRS: Final = ("ours - ours", "node - ours", "ours - node", "node - node")
COLUMNS: Final = (
    "X25519MLKEM768 alone", "X25519 added", "X25519 alone, explicit KEM", "PSK of SHA-384", "HelloRetryRequest",
    "modes offered", "a bit of the PSK changed",
)  # fmt: skip
_ALONE: Final = ("X25519MLKEM768",)
_CLASSICAL: Final = ("X25519",)
_ADDED: Final = (*_ALONE, *_CLASSICAL)
_RETRY: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""What makes a ServerHello a HelloRetryRequest (RFC 8446 section 4.1.3)."""
_MODES: Final = {0: "psk_ke", 1: "psk_dhe_ke"}
_CAUSES: Final = {
    "no key exchange group in common": "no group in common",
    "ALERT_HANDSHAKE_FAILURE": "alert handshake_failure",
    "BINDER_DOES_NOT_VERIFY": "the binder does not verify",
    "ALERT_DECRYPT_ERROR": "alert decrypt_error",
    "ALERT_ILLEGAL_PARAMETER": "alert illegal_parameter",
}
"""What our side says of a refusal, in short."""


@dataclass(frozen=True)
class Outcome:
    """One connection: what our side says of it, what came back, and what went over the wire."""

    info: QKDInfo | None
    error: str
    echoed: bool
    retried: bool
    modes: tuple[str, ...]
    key_id: str

    @property
    def hybrid(self) -> bool:
        """Both sides have the PSK of this key, and data came both ways."""
        return (
            self.info is not None
            and self.info.protection is Protection.HYBRID
            and self.info.key_id == self.key_id
            and self.echoed
        )

    @property
    def text(self) -> str:
        """For a cell."""
        if self.hybrid:
            assert self.info is not None
            kem = f", {self.info.kem}" if self.info.kem else ""
            return f"hybrid: {self.info.group}{kem}, {self.info.cipher}"
        assert self.error, "it has ended without an error"
        return (
            f"refused: {next((cause for text, cause in _CAUSES.items() if text in self.error), self.error)}"
        )


def connection(
    lab: Lab,
    stack: Stack,
    role: str,
    *,
    ours: tuple[str, ...] = _ADDED,
    theirs: tuple[str, ...] = _CLASSICAL,
    kdf: KDF = KDF.SHA256,
    changed: bool = False,
) -> Outcome:
    """A bootstrap between two of ours, and then one connection whose client or server is the stack.

    `ours` and `theirs` are groups; `changed` gives the stack a PSK of which one bit is another.
    """
    server_context = lab.server(groups=ours)
    client_context = lab.client(groups=ours, kdf=kdf, announced_keys=role == "server")
    for context in (server_context, client_context):
        context.set_alpn_protocols(["echo"])
    with (
        tempfile.TemporaryDirectory(prefix="qkd-tls-interop-") as folder,
        warnings.catch_warnings(),
        Server(server_context, answer) as server,
        Proxy(server.address) as front,
    ):
        # A classical group is what this is about.
        warnings.simplefilter("ignore")
        with front.connect(client_context) as bootstrap:
            bootstrap.sendall(HELLO)
            assert bootstrap.recv(64) == b"olleh\n"
        association = server.seen_info().association
        assert association is not None
        sent = len(front.client_sent)
        if role == "client":
            with export_psk(bootstrap, kdf) as exported:
                psk = exported.psk()
        else:
            # The server's side knows which key the client takes next: the one that was announced.
            known = server_context._associations.by_id(bytes.fromhex(association), time.time())
            assert known is not None
            key = known.take_announced()
            assert key is not None
            psk = known.psk(key, kdf)
        secret = bytes(psk.secret)
        given = Given(
            psk.identity.decode(),
            bytes([secret[0] ^ changed]) + secret[1:],
            kdf,
            theirs,
            Path(folder),
        )
        info, error, echoed = None, "", False
        if role == "client":
            said = stack.client(given, front.address[1])
            echoed = "olleh" in said and stack.confirms(given) in said
            seen = server.seen()
            info, error = seen.info, str(seen.error or "")
        else:
            with stack.server(given) as port:
                front.target = "127.0.0.1", port
                try:
                    with front.connect(client_context) as sock:
                        info, echoed = sock.qkd, stack.talk(sock)
                except OSError as caught:
                    error = str(caught)
        modes = _modes(bytes(front.client_sent[sent:]))
        return Outcome(info, error, echoed, _RETRY in front.server_sent, modes, psk.key_id)


_PSK_KEY_EXCHANGE_MODES = 45


def _modes(stream: bytes) -> tuple[str, ...]:
    """Of the stream's first ClientHello; the last records of the connection before may come late."""
    while stream and stream[0] != 22:
        stream = stream[5 + int.from_bytes(stream[3:5], "big") :]
    # The whole message is in one record.
    _, found = extensions(stream[: 5 + int.from_bytes(stream[3:5], "big")])
    return tuple(_MODES[mode] for mode in sorted(found.get(_PSK_KEY_EXCHANGE_MODES, b"\0")[1:]))


def row(lab: Lab, stack: Stack, role: str) -> list[str]:
    """A stack's cells. Raises Missing."""
    version = stack.version()
    alone = connection(lab, stack, role, ours=_ALONE, theirs=_ALONE if stack.ml_kem else _CLASSICAL)
    added = connection(lab, stack, role)
    explicit = connection(lab, stack, role, ours=_CLASSICAL)
    sha384 = connection(lab, stack, role, kdf=KDF.SHA384)
    retry = added
    if role == "client":
        retry = connection(lab, stack, role, ours=_CLASSICAL, theirs=("P-256", "X25519"))
    changed = connection(lab, stack, role, changed=True)
    hashed = sha384.text if sha384.hybrid else f"refused: {stack.sha384_reason}"
    assert sha384.hybrid or stack.sha384_reason, sha384.error
    retried = f"{'yes' if retry.retried else 'none'}, {retry.text}"
    program = stack.client_program if role == "client" else stack.server_program
    cells = [alone.text, added.text, explicit.text, hashed, retried, ", ".join(added.modes), changed.text]
    return [stack.name, version, f"{role}: {program}", *cells, stack.note or "-"]


def missing(stack: Stack, role: str, why: Missing) -> list[str]:
    """The row of a stack that is not here."""
    return [stack.name, "-", role, *["not measured"] * len(COLUMNS), str(why)]


def pairing(lab: Lab, process: NodeProcess, pair: str) -> list[str]:
    """Our library and the implementation for Node.js, which speak all of qkd-tls/1."""
    client_is, server_is = pair.split(" - ")
    cells = [pair]
    for kem in (None, "ML-KEM-1024"):
        with OurServer(lab, alpn=[], mutual=False) as ours:
            server: Any = ours if server_is == "ours" else NodeServer(process, lab)
            client: Any
            if client_is == "ours":
                client = OurClient(lab, kem=kem)
            else:
                client = NodeClient(process, lab, mutual=False, peerSaeId="SAE-B", kem=kem)
            for _ in range(2):
                mine, theirs = client.connect(server.address), server.outcome()
                assert (mine.key_id, mine.group, mine.cipher) == (theirs.key_id, theirs.group, theirs.cipher)
                used = f", {mine.kem}" if mine.kem else ""
                cells.append(f"{mine.protection}, {mine.path}: {mine.group}{used}, {mine.cipher}")
    return cells


def every_row(lab: Lab) -> list[list[str]]:
    """The rows of all stacks."""
    rows = []
    for stack in STACKS:
        for role in ROLES:
            try:
                rows.append(row(lab, stack, role))
            except Missing as why:
                rows.append(missing(stack, role, why))
    return rows
