"""dnspython: DNS over TLS against a peer of a few lines."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, ClassVar

import dns.message
import dns.query
import dns.rrset

from tests.support.dropin.harness import HALF, PATIENCE, BrokenOff, Program, drain, end_cleanly, truncate

__all__ = ["PROGRAMS"]


class DNSOverTLS(Program):
    name = "dnspython, DNS over TLS"
    distribution = "dnspython"
    how = "dns.query.tls(query, address, ssl_context=context)"
    notes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("up", "down"),
        "A message of DNS has at most 65535 bytes; an answer of 60000 comes in the first column.",
    )
    without = frozenset({"up", "down"})

    def start(self) -> None:
        self.port = self.peer(self.serve)

    def serve(self, raw: socket.socket) -> None:
        with self.ends.accept(raw) as tls, tls.makefile("rb") as file:
            size = int.from_bytes(file.read(2), "big")
            query = dns.message.from_wire(file.read(size))
            (name,) = query.question[0].name.labels[:1]
            if name == b"hello":
                answer: Any = dns.message.make_response(query)
                texts = [f'"{number:0200d}"' for number in range(280)]
                answer.answer.append(dns.rrset.from_text_list(query.question[0].name, 60, "IN", "TXT", texts))
                wire = answer.to_wire(max_size=65535)
                tls.sendall(len(wire).to_bytes(2, "big") + wire)
                drain(tls)
            else:
                tls.sendall(b"\0\x64" + HALF)
                file.close()
                {b"silent": drain, b"end": end_cleanly, b"cut": truncate}[name](tls)

    def ask(self, name: str, timeout: float = PATIENCE) -> Any:
        return dns.query.tls(
            dns.message.make_query(f"{name}.example.", "TXT"),
            "127.0.0.1",
            timeout=timeout,
            port=self.port,
            ssl_context=self.ends.client,
            server_hostname="localhost",
        )

    def connects(self) -> object:
        return len(self.ask("hello").answer[0]) == 280

    def up(self) -> object:
        return "none"

    def down(self) -> object:
        return "none"

    def broken_off(self, how: BrokenOff, timeout: float = PATIENCE) -> object:
        return self.ask(how, timeout)


PROGRAMS: list[type[Program]] = [DNSOverTLS]
