"""The cost of a handshake: microseconds of CPU, both sides together, in memory.

Six kinds take turns in one run, so that the ratios hold on a noisy machine:

* ``pyOpenSSL``: TLS 1.3 with certificates, X25519MLKEM768, ECDSA P-256, on the OpenSSL that qkd-tls uses;
* ``issuing CA``: the same with a chain of two certificates, as in most PKIs;
* ``ssl``: the same as the first, with the standard library and the groups it supports;
* ``bootstrap``: a first connection of qkd-tls, two handshakes and a QKD key;
* ``associated``: a later connection, with a fresh QKD key, all of the engine included;
* ``announced``: the same, with a key that was fetched with the first connection.

Each verifies the server's certificate if the server sends one, and negotiates ALPN. QKD keys are fetched
ahead, so that no KME is measured. Usage::

    python benchmarks/handshake.py [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import ssl
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import trustme
from OpenSSL import SSL

import qkd_tls
from kms_client import KeyManager, LocalKeyManager, QKDKey
from qkd_tls.endpoint import fetch_keys
from qkd_tls.engine import Engine, Established, FetchKeys, FetchKeysByID
from qkd_tls.info import QKDInfo
from qkd_tls.openssl import openssl_version

NAME = "server.example"
ALPN = "http/1.1"
NUMBER = 60  # an offer announces up to 63 keys for later connections


def pyopenssl(ca: trustme.CA, leaf: trustme.LeafCert) -> Callable[[], None]:
    """Return a handshake with certificates over X25519MLKEM768, as in an ordinary pyOpenSSL program."""
    server, client = SSL.Context(SSL.TLS_METHOD), SSL.Context(SSL.TLS_METHOD)
    for context in (server, client):
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        # pyOpenSSL has no call for groups; OpenSSL's own default puts X25519MLKEM768 first.
    leaf.configure_cert(server)
    ca.configure_trust(client)
    client.set_verify(SSL.VERIFY_PEER)
    client.set_alpn_protos([ALPN.encode()])
    server.set_alpn_select_callback(lambda _connection, offered: offered[0])

    def handshake() -> None:
        ends = SSL.Connection(client, None), SSL.Connection(server, None)
        ends[0].set_connect_state()
        ends[0].set_tlsext_host_name(NAME.encode())
        ends[1].set_accept_state()
        done = [False, False]
        while not all(done):
            for side in (0, 1):
                try:
                    ends[side].do_handshake()
                    done[side] = True
                except SSL.WantReadError:
                    pass
                with contextlib.suppress(SSL.WantReadError):
                    ends[1 - side].bio_write(ends[side].bio_read(1 << 16))
        assert ends[0].get_group_name() == "X25519MLKEM768"

    return handshake


def standard_library(ca: trustme.CA, leaf: trustme.LeafCert) -> Callable[[], None]:
    """Return a handshake with certificates and the groups of the standard library's OpenSSL."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    leaf.configure_cert(server)
    ca.configure_trust(client)
    for context in (server, client):
        context.set_alpn_protocols([ALPN])

    def handshake() -> None:
        bios = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(bios[0], bios[1], server_hostname=NAME),
            server.wrap_bio(bios[1], bios[0], server_side=True),
        )
        done = [False, False]
        while not all(done):
            for side in (0, 1):
                try:
                    ends[side].do_handshake()
                    done[side] = True
                except ssl.SSLWantReadError:
                    pass
        assert ends[0].version() == "TLSv1.3"

    return handshake


