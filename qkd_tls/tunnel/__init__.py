"""Tunnel, the command `qkd-tls tunnel`: hybrid connections for programs that are not Python.

A client tunnel accepts plain connections and passes each on over a hybrid one; a server tunnel does the reverse. One
process serves all tunnels of a configuration file, in one thread:

`settings` reads the file, `service` starts, reloads and drains, `listener` accepts, `connection` sets up one
connection and reports on it, `relay` moves its bytes. `audit`, `metrics` and `health` report on it, `systemd`
and `proxy_protocol` speak to the programs around it.
"""

from qkd_tls.tunnel.command import check, run

__all__ = ["check", "run"]
