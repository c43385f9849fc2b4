"""The command `qkd-tls`: a small module for each subcommand, and what they share.

`program` puts them together; `settings` makes a `QKDContext` of options and environment variables; `handshake` shows a
handshake step by step, `report` what protected a connection, `picture` the same as a drawing; `failure` makes an exit
code, an error and a hint of an exception.
"""

from qkd_tls.cli.program import main

__all__ = ["main"]
