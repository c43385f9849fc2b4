"""`qkd-kme doctor` as a command: options, exit codes, and the forms of its report."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kms_client.cli import main
from kms_client.doctor import ExaminedSide, Finding, Report, Verdict, checks
from kms_client.doctor.report_html import html
from kms_client.doctor.report_text import text
from kms_client.emulator import RunningPair, add_sae, run_pair
from tests.support.kme_server import spellings
from tests.support.misbehaving_kme import Answered, Request, answered, twisted
from tests.support.patience import PATIENCE

WITHOUT_EMULATOR = (
    "import sys; sys.modules['aiohttp'] = None; from kms_client.cli import main; sys.exit(main())"
)


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slow machine be no finding about the KME."""
    monkeypatch.setattr(checks, "_SLOW", PATIENCE)


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    with run_pair(more_saes={"b": ["SAE-C"]}) as running:
        yield running


def options(pair: RunningPair, *more: str, url: str | None = None) -> list[str]:
    pki = pair.pki
    return ["doctor", url or pair.url_a, "--sae", "SAE-A", "--peer-sae", "SAE-B", "--cert", str(pki.sae_a_cert),
            "--key", str(pki.sae_a_key), "--ca", str(pki.kms_ca), "--seconds", "0.01", *more]  # fmt: skip


def of_peer(pair: RunningPair) -> list[str]:
    pki = pair.pki
    return ["--peer-url", pair.url_b, "--peer-cert", str(pki.sae_b_cert), "--peer-key", str(pki.sae_b_key)]


