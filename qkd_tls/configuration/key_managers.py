"""What the tables of a configuration file mean: `[kme.NAME]`, `[failover]`, `[pool]`, `[peers]` and `[tls.NAME]`.

Tables become plain settings, which key managers and TLS contexts are made from. `QKDContext.from_config` and the tunnel
both read their files with this module.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from kms_client import (
    Etsi014Client,
    FailoverKeyManager,
    KeyManager,
    KeyPool,
    KMSError,
    SecureSite,
    SkipClient,
)
from qkd_tls import control, kems
from qkd_tls.configuration.tables import REQUIRED, Table, read_file
from qkd_tls.context import QKDContext
from qkd_tls.hybrid import KDF
from qkd_tls.policy import Policy

__all__ = [
    "FailoverSettings",
    "KMESettings",
    "KeySource",
    "PoolSettings",
    "Role",
    "Sections",
    "TLSFiles",
    "load_context",
]

Role = Literal["client", "server"]

_Context = TypeVar("_Context", bound=QKDContext)
_T = TypeVar("_T")

_CERTIFICATE: Final = re.compile(rb"-----BEGIN (TRUSTED )?CERTIFICATE-----")
_IN_C: Final = re.compile(r" \(_ssl\.c:\d+\)$")
_PROTOCOLS: Final = (Etsi014Client.protocol, SkipClient.protocol)


# --- key managers


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
    """Bits."""
    master_in_key_ids: bool = False
    site: tuple[str, ...] = ()
    """Networks that the KME may be in, beside this host."""
    this_host: bool = True
    """Whether this host is inside the secure site."""
    peers: tuple[str, ...] | None = None
    """SAE IDs that the KME has a link to, where several KMEs serve as one; None for all."""

    @classmethod
    def take(cls, name: str, table: Table) -> KMESettings:
        """Read a table; every mistake raises ConfigError, those that the client of a KME finds too."""
        protocol = table.take_choice("protocol", _PROTOCOLS, Etsi014Client.protocol)
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
            sae_id=_take_sae_id(table, "sae_id", REQUIRED),
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
            peers=_take_sae_ids(table, "peers"),
        )
        table.finish()
        settings._check(table)
        return settings

    def _check(self, table: Table) -> None:
        """Let the client itself check what it is made of, piece by piece, to know which key of the file is wrong."""
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        def client(**settings: Any) -> None:
            Etsi014Client(self.url, sae_id=self.sae_id, ssl_context=trust, **settings).close()

        _blaming(table, "url", client)
        _blaming(table, "headers", lambda: client(headers=dict(self.headers)))
        _blaming(table, "ca", lambda: trust.load_verify_locations(self.ca), path=self.ca)
        _blaming(table, "cert" if self.pkcs12 is None else "pkcs12", lambda: self.client().close())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        named = (self.cert, self.key, self.pkcs12, self.key_password_file, self.ca)
        return tuple(path for path in named if path is not None)

    def client(self) -> Etsi014Client | SkipClient:
        """A new client of this KME, which is not contacted yet."""
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
    """The table `[failover]`: how several KMEs serve as one; see `FailoverKeyManager`."""

    protocol: str | None = None
    threshold: int = 3
    min_backoff: float = 0.2
    max_backoff: float = 15.0

    @classmethod
    def take(cls, table: Table) -> FailoverSettings:
        """Read the table; raises ConfigError."""
        settings = cls(
            protocol=table.take_choice("protocol", _PROTOCOLS, None),
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
        """Read the table; raises ConfigError."""
        low_water = table.take_int("low_water", 4, 1)
        settings = cls(
            low_water=low_water,
            high_water=table.take_int("high_water", max(low_water, 16), low_water),
            max_age=table.take_seconds("max_age", 60.0),
            timeout=table.take_seconds("timeout", 10.0),
            idle_after=table.take_seconds("idle_after", 600.0),
            peers=_take_sae_ids(table, "peers") or (),
            **_take_backoff(table),
        )
        table.finish()
        return settings


@dataclass(frozen=True, kw_only=True)
class KeySource:
    """Where a context's keys come from: a KME, or several as one, perhaps with keys fetched ahead."""

    kmes: tuple[KMESettings, ...]
    """The preferred one first."""
    failover: FailoverSettings
    pool: PoolSettings | None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        return tuple(path for kme in self.kmes for path in kme.files)

    def key_manager(
        self, around: Callable[[KMESettings, KeyManager], KeyManager] = lambda _, client: client
    ) -> KeyManager:
        """A new key manager; its `close` closes all of it. `around` may put something around each KME's client.

        Raises ValueError where the KMEs do not fit together.
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


# --- TLS contexts


@dataclass(frozen=True, kw_only=True)
class TLSFiles:
    """A table `[tls.NAME]`: what a `QKDContext` is made of, for a client or for a server."""

    table: Table = field(repr=False, compare=False)
    """For messages."""
    server_side: bool
    certificate: Path | None
    key: Path | None
    key_password_file: Path | None
    ca: Path | None
    """None: the system's."""
    crl: Path | None
    verify: ssl.VerifyMode
    alpn: tuple[str, ...] | None
    source: KeySource | None
    """None: no QKD keys, under policy off."""
    policy: Policy
    qkd: tuple[tuple[str, Any], ...]
    """Further arguments of `QKDContext`."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        named = (self.certificate, self.key, self.key_password_file, self.ca, self.crl)
        return tuple(path for path in named if path is not None)

    def key_manager(
        self, around: Callable[[KMESettings, KeyManager], KeyManager] = lambda _, client: client
    ) -> KeyManager | None:
        """A new key manager for the context; see `KeySource.key_manager`. Raises ConfigError."""
        source = self.source
        return None if source is None else _blaming(self.table, "kme", lambda: source.key_manager(around))

    def context(self, key_manager: KeyManager | None, kind: type[_Context]) -> _Context:
        """A new context of this class. Raises ConfigError where the files or the groups do not do."""
        blaming = partial(_blaming, self.table)
        context: _Context = blaming(
            "groups",
            lambda: kind(
                ssl.PROTOCOL_TLS_SERVER if self.server_side else ssl.PROTOCOL_TLS_CLIENT,
                key_manager=key_manager,
                policy=self.policy,
                **dict(self.qkd),
            ),
        )
        context.verify_mode = self.verify
        if self.ca is not None:
            blaming("ca", lambda: context.load_verify_locations(cafile=str(self.ca)), path=self.ca)
        elif self.verify is not ssl.CERT_NONE:
            context.load_default_certs(
                ssl.Purpose.CLIENT_AUTH if self.server_side else ssl.Purpose.SERVER_AUTH
            )
        if self.crl is not None:
            blaming("crl", lambda: context.load_verify_locations(cafile=str(self.crl)), path=self.crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        if (certificate := self.certificate) is not None:
            blaming("certificate", lambda: _check_certificate(certificate), path=certificate)
            blaming(
                "certificate" if self.key is None else "key",
                lambda: context.load_cert_chain(certificate, self.key or certificate, self._password),
                path=self.key or certificate,
            )
        if (alpn := self.alpn) is not None:
            blaming("alpn", lambda: context.set_alpn_protocols(alpn))
        return context

    def _password(self) -> bytes:
        # Without a password OpenSSL must not ask on a terminal.
        return b"" if self.key_password_file is None else self.key_password_file.read_bytes().rstrip(b"\r\n")


class Sections:
    """The tables of a file that make contexts. A `[kme.NAME]` is read when it is asked for, and once."""

    def __init__(self, top: Table) -> None:
        """Read `[pool]`, `[failover]` and `[peers]`. Raises ConfigError."""
        self._kme_tables = top.take_tables("kme")
        self.tls_tables = top.take_tables("tls")
        self._failover = FailoverSettings.take(top.take_table("failover"))
        pool = top.take_table("pool")
        self._pool = PoolSettings.take(pool) if "pool" in top else None
        peers = top.take_table("peers")
        self._peers = {host: _take_sae_id(peers, host, REQUIRED) for host in peers}
        self._kmes: dict[str, KMESettings] = {}

    def check_kmes(self) -> None:
        """Read all `[kme.NAME]`, also those that no context uses. Raises ConfigError."""
        for name in self._kme_tables:
            self._kme(name)

    def tls(self, name: str, role: Role | None = None) -> TLSFiles:
        """Read `[tls.NAME]` for one side: the one that is asked for, or the one that the table names.

        Raises ConfigError.
        """
        table = self.tls_tables[name]
        said = table.take_choice("role", ("client", "server"), role or REQUIRED)
        if said != (role or said):
            raise table.error("role", f"is {said}, and a {role}'s context is wanted")
        server_side = said == "server"
        policy = Policy(table.take_choice("policy", tuple(map(str, Policy)), str(Policy.REQUIRE)))
        source = self._source(table, policy, server_side)
        certificate = table.take_file("certificate", REQUIRED if server_side else None)
        key = table.take_secret_file("key", None)
        if certificate is None and key is not None:
            raise table.error("key", "is of no use without certificate")
        if certificate is not None and key is None:
            # It is in the certificate's file, which then is the secret one.
            table.take_secret_file("certificate")
        verify = ssl.CERT_REQUIRED
        if server_side:
            modes = {"require": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
            verify = modes[table.take_choice("verify_client", tuple(modes), "require")]
        needs_ca = server_side and verify is not ssl.CERT_NONE
        ca = table.take_text("ca", REQUIRED if needs_ca else None)
        settings = TLSFiles(
            table=table,
            server_side=server_side,
            certificate=certificate,
            key=key,
            key_password_file=table.take_secret_file("key_password_file", None),
            ca=None if ca in (None, "system") else table.take_file("ca"),
            crl=table.take_file("crl", None),
            verify=verify,
            alpn=table.take_list("alpn", None),
            source=source,
            policy=policy,
            qkd=tuple(self._take_qkd(table, server_side)),
        )
        table.finish()
        return settings

    def _kme(self, name: str) -> KMESettings:
        if name not in self._kmes:
            self._kmes[name] = KMESettings.take(name, self._kme_tables[name])
        return self._kmes[name]

    def _source(self, table: Table, policy: Policy, server_side: bool) -> KeySource | None:
        names = table.take_names("kme", None if policy is Policy.OFF else REQUIRED)
        if names is None:
            return None
        for name in names:
            if name not in self._kme_tables:
                there = ", ".join(f"[kme.{known}]" for known in self._kme_tables) or "none"
                raise table.error("kme", f"there is no [kme.{name}]; there is {there}")
        # A server is told the IDs of its keys, and nobody can fetch those ahead.
        return KeySource(
            kmes=tuple(map(self._kme, names)),
            failover=self._failover,
            pool=None if server_side else self._pool,
        )

    def _take_qkd(self, table: Table, server_side: bool) -> Iterator[tuple[str, Any]]:
        """Arguments of QKDContext beside key manager and policy; only those of this side are known."""
        yield "allowed_peer_sae_ids", _take_sae_ids(table, "allowed_peer_sae_ids")
        yield "groups", table.take_list("groups", ("X25519MLKEM768",))
        yield "association_lifetime", table.take_int("association_lifetime", 3600, 1, 10_000_000)
        if server_side:
            yield "max_keys", table.take_int("max_keys", 64, 1, 1000)
            return
        yield "peer_sae_id", _take_sae_id(table, "peer_sae_id", None) or self._peers
        yield "announced_keys", table.take_int("announced_keys", 0, 0, 63)
        yield "pipelined", table.take_bool("pipelined", True)
        kem = table.take_text("kem", None)
        if kem is not None and kem not in kems.names():
            raise table.error("kem", f"{kem!r} is not available here; these are: {', '.join(kems.names())}")
        yield "kem", kem
        yield "kdf", KDF(table.take_choice("kdf", tuple(kdf.value for kdf in KDF), KDF.SHA384.value))


def load_context(kind: type[_Context], file: Path, table: str | None, role: Role | None) -> _Context:
    """A context of this class from a file; see `QKDContext.from_config`."""
    top = read_file(file)
    sections = Sections(top)
    top.finish()
    names = list(sections.tls_tables)
    if table is None:
        if len(names) != 1:
            listed = f"{', '.join(f'[tls.{name}]' for name in names)}: say which" if names else "none"
            raise top.error("tls", f"there must be one table [tls.NAME], and there is {listed}")
        [table] = names
    if table not in names:
        raise top.error("tls", f"there is no [tls.{table}]")
    settings = sections.tls(table, role)
    manager = settings.key_manager()
    try:
        return settings.context(manager, kind)
    except BaseException:
        if manager is not None:
            manager.close()
        raise


# --- values


def _blaming(table: Table, key: str, call: Callable[[], _T], *, path: Path | None = None) -> _T:
    """What `call` gives; what goes wrong in it is the fault of one key of the file, which perhaps names `path`."""
    try:
        return call()
    except KMSError as error:
        # The argument of a client has another name in a file.
        problem = f"{error.message}. {error.hint.replace('key_password', 'key_password_file')}"
    except ssl.SSLError as error:
        problem = _IN_C.sub("", str(error.args[-1]))
    except (ValueError, OSError) as error:
        problem = str(error)
    # Out of the except block: what was caught may hold what was read.
    raise table.error(key, problem if path is None else f"cannot use {path}: {problem}")


def _check_certificate(path: Path) -> None:
    if not _CERTIFICATE.search(path.read_bytes()):
        raise ValueError("it has no certificate in PEM")


def _take_sae_id(table: Table, key: str, default: Any) -> Any:
    sae_id = table.take_text(key, default)
    if sae_id is not None:
        _check_sae_id(table, key, sae_id)
    return sae_id


def _take_sae_ids(table: Table, key: str) -> tuple[str, ...] | None:
    sae_ids = table.take_list(key, None)
    for sae_id in sae_ids or ():
        _check_sae_id(table, key, sae_id)
    return sae_ids


def _check_sae_id(table: Table, key: str, sae_id: str) -> None:
    if sae_id in (".", ".."):
        raise table.error(key, f"{sae_id!r} cannot be an SAE ID")
    _blaming(table, key, lambda: control.Identity(sae_id, _PROTOCOLS, (), 1))


def _take_headers(table: Table) -> tuple[tuple[str, str], ...]:
    return tuple((name, table.take_secret(name)) for name in table)


def _take_key_size(table: Table) -> int:
    size = table.take_int("key_size", 256, 256, 65536)
    if size % 8:
        raise table.error("key_size", f"must be a multiple of 8 bits, not {size}")
    return size


def _take_site(table: Table) -> tuple[str, ...]:
    networks = table.take_list("site", None) or ()
    _blaming(table, "site", lambda: SecureSite(networks))
    return networks


def _take_backoff(table: Table) -> dict[str, float]:
    first = table.take_seconds("min_backoff", 0.2)
    most = table.take_seconds("max_backoff", max(first, 15.0))
    if most < first:
        raise table.error("max_backoff", f"must not be less than min_backoff, {first:g} seconds")
    return {"min_backoff": first, "max_backoff": most}
