"""The tables `[kme.NAME]`, `[failover]` and `[pool]`: the sources of a context's keys."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kms_client import (
    Etsi014Client,
    FailoverKeyManager,
    KeyManager,
    KeyPool,
    SecureSite,
    SkipClient,
)
from qkd_tls.configuration.tables import REQUIRED, Table
from qkd_tls.configuration.values import PROTOCOLS, blaming, take_sae_id, take_sae_ids

__all__ = ["FailoverSettings", "KMESettings", "KeyManagerSettings", "PoolSettings"]


@dataclass(frozen=True, kw_only=True)
class KMESettings:
    """A table `[kme.NAME]`: one KME as one SAE sees it."""

    name: str
    protocol: str = Etsi014Client.protocol
    url: str
    sae_id: str
    cert: Path | None = None
    key: Path | None = None
    pkcs12: Path | None = None
    key_password_file: Path | None = None
    ca: Path
    server_hostname: str | None = None
    unix_socket: Path | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Further header fields; a value may be secret."""
    connect_timeout: float = 3.0
    read_timeout: float = 5.0
    key_size: int = 256
    """Bits of a key."""
    master_in_key_ids: bool = False
    site: tuple[str, ...] = ()
    """Networks that the KME may be in, beside this host."""
    this_host: bool = True
    """True if this host is inside the secure site."""
    peers: tuple[str, ...] | None = None
    """SAE IDs that the KME has a link to, if several KMEs serve as one; None for all."""

    @classmethod
    def take(cls, name: str, table: Table) -> KMESettings:
        """Read a table. Raises ConfigError for every mistake, including those that the KME's client finds."""
        protocol = table.take_choice("protocol", PROTOCOLS, Etsi014Client.protocol)
        pkcs12 = table.take_secret_file("pkcs12", None)
        cert = table.take_file("cert", None)
        key = table.take_secret_file("key", None)
        if pkcs12 is not None and (cert is not None or key is not None):
            raise table.error(
                "pkcs12", "stands beside cert or key: give one of them, they are the same thing"
            )
        if pkcs12 is None and cert is None:
            raise table.error("cert", "is missing: give cert and key, or pkcs12")
        if cert is not None and key is None:
            # It is in the certificate's file, which then is the secret one.
            table.take_secret_file("cert")
        unix_socket = table.take_text("unix_socket", None)
        settings = cls(
            name=name,
            protocol=protocol,
            url=table.take_text("url"),
            sae_id=take_sae_id(table, "sae_id", REQUIRED),
            cert=cert,
            key=key,
            pkcs12=pkcs12,
            key_password_file=table.take_secret_file("key_password_file", None),
            ca=table.take_file("ca"),
            server_hostname=table.take_text("server_hostname", None),
            unix_socket=None if unix_socket is None else table.path(unix_socket),
            headers=_take_headers(table.take_table("headers")),
            connect_timeout=table.take_seconds("connect_timeout", 3.0),
            read_timeout=table.take_seconds("read_timeout", 5.0),
            key_size=_take_key_size(table),
            master_in_key_ids=(
                protocol == Etsi014Client.protocol and table.take_bool("master_in_key_ids", False)
            ),
            site=_take_site(table),
            this_host=table.take_bool("this_host", True),
            peers=take_sae_ids(table, "peers"),
        )
        table.finish()
        settings._check(table)
        return settings

    def _check(self, table: Table) -> None:
        """Let the client itself check its settings, piece by piece, to find the wrong key of the file."""
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        def client(**settings: Any) -> None:
            Etsi014Client(self.url, sae_id=self.sae_id, ssl_context=trust, **settings).close()

        blaming(table, "url", client)
        blaming(table, "headers", lambda: client(headers=dict(self.headers)))
        blaming(table, "ca", lambda: trust.load_verify_locations(self.ca), path=self.ca)
        blaming(table, "cert" if self.pkcs12 is None else "pkcs12", lambda: self.client().close())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        named = (self.cert, self.key, self.pkcs12, self.key_password_file, self.ca)
        return tuple(path for path in named if path is not None)

    def client(self) -> Etsi014Client | SkipClient:
        """Make a new client of this KME, which is not contacted yet."""
        kind = (
            SkipClient
            if self.protocol == SkipClient.protocol
            else partial(Etsi014Client, master_in_key_ids=self.master_in_key_ids)
        )
        return kind(
            self.url,
            sae_id=self.sae_id,
            cert=self.cert,
            key=self.key,
            pkcs12=self.pkcs12,
            key_password=self.key_password_file,
            ca=self.ca,
            server_hostname=self.server_hostname,
            unix_socket=self.unix_socket,
            headers=dict(self.headers),
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            size=self.key_size,
            site=SecureSite(self.site, this_host=self.this_host),
        )


