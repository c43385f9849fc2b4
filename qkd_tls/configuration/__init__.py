"""Configuration files: `tables` reads TOML; `key_managers` and `contexts` interpret the tables."""

from qkd_tls.configuration.contexts import Role, Sections, TLSFiles, load_context
from qkd_tls.configuration.key_managers import (
    FailoverSettings,
    KeyManagerSettings,
    KMESettings,
    PoolSettings,
)
from qkd_tls.configuration.tables import REQUIRED, ConfigError, Table, read_file

__all__ = [
    "REQUIRED",
    "ConfigError",
    "FailoverSettings",
    "KMESettings",
    "KeyManagerSettings",
    "PoolSettings",
    "Role",
    "Sections",
    "TLSFiles",
    "Table",
    "load_context",
    "read_file",
]
