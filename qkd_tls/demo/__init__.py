"""The demo of `qkd-tls demo`: a whole set-up on this machine, ten connections, and a KME that fails."""

from qkd_tls.demo.story import run

__all__ = ["run"]
