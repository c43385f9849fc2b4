"""`python -m kms_client.emulator` is the command `qkd-kme`, as `python -m kms_client` is."""

from kms_client.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
