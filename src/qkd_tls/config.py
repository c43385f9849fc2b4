"""Configuration files: TOML, read strictly; and the KMEs and TLS contexts that they describe.

Every mistake is a `ConfigError` that names file, table and key. Unknown keys are mistakes: a misspelt limit must not be
no limit. Secrets are never in the file itself, which names the files that they are in.
"""

from __future__ import annotations

import difflib
import math
import ssl
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kms_client import Etsi014Client, KeyManager, KMSError, SecureSite
from qkd_tls.context import QKDContext
from qkd_tls.hybrid import KDF
from qkd_tls.policy import Policy

__all__ = ["ConfigError", "KMESettings", "TLSFiles", "Table", "read_file"]

_REQUIRED: Final[Any] = object()
_LONGEST: Final = 1e9
"""Seconds; about 31 years."""


class ConfigError(ValueError):
    """A configuration that cannot be used.

    Attributes: ``file``; ``table`` (as it stands in the file, "" for the top); ``key`` ("" where the table itself is
    meant); ``problem`` (what is wrong, and what would be right).
    """

    def __init__(self, file: Path, table: str, key: str, problem: str) -> None:
        self.file, self.table, self.key, self.problem = file, table, key, problem
        where = [str(file)]
        if table:
            where.append(table)
        if key:
            where.append(key)
        super().__init__(": ".join([*where, problem]))


class Table:
    """One table of a file. Each `take_` method reads a key once; `finish` refuses those that nobody has read."""

    def __init__(self, file: Path, name: str, content: Mapping[str, Any]) -> None:
        self.file, self.name = file, name
        self._content = dict(content)
        self._taken: dict[str, None] = {}

    def error(self, key: str, problem: str) -> ConfigError:
        """An error about one key of this table; "" for the table."""
        return ConfigError(self.file, self.name, key, problem)

    def finish(self) -> None:
        """Refuse unknown keys."""
        for key in self._content:
            if key not in self._taken:
                close = difflib.get_close_matches(key, self._taken, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(self._taken)}"
                raise self.error(key, f"is not known here; {hint}")

    def __contains__(self, key: str) -> bool:
        return key in self._content

    # --- values

    def _take(self, key: str, kind: Any, kind_name: str, default: Any) -> Any:
        self._taken[key] = None
        if key not in self._content:
            if default is _REQUIRED:
                raise self.error(key, "is missing")
            return default
        value = self._content[key]
        # TOML's true is no number, though Python's is.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"must be {kind_name}, not {value!r}")
        return value

    def take_text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A non-empty string."""
        value = self._take(key, str, "a string", default)
        if value == "":
            raise self.error(key, "must not be empty")
        return value

    def take_bool(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._take(key, bool, "true or false", default))

    def take_int(self, key: str, default: int, least: int = 0, most: int = 1_000_000) -> int:
        """A whole number from `least` to `most`."""
        value: int = self._take(key, int, "a whole number", default)
        if not least <= value <= most:
            raise self.error(key, f"must be {least} to {most}, not {value}")
        return value

    def take_seconds(self, key: str, default: Any = _REQUIRED, *, zero: bool = False) -> Any:
        """A positive number of seconds; 0 too where that means something."""
        value = self._take(key, (int, float), "a number of seconds", default)
        if value is None:
            return None
        seconds = float(value)
        if not math.isfinite(seconds) or seconds > _LONGEST or seconds < 0 or (seconds == 0 and not zero):
            raise self.error(
                key, f"must be {'0 or ' if zero else ''}a positive number of seconds, not {value}"
            )
        return seconds

    def take_list(self, key: str, default: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """A list of non-empty strings."""
        value = self._take(key, list, "a list of strings", None)
        if value is None:
            return default
        if not value or not all(isinstance(entry, str) and entry for entry in value):
            raise self.error(key, "must be a list of one or more non-empty strings")
        return tuple(value)

    def take_choice(self, key: str, choices: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """One of a few words."""
        value = self.take_text(key, default)
        if value not in choices:
            raise self.error(key, f"must be {' or '.join(choices)}, not {value!r}")
        return str(value)

    # --- files

    def path(self, text: str) -> Path:
        """A path as the file means it: relative to the folder that the file is in."""
        return self.file.parent / text

    def take_file(self, key: str, default: Any = _REQUIRED) -> Any:
        """The path of a file that can be read."""
        text = self.take_text(key, default)
        if text is None:
            return None
        if "-----BEGIN" in text:
            raise self.error(key, "must be the path of a file, not the content: keep it in a file of its own")
        path = self.path(text)
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise self.error(key, f"cannot read {path}: {error.strerror}") from None
        return path

    def take_secret_file(self, key: str, default: Any = _REQUIRED) -> Any:
        """The same for a file that only its owner (and group) may read."""
        path = self.take_file(key, default)
        if path is not None:
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise self.error(
                    key,
                    f"everybody on this machine may read or change {path} (mode {mode:04o}): chmod 600 it",
                )
        return path

    # --- tables

    def take_table(self, key: str) -> Table:
        """A table in this one; an empty one where it is missing."""
        content = self._take(key, dict, "a table", {})
        return Table(self.file, f"[{self._dotted(key)}]", content)

    def take_tables(self, key: str) -> dict[str, Table]:
        """The tables `[key.NAME]`, by name."""
        tables = self._take(key, dict, f"tables [{key}.NAME]", {})
        for name, content in tables.items():
            if not isinstance(content, dict):
                raise self.error(key, f"must hold tables [{key}.NAME], and {name!r} is none")
        return {
            name: Table(self.file, f"[{self._dotted(key)}.{name}]", content)
            for name, content in tables.items()
        }

    def take_array(self, key: str) -> Iterator[Table]:
        """The tables `[[key]]`, in order; each is called by its own `name` where it has one."""
        tables = self._take(key, list, f"tables [[{key}]]", [])
        for number, content in enumerate(tables, 1):
            if not isinstance(content, dict):
                raise self.error(key, f"must be tables [[{key}]]")
            name = content.get("name")
            label = repr(name) if isinstance(name, str) and name else f"number {number}"
            yield Table(self.file, f"[[{self._dotted(key)}]] {label}", content)

    def _dotted(self, key: str) -> str:
        return f"{self.name.strip('[]')}.{key}" if self.name else key


def read_file(path: Path) -> Table:
    """The file's top table. Raises ConfigError where it cannot be read or is not TOML."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(path, "", "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(path, "", "", "is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, "", "", f"is not TOML: {error}") from None
    return Table(path, "", content)


