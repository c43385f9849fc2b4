"""The command `python -m qkd_tls.tunnel CONFIG`, which serves the tunnels of a configuration file."""

import sys
from pathlib import Path

from qkd_tls.tunnel import run

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qkd_tls.tunnel CONFIG")
    sys.exit(run(Path(sys.argv[1])))
