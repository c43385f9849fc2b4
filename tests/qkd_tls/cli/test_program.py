"""The program as a whole: help, completion, the tunnel's entry, and what is said of errors."""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kms_client import KeyManager, KMSError, LocalKeyManager
from qkd_tls import QKDUnavailable
from qkd_tls.cli import main
from qkd_tls.cli.failure import CommandError, ExitCode, explain_error
from qkd_tls.cli.handshake import Handshake, TimelineEntry, Watch, describe_step
from qkd_tls.cli.terminal import printable
from qkd_tls.engine import TRANSITIONS, Event, State, Step
from qkd_tls.errors import ssl_error
from tests.support.commands import Site, record, text
from tests.support.paths import DOCS

COMMANDS = ("connect", "serve", "get", "tunnel", "psk", "explain", "completion", "demo")
DOCUMENTATION = DOCS / "howto-command-line.md"


# --- help


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qkd_tls", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


def test_help_names_every_command() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\b", result.stdout, re.MULTILINE)
    assert "exit codes: 0 done; 1 " in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: qkd-tls {command} ")
    assert "%(" not in said


def test_help_without_the_extras() -> None:
    """Neither the emulator's nor any other extra is imported before it is needed."""
    code = (
        "import sys\n"
        "for name in ('aiohttp', 'shtab', 'prometheus_client', 'oqs'): sys.modules[name] = None\n"
        "from qkd_tls.cli import main\nmain(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_command_that_is_none() -> None:
    result = run("conect")
    assert result.returncode == 2
    assert "invalid choice: 'conect'" in result.stderr


# --- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str) -> None:
    result = run("completion", shell)
    assert (result.returncode, result.stderr) == (0, "")
    # What shtab makes for tcsh knows the commands only.
    for word in ("connect", "explain") if shell == "tcsh" else ("connect", "--announced-keys", "--from-json"):
        assert word in result.stdout
    # tcsh has no option that checks only; it is not installed in most places anyway.
    checker = shutil.which("zsh" if shell == "zsh" else "bash")
    if shell != "tcsh" and checker is not None:
        check = subprocess.run(
            [checker, "-n"], input=result.stdout, capture_output=True, text=True, timeout=30, check=False
        )
        assert (check.returncode, check.stderr) == (0, "")


def test_completion_in_bash() -> None:
    """As bash itself does it: the words after `qkd-tls co` and `qkd-tls connect --announced`."""
    script = run("completion", "bash").stdout
    function = re.findall(r"^complete .*-F (\S+) qkd-tls$", script, re.MULTILINE)[0]
    ask = (
        f"{script}\nfor line in 'qkd-tls co' 'qkd-tls connect --announced'; do\n"
        "COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n"
        f"COMPREPLY=(); {function} qkd-tls; echo ${{COMPREPLY[@]}}; done"
    )
    result = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.splitlines() == ["connect completion", "--announced-keys"]


def test_completion_without_shtab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qkd_tls.cli.completion.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "error: completion scripts need shtab\nhint: install it with: pip install shtab\n"
    )


# --- the tunnel's entry; the tunnel has tests of its own


CONFIG = """\
[kme.here]
url = "{QKD_TLS_KME}"
sae_id = "{QKD_TLS_SAE_ID}"
cert = "{QKD_TLS_KME_CERT}"
key = "{QKD_TLS_KME_KEY}"
ca = "{QKD_TLS_KME_CA}"

[tls.client]
kme = "here"
ca = "{QKD_TLS_CA}"

[[tunnel]]
name = "web"
mode = "client"
listen = "127.0.0.1:0"
connect = "localhost:1"
tls = "client"
"""


@pytest.fixture
def tunnel_file(client_site: Site, tmp_path: Path) -> Path:
    file = tmp_path / "tunnel.toml"
    file.write_text(CONFIG.format(**client_site.environment))
    return file


