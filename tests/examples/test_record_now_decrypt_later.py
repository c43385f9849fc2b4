"""The example of who records now and decrypts later: as a process, and its parts; and its page in the manual."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import record_now_decrypt_later as example  # type: ignore[import-not-found,unused-ignore]

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "record-now-decrypt-later.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def output() -> str:
    """What the example prints, with every warning an error."""
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "record_now_decrypt_later.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def cells(output: str) -> dict[str, list[str]]:
    """READ or closed, for X25519, X25519MLKEM768, the bootstrap and the request of qkd-tls/1."""
    rows = re.findall(r"^ +(\S.*?) {2,}((?:READ|closed)(?: +(?:READ|closed)){3})", output, re.MULTILINE)
    return {name: values.split() for name, values in rows}


def test_only_all_three_secrets_open_the_third_connection(output: str) -> None:
    no, yes = "closed", "READ"
    assert cells(output) == {
        "nothing but the recordings": [no, no, no, no],
        "X25519 falls": [yes, no, no, no],
        "X25519 and ML-KEM-768 fall": [yes, yes, yes, no],
        "and all QKD keys leak": [yes, yes, yes, yes],
        "all QKD keys leak": [no, no, no, no],
        "and the association secret": [no, no, no, no],
        "and X25519 falls": [yes, no, no, no],
        "and ML-KEM-768 falls instead": [no, no, no, no],
    }


def test_the_server_says_that_the_third_is_hybrid(output: str) -> None:
    assert "the server says: hybrid, X25519MLKEM768, TLS_AES_256_GCM_SHA384" in output


def test_the_page_shows_what_the_example_prints(output: str) -> None:
    """But for the number of bytes, which a certificate's signature changes from run to run."""

    def without_sizes(text: str) -> str:
        return re.sub(r"[\d,]+ bytes", "N bytes", text)

    assert without_sizes(output.strip()) in without_sizes(PAGE)


@pytest.fixture(scope="module")
def recorded() -> tuple[list[example.Recorded], list[bytes]]:
    source = example.LeakySource()
    return example.record_three(source), source.leaked


def test_nothing_is_in_the_clear(recorded: tuple[list[example.Recorded], list[bytes]]) -> None:
    connections, leaked = recorded
    for one in connections:
        wire = one.recording.client + one.recording.server
        assert example.ANSWER not in wire
        assert b"/plans/2046" not in wire
        assert not any(key in wire for key in leaked)


def test_one_bit_of_the_qkd_key_closes_the_third_again(
    recorded: tuple[list[example.Recorded], list[bytes]],
) -> None:
    connections, leaked = recorded
    all_known = next(one for one in example.SCENARIOS if one.reads == frozenset(example.COLUMNS))
    assert example.attack(all_known, connections, leaked).as_expected
    almost = example.attack(all_known, connections, [key[:-1] + bytes([key[-1] ^ 1]) for key in leaked])
    assert almost.reads == frozenset({example.PLAIN, example.ML, example.BOOTSTRAP})
    assert almost.why_not == "QKD key"


def test_an_unexpected_outcome_is_shown_and_ends_in_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    too_hopeful = dataclasses.replace(example.SCENARIOS[0], reads=frozenset({example.HYBRID}))
    monkeypatch.setattr(example, "SCENARIOS", (too_hopeful,))
    assert example.main() == 1
    printed = capsys.readouterr().out
    assert "<-- not as expected" in printed
    assert printed.endswith("Not everything was as it should be.\n")