@dataclass(frozen=True, kw_only=True)
class KMESettings:
    """A table `[kme.NAME]`: one KME as one SAE sees it."""

    name: str
    url: str
    sae_id: str
    cert: Path
    key: Path
    ca: Path
    connect_timeout: float = 3.0
    read_timeout: float = 5.0
    key_size: int = 256
    """Bits."""
    master_in_key_ids: bool = False
    site: tuple[str, ...] = ()
    """Networks that the KME may be in, beside this host."""

    @classmethod
    def take(cls, name: str, table: Table) -> KMESettings:
        """Read a table; every mistake raises ConfigError, those that `Etsi014Client` finds too."""
        settings = cls(
            name=name,
            url=table.take_text("url"),
            sae_id=table.take_text("sae_id"),
            cert=table.take_file("cert"),
            key=table.take_secret_file("key"),
            ca=table.take_file("ca"),
            connect_timeout=table.take_seconds("connect_timeout", 3.0),
            read_timeout=table.take_seconds("read_timeout", 5.0),
            key_size=table.take_int("key_size", 256, 256, 65536),
            master_in_key_ids=table.take_bool("master_in_key_ids", False),
            site=_take_site(table),
        )
        table.finish()
        try:
            settings.client().close()
        except ValueError as error:
            raise table.error("", str(error)) from None
        except KMSError as error:
            raise table.error("", str(error)) from None
        return settings

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        return self.cert, self.key, self.ca

    def client(self) -> Etsi014Client:
        """A new client of this KME, which is not contacted yet."""
        return Etsi014Client(
            self.url,
            sae_id=self.sae_id,
            cert=self.cert,
            key=self.key,
            ca=self.ca,
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            size=self.key_size,
            master_in_key_ids=self.master_in_key_ids,
            site=SecureSite(self.site),
        )


