"""The TLS of a KME, seen without a certificate of one's own; nothing but handshakes is sent."""

from __future__ import annotations

import select
import socket
import time
from dataclasses import dataclass

from cryptography import x509
from OpenSSL import SSL

__all__ = ["TLSFacts", "accepts_old_tls", "look"]

_OLD_CIPHERS = b"ALL:@SECLEVEL=0"  # with fewer bits than OpenSSL would take by itself


@dataclass(frozen=True)
class TLSFacts:
    """The parameters that a handshake showed. The certificate is as presented: it has not been verified here.

    Attributes:
        address: the KME's IP address.
        own_address: this end's.
        version: such as "TLSv1.3".
        cipher: OpenSSL's name of the cipher suite; "" if none was agreed on.
        group: OpenSSL's name of the key exchange group; "" if it is not known.
        chain: the certificates presented, the KME's own first.
    """

    address: str
    own_address: str
    version: str
    cipher: str
    group: str
    chain: tuple[x509.Certificate, ...]


def look(host: str, port: int, timeout: float) -> TLSFacts:
    """Shake hands and return what was agreed on.

    A KME may end the handshake because it gets no client certificate; the parameters it had sent before
    count.

    Raises:
        OSError: cannot connect, or no answer within `timeout` seconds.
    """
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    with socket.create_connection((host, port), timeout) as sock:
        # Before the handshake: a KME that resets the connection takes them away.
        address, own_address = sock.getpeername()[0], sock.getsockname()[0]
        connection, _ = _handshake(context, sock, host, timeout)
        return TLSFacts(
            address=address,
            own_address=own_address,
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            group=connection.get_group_name() or "",
            chain=tuple(connection.get_peer_cert_chain(as_cryptography=True) or ()),
        )


def accepts_old_tls(host: str, port: int, timeout: float) -> bool | None:
    """Return True if the KME shakes hands when it is offered nothing above TLS 1.1.

    Returns:
        True or False; None if it cannot be told, because the OpenSSL here has no such version.

    Raises:
        OSError: cannot connect, or no answer within `timeout` seconds.
    """
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_VERSION)
    context.set_max_proto_version(SSL.TLS1_1_VERSION)
    context.set_cipher_list(_OLD_CIPHERS)
    with socket.create_connection((host, port), timeout) as sock:
        connection, problem = _handshake(context, sock, host, timeout)
        if problem is None or connection.get_peer_cert_chain(as_cryptography=True):
            return True
        # A handshake that this side cannot begin says nothing about the other.
        return None if "no protocols available" in problem else False


def _handshake(
    context: SSL.Context, sock: socket.socket, host: str, timeout: float
) -> tuple[SSL.Connection, str | None]:
    """Return the connection, and the reason why its handshake ended early, if it did."""
    connection = SSL.Connection(context, sock)
    if not _is_address(host):
        connection.set_tlsext_host_name(host.encode("idna"))
    connection.set_connect_state()
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection.do_handshake()
        except SSL.WantReadError:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([sock], [], [], remaining)[0]:
                raise TimeoutError(f"no TLS handshake within {timeout:g} seconds") from None
        except (SSL.Error, SSL.SysCallError) as error:
            return connection, str(error)
        else:
            return connection, None


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()
