"""The command `qkd-tls` as `python -m qkd_tls`."""

from qkd_tls.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