def _take_site(table: Table) -> tuple[str, ...]:
    networks = table.take_list("site", None) or ()
    try:
        SecureSite(networks)
    except ValueError as error:
        raise table.error("site", str(error)) from None
    return networks


@dataclass(frozen=True, kw_only=True)
class TLSFiles:
    """A table `[tls.NAME]`: what a `QKDContext` is made of, for a client or for a server."""

    server_side: bool
    certificate: Path | None
    key: Path | None
    key_password_file: Path | None
    ca: Path | None
    """None: the system's."""
    crl: Path | None
    verify: ssl.VerifyMode
    alpn: tuple[str, ...] | None
    kme: str | None
    """Name of the KME."""
    policy: Policy
    qkd: tuple[tuple[str, Any], ...]
    """Further arguments of `QKDContext`."""

    @classmethod
    def take(cls, table: Table, *, server_side: bool) -> TLSFiles:
        """Read a table for one side; raises ConfigError."""
        policy = Policy(table.take_choice("policy", tuple(map(str, Policy)), str(Policy.REQUIRE)))
        kme = table.take_text("kme", None if policy is Policy.OFF else _REQUIRED)
        certificate = table.take_file("certificate", _REQUIRED if server_side else None)
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
        ca = table.take_text("ca", _REQUIRED if needs_ca else None)
        settings = cls(
            server_side=server_side,
            certificate=certificate,
            key=key,
            key_password_file=table.take_secret_file("key_password_file", None),
            ca=None if ca in (None, "system") else table.take_file("ca"),
            crl=table.take_file("crl", None),
            verify=verify,
            alpn=table.take_list("alpn", None),
            kme=kme,
            policy=policy,
            qkd=tuple(_take_qkd(table, server_side)),
        )
        table.finish()
        return settings

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the settings name."""
        named = (self.certificate, self.key, self.key_password_file, self.ca, self.crl)
        return tuple(path for path in named if path is not None)

    def context(self, key_manager: KeyManager | None) -> QKDContext:
        """A new context. Raises ValueError, OSError or ssl.SSLError where the settings or the files do not do."""
        context = QKDContext(
            ssl.PROTOCOL_TLS_SERVER if self.server_side else ssl.PROTOCOL_TLS_CLIENT,
            key_manager=key_manager,
            policy=self.policy,
            **dict(self.qkd),
        )
        context.verify_mode = self.verify
        if self.ca is not None:
            context.load_verify_locations(cafile=str(self.ca))
        elif self.verify is not ssl.CERT_NONE:
            context.load_default_certs(
                ssl.Purpose.CLIENT_AUTH if self.server_side else ssl.Purpose.SERVER_AUTH
            )
        if self.crl is not None:
            context.load_verify_locations(cafile=str(self.crl))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        if self.certificate is not None:
            password = None
            if self.key_password_file is not None:
                password = self.key_password_file.read_text(encoding="utf-8").rstrip("\r\n")
            # Without a password OpenSSL must not ask on a terminal.
            context.load_cert_chain(self.certificate, self.key or self.certificate, password or "")
        if self.alpn is not None:
            context.set_alpn_protocols(self.alpn)
        return context


def _take_qkd(table: Table, server_side: bool) -> Iterator[tuple[str, Any]]:
    """Arguments of QKDContext beside key manager and policy; only those of this side are known."""
    allowed = table.take_list("allowed_peer_sae_ids", None)
    yield "allowed_peer_sae_ids", allowed
    yield "groups", table.take_list("groups", ("X25519MLKEM768",))
    yield "association_lifetime", table.take_int("association_lifetime", 3600, 1, 10_000_000)
    if server_side:
        yield "max_keys", table.take_int("max_keys", 64, 1, 1000)
        return
    yield "peer_sae_id", table.take_text("peer_sae_id", None)
    yield "announced_keys", table.take_int("announced_keys", 0, 0, 63)
    yield "pipelined", table.take_bool("pipelined", True)
    yield "kem", table.take_text("kem", None)
    yield "kdf", KDF(table.take_choice("kdf", tuple(kdf.value for kdf in KDF), KDF.SHA384.value))
