"""The tables `[tls.NAME]` and `[peers]`, which make TLS contexts.

`QKDContext.from_config` and the tunnel both read their files with this module.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from kms_client import KeyManager
from qkd_tls import kems
from qkd_tls.configuration.key_managers import FailoverSettings, KeyManagerSettings, KMESettings, PoolSettings
from qkd_tls.configuration.tables import REQUIRED, Table, read_file
from qkd_tls.configuration.values import blaming, take_sae_id, take_sae_ids
from qkd_tls.hybrid import KDF
from qkd_tls.policy import Policy

__all__ = ["Role", "Sections", "TLSFiles", "load_context"]

Role = Literal["client", "server"]

_Context = TypeVar("_Context", bound=ssl.SSLContext)

_CERTIFICATE: Final = re.compile(rb"-----BEGIN (TRUSTED )?CERTIFICATE-----")


@dataclass(frozen=True, kw_only=True)
class TLSFiles:
    """A table `[tls.NAME]`: the settings of a `QKDContext` for a client or a server."""

    table: Table = field(repr=False, compare=False)
    """The table, for messages."""
    server_side: bool
    certificate: Path | None
    key: Path | None
    key_password_file: Path | None
    ca: Path | None
    """The file of CA certificates; None for the system's."""
    crl: Path | None
    verify: ssl.VerifyMode
    alpn: tuple[str, ...] | None
    source: KeyManagerSettings | None
    """The source of keys; None under policy off: no QKD keys."""
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
        """Make a new key manager; see `KeyManagerSettings.key_manager`. Raises ConfigError."""
        source = self.source
        return None if source is None else blaming(self.table, "kme", lambda: source.key_manager(around))

    def context(self, key_manager: KeyManager | None, kind: Callable[..., _Context]) -> _Context:
        """Make a new context of this class. Raises ConfigError if the files or the groups cannot be used."""
        blame = partial(blaming, self.table)
        context: _Context = blame(
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
            blame("ca", lambda: context.load_verify_locations(cafile=str(self.ca)), path=self.ca)
        elif self.verify is not ssl.CERT_NONE:
            context.load_default_certs(
                ssl.Purpose.CLIENT_AUTH if self.server_side else ssl.Purpose.SERVER_AUTH
            )
        if self.crl is not None:
            blame("crl", lambda: context.load_verify_locations(cafile=str(self.crl)), path=self.crl)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        if (certificate := self.certificate) is not None:
            blame("certificate", lambda: _check_certificate(certificate), path=certificate)
            blame(
                "certificate" if self.key is None else "key",
                lambda: context.load_cert_chain(certificate, self.key or certificate, self._password),
                path=self.key or certificate,
            )
        if (alpn := self.alpn) is not None:
            blame("alpn", lambda: context.set_alpn_protocols(alpn))
        return context

    def _password(self) -> bytes:
        # Without a password OpenSSL must not ask on a terminal.
        return b"" if self.key_password_file is None else self.key_password_file.read_bytes().rstrip(b"\r\n")


class Sections:
    """The tables of a file that make contexts. Each `[kme.NAME]` is read once, when a context needs it."""

    def __init__(self, top: Table) -> None:
        """Read `[pool]`, `[failover]` and `[peers]`. Raises ConfigError."""
        self._kme_tables = top.take_tables("kme")
        self.tls_tables = top.take_tables("tls")
        self._failover = FailoverSettings.take(top.take_table("failover"))
        pool = top.take_table("pool")
        self._pool = PoolSettings.take(pool) if "pool" in top else None
        peers = top.take_table("peers")
        self._peers = {host: take_sae_id(peers, host, REQUIRED) for host in peers}
        self._kmes: dict[str, KMESettings] = {}

    def check_kmes(self) -> None:
        """Read all `[kme.NAME]`, including those that no context uses. Raises ConfigError."""
        for name in self._kme_tables:
            self._kme(name)

    def tls(self, name: str, role: Role | None = None) -> TLSFiles:
        """Read `[tls.NAME]` for the given side, or for the side that the table names.

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

    def _source(self, table: Table, policy: Policy, server_side: bool) -> KeyManagerSettings | None:
        names = table.take_names("kme", None if policy is Policy.OFF else REQUIRED)
        if names is None:
            return None
        for name in names:
            if name not in self._kme_tables:
                there = ", ".join(f"[kme.{known}]" for known in self._kme_tables) or "none"
                raise table.error("kme", f"there is no [kme.{name}]; there is {there}")
        # A server is told the IDs of its keys, and nobody can fetch those ahead.
        return KeyManagerSettings(
            kmes=tuple(map(self._kme, names)),
            failover=self._failover,
            pool=None if server_side else self._pool,
        )

    def _take_qkd(self, table: Table, server_side: bool) -> Iterator[tuple[str, Any]]:
        """Yield the arguments of QKDContext beside key manager and policy; only this side's are known."""
        yield "allowed_peer_sae_ids", take_sae_ids(table, "allowed_peer_sae_ids")
        yield "groups", table.take_list("groups", ("X25519MLKEM768",))
        yield "association_lifetime", table.take_int("association_lifetime", 3600, 1, 10_000_000)
        if server_side:
            yield "max_keys", table.take_int("max_keys", 64, 1, 1000)
            return
        yield "peer_sae_id", take_sae_id(table, "peer_sae_id", None) or self._peers
        yield "announced_keys", table.take_int("announced_keys", 0, 0, 63)
        yield "pipelined", table.take_bool("pipelined", True)
        kem = table.take_text("kem", None)
        if kem is not None and kem not in kems.names():
            raise table.error("kem", f"{kem!r} is not available here; these are: {', '.join(kems.names())}")
        yield "kem", kem
        yield "kdf", KDF(table.take_choice("kdf", tuple(kdf.value for kdf in KDF), KDF.SHA384.value))


def load_context(kind: Callable[..., _Context], file: Path, table: str | None, role: Role | None) -> _Context:
    """Make a context of this class from a file; see `QKDContext.from_config`."""
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


def _check_certificate(path: Path) -> None:
    if not _CERTIFICATE.search(path.read_bytes()):
        raise ValueError("it has no certificate in PEM")