class FetchedAhead:
    """A key manager that hands out keys fetched before the clock runs."""

    def __init__(self, manager: LocalKeyManager) -> None:
        self.protocol, self.name, self.sae_id = manager.protocol, manager.name, manager.sae_id
        self.status, self.close = manager.status, manager.close
        self.keys: list[QKDKey] = []

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = 256) -> list[QKDKey]:
        """Return the next keys."""
        return [self.keys.pop() for _ in range(number)]

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Return the next keys, which are the same at the other end."""
        return [self.keys.pop() for _ in key_ids]


class Ours:
    """Client and server contexts of qkd-tls with key managers of one link in this process."""

    def __init__(self, ca: trustme.CA, leaf: trustme.LeafCert, *, announced: int = 0) -> None:
        self._announced = announced
        self._link = LocalKeyManager.pair("SAE-A", "SAE-B")
        alice, bob = self._managers = FetchedAhead(self._link[0]), FetchedAhead(self._link[1])
        self._server = qkd_tls.QKDContext(ssl.PROTOCOL_TLS_SERVER, key_manager=bob)
        self._client = qkd_tls.QKDContext(key_manager=alice, peer_sae_id="SAE-B", announced_keys=announced)
        for context in (self._server, self._client):
            context.set_alpn_protocols([ALPN])
        with leaf.private_key_and_cert_chain_pem.tempfile() as pem:
            self._server.load_cert_chain(pem)
        self._client.load_verify_locations(cadata=ca.cert_pem.bytes().decode())

    def prepare(self) -> None:
        """Fetch keys for the next handshakes, and announce them if this pair uses announced keys."""
        alice, bob = self._managers
        alice.keys = self._link[0].get_keys("SAE-B", NUMBER + 1)
        bob.keys = self._link[1].get_keys_by_id("SAE-A", [key.key_id for key in alice.keys])
        if self._announced:
            self.bootstrap()

    def bootstrap(self) -> None:
        """Make a first connection."""
        self._client.forget_associations()
        self._server.forget_associations()
        self._handshake("bootstrap")

    def associated(self) -> None:
        """Make a later connection."""
        self._handshake("associated")

    def _handshake(self, path: str) -> None:
        alice, bob = self._managers
        client = self._client.new_engine(server_side=False, server_hostname=NAME)
        server = self._server.new_engine(server_side=True)
        ours = self._step(client, alice)
        while True:
            server.receive_data(client.data_to_send())
            theirs = self._step(server, bob)
            if ours is not None:
                break
            client.receive_data(server.data_to_send())
            ours = self._step(client, alice)
        assert theirs is not None
        assert theirs.path == ours.path == path

    def _step(self, engine: Engine, manager: KeyManager) -> QKDInfo | None:
        action = engine.next_action()
        while isinstance(action, (FetchKeys, FetchKeysByID)):
            engine.keys(fetch_keys(action, manager))
            action = engine.next_action()
        return action.info if isinstance(action, Established) else None


def timed(handshake: Callable[[], None], number: int) -> float:
    """Return the microseconds of CPU for each of `number` handshakes."""
    start = time.process_time()
    for _ in range(number):
        handshake()
    return (time.process_time() - start) / number * 1e6


def report(samples: dict[str, list[float]]) -> Iterator[str]:
    """Yield the lines of the table: median, middle half, and the ratio to pyOpenSSL round by round."""
    yield f"{'':12}{'median':>8}{'middle half':>18}{'ratio to pyOpenSSL, round by round':>42}"
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratios = [value / base for value, base in zip(values, samples["pyOpenSSL"], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4)
        yield (
            f"{name:12}{median:6.0f} us{low:9.0f} to {high:.0f} us"
            f"{middle:24.2f}   ({lower:.2f} to {upper:.2f})"
        )


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help=f"rounds of {NUMBER} handshakes of each kind (default 20)"
    )
    rounds = parser.parse_args().rounds
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    leaf = ca.issue_cert(NAME, key_type=trustme.KeyType.ECDSA)
    fetched, announced = Ours(ca, leaf), Ours(ca, leaf, announced=NUMBER)
    kinds: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "pyOpenSSL": (lambda: None, pyopenssl(ca, leaf)),
        "issuing CA": (
            lambda: None,
            pyopenssl(
                ca,
                ca.create_child_ca(key_type=trustme.KeyType.ECDSA).issue_cert(
                    NAME, key_type=trustme.KeyType.ECDSA
                ),
            ),
        ),
        "ssl": (lambda: None, standard_library(ca, leaf)),
        "bootstrap": (fetched.prepare, fetched.bootstrap),
        "associated": (fetched.prepare, fetched.associated),
        "announced": (announced.prepare, announced.associated),
    }
    samples: dict[str, list[float]] = {name: [] for name in kinds}
    print(f"{openssl_version()}; the standard library has {ssl.OPENSSL_VERSION}")
    for number in range(rounds + 1):
        for name, (prepare, handshake) in kinds.items():
            prepare()
            value = timed(handshake, NUMBER)
            if number:  # the first round warms up
                samples[name].append(value)
        print(f"\rround {number} of {rounds}", end="", flush=True)
    print()
    print("\n".join(report(samples)))


if __name__ == "__main__":
    main()
