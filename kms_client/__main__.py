"""`python -m kms_client` is the command `qkd-kme`."""

from kms_client.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