def test_a_tunnels_file_is_checked(client_site: Site, tunnel_file: Path) -> None:
    result = client_site.run("tunnel", "--config", str(tunnel_file), "--check")
    assert (result.returncode, text(result)) == (0, f"{tunnel_file}: in order\n")
    result = client_site.run("tunnel", "--config", str(tunnel_file), "--check", "--json")
    assert record(result.stdout) == {"command": "tunnel", "config": str(tunnel_file), "in_order": True}


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_a_mistake_in_a_tunnels_file(client_site: Site, tunnel_file: Path, more: list[str]) -> None:
    tunnel_file.write_text(tunnel_file.read_text().replace("listen", "lisen"))
    result = client_site.run("tunnel", "--config", str(tunnel_file), *more)
    assert result.returncode == 2
    assert text(result).startswith(f"error: {tunnel_file}: ")
    assert "\nhint: correct it; " in text(result)


def test_a_tunnel_runs_until_it_is_stopped(client_site: Site, tunnel_file: Path) -> None:
    with client_site.start("tunnel", "--config", str(tunnel_file)) as process:
        assert process.stderr is not None
        assert b"web" in process.stderr.readline()
        process.terminate()
        assert process.wait(30) == 0


# --- what is said of errors


def verification(message: str) -> ssl.SSLCertVerificationError:
    error = ssl_error(ssl.SSLCertVerificationError, f"certificate verify failed: {message}")
    error.verify_message = message
    return error


def requests_error(inner: BaseException) -> Exception:
    """As urllib3 and requests put an error into others."""
    retries = OSError("Max retries exceeded")
    retries.reason = inner  # type: ignore[attr-defined]
    return OSError(retries)


KMS = KMSError("no key", kms="https://kme", hint="Do it.")


