"""A connection of ours goes in step with one of the standard library, call by call.

What has come and is not decrypted yet stands where the standard library has it: in the descriptor, for `select`, or in
the caller's `MemoryBIO`. See tests/support/in_step.py for the scripts, and for the differences that are meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.in_step import (
    Arrive,
    Call,
    Contexts,
    Mode,
    Say,
    Script,
    Side,
    Step,
    compare,
    our_contexts,
    scripts,
    stock_contexts,
)
from tests.support.sizes import sized
from tests.support.sockets import Authority, Identity, local_lab

MODES: tuple[Mode, ...] = get_args(Mode)
SIDES: tuple[Side, ...] = get_args(Side)


@pytest.fixture(scope="module")
def both(
    ca: Authority,
    server_identity: Identity,
    client_identity: Identity,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Contexts, Contexts]:
    """The contexts of the standard library, and ours."""
    lab, folder = local_lab(ca, server_identity, client_identity), tmp_path_factory.mktemp("key-logs")
    return stock_contexts(lab, folder), our_contexts(lab, folder)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=sized(10_000 // 6, 100))
@given(data=st.data())
def test_any_script(both: tuple[Contexts, Contexts], mode: Mode, side: Side, data: st.DataObject) -> None:
    compare(*both, mode, side, data.draw(scripts(mode)))


SEGMENT = (Say("data", 100), Say("data", 16384), Say("data", 16384), Say("data", 5))
ALL = Arrive(100)

KNOWN: dict[str, tuple[tuple[Say, ...], Arrive, tuple[Step, ...]]] = {
    "data in the segment of Finished": (SEGMENT, ALL, (Call("pending"), *[Call("read", 70000)] * 5)),
    "a record that came in part with Finished": (
        (Say("data", 100),),
        Arrive(0, 60),
        (Call("read", 10), ALL, Call("read", 10), Call("pending")),
    ),
    "one record at most for each read": (
        (),
        ALL,
        (*SEGMENT, ALL, *[Call("read", 70000)] * 5),
    ),
    "nothing is read by a write": ((), ALL, (*SEGMENT, ALL, Call("write", 10), Call("pending"))),
    "a write writes everything": ((), ALL, (Call("write", 70000), Call("write", 0))),
    "a ticket before data": (
        (),
        ALL,
        (Say("ticket"), Say("data", 7), ALL, Call("read", 100), Call("read", 100)),
    ),
    "a requested KeyUpdate before data": (
        (),
        ALL,
        (Say("key update requested"), Say("data", 7), ALL, Call("read", 100), Call("write", 5)),
    ),
    "a message behind a requested KeyUpdate": (
        (),
        ALL,
        (Say("key update requested"), Say("ticket"), ALL, Call("read", 100), Call("read", 100)),
    ),
    "messages behind requested KeyUpdates": (
        (),
        ALL,
        (
            *[Say("key update requested"), Say("key update requested"), Say("ticket")] * 2,
            ALL,
            Call("read", 9),
        ),
    ),
    "close_notify in the segment of Finished": (
        (Say("data", 7), Say("close_notify")),
        ALL,
        (Call("read", 100), Call("read", 100), Call("write", 5), Call("unwrap")),
    ),
    "plaintext in the segment of close_notify": (
        (Say("close_notify"), Say("plaintext", 50)),
        ALL,
        (Call("unwrap"), Call("pending")),
    ),
    "data behind our close_notify": (
        (),
        ALL,
        (Call("unwrap"), Say("data", 10), ALL, Call("unwrap"), Call("read", 5)),
    ),
    "close_notify behind ours": (
        (),
        ALL,
        (Call("unwrap"), Say("close_notify"), Say("plaintext", 50), ALL, Call("read", 100), Call("unwrap")),
    ),
    "the end without close_notify": ((), ALL, (Say("data", 7), Say("end"), ALL, *[Call("read", 5)] * 4)),
}


@pytest.mark.parametrize("path", ["bootstrap", "associated"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KNOWN)
def test_what_has_gone_wrong(
    both: tuple[Contexts, Contexts],
    name: str,
    mode: Mode,
    side: Side,
    path: Literal["bootstrap", "associated"],
) -> None:
    early, with_finished, steps = KNOWN[name]
    compare(*both, mode, side, Script(path, early, with_finished, 0, Call("do_handshake"), steps))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "object"])
def test_nothing_to_send_over_a_closed_socket(
    both: tuple[Contexts, Contexts], mode: Mode, side: Side
) -> None:
    steps = (Call("close"), Call("sendall", 0), Call("send", 0), Call("write", 0))
    compare(*both, mode, side, Script("bootstrap", (), ALL, 0, Call("do_handshake"), steps))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "object"])
class TestSocketThatIsPlainAgain:
    """`unwrap` returns the same socket, and what is behind the peer's close_notify is for it."""

    STEPS: tuple[Step, ...] = (
        Say("close_notify"),
        Say("plaintext", 50),
        ALL,
        Call("unwrap"),
        Call("recv", 20),
        Call("send", 10),
        Call("sendall", 10),
        Call("recv_into", 100),
        Call("pending"),
        Call("unwrap"),
        Call("read", 10),
        Call("write", 10),
        Call("close"),
        Call("recv", 10),
        Call("send", 10),
        Call("unwrap"),
    )

    def test_in_step(self, both: tuple[Contexts, Contexts], mode: Mode, side: Side) -> None:
        compare(*both, mode, side, Script("associated", (), ALL, 0, Call("do_handshake"), self.STEPS))


@pytest.mark.parametrize("mode", MODES)
def test_the_standard_library_is_in_step_with_itself(
    both: tuple[Contexts, Contexts], mode: Mode, ca: Authority, server_identity: Identity, tmp_path: Path
) -> None:
    """Nothing that is compared depends on chance."""
    again = stock_contexts(local_lab(ca, server_identity, server_identity), tmp_path)
    for early, with_finished, steps in KNOWN.values():
        script = Script("associated", early, with_finished, 1, Call("do_handshake"), steps)
        compare(both[0], again, mode, "server", script)
