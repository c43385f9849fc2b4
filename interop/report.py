"""Run the matrix of docs/interop.md and write its tables: `python -m interop.report`.

It needs the programs that `.ci/run` installs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kms_client.emulator import run_pair
from tests.support.interop.matrix import PAIRS, every_row, pairing
from tests.support.interop.node_peer import NodeProcess
from tests.support.interop.table import write
from tests.support.sockets import Authority, Lab


def main() -> None:
    """Run the matrix and write the tables; takes no arguments."""
    with run_pair(rate=2000.0, buffer=2000) as kmes, tempfile.TemporaryDirectory(prefix="qkd-tls-") as folder:
        ca = Authority(Path(folder))
        managers = {"client": kmes.client("a"), "server": kmes.client("b")}
        lab = Lab(ca, ca.issue("server"), ca.issue("client", ["client.example"]), kmes, managers)
        stacks = every_row(lab)
        with NodeProcess() as process:
            pairs = [pairing(lab, process, pair) for pair in PAIRS]
        for manager in managers.values():
            manager.close()
    write(stacks, pairs)


if __name__ == "__main__":
    main()