@pytest.mark.parametrize(
    ("error", "code", "message", "hint"),
    [
        (CommandError("no", hint="do", code=ExitCode.QKD), 3, "no", "do"),
        (KMS, 3, "no key (KMS https://kme)", "Do it"),
        (KMSError("no key"), 3, "no key", "look at the KME's log"),
        (QKDUnavailable("no\x1bkey", hint="wait."), 3, "no?key", "wait"),
        (requests_error(QKDUnavailable("no key", hint="wait")), 3, "no key", "wait"),
        (
            requests_error(ConnectionRefusedError(111, "Connection refused")),
            1,
            "Connection refused",
            "check host",
        ),
        (verification("certificate has expired"), 4, "refused: certificate has expired", "renewed"),
        (verification("certificate is not yet valid"), 4, "not yet valid", "clock"),
        (verification("certificate revoked"), 4, "revoked", "must not be trusted"),
        (verification("self-signed certificate"), 4, "self-signed", "--ca"),
        (verification("unsuitable certificate purpose"), 4, "purpose", "openssl x509"),
        (ssl_error(ssl.SSLError, "[SSL] bad certificate", "SSL/TLS_ALERT_BAD_CERTIFICATE"), 4, "bad", "log"),
        (ssl_error(ssl.SSLError, "[SSL] odd: turn it off", "ODD"), 1, "odd", "turn it off"),
        (socket.gaierror(-2, "Name or service not known"), 1, "Name or service", "spelling"),
        (TimeoutError("timed out"), 1, "timed out", "--timeout"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe", "the peer has gone"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), 1, "unreachable", "network"),
        (OSError(), 1, "OSError", "network"),
        (PermissionError(errno.EACCES, "Permission denied", "x.key"), 2, "x.key: Permission denied", "path"),
        (KeyboardInterrupt(), 130, "interrupted", "again"),
    ],
)
def test_errors(error: BaseException, code: int, message: str, hint: str) -> None:
    failure = explain_error(error)
    assert failure is not None
    assert failure.code == code
    assert message in failure.message
    assert hint in failure.hint
    assert str(failure) == f"error: {failure.message}\nhint: {failure.hint}"


def test_a_mistake_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("qkd_tls.cli.completion.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["completion", "bash"])


def test_a_broken_pipe_that_is_not_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("qkd_tls.cli.completion.run", fail)
    assert main(["completion", "bash"]) == ExitCode.CONNECTION
    assert capsys.readouterr().err.startswith("error: Broken pipe\n")


def test_the_table_of_exit_codes_is_complete() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+?) \|", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE))
    assert {int(code) for code in rows} == {int(code) for code in ExitCode}


def test_the_environment_variables_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    options: set[str] = set()
    for command in ("connect", "serve"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out.partition("KME (ETSI GS QKD 014)")[2].partition("output:")[0]
        options |= set(re.findall(r"^  --([a-z-]+)", said, re.MULTILINE))
    documented = re.findall(
        r"^\| `--([a-z-]+)` \| `(QKD_TLS_\w+)` \|", DOCUMENTATION.read_text("utf-8"), re.MULTILINE
    )
    assert {option for option, _ in documented} == options
    assert all(variable == "QKD_TLS_" + option.replace("-", "_").upper() for option, variable in documented)


# --- steps


@pytest.mark.parametrize(("before", "event"), TRANSITIONS, ids=lambda part: part.name)
def test_every_step_has_its_words(before: State, event: Event) -> None:
    role = "server" if before.name.startswith("SERVER") else "client"
    said = describe_step(Step(role, before, event, TRANSITIONS[before, event]))
    assert said
    assert event.value not in said or said.startswith(event.value), "the engine's own words"


def test_a_step_without_words_is_shown_in_the_engines() -> None:
    step = Step("client", State.CLIENT_START, Event.SKIPPED, State.FAILED)
    assert describe_step(step) == "ClientHello skipped: failed"


def test_what_nobody_watches_is_not_noted() -> None:
    watch = Watch()
    watch.step(Step("client", State.CLIENT_START, Event.NO_KEY_NEEDED, State.CLIENT_HELLO))
    assert watch.current is None
    lines: list[TimelineEntry] = []
    with watch.of(Handshake(lines.append)):
        watch.step(Step("client", State.CLIENT_START, Event.NO_KEY_NEEDED, State.CLIENT_HELLO))
    assert [line.what for line in lines] == ["TLS"]


def test_a_watched_key_manager_is_the_same_key_manager() -> None:
    ours, theirs = LocalKeyManager.pair("SAE-A", "SAE-B")
    watch = Watch()
    manager = watch.manager(ours)
    assert isinstance(manager, KeyManager)
    assert (manager.protocol, manager.name, manager.sae_id) == (ours.protocol, ours.name, ours.sae_id)
    assert manager.status("SAE-B") == ours.status("SAE-B")
    [unwatched] = manager.get_keys("SAE-B")
    lines: list[TimelineEntry] = []
    with watch.of(Handshake(lines.append)):
        keys = watch.manager(theirs).get_keys_by_id("SAE-A", [unwatched.key_id])
        keys += manager.get_keys("SAE-B", 2)
        with pytest.raises(KMSError):
            watch.manager(theirs).get_keys_by_id("SAE-A", ["none", "such"])
    texts = [re.sub(r"\d+\.\d ms", "N ms", line.text) for line in lines]
    assert texts[:4] == [
        f"asking {theirs.name} for key {unwatched.key_id} shared with SAE-A",
        f"answered after N ms: key {unwatched.key_id}",
        f"asking {ours.name} for 2 keys shared with SAE-B",
        f"answered after N ms: key {keys[1].key_id} and 1 more",
    ]
    assert texts[4] == f"asking {theirs.name} for 2 keys by their IDs shared with SAE-A"
    assert texts[5].startswith("failed after N ms: ")
    for key in keys:
        with key.use() as secret:
            assert secret.hex() not in str(lines)
    manager.close()


def test_printable() -> None:
    assert printable("a\x1b[1m\nb\u202ec") == "a?[1m?b?c"


def test_modules_have_what_the_program_needs() -> None:
    for command in COMMANDS[:-1]:
        module = importlib.import_module(f"qkd_tls.cli.{command}")
        assert set(module.__all__) == {"DESCRIPTION", "SUMMARY", "add_arguments", "run"}
