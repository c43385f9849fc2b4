"""`python -m kms_client.emulator` is `qkd-kme`."""

import sys

from kms_client.cli import main

sys.exit(main())