def test_text_and_progress(pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    cert, key = add_sae(pair.pki, "SAE-C", "sae-c")
    third = ["--other-sae", "SAE-C", "--other-cert", str(cert), "--other-key", str(key)]
    ca = ["--peer-ca", str(pair.pki.kms_ca)]
    assert main(options(pair, *of_peer(pair), *third, *ca, "--strict")) == 0
    said = capsys.readouterr()
    assert "Side A\n" in said.out
    assert "Side B\n" in said.out
    assert "Both sides\n" in said.out
    assert "SAE-C, for a key of SAE-B: refused with status 401" in said.out
    assert "0 WARN, 0 FAIL, 1 SKIP" in said.out
    assert "12 keys were used up" in said.out
    assert max(map(len, said.out.splitlines())) <= 110
    assert "A: Get key by POST" in said.err


def test_json(pair: RunningPair, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(options(pair, "--quiet", "--no-keys", "--json", str(tmp_path / "report.json"))) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("qkd-kme doctor, ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == [
        "format",
        "standard",
        "started",
        "seconds",
        "keys_used",
        "summary",
        "sides",
        "findings",
    ]
    assert report["format"] == "qkd-kme-doctor/1"
    assert report["keys_used"] == 0
    assert list(report["summary"]) == ["PASS", "WARN", "FAIL", "SKIP"]
    assert [list(side) for side in report["sides"]] == [["name", "url", "sae_id", "peer_sae_id", "keys"]]
    for finding in report["findings"]:
        assert list(finding) == ["check", "side", "title", "verdict", "text", "clause", "advice"]
    assert sum(report["summary"].values()) == len(report["findings"])


def test_json_instead_of_the_text(pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(pair, "--quiet", "--no-keys", "--json", "-")) == 0
    assert json.loads(capsys.readouterr().out)["standard"] == "ETSI GS QKD 014 V1.1.1"


def test_exit_codes(pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    def with_text(request: Request) -> Answered:
        answer = request.forward()
        return answered(400, {"message": "no"}) if answer.status == 400 else answer

    with twisted(pair, "a", with_text) as url:
        assert main(options(pair, "--no-keys", "--quiet", url=url)) == 0
        assert main(options(pair, "--no-keys", "--quiet", "--strict", url=url)) == 3
    assert " WARN, 0 FAIL" in capsys.readouterr().out
    assert main(options(pair, "--quiet", url="https://127.0.0.1:1")) == 1
    assert "FAIL  -    Reachable: 127.0.0.1 port 1: Connection refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--sae", ""], "cannot be an SAE ID"),
        (["--cert", "no/such/file"], "cannot be loaded"),
        (["--ca", "no/such/file"], "cannot be loaded"),
        (["--site", "example.org"], "not a network"),
        (["--peer-url", "https://127.0.0.1:1"], "this SAE's certificate"),
        (["--other-sae", "SAE-C"], "give --peer-url too"),
    ],
    ids=["sae", "cert", "ca", "site", "peer", "other"],
)
def test_options_that_cannot_be_used(
    pair: RunningPair, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main(options(pair, *more)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("qkd-kme doctor: ")
    assert says in said.err


@pytest.mark.parametrize("more", [["--seconds", "0"], ["--timeout", "x"], ["--what"]])
def test_options_that_do_not_exist(
    pair: RunningPair, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options(pair, *more))
    assert ended.value.code == 2
    assert "usage: qkd-kme" in capsys.readouterr().err


def test_a_url_that_is_none(pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(pair, url="http://user:secret@kme.example")) == 2
    assert "secret" not in capsys.readouterr().err


def test_a_report_that_cannot_be_written(pair: RunningPair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(pair, "--no-keys", "--quiet", "--html", "no/such/directory/report.html")) == 1
    assert "qkd-kme: " in capsys.readouterr().err


def test_doctor_needs_no_emulator(pair: RunningPair) -> None:
    command = [sys.executable, "-c", WITHOUT_EMULATOR]
    ended = subprocess.run(
        [*command, *options(pair, "--no-keys", "--quiet")], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "0 FAIL" in ended.stdout
    ended = subprocess.run([*command, "pair"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "invalid choice: 'pair'" in ended.stderr
    ended = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert "install them with: pip install aiohttp numpy." in " ".join(ended.stdout.split())


def test_no_key_in_anything_that_a_process_writes(pair: RunningPair, tmp_path: Path) -> None:
    """With keys that the test knows: a KME in between writes them down."""
    keys: list[str] = []

    def spy(request: Request) -> Answered:
        answer = request.forward()
        if request.call == "enc_keys" and answer.status == 200:
            keys.extend(entry["key"] for entry in answer.json()["keys"])
        return answer

    page, report = tmp_path / "report.html", tmp_path / "report.json"
    program = "import logging; logging.basicConfig(level=logging.DEBUG); "
    program += "import sys; from kms_client.cli import main; sys.exit(main())"
    with twisted(pair, "a", spy) as url:
        arguments = options(pair, *of_peer(pair), "--html", str(page), "--json", str(report), url=url)
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    assert len(keys) == 6
    written = ended.stdout + ended.stderr + page.read_text() + report.read_text()
    assert "DEBUG" in written
    for key in keys:
        for spelling in spellings(base64.b64decode(key)):
            assert spelling not in written


# --- HTML


class Page(HTMLParser):
    """What is in a page, and whether its elements are closed in order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def a_report(text: str = "seen") -> Report:
    return Report(
        started="2030-01-01T00:00:00+00:00",
        seconds=1.0,
        sides=[ExaminedSide("A", "https://kme.example", "SAE <A>", "SAE-B", 3)],
        findings=[
            Finding("one", "A", "One", Verdict.PASS, text, "5.1", ""),
            Finding("one", "A", "One", Verdict.WARN, text, "5.1", "Do & see"),
            Finding("two", "A-B", "Two", Verdict.FAIL, text, "", "Do"),
            Finding("three", "A", "Three", Verdict.SKIP, text, "", ""),
        ],
    )


def test_the_page_is_whole_and_loads_nothing(pair: RunningPair, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert main(options(pair, *of_peer(pair), "--quiet", "--html", str(file))) == 0
    page = Page(file.read_text(encoding="utf-8"))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("title")) == 1
    for tag in ("script", "link", "img", "iframe", "a", "form"):
        assert page.all(tag) == []
    assert not any(
        {"src", "href", "onload", "onclick"} & attributes.keys() for _, attributes in page.elements
    )
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert len(page.all("table")) == len(page.all("caption")) == 4
    for heading in page.all("th"):
        assert heading.get("scope") in ("row", "col")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 60
    assert "Nothing failed" in page.text


def test_the_page_escapes_what_a_kme_says() -> None:
    page = html(a_report("<script>alert(1)</script> \"quoted\" & 'so'"))
    assert Page(page).all("script") == []
    assert "&lt;script&gt;" in page
    assert "SAE &lt;A&gt;" in page
    assert "Do &amp; see" in page
    assert "<title>KME examination: 1 failed</title>" in page


def test_the_page_begins_with_what_needs_attention() -> None:
    page = Page(html(a_report()))
    assert [link["href"] for link in page.all("a")] == ["#A-B-two", "#A-one"]
    assert {"A-B-two", "A-one"} <= {attributes.get("id") for attributes in page.all("tr")}


def test_the_page_says_what_to_do_and_what_a_verdict_means() -> None:
    page = Page(html(a_report()))
    assert "What to do:" in page.text
    assert "1 WARN: works, with a reservation" in page.text
    calm = Report("2030-01-01T00:00:00+00:00", 1.0, [], a_report().findings[:2])
    assert "Nothing failed, 1 with a reservation" in Page(html(calm)).text


def test_the_text_of_a_report() -> None:
    assert text(a_report()).splitlines()[3:] == [
        "Side A",
        "  PASS  5.1  One: seen",
        "  WARN  5.1  One: seen",
        "             -> Do & see",
        "  SKIP  -    Three: seen",
        "",
        "Both sides",
        "  FAIL  -    Two: seen",
        "             -> Do",
        "",
        "1 PASS, 1 WARN, 1 FAIL, 1 SKIP",
        "3 keys were used up. 1.0 s.",
    ]
    assert a_report().exit_code() == a_report().exit_code(strict=True) == 1
