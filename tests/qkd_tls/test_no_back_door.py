"""No connection of the standard library's comes out of a `QKDContext`, by whatever door of `ssl` or `_ssl`.

A stock TLS peer records what reaches it. Under policy `require`, that is not one byte of application data. What
programs read from a context stays what a context of the standard library says.
"""

from __future__ import annotations

import _ssl
import contextlib
import copy
import inspect
import pickle
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkd_tls import QKDContext
from tests.support.sizes import sized
from tests.support.sockets import TIMEOUT, Authority, Identity, Lab, local_lab

# A door that is shut in the middle leaves the standard library's half-made socket.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

SECRET = b"nothing may see this"


# --- doors


class OverBIO:
    """What comes over memory, moved to a socket by the test."""

    def __init__(self, raw: socket.socket, make: Callable[[ssl.MemoryBIO, ssl.MemoryBIO], Any]) -> None:
        self.raw = raw
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = make(self.incoming, self.outgoing)

    def run(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                self.raw.sendall(self.outgoing.read())
                data = self.raw.recv(1 << 16)
                if data:
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            finally:
                self.raw.sendall(self.outgoing.read())


class TracedSocket(ssl.SSLSocket):
    """A subclass, as tracers have it."""


class TracedObject(ssl.SSLObject):
    """The same for connections over memory."""


Door = Callable[[Any, socket.socket, bool, "str | None"], Any]


def _sslsocket_class(kind: type[ssl.SSLSocket]) -> Door:
    def door(context: Any, raw: socket.socket, server_side: bool, name: str | None) -> Any:
        context.sslsocket_class = kind
        return context.wrap_socket(raw, server_side=server_side, server_hostname=name)

    return door


def _sslobject_class(kind: type[ssl.SSLObject]) -> Door:
    def door(context: Any, raw: socket.socket, server_side: bool, name: str | None) -> Any:
        context.sslobject_class = kind
        return OverBIO(
            raw,
            lambda one, other: context.wrap_bio(one, other, server_side=server_side, server_hostname=name),
        )

    return door


def _another_class(context: Any, raw: socket.socket, server_side: bool, name: str | None) -> Any:
    context.__class__ = ssl.SSLContext
    return context.wrap_socket(raw, server_side=server_side, server_hostname=name)


def _copied(copying: Callable[[Any], Any]) -> Door:
    return lambda context, raw, server_side, name: ssl.SSLContext.wrap_socket(
        copying(context), raw, server_side=server_side, server_hostname=name
    )


def _own_class(context: Any, raw: socket.socket, server_side: bool, name: str | None) -> Any:
    """A subclass of ours whose attributes are the standard library's classes."""
    context.__class__ = type(
        "Mine", (type(context),), {"sslsocket_class": ssl.SSLSocket, "sslobject_class": ssl.SSLObject}
    )
    return context.wrap_socket(raw, server_side=server_side, server_hostname=name)


def _restored_methods(context: Any, raw: socket.socket, server_side: bool, name: str | None) -> Any:
    context.wrap_socket = ssl.SSLContext.wrap_socket.__get__(context)
    return context.wrap_socket(raw, server_side=server_side, server_hostname=name)


DOORS: dict[str, Door] = {
    "SSLSocket._create": lambda context, raw, server_side, name: ssl.SSLSocket._create(  # type: ignore[attr-defined]
        raw, server_side=server_side, server_hostname=name, context=context
    ),
    "a subclass's _create": lambda context, raw, server_side, name: TracedSocket._create(  # type: ignore[attr-defined]
        raw, server_side=server_side, server_hostname=name, context=context
    ),
    "SSLSocket._create, handshake later": lambda context, raw, server_side, name: ssl.SSLSocket._create(  # type: ignore[attr-defined]
        raw, server_side=server_side, server_hostname=name, context=context, do_handshake_on_connect=False
    ),
    "SSLObject._create": lambda context, raw, server_side, name: OverBIO(
        raw,
        lambda one, other: ssl.SSLObject._create(  # type: ignore[attr-defined]
            one, other, server_side=server_side, server_hostname=name, context=context
        ),
    ),
    "SSLContext.wrap_socket": lambda context, raw, server_side, name: ssl.SSLContext.wrap_socket(
        context, raw, server_side=server_side, server_hostname=name
    ),
    "SSLContext.wrap_bio": lambda context, raw, server_side, name: OverBIO(
        raw,
        lambda one, other: ssl.SSLContext.wrap_bio(
            context, one, other, server_side=server_side, server_hostname=name
        ),
    ),
    "_SSLContext._wrap_socket": lambda context, raw, server_side, name: _ssl._SSLContext._wrap_socket(  # type: ignore[attr-defined]
        context, raw, server_side, name
    ),
    "_SSLContext._wrap_bio": lambda context, raw, server_side, name: OverBIO(
        raw,
        lambda one, other: _ssl._SSLContext._wrap_bio(context, one, other, server_side, name),  # type: ignore[attr-defined]
    ),
    "context._wrap_socket": lambda context, raw, server_side, name: context._wrap_socket(
        raw, server_side, name
    ),
    "context._wrap_bio": lambda context, raw, server_side, name: OverBIO(
        raw, lambda one, other: context._wrap_bio(one, other, server_side, name)
    ),
    "super().wrap_socket": lambda context, raw, server_side, name: super(QKDContext, context).wrap_socket(
        raw, server_side=server_side, server_hostname=name
    ),
    "super()._wrap_socket": lambda context, raw, server_side, name: super(QKDContext, context)._wrap_socket(
        raw, server_side, name
    ),
    "sslsocket_class": _sslsocket_class(ssl.SSLSocket),
    "sslsocket_class, a subclass": _sslsocket_class(TracedSocket),
    "sslobject_class": _sslobject_class(ssl.SSLObject),
    "sslobject_class, a subclass": _sslobject_class(TracedObject),
    "another __class__": _another_class,
    "a class with the standard library's classes": _own_class,
    "methods put back": _restored_methods,
    "copy": _copied(copy.copy),
    "deepcopy": _copied(copy.deepcopy),
    "pickle": _copied(lambda context: pickle.loads(pickle.dumps(context))),
}


def test_no_door_is_forgotten() -> None:
    """All functions of `ssl` and `_ssl` that take a context, or make a connection of one."""
    found = set()
    for module in (ssl, _ssl):
        # Copies: to look at a class may add to it.
        for name, thing in list(vars(module).items()):
            if inspect.isclass(thing) and thing.__module__ in ("ssl", "_ssl"):
                for attribute in list(vars(thing)):
                    member = getattr(thing, attribute)
                    if callable(member) and ("wrap" in attribute or _takes_a_context(member)):
                        found.add(f"{thing.__name__}.{attribute}")
            elif inspect.isroutine(thing) and (_takes_a_context(thing) or "wrap" in name):
                found.add(name)
    assert found - {"SSLSocket.unwrap", "SSLObject.unwrap", "SSLContext._encode_hostname"} <= {
        *DOORS,
        # It makes a context of its own; before Python 3.12.
        "wrap_socket",
        "SSLContext._wrap_socket",
        "SSLContext._wrap_bio",
    }


def _takes_a_context(function: Any) -> bool:
    try:
        return "context" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


# --- the peer


@contextlib.contextmanager
def recording_peer(context: ssl.SSLContext, *, server_side: bool) -> Iterator[tuple[socket.socket, Any]]:
    """A socket whose other end speaks the standard library's TLS; and a function for what has reached that end."""
    near, far = socket.socketpair()
    near.settimeout(TIMEOUT)
    far.settimeout(TIMEOUT)
    received: queue.Queue[bytes] = queue.Queue()

    def serve() -> None:
        data = b""
        with contextlib.suppress(OSError, ValueError), far:
            name = None if server_side else "localhost"
            with context.wrap_socket(far, server_side=server_side, server_hostname=name) as sock:
                sock.sendall(b"hello")
                while piece := sock.recv(1000):
                    data += piece
        received.put(data)

    thread = threading.Thread(target=serve)
    thread.start()

    def reached() -> bytes:
        with contextlib.suppress(OSError):
            near.shutdown(socket.SHUT_RDWR)
        return received.get(timeout=TIMEOUT)

    try:
        yield near, reached
    finally:
        near.close()
        thread.join(TIMEOUT)


@pytest.mark.parametrize("verified", [True, False], ids=["verifying", "not verifying"])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("door", DOORS)
def test_nothing_gets_through(local: Lab, door: str, side: str, verified: bool) -> None:
    """A refusal, or a connection of ours, which refuses a peer without QKD itself."""
    context = local.client() if side == "client" else local.server()
    stock = local.stock_server() if side == "client" else local.stock_client()
    if side == "client" and not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with recording_peer(stock, server_side=side == "client") as (raw, reached):
        descriptor = raw.fileno()
        refusal: Exception | None = None
        got, end = b"", None
        try:
            end = DOORS[door](context, raw, side == "server", "localhost" if side == "client" else None)
        except Exception as error:  # noqa: BLE001 - looked at below
            refusal = error
        else:
            got = speak(end)
        # The door may have taken the descriptor away, and left it open.
        with contextlib.suppress(OSError):
            other = socket.socket(fileno=descriptor)
            other.shutdown(socket.SHUT_RDWR)
            other.detach()
        assert reached() == b""
        assert got == b""
        if refusal is not None:
            assert isinstance(refusal, (OSError, TypeError, ValueError, NotImplementedError)), repr(refusal)
        if isinstance(end, socket.socket):
            end.close()


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize(
    "door", [door for door in DOORS if "super" not in door and door not in {"copy", "deepcopy", "pickle"}]
)
def test_the_doors_are_open_at_a_context_of_the_standard_library(local: Lab, door: str, side: str) -> None:
    """So that nothing is called shut which leads nowhere."""
    client, server = local.stock_client(), local.stock_server()
    context, peer = (client, server) if side == "client" else (server, client)
    with recording_peer(peer, server_side=side == "client") as (raw, reached):
        end = DOORS[door](context, raw, side == "server", "localhost" if side == "client" else None)
        assert speak(end) == b"hello"
        if isinstance(end, socket.socket):
            end.close()
        elif not isinstance(end, OverBIO):
            # The interpreter's own object has read with the descriptor of `raw`.
            raw.shutdown(socket.SHUT_RDWR)
        assert reached() == SECRET


def speak(end: Any) -> bytes:
    """Shake hands, send the secret and read, as far as that goes; return what was read."""
    tls = end.tls if isinstance(end, OverBIO) else end
    run = end.run if isinstance(end, OverBIO) else lambda call: call()
    with contextlib.suppress(OSError, ValueError, NotImplementedError):
        run(tls.do_handshake)
        if getattr(tls, "qkd", None) is not None:
            return b""
        run(lambda: tls.write(SECRET))
        return bytes(run(lambda: tls.read(100)))
    return b""


# --- what programs read


def _read(context: ssl.SSLContext) -> dict[str, Any]:
    """What a context tells of itself."""
    return {
        "protocol": context.protocol,
        "options": context.options,
        "verify_mode": context.verify_mode,
        "verify_flags": context.verify_flags,
        "check_hostname": context.check_hostname,
        "hostname_checks_common_name": context.hostname_checks_common_name,
        "minimum_version": context.minimum_version,
        "maximum_version": context.maximum_version,
        "num_tickets": context.num_tickets,
        "post_handshake_auth": context.post_handshake_auth,
        "keylog_filename": context.keylog_filename,
        "sni_callback": context.sni_callback,
        "security_level": getattr(context, "security_level", None),
        "session_stats": context.session_stats(),
        "cert_store_stats": context.cert_store_stats(),
        "get_ca_certs": context.get_ca_certs(),
        "get_ca_certs, binary": context.get_ca_certs(True),
        "get_ciphers": [cipher for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.3"],
        "is a context": isinstance(context, ssl.SSLContext),
    }


def _verify(context: ssl.SSLContext, mode: ssl.VerifyMode) -> None:
    context.check_hostname = False
    context.verify_mode = mode


def _callback(*_: object) -> None:
    """Accept any name."""


CHANGES: dict[str, Callable[[ssl.SSLContext, Lab], object]] = {
    "CA": lambda context, lab: context.load_verify_locations(str(lab.ca.file)),
    "CA, again": lambda context, lab: context.load_verify_locations(cadata=lab.ca.pem),
    "CA, DER": lambda context, lab: context.load_verify_locations(cadata=lab.ca.der),
    "a certificate": lambda context, lab: lab.server_identity.load_into(context),
    "no verification": lambda context, lab: _verify(context, ssl.CERT_NONE),
    "verification": lambda context, lab: setattr(context, "verify_mode", ssl.CERT_REQUIRED),
    "optional": lambda context, lab: _verify(context, ssl.CERT_OPTIONAL),
    "host names": lambda context, lab: setattr(context, "check_hostname", True),
    "common names": lambda context, lab: setattr(context, "hostname_checks_common_name", True),
    "options": lambda context, lab: setattr(
        context,
        "options",
        context.options | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION,
    ),
    "fewer options": lambda context, lab: setattr(
        context, "options", context.options & ~ssl.OP_CIPHER_SERVER_PREFERENCE
    ),
    "flags": lambda context, lab: setattr(
        context, "verify_flags", context.verify_flags | ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    ),
    "later certificates": lambda context, lab: setattr(context, "post_handshake_auth", True),
    "names": lambda context, lab: setattr(context, "sni_callback", _callback),
    "no names": lambda context, lab: setattr(context, "sni_callback", None),
    "versions": lambda context, lab: setattr(context, "minimum_version", ssl.TLSVersion.TLSv1_3),
    "the largest version": lambda context, lab: setattr(context, "maximum_version", ssl.TLSVersion.TLSv1_3),
    "ALPN": lambda context, lab: context.set_alpn_protocols(["h2", "http/1.1"]),
    "ciphers": lambda context, lab: context.set_ciphers("ECDHE+AESGCM"),
}


@pytest.fixture(scope="module")
def site(ca: Authority, server_identity: Identity, client_identity: Identity) -> Lab:
    return local_lab(ca, server_identity, client_identity)


@settings(max_examples=sized(1000, 60))
@given(
    protocol=st.sampled_from([ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER]),
    changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=6),
)
def test_a_context_tells_what_the_standard_librarys_would(
    site: Lab, protocol: int, changes: list[str]
) -> None:
    side = "client" if protocol == ssl.PROTOCOL_TLS_CLIENT else "server"
    ours, stock = QKDContext(protocol, key_manager=site.manager(side)), ssl.SSLContext(protocol)
    # What ours always is (docs/dropin.md).
    stock.minimum_version = stock.maximum_version = ssl.TLSVersion.TLSv1_3
    with contextlib.suppress(ValueError):
        stock.num_tickets = 0
    for number, change in enumerate(("", *changes)):
        outcomes = [_outcome(change, context, site) for context in (ours, stock)]
        assert outcomes[0] == outcomes[1], f"after {changes[:number]}"
        found, expected = _read(ours), _read(stock)
        if stock.num_tickets != 0:
            # A client's context of the standard library cannot change what only servers have.
            del found["num_tickets"], expected["num_tickets"]
        assert found == expected, f"after {changes[:number]}"


def _outcome(change: str, context: ssl.SSLContext, site: Lab) -> str:
    try:
        if change:
            CHANGES[change](context, site)
    except (OSError, ValueError) as error:
        return type(error).__name__
    return ""
