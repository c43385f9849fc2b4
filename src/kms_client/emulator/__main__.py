"""`python -m kms_client.emulator` is `qkd-kme`."""

import sys

from ..cli import main

sys.exit(main())
