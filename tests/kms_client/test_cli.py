"""`qkd-kme`: in processes of its own, and in this one with another."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kms_client import Etsi014Client, KMSUnavailable
from kms_client.cli import main
from kms_client.emulator import DemoPKI, ensure_demo_pki
from tests.support.patience import PATIENCE, eventually
from tests.support.ports import free_port

COMMAND = [sys.executable, "-m", "kms_client"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return ensure_demo_pki(tmp_path_factory.mktemp("pki"))


@contextmanager
def process(*arguments: str, number: signal.Signals = signal.SIGTERM) -> Iterator[dict[str, Any]]:
    """A `qkd-kme` of its own: what it said when ready. Must end well when told to."""
    started = subprocess.Popen([*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    with started.stdout:
        try:
            ready: dict[str, Any] = json.loads(started.stdout.readline())
            yield ready
        finally:
            started.send_signal(number)
            code = started.wait(PATIENCE)
        assert started.stdout.read() == ""
    assert code == 0


def client(ready: dict[str, Any], side: str, pki: DemoPKI) -> Etsi014Client:
    [url] = [kme["url"] for kme in ready["kmes"] if kme["side"] == side]
    stem = pki.directory / f"sae-{side}"
    files: dict[str, Any] = {
        "cert": stem.with_suffix(".pem"),
        "key": stem.with_suffix(".key"),
        "ca": pki.kms_ca,
    }
    return Etsi014Client(url, sae_id=pki.sae_a if side == "a" else pki.sae_b, **files)


def exchange(a: Etsi014Client, b: Etsi014Client) -> None:
    for master, slave in ((a, b), (b, a)):
        ours = master.get_keys(slave.sae_id, 3)
        theirs = slave.get_keys_by_id(master.sae_id, [key.key_id for key in ours])
        for one, other in zip(ours, theirs, strict=True):
            with one.use() as secret, other.use() as twin:
                assert secret == twin


def when_linked(call: Callable[[], None]) -> None:
    """Call until the link is up and has keys."""

    def linked() -> bool:
        try:
            call()
        except KMSUnavailable:
            return False
        return True

    eventually(linked, "the link")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@contextmanager
def here_while(port: int, action: Callable[[], None]) -> Iterator[None]:
    """Run `action` in a thread once the port answers, then end this process' `main` as Ctrl-C does."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            eventually(lambda: answers(port), f"port {port}")
            action()
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()
    if failures:
        raise failures[0]


def test_pair_in_its_own_process(tmp_path: Path) -> None:
    directory, record = tmp_path / "new" / "pki", tmp_path / "record"
    with process("pair", "--dir", str(directory), "--record", str(record), number=signal.SIGINT) as ready:
        assert ready["dir"] == str(directory)
        assert [(kme["side"], kme["kme_id"], kme["sae_ids"]) for kme in ready["kmes"]] == [
            ("a", "KME-A", ["SAE-A"]), ("b", "KME-B", ["SAE-B"])]  # fmt: skip
        pki = ensure_demo_pki(directory)
        a, b = client(ready, "a", pki), client(ready, "b", pki)
        exchange(a, b)
        a.close()
        b.close()
    deliveries = [json.loads(line) for line in record.read_text().splitlines()]
    assert Counter(tuple(d.values()) for d in deliveries).most_common(1)[0][1] == 1
    assert Counter((d["sae_id"], d["role"]) for d in deliveries) == dict.fromkeys(
        [("SAE-A", "master"), ("SAE-A", "slave"), ("SAE-B", "master"), ("SAE-B", "slave")], 3
    )


def test_two_processes_one_restarted(pki: DemoPKI) -> None:
    directory = str(pki.directory)
    with process("serve", "--side", "a", "--dir", directory) as side_a:
        a = client(side_a, "a", pki)
        with pytest.raises(KMSUnavailable, match="link to KME-B is down"):
            a.get_keys("SAE-B")
        for _ in range(2):
            with process("serve", "--side", "b", "--dir", directory, "--link", side_a["link"]) as side_b:
                assert side_b["link"] == side_a["link"]
                b = client(side_b, "b", pki)
                when_linked(lambda a=a, b=b: exchange(a, b))  # type: ignore[misc]
                b.close()
            with pytest.raises(KMSUnavailable, match="link to KME-B is down"):
                when_link_is_lost(a)
        a.close()


def when_link_is_lost(a: Etsi014Client) -> None:
    eventually(lambda: a.get_keys("SAE-B") and None)


