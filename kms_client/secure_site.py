"""The secure site: the addresses that keys may be fetched from.

ETSI GS QKD 014 is meant for use inside one secure site, because keys cross it under ordinary TLS. Only the
operator knows the extent of the site. This module compares it with the address that a connection really goes
to.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from kms_client.errors import KMSOutsideSecureSite

__all__ = ["SecureSite", "TellsGroup"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@runtime_checkable
class TellsGroup(Protocol):
    """A TLS socket that can say which key exchange protects it, as the sockets of `qkd_tls` can.

    `qkd.group` is the name of the group that was negotiated, as OpenSSL spells it: "X25519MLKEM768".
    """

    @property
    def qkd(self) -> Any:
        """The connection's protection; has an attribute `group`."""
        ...


class SecureSite:
    """The addresses at which a KME may be.

    Args:
        allowed: networks inside the site, beside this host: `10.1.0.0/16`, `2001:db8:1::/48`, or single
            addresses. Host names are refused: a DNS server would decide what belongs to the site.
        this_host: True if loopback, this host's own addresses and Unix sockets are inside. Set False if a
            program on this host (stunnel, `ssh -L`, a container's port forwarding) passes such connections on
            to another host.
        ml_kem_outside: True if a KME outside may be used when the link to it is itself protected by ML-KEM.
            Needs `ssl_context=` with a context whose sockets are `TellsGroup`. False: never.

    Raises:
        ValueError: an entry is not a network, or has bits set beyond its prefix.
        TypeError: one string was given instead of a sequence of strings.
    """

    def __init__(
        self, allowed: Iterable[str] = (), *, this_host: bool = True, ml_kem_outside: bool = True
    ) -> None:
        """Check the networks."""
        if isinstance(allowed, str):
            raise TypeError("allowed must be a sequence of networks, not one string")
        self._allowed = tuple(_network(text) for text in allowed)
        self._this_host = this_host
        self.ml_kem_outside = ml_kem_outside

    def contains(self, address: str, own_address: str = "") -> bool:
        """Return True if an IP address is inside; `own_address` is this end of the connection to it.

        A connection to one of this host's own addresses has the same address at both ends.
        """
        there = _address(address)
        if self._this_host and (there.is_loopback or (own_address and there == _address(own_address))):
            return True
        return any(there.version == network.version and there in network for network in self._allowed)

    def contains_peer(self, sock: socket.socket) -> bool:
        """Return True if the other end of a connected socket is inside.

        Raises:
            OSError: the socket is not connected (any more).
        """
        if sock.family == socket.AF_UNIX:
            return self._this_host
        return self.contains(sock.getpeername()[0], sock.getsockname()[0])

    def refusal(self, sock: socket.socket, reason: str, *, kms: str) -> KMSOutsideSecureSite:
        """Return the error for a connection to an address outside: the address, the reason and the remedy."""
        if sock.family == socket.AF_UNIX:
            where = "a Unix socket"
            hint = "Make the site with this_host=True if a KME on this host listens there."
        else:
            where = str(_address(sock.getpeername()[0]))
            hint = (
                f'If this address is inside the secure site, name its network: site=SecureSite(["{where}"]). '
                "If not, use a KME inside, or a link to this one that ML-KEM protects."
            )
        return KMSOutsideSecureSite(
            f"the KME is outside the secure site: connected to {where}, and {reason}; no request was sent",
            kms=kms,
            hint=hint,
        )

    def __repr__(self) -> str:
        """Show the networks and the switches."""
        networks = [str(network) for network in self._allowed]
        return f"SecureSite({networks}, this_host={self._this_host}, ml_kem_outside={self.ml_kem_outside})"


def has_ml_kem(sock: object) -> bool:
    """Return True if a TLS socket reports ML-KEM in its key exchange; False if it cannot report it."""
    group = getattr(sock.qkd, "group", None) if isinstance(sock, TellsGroup) else None
    return isinstance(group, str) and "MLKEM" in group.upper()


def _network(text: str) -> _Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not a network of the secure site: {error}. Networks look like 10.1.0.0/16 or 2001:db8:1::/48"
        ) from None


def _address(text: str) -> _Address:
    """Return an address without its interface; IPv4 within IPv6 as IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