@dataclass(frozen=True, kw_only=True)
class FailoverSettings:
    """The table `[failover]`, for several KMEs that serve as one; see `FailoverKeyManager`."""

    protocol: str | None = None
    threshold: int = 3
    min_backoff: float = 0.2
    max_backoff: float = 15.0

    @classmethod
    def take(cls, table: Table) -> FailoverSettings:
        """Read the table. Raises ConfigError."""
        settings = cls(
            protocol=table.take_choice("protocol", PROTOCOLS, None),
            threshold=table.take_int("threshold", 3, 1),
            **_take_backoff(table),
        )
        table.finish()
        return settings


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """The table `[pool]`: keys fetched ahead by clients; see `KeyPool`."""

    low_water: int = 4
    high_water: int = 16
    max_age: float = 60.0
    timeout: float = 10.0
    idle_after: float = 600.0
    peers: tuple[str, ...] = ()
    min_backoff: float = 0.2
    max_backoff: float = 15.0

    @classmethod
    def take(cls, table: Table) -> PoolSettings:
        """Read the table. Raises ConfigError."""
        low_water = table.take_int("low_water", 4, 1)
        settings = cls(
            low_water=low_water,
            high_water=table.take_int("high_water", max(low_water, 16), low_water),
            max_age=table.take_seconds("max_age", 60.0),
            timeout=table.take_seconds("timeout", 10.0),
            idle_after=table.take_seconds("idle_after", 600.0),
            peers=take_sae_ids(table, "peers") or (),
            **_take_backoff(table),
        )
        table.finish()
        return settings


@dataclass(frozen=True, kw_only=True)
class KeyManagerSettings:
    """The source of a context's keys: a KME, or several as one, perhaps with keys fetched ahead."""

    kmes: tuple[KMESettings, ...]
    """The KMEs, the preferred one first."""
    failover: FailoverSettings
    pool: PoolSettings | None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        return tuple(path for kme in self.kmes for path in kme.files)

    def key_manager(
        self, around: Callable[[KMESettings, KeyManager], KeyManager] = lambda _, client: client
    ) -> KeyManager:
        """Make a new key manager; its `close` closes all of it. `around` may wrap each KME's client.

        Raises ValueError if the KMEs do not fit together.
        """
        members = [around(kme, kme.client()) for kme in self.kmes]
        try:
            manager = members[0] if len(members) == 1 else self._failover(members)
        except BaseException:
            for member in members:
                member.close()
            raise
        if self.pool is None:
            return manager
        return KeyPool(manager, size=self.kmes[0].key_size, **vars(self.pool))

    def _failover(self, members: list[KeyManager]) -> KeyManager:
        sizes = sorted({kme.key_size for kme in self.kmes})
        if len(sizes) > 1:
            raise ValueError(f"all KMEs that serve as one must have one key_size, not {sizes}")
        if self.failover.protocol is None and len(spoken := {kme.protocol for kme in self.kmes}) > 1:
            raise ValueError(
                f"these KMEs speak {' and '.join(sorted(spoken))}: if all of them deliver the same keys under the same "
                "IDs, say in [failover] which protocol is told to peers"
            )
        links = {
            member.name: kme.peers
            for member, kme in zip(members, self.kmes, strict=True)
            if kme.peers is not None
        }
        return FailoverKeyManager(members, peers=links, size=sizes[0], **vars(self.failover))


def _take_headers(table: Table) -> tuple[tuple[str, str], ...]:
    return tuple((name, table.take_secret(name)) for name in table)


def _take_key_size(table: Table) -> int:
    size = table.take_int("key_size", 256, 256, 65536)
    if size % 8:
        raise table.error("key_size", f"must be a multiple of 8 bits, not {size}")
    return size


def _take_site(table: Table) -> tuple[str, ...]:
    networks = table.take_list("site", None) or ()
    blaming(table, "site", lambda: SecureSite(networks))
    return networks


def _take_backoff(table: Table) -> dict[str, float]:
    first = table.take_seconds("min_backoff", 0.2)
    most = table.take_seconds("max_backoff", max(first, 15.0))
    if most < first:
        raise table.error("max_backoff", f"must not be less than min_backoff, {first:g} seconds")
    return {"min_backoff": first, "max_backoff": most}
