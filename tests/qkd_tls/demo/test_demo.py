"""`qkd-tls demo` as a process, and what it does where things are not as they should be."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests

import qkd_tls
from kms_client import KMSUnavailable
from qkd_tls import cli
from qkd_tls.demo import peers, story
from qkd_tls.demo.processes import DemoError, Process, Processes, wait_for
from tests.support.patience import PATIENCE

# Where the tests were started in the background, SIGINT is ignored in all children: as from a terminal, it is not here.
COMMAND = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from qkd_tls.cli import main; sys.exit(main(['demo']))"
)


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_the_whole_demo(temporary_files: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qkd_tls", "demo"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    rows = re.findall(
        r"^ +(\d+)  (bootstrap|associated)(, announced key)? +X25519MLKEM768  TLS_AES_256_GCM_SHA384"
        r"  ([0-9a-f]{8})\.\.   +\4\.\.   +(\d \+ \d) +\d+\.\d$",
        result.stdout,
        re.MULTILINE,
    )
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    assert [row[1] for row in rows] == ["bootstrap"] + 9 * ["associated"]
    assert [row[4] for row in rows] == ["1 + 1"] + 3 * ["0 + 0"] + 6 * ["1 + 1"]
    assert re.search(r"QKD link +emulated, 20 km of fibre, decoy-state BB84; first keys", result.stdout)
    assert re.search(r" +block \d+: [\d,]+ bits sifted, QBER 0\.\d\d%, [\d,]+ bits told", result.stdout)
    assert re.search(r" +[\d,]+ kbit/s so far; [\d,]+ \+ [\d,]+ keys stored, [\d,]+ bits kept", result.stdout)
    assert re.search(
        r"require +refused with QKDUnavailable\n +no QKD key: .* \(KMS https://127.0.0.1:\d+; ", result.stdout
    )
    assert re.search(r"prefer +connected, protection pq-only", result.stdout)
    assert "FAILED" not in result.stdout
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120
    assert not list(temporary_files.iterdir())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + 15), (signal.SIGHUP, 128 + 1)]
)
def test_it_stops_its_processes_where_it_is_stopped(temporary_files: Path, number: int, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "HTTPS server" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(PATIENCE) == code
    assert not any(child.is_running() for child in children)
    assert not list(temporary_files.iterdir())


@pytest.mark.parametrize("missing", ["aiohttp", "numpy"])
def test_without_a_package_of_the_emulator_it_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; {COMMAND}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "qkd-tls demo: the KME emulator needs aiohttp and NumPy; install them with: pip install aiohttp numpy\n"
    )


def test_a_failed_check_is_shown_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(story._Demo, "run", lambda self: {"this": True, "that": False})
    assert cli.main(["demo"]) == 1
    out = capsys.readouterr().out
    assert "ok      this" in out
    assert "FAILED  that" in out
    assert out.endswith("1 of 2 checks failed.\n")


@pytest.mark.parametrize(("error", "code"), [(DemoError("KME A ended"), 1), (KeyboardInterrupt(), 130)])
def test_what_ends_the_demo_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def fail(self: object) -> dict[str, bool]:
        raise error

    monkeypatch.setattr(story._Demo, "run", fail)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err in ("qkd-tls demo: KME A ended\n", "qkd-tls demo: interrupted\n")


# --- the checks, on reports that are wrong in one place


def qkd(number: int, **changes: Any) -> dict[str, Any]:
    announced = 2 <= number <= 4
    return {
        "protection": "hybrid",
        "group": "X25519MLKEM768",
        "cipher": "TLS_AES_256_GCM_SHA384",
        "path": "bootstrap" if number == 1 else "associated",
        "key_id": f"key-{number}",
        "announced": announced,
        "kms_round_trips": 0 if announced else 1,
        "fallback": None,
    } | changes


def reports() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    numbers = range(1, 11)
    return (
        [{"path": f"/{number}", "qkd": qkd(number), "ms": 1.0} for number in numbers],
        [{"path": f"/{number}", "qkd": qkd(number), "port": 40000 + number} for number in numbers],
    )


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[story._Demo]:
    with Processes(tmp_path) as processes:
        yield story._Demo(tmp_path, processes, story._Page(io.StringIO()))


def failed(stage: story._Demo) -> list[str]:
    return [check for check, passed in stage.checks.items() if not passed]


def test_good_reports_pass(stage: story._Demo) -> None:
    stage._ten_connections(*reports())
    assert len(stage.checks) == 7
    assert failed(stage) == []


@pytest.mark.parametrize(
    ("side", "number", "changes", "check"),
    [
        (0, 5, {"key_id": "key-other"}, "each key ID the same"),
        (1, 5, {"key_id": "key-other"}, "each key ID the same"),
        (1, 5, {"key_id": None}, "each key ID the same"),
        (1, 5, {"protection": "pq-only"}, "protection hybrid"),
        (0, 5, {"group": "X25519"}, "group X25519MLKEM768"),
        (0, 5, {"path": "bootstrap"}, "the first a bootstrap"),
        (1, 5, {"path": "bootstrap"}, "the first a bootstrap"),
        (0, 3, {"announced": False}, "no KME asked"),
        (0, 9, {"announced": True, "kms_round_trips": 0}, "no KME asked"),
        (1, 3, {"kms_round_trips": 1}, "no KME asked"),
        (1, 5, {"kms_round_trips": 0}, "no KME asked"),
    ],
)
def test_a_wrong_report_fails_its_check(
    stage: story._Demo, side: int, number: int, changes: dict[str, Any], check: str
) -> None:
    both = reports()
    both[side][number - 1]["qkd"] |= changes
    stage._ten_connections(*both)
    assert any(text.startswith(check) for text in failed(stage))


def test_a_key_used_twice_fails(stage: story._Demo) -> None:
    both = reports()
    for side in both:
        side[6]["qkd"]["key_id"] = side[5]["qkd"]["key_id"]
    stage._ten_connections(*both)
    assert failed(stage) == ["no key ID twice"]


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_connection_fails(stage: story._Demo, side: int) -> None:
    both = reports()
    del both[side][-1]
    stage._ten_connections(*both)
    assert "10 requests on 10 connections" in failed(stage)


def test_two_requests_on_one_connection_fail(stage: story._Demo) -> None:
    client, server = reports()
    server[3]["port"] = server[4]["port"]
    stage._ten_connections(client, server)
    assert failed(stage) == ["10 requests on 10 connections"]


def test_a_refused_request_ends_it(stage: story._Demo) -> None:
    client, server = reports()
    client[2] = {"path": "/3", "error": "QKDUnavailable", "text": "no key"}
    with pytest.raises(DemoError, match="request /3 failed: no key"):
        stage._ten_connections(client, server)


URL = "https://127.0.0.1:1"
REFUSED: dict[str, Any] = {
    "error": "QKDUnavailable",
    "kms": URL,
    "text": f"no QKD key: refused (KMS {URL}; peer SAE SAE-B). What to do: Check it",
    "hint": "check",
    "warnings": [],
}
FALLEN_BACK = {
    "qkd": qkd(1, protection="pq-only", key_id=None, fallback="no QKD key"),
    "warnings": ["QKDFallbackWarning"],
}
HYBRID = {"qkd": qkd(1), "warnings": []}


@pytest.mark.parametrize(
    ("what", "client", "server", "passes"),
    [
        ("_refused", REFUSED, HYBRID, True),
        ("_refused", REFUSED | {"error": "QKDProtocolError"}, HYBRID, False),
        ("_refused", REFUSED | {"kms": "https://other.example"}, HYBRID, False),
        ("_refused", REFUSED | {"text": "no QKD key"}, HYBRID, False),
        ("_refused", HYBRID, HYBRID, False),
        ("_refused", FALLEN_BACK, FALLEN_BACK, False),
        ("_fallen_back", FALLEN_BACK, FALLEN_BACK, True),
        ("_fallen_back", FALLEN_BACK | {"warnings": []}, FALLEN_BACK, False),
        ("_fallen_back", FALLEN_BACK, HYBRID, False),
        ("_fallen_back", HYBRID, FALLEN_BACK, False),
        ("_fallen_back", REFUSED, HYBRID, False),
        ("_recovered", HYBRID, HYBRID, True),
        ("_recovered", FALLEN_BACK, FALLEN_BACK, False),
        ("_recovered", REFUSED, HYBRID, False),
    ],
)
def test_what_is_checked_of_a_kme_that_is_off(
    monkeypatch: pytest.MonkeyPatch,
    stage: story._Demo,
    what: str,
    client: dict[str, Any],
    server: dict[str, Any],
    passes: bool,
) -> None:
    monkeypatch.setattr(stage, "_client", lambda *_: [client])
    process: Any = SimpleNamespace(reports=[server])
    kme = story._KME("a", (), process, URL, "127.0.0.1:2")
    getattr(stage, what)(kme, "https://127.0.0.1:3", *([process] if what == "_fallen_back" else []))
    assert list(stage.checks.values()) == [passes]


def test_keys_are_waited_for(monkeypatch: pytest.MonkeyPatch, stage: story._Demo) -> None:
    answers: list[Any] = [KMSUnavailable("the link is down"), 0, 5, 5]

    class Manager:
        def __init__(self, url: str, **_: object) -> None:
            pass

        def status(self, peer: str) -> SimpleNamespace:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(stored_key_count=answer)

        def close(self) -> None:
            pass

    monkeypatch.setattr(story, "Etsi014Client", Manager)
    process: Any = None
    stage._wait_for_keys(*(story._KME(side, (), process, URL, "127.0.0.1:2") for side in "ab"))
    assert answers == []


def side(**changes: Any) -> dict[str, Any]:
    last = {"number": 1, "sifted": 1000, "qber": 0.01, "leaked": 90, "secret": 400, "keys": 1} | changes
    return {
        "blocks": {"kept": 1, "last": last},
        "optics": {"length_km": 20.0, "max_qber": 0.08},
        "keys": {"for_a": 1, "for_b": 0},
        "secret_bit_s": 400.0,
        "authentication": {"made_bits": 144},
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "passes"),
    [
        ({}, {}, True),
        ({}, {"qber": 0.02}, False),
        ({}, {"secret": 401}, False),
        ({"qber": 0.0}, {"qber": 0.0}, False),
        ({"qber": 0.09}, {"qber": 0.09}, False),
    ],
)
def test_what_the_sides_of_the_link_report_is_compared(
    monkeypatch: pytest.MonkeyPatch,
    stage: story._Demo,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    passes: bool,
) -> None:
    behind = side()
    behind["blocks"]["kept"] = 0  # side B is late the first time
    answers = [side(**ours), behind, side(**ours), side(**theirs)]
    monkeypatch.setattr(story, "_figures", lambda page: answers.pop(0))
    process: Any = None
    kme_a, kme_b = (story._KME(name, (), process, URL, "127.0.0.1:2") for name in "ab")
    stage._link(kme_a, kme_b, 1.0)
    assert list(stage.checks.values()) == [passes]
    assert answers == []


def test_an_error_that_has_nothing_to_do_with_keys_is_not_reported_as_one() -> None:
    class Session(requests.Session):
        def get(self, *_: Any, **__: Any) -> requests.Response:
            raise requests.exceptions.SSLError("certificate verify failed")

    with Session() as session, pytest.raises(requests.exceptions.SSLError, match="certificate verify failed"):
        peers._outcome(session, URL)


def test_errors_are_shown_in_short() -> None:
    assert story._in_short(REFUSED["text"]) == f"no QKD key: refused (KMS {URL}; peer SAE SAE-B)"
    assert story._in_short(None) == "nothing"


# --- processes and the page


def test_a_process_that_fails_is_quoted(tmp_path: Path) -> None:
    process = Process("KME A", tmp_path, "qkd_tls", "no-such-command")
    with pytest.raises(
        DemoError, match=r"KME A ended with exit code 2; it wrote:\nusage: (.|\n)*no-such-command"
    ):
        process.first_report()
    with pytest.raises(DemoError, match="KME A ended with exit code 2"):
        process.finish()


def test_a_process_that_takes_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd_tls.demo.processes._START_TIMEOUT", 0.1)
    process = Process("KME A", tmp_path, "timeit", "-n1", "-r1", "__import__('time').sleep(60)")
    try:
        with pytest.raises(DemoError, match="waited 0 seconds for KME A to start"):
            process.first_report()
        with pytest.raises(DemoError, match="KME A did not end within 0 seconds"):
            process.finish()
    finally:
        process.stop()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd_tls.demo.processes._STOP_TIMEOUT", 0.1)
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); print('{}', flush=True); signal.pause()"
    (tmp_path / "deaf.py").write_text(deaf)
    process = Process("deaf", tmp_path, "deaf")
    assert process.first_report() == {}
    # It sleeps for ever: without the signal that it cannot ignore, this would not end.
    process.stop()
    process.stop()  # a second time does no harm


def test_waiting_gives_what_was_waited_for() -> None:
    answers = iter([None, None, "there"])
    assert wait_for("it", lambda: next(answers)) == "there"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], colour: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        story._Page(out).checks({"this": True, "that": False})
    assert ("\x1b[" in terminal.getvalue()) is colour
    assert "\x1b" not in file.getvalue()


# --- the command


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"qkd-tls {qkd_tls.__version__}\n"


def test_without_a_command_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "usage: qkd-tls" in capsys.readouterr().err
