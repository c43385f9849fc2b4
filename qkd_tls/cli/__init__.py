"""The command `qkd-tls`: a small module for each subcommand, and their common parts.

`program` puts them together; `settings` makes a `QKDContext` from options and environment variables;
`handshake` shows a handshake step by step, `report` what protected a connection, `picture` the same as a
drawing; `failure` turns an exception into an exit code, an error and a hint.
"""

from qkd_tls.cli.program import main

__all__ = ["main"]
