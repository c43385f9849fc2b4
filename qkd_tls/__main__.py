"""`python -m qkd_tls` is the command `qkd-tls`."""

from qkd_tls.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
