"""Stock TLS stacks on the hybrid handshake: docs/interop.md says what comes out when they are run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.interop.matrix import PAIRS, ROLES, pairing, row
from tests.support.interop.node_peer import NodeProcess
from tests.support.interop.stacks import STACKS, Stack
from tests.support.interop.table import WITHOUT_PSK, committed
from tests.support.sockets import Lab


@pytest.fixture(scope="module")
def node_process() -> Iterator[NodeProcess]:
    with NodeProcess() as process:
        yield process


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_a_stock_stack_with_ours(lab: Lab, stack: Stack, role: str) -> None:
    """`python -m interop.report` writes the table. What it says of versions may differ here."""
    measured = row(lab, stack, role)
    (written,) = [one for one in committed("stacks") if one[0] == stack.name and one[2].startswith(role)]
    assert [*measured[:1], *measured[2:]] == [*written[:1], *written[2:]]
    alone, added, explicit, _, _, _, changed = measured[3:10]
    assert alone.startswith("hybrid: X25519MLKEM768" if stack.ml_kem else "refused: ")
    assert added.startswith("hybrid: X25519, TLS_")
    assert explicit.startswith("hybrid: X25519, ML-KEM-768, ")
    assert changed.startswith("refused: ")


@pytest.mark.parametrize("pair", PAIRS)
def test_a_second_implementation_with_ours(lab: Lab, node_process: NodeProcess, pair: str) -> None:
    measured = pairing(lab, node_process, pair)
    assert measured in committed("pairs")
    assert all(cell.startswith("hybrid, ") for cell in measured[1:])


def test_the_tables_have_all_rows() -> None:
    names = [stack.name for stack in STACKS for _ in ROLES]
    assert [one[0] for one in committed("stacks")] == [*names, *(name for name, _ in WITHOUT_PSK)]
    assert [one[0] for one in committed("pairs")] == list(PAIRS)
