"""The settings of a tunnel's configuration file, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qkd_tls.configuration import ConfigError, Sections, Table, TLSFiles, read_file
from qkd_tls.tunnel.address import TCP, Activated, Address, Unix, parse

__all__ = ["ServiceSettings", "TunnelFile", "TunnelLimits", "TunnelSettings", "load"]


@dataclass(frozen=True, kw_only=True)
class TunnelLimits:
    """The limits of one tunnel; times in seconds, None for no limit."""

    max_connections: int
    connect_timeout: float
    handshake_timeout: float
    idle_timeout: float | None
    max_age: float | None
    max_age_grace: float
    quiet: float
    """Seconds without a byte that make a quiet moment."""


@dataclass(frozen=True, kw_only=True)
class TunnelSettings:
    """The table `[[tunnel]]`."""

    name: str
    mode: Literal["client", "server"]
    listen: Address
    connect: TCP | Unix
    tls: str
    server_name: str | None
    proxy_protocol: bool
    socket_mode: int
    limits: TunnelLimits

    @property
    def socket_key(self) -> tuple[Address, str]:
        """The key by which a reload finds the listening sockets to keep; with port 0, one for each tunnel."""
        any_port = isinstance(self.listen, TCP) and self.listen.port == 0
        return self.listen, self.name if any_port else ""

    @property
    def accepts_hybrid(self) -> bool:
        """True if the listening side is the hybrid one."""
        return self.mode == "server"


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """The table `[service]`: settings of the process."""

    drain_timeout: float = 30.0
    audit: Path | Literal["stderr", "off"] = "stderr"
    health: TCP | Unix | None = None


@dataclass(frozen=True, kw_only=True)
class TunnelFile:
    """A whole file. `tls` holds the tables that a tunnel uses, by name."""

    file: Path
    service: ServiceSettings
    tunnels: tuple[TunnelSettings, ...]
    tls: dict[str, TLSFiles] = field(default_factory=dict)


def load(file: Path) -> TunnelFile:
    """Read and check a file. Raises ConfigError for the first mistake."""
    top = read_file(file)
    service = _service(top.take_table("service"))
    sections = Sections(top)
    tunnels = tuple(_tunnel(table, sections.tls_tables) for table in top.take_array("tunnel"))
    top.finish()
    if not tunnels:
        raise ConfigError(file, "", "tunnel", "there must be one [[tunnel]] or more")
    _refuse_twice(file, tunnels)
    sections.check_kmes()
    tls: dict[str, TLSFiles] = {}
    for tunnel in tunnels:
        if tunnel.tls not in tls:
            tls[tunnel.tls] = sections.tls(tunnel.tls, tunnel.mode)
        if tls[tunnel.tls].server_side != tunnel.accepts_hybrid:
            raise sections.tls_tables[tunnel.tls].error(
                "", "is used by a client and by a server tunnel: make one table for each"
            )
    return TunnelFile(file=file, service=service, tunnels=tunnels, tls=tls)


def _refuse_twice(file: Path, tunnels: tuple[TunnelSettings, ...]) -> None:
    for what in ("name", "listen"):
        seen = set()
        for tunnel in tunnels:
            value = str(getattr(tunnel, what))
            if value in seen and not value.endswith(":0"):
                raise ConfigError(file, "[[tunnel]]", what, f"{value} stands in two tunnels")
            seen.add(value)


def _service(table: Table) -> ServiceSettings:
    drain_timeout = table.take_seconds("drain_timeout", 30.0, zero=True)
    audit = table.take_text("audit", "stderr")
    health: TCP | Unix | None = None
    if table.take_text("health", None) is not None:
        address = _address(table, "health")
        if isinstance(address, Activated) or (isinstance(address, TCP) and not address.is_loopback):
            raise table.error("health", "must be a loopback address or unix:PATH: it has no authentication")
        health = address
    table.finish()
    return ServiceSettings(
        drain_timeout=drain_timeout,
        audit=audit if audit in ("stderr", "off") else table.path(audit),
        health=health,
    )


def _tunnel(table: Table, tls_tables: dict[str, Table]) -> TunnelSettings:
    name = table.take_text("name")
    mode: Literal["client", "server"] = (
        "client" if table.take_choice("mode", ("client", "server")) == "client" else "server"
    )
    listen, connect = _address(table, "listen"), _address(table, "connect")
    if isinstance(connect, Activated) or (isinstance(connect, TCP) and not (connect.host and connect.port)):
        raise table.error("connect", "must name a host and a port, or unix:PATH")
    tls = table.take_text("tls")
    if tls not in tls_tables:
        raise table.error("tls", f"there is no [tls.{tls}]")
    server_name, proxy_protocol = None, False
    if mode == "client":
        host = connect.host if isinstance(connect, TCP) else None
        server_name = table.take_text("server_name", host)
        if server_name is None:
            raise table.error(
                "server_name", "is missing: a Unix path says nothing of the name in the certificate"
            )
    else:
        proxy_protocol = table.take_bool("proxy_protocol", False)
    limits = TunnelLimits(
        max_connections=table.take_int("max_connections", 1000, 1),
        connect_timeout=table.take_seconds("connect_timeout", 10.0),
        handshake_timeout=table.take_seconds("handshake_timeout", 30.0),
        idle_timeout=table.take_seconds("idle_timeout", None),
        max_age=table.take_seconds("max_age", None),
        max_age_grace=table.take_seconds("max_age_grace", 60.0),
        quiet=table.take_seconds("quiet", 0.5),
    )
    settings = TunnelSettings(
        name=name,
        mode=mode,
        listen=listen,
        connect=connect,
        tls=tls,
        server_name=server_name,
        proxy_protocol=proxy_protocol,
        socket_mode=_socket_mode(table, listen),
        limits=limits,
    )
    table.finish()
    return settings


def _socket_mode(table: Table, listen: Address) -> int:
    text = table.take_text("socket_mode", "0600")
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise table.error("socket_mode", f'must be an octal number such as "0660", not {text!r}')
    if "socket_mode" in table and not isinstance(listen, Unix):
        raise table.error("socket_mode", "is for listen = unix:PATH only")
    return mode


def _address(table: Table, key: str) -> Address:
    try:
        return parse(table.take_text(key), table.file.parent)
    except ConfigError:
        raise
    except ValueError as error:
        raise table.error(key, str(error)) from None