def test_side_a_here_side_b_there(pki: DemoPKI, capsys: pytest.CaptureFixture[str]) -> None:
    port, link_port = free_port(), free_port()
    arguments = ["serve", "--side", "a", "--dir", str(pki.directory), "--port", str(port)]

    def action() -> None:
        ready = {"kmes": [{"side": "a", "url": f"https://127.0.0.1:{port}"}]}
        there = ["serve", "--side", "b", "--dir", str(pki.directory), "--link", f"127.0.0.1:{link_port}"]
        with process(*there) as side_b:
            a, b = client(ready, "a", pki), client(side_b, "b", pki)
            when_linked(lambda: exchange(a, b))
            a.close()
            b.close()

    with here_while(port, action):
        assert main([*arguments, "--link-port", str(link_port), "--initial", "20"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"certificates and keys: {pki.directory}",
        f"KME-A at https://127.0.0.1:{port} for SAE-A",
        f"link: 127.0.0.1:{link_port}",
        "running; stop with Ctrl-C",
    ]


def test_side_b_here_side_a_there(pki: DemoPKI) -> None:
    port = free_port()
    with process("serve", "--side", "a", "--dir", str(pki.directory)) as side_a:

        def action() -> None:
            ready = {"kmes": [{"side": "b", "url": f"https://127.0.0.1:{port}"}]}
            a, b = client(side_a, "a", pki), client(ready, "b", pki)
            when_linked(lambda: exchange(a, b))
            a.close()
            b.close()

        arguments = ["serve", "--side", "b", "--dir", str(pki.directory), "--port", str(port)]
        with here_while(port, action):
            assert main([*arguments, "--link", side_a["link"], "--json"]) == 0


def test_pair_here(pki: DemoPKI, tmp_path: Path) -> None:
    port_a, port_b = free_port(), free_port()

    def action() -> None:
        urls = {"a": port_a, "b": port_b}
        ready = {"kmes": [{"side": s, "url": f"https://localhost:{p}"} for s, p in urls.items()]}
        a, b = client(ready, "a", pki), client(ready, "b", pki)
        when_linked(lambda: exchange(a, b))
        a.close()
        b.close()

    with here_while(port_b, action):
        arguments = ["pair", "--dir", str(pki.directory), "--record", str(tmp_path / "record")]
        assert main([*arguments, "--port-a", str(port_a), "--port-b", str(port_b)]) == 0
    assert len((tmp_path / "record").read_text().splitlines()) == 12


class TestPKI:
    def test_modes_and_reuse(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        directory = tmp_path / "pki"
        for _ in range(2):
            assert main(["pki", "--dir", str(directory), "--host", "192.0.2.1", "--json"]) == 0
            assert json.loads(capsys.readouterr().out) == {"kmes": [], "dir": str(directory)}
        assert main(["pki", "--dir", str(directory)]) == 0
        assert capsys.readouterr().out == f"certificates and keys: {directory}\n"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        keys = list(directory.glob("*.key"))
        assert len(keys) == 8
        assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}

    def test_every_path_exists_and_openssl_agrees(self, pki: DemoPKI) -> None:
        for ca, names in (("kms_ca", ["kme_a", "kme_b", "sae_a", "sae_b"]), ("app_ca", ["server", "client"])):
            for name in names:
                assert getattr(pki, f"{name}_key").exists()
                cert = getattr(pki, f"{name}_cert")
                verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(getattr(pki, ca)), str(cert)]
                assert subprocess.run(verify, capture_output=True, check=False).returncode == 0

    def test_written_once_by_many(self, tmp_path: Path) -> None:
        threads = [threading.Thread(target=ensure_demo_pki, args=(tmp_path / "pki",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ca = (tmp_path / "pki" / "kms-ca.pem").read_bytes()
        ensure_demo_pki(tmp_path / "pki")
        assert (tmp_path / "pki" / "kms-ca.pem").read_bytes() == ca


class TestRefusals:
    def test_said_in_one_line(self, pki: DemoPKI, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        directory = ["--dir", str(pki.directory)]
        for arguments, says in (
            (
                ["pki", *directory, "--sae-a", "Alice"],
                "is for SAE SAE-A, not Alice: choose another directory",
            ),
            (["serve", "--side", "b", *directory], "side b needs --link HOST:PORT"),
            (["serve", "--side", "a", *directory, "--link", "x:1"], "side a takes none"),
            (["serve", "--side", "b", *directory, "--link", "x"], "--link is HOST:PORT, not x"),
            (["pair", *directory, "--key-size", "12"], "key size must be"),
            (["pair", *directory, "--host", "192.0.2.1"], "192.0.2.1"),
            (["pki", "--dir", str(pki.kms_ca)], "exists"),
            (["pair", *directory, "--record", str(tmp_path / "none" / "record")], "No such file"),
        ):
            assert main(arguments) == 1
            said = capsys.readouterr()
            assert said.out == ""
            assert said.err.startswith("qkd-kme: ")
            assert says in said.err
            assert said.err.count("\n") == 1

    def test_expired(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import datetime

        from kms_client.emulator import pki as module

        real = module._now
        monkeypatch.setattr(module, "_now", lambda: real() - datetime.timedelta(days=400))
        ensure_demo_pki(tmp_path)
        monkeypatch.setattr(module, "_now", real)
        assert main(["pki", "--dir", str(tmp_path)]) == 1
        assert "have expired: remove the directory" in capsys.readouterr().err
