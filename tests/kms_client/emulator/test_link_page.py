"""The page that shows a link: over HTTP, and in a real Chromium."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from kms_client import Etsi014Client
from kms_client.emulator import ensure_demo_pki
from kms_client.emulator.link.controls import Controls
from kms_client.emulator.link.figures import Block, Figures
from kms_client.emulator.watch import WatchPage
from tests.support.patience import PATIENCE
from tests.support.requirements import debian

JSON = {"Content-Type": "application/json"}
KEY_ID = "26e9895d-5ce9-e8ef-74fc-92a52024c7d9"


class Site:
    """A page, served from a loop in another thread, and the two sides that it shows."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.controls = Controls(20.0)
        self.clock = 1_800_000_000.0
        self.sides = [self._figures("a", self.controls), self._figures("b", None)]
        self.page = WatchPage(self.sides)
        self._loop = loop
        self.call(self.page.start())

    def _figures(self, side: str, controls: Controls | None) -> Figures:
        figures = Figures(
            side,
            controls=controls,
            stored=lambda: (120, 80),
            capacity=2000,
            names={"kme_id": f"KME-{side.upper()}"},
            clock=lambda: self.clock,
        )
        figures.optics = {"max_qber": 0.08}
        figures.authentication = lambda: {
            "mode": "one-time keys",
            "reserve_keys": 64,
            "made_bits": 16384,
            "spent_bits": 5120,
            "bootstraps": 1,
            "failures": 0,
        }
        return figures

    def make_blocks(self, number: int) -> None:
        for figures in self.sides:
            figures.set_state("running")
        for count in range(number):
            self.clock += 1
            for figures in self.sides:
                figures.sifted(500_000, 500_000, 1_000_000)
                figures.block(Block(count, 1_000_000, 0.011, 9_000, 90_000, 400_000, 1560, 0, 2_048, ""))
                figures.tick()

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def request(
        self, method: str, path: str, body: str | bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(
            "127.0.0.1", urlsplit(self.page.url).port or 0, timeout=PATIENCE
        )
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    # In its own thread: Chromium's driver has a loop of its own in this one.
    asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def site(loop: asyncio.AbstractEventLoop) -> Iterator[Site]:
    site = Site(loop)
    yield site
    site.call(site.page.stop())


# --- HTTP


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")]
)
def test_files(site: Site, path: str, kind: str) -> None:
    status, headers, body = site.request("GET", path)
    assert status == 200
    assert headers.get_content_type() == kind
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    # Nothing of it comes from anywhere else.
    assert set(re.findall(rb"https?://[^\"'\s]+", body)) <= {b"http://www.w3.org/2000/svg"}


def test_figures_of_both_sides(site: Site) -> None:
    site.make_blocks(2)
    status, headers, body = site.request("GET", "/figures")
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    a, b = json.loads(body)["sides"]
    assert [side["kme_id"] for side in (a, b)] == ["KME-A", "KME-B"]
    assert a["blocks"]["kept"] == b["blocks"]["kept"] == 2
    assert a["controls"]["length_km"] == 20
    assert b["controls"] is None


def test_a_switch_is_set(site: Site) -> None:
    status, _, body = site.request("POST", "/controls", json.dumps({"length_km": 50, "middle": "drop"}), JSON)
    assert status == 200
    assert json.loads(body) == site.controls.snapshot()
    assert (site.controls.length_km, site.controls.middle) == (50.0, "drop")


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ('{"length_km": -1}', JSON, 400, "length_km is a number from 0 to 500"),
        ('{"fibre": 1}', JSON, 400, "there is no switch 'fibre'"),
        ("[1]", JSON, 400, "a JSON object"),
        ("{", JSON, 400, "not JSON"),
        (b"\xff", JSON, 400, "not JSON"),
        ("[" * 5000, JSON, 400, "not JSON"),
        ('{"length_km": ' + "1" * 20_000 + "}", JSON, 413, ""),
        ("length_km=1", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "a JSON object"),
        ('{"length_km": 1}', {"Content-Type": "text/plain"}, 415, "a JSON object"),
        ('{"length_km": 1}', {**JSON, "Sec-Fetch-Site": "cross-site"}, 403, "another page"),
        ('{"length_km": 1}', {**JSON, "Host": "rebound.example"}, 421, "not a page of that host"),
        ('{"length_km": 1}', {**JSON, "Host": "rebound.example:80"}, 421, "not a page of that host"),
    ],
)
def test_a_switch_is_not_set(
    site: Site, body: str | bytes, headers: dict[str, str], status: int, message: str
) -> None:
    before = site.controls.snapshot()
    got, _, answer = site.request("POST", "/controls", body, headers)
    assert got == status
    assert message in json.loads(answer)["message"]
    assert site.controls.snapshot() == before


def test_only_what_there_is(site: Site) -> None:
    assert site.request("GET", "/nothing")[0] == 404
    assert site.request("GET", "/controls")[0] == 405
    for host in ("localhost", "localhost:1", "[::1]:80", "127.0.0.1"):
        assert site.request("GET", "/figures", headers={"Host": host})[0] == 200


def test_side_b_has_no_switches(loop: asyncio.AbstractEventLoop, site: Site) -> None:
    site.call(site.page.stop())
    site.page = WatchPage(site.sides[1:])
    site.call(site.page.start())
    status, _, body = site.request("POST", "/controls", "{}", JSON)
    assert status == 409
    assert "side A" in json.loads(body)["message"]


def test_loopback_only(site: Site) -> None:
    with pytest.raises(ValueError, match="loopback only"):
        site.call(WatchPage(site.sides).start("192.0.2.1"))
    other = WatchPage(site.sides)
    with pytest.raises(OSError, match="in use"):
        site.call(other.start(port=urlsplit(site.page.url).port or 0))
    site.call(other.stop())


# --- in Chromium


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    binary = shutil.which("chromium")
    if binary is None:
        raise debian("chromium").missing()
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        expect.set_options(timeout=1000 * PATIENCE)
        browser = playwright.chromium.launch(executable_path=binary, args=arguments)
        page = browser.new_page(viewport={"width": 1160, "height": 1500})
        yield page
        browser.close()


@pytest.fixture
def page(browser_page: Page, site: Site) -> Iterator[Page]:
    """The page, open; nothing that it says to its console is an error, and it asks nobody else."""
    complaints: list[str] = []
    strangers: list[str] = []

    def said(message: Any) -> None:
        # Refusals are part of some tests; Chromium tells of each.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    def asked(request: Any) -> None:
        if not request.url.startswith((site.page.url, "data:")):
            strangers.append(request.url)

    def failed(error: Any) -> None:
        complaints.append(str(error))

    listeners: dict[Any, Any] = {"console": said, "pageerror": failed, "request": asked}
    for event, listener in listeners.items():
        browser_page.on(event, listener)
    site.make_blocks(40)
    browser_page.goto(site.page.url)
    expect(browser_page.locator("#state")).to_have_text("running")
    yield browser_page
    browser_page.goto("about:blank")
    for event, listener in listeners.items():
        browser_page.remove_listener(event, listener)
    assert complaints == []
    assert strangers == []


def test_what_an_operator_reads(page: Page, site: Site) -> None:
    expect(page.locator("#qber")).to_have_text("1.10 %")
    expect(page.locator("#qber-note")).to_have_text("thrown away above 8.0 %")
    expect(page.locator("#secret")).to_have_text("400 kbit/s")
    expect(page.locator("#blocks")).to_have_text("40 kept")
    expect(page.locator("#share")).to_have_text("0.03 %")
    expect(page.locator("#store-a")).to_have_text("120 of 2000 keys")
    expect(page.locator("#store-b")).to_have_text("80 of 2000 keys")
    for chart in ("qber", "rate", "store", "auth"):
        line = page.locator(f"#chart-{chart} polyline").first.get_attribute("points")
        assert line is not None
        assert len(line.split()) == 40
    expect(page.locator("#eve")).to_be_hidden()
    assert page.locator("#link").bounding_box() is not None


def test_it_follows(page: Page, site: Site) -> None:
    for figures, role in zip(site.sides, ("master", "slave"), strict=True):
        figures.delivery(KEY_ID, "SAE-A" if role == "master" else "SAE-B", role)
        figures.block(Block(41, 1_000_000, 0.26, 0, 0, 0, 0, 0, 0, "QBER above 8.0 %"))
    expect(page.locator("#deliveries tr")).to_have_count(2)
    expect(page.locator("#deliveries .id").first).to_have_text(KEY_ID)
    expect(page.locator("#delivered")).to_contain_text("KME-A: 1 to masters, 0 to slaves.")
    expect(page.locator("#blocks-note")).to_contain_text("1 thrown away (1: QBER above 8.0 %)")
    expect(page.locator("#events")).to_contain_text("block 41 thrown away")
    expect(page.locator("#qber")).to_have_text("26.00 %")


def test_by_keyboard_alone(page: Page, site: Site) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Fibre, km")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#told")).to_contain_text("Set at")
    assert site.controls.length_km == 21.0
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#eve-text")).to_have_text("Eve intercepts 3 %")
    expect(page.locator("#eve")).to_be_visible()
    assert site.controls.intercept == 0.03
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#middle-text")).to_have_text("Mallory: change")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#fibre")).to_have_class("cut")
    assert site.controls.paused


def test_a_refused_switch_is_told(page: Page, site: Site) -> None:
    page.get_by_label("Extra loss, dB").fill("200")
    page.keyboard.press("Tab")
    expect(page.locator("#told")).to_contain_text("extra_loss_db is a number from 0 to 100")


def test_every_control_has_a_name(page: Page) -> None:
    for control in page.locator("input, select").all():
        assert control.evaluate("(control) => control.labels.length") == 1
    schemes: list[Literal["light", "dark"]] = ["light", "dark"]
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const node of document.querySelectorAll("h1, h2, dt, dd, p, td, th, label, figcaption, output")) {
    if (!node.textContent.trim() || !node.checkVisibility()) continue;
    const [one, other] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
    if ((one + 0.05) / (other + 0.05) < 4.5) faint.push(node.outerHTML.slice(0, 80));
  }
  return faint;
}"""
"""Texts with less contrast than 4.5 (WCAG 2.2, success criterion 1.4.3)."""


def test_when_the_link_has_gone(page: Page, site: Site) -> None:
    site.call(site.page.stop())
    expect(page.locator("#state")).to_have_text("no answer from the link")
    url = urlsplit(site.page.url)
    site.call(site.page.start(port=url.port or 0))
    expect(page.locator("#state")).to_have_text("running")


# --- a real link


@dataclass
class RunningLink:
    """Both sides of a link in one process, and clients of both KMEs."""

    page: str
    master: Etsi014Client
    slave: Etsi014Client

    def deliver(self) -> str:
        """A key, fetched at both sides; its ID."""
        (key,) = self.master.get_keys("SAE-B", 1, 256)
        (same,) = self.slave.get_keys_by_id("SAE-A", [key.key_id])
        with same.use() as theirs, key.use() as ours:
            assert bytes(theirs) == bytes(ours)
        return key.key_id


@pytest.fixture(scope="module")
def running_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningLink]:
    folder = tmp_path_factory.mktemp("link") / "pki"
    # The store is larger than what these tests make, so that production never pauses.
    options = ["--dir", str(folder), "--block", "300000", "--buffer", "1000000", "--page-port", "0", "--json"]
    command = [sys.executable, "-m", "kms_client", "link", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            pki = ensure_demo_pki(folder)
            clients = [
                Etsi014Client(
                    kme["url"],
                    sae_id=f"SAE-{side.upper()}",
                    cert=folder / f"sae-{side}.pem",
                    key=folder / f"sae-{side}.key",
                    ca=pki.kms_ca,
                )
                for side, kme in zip("ab", ready["kmes"], strict=True)
            ]
            yield RunningLink(ready["page"], *clients)
            for client in clients:
                client.close()
        finally:
            process.terminate()


@pytest.fixture
def live(browser_page: Page, running_link: RunningLink) -> Iterator[Page]:
    browser_page.goto(running_link.page)
    expect(browser_page.locator("#state")).to_have_text("running")
    expect(browser_page.locator("#blocks")).to_have_text(re.compile("^[1-9][0-9]* kept"))
    yield browser_page
    browser_page.goto("about:blank")


def kept(page: Page) -> int:
    return int((page.locator("#blocks").text_content() or "").split()[0])


def wait_for_more_blocks(page: Page) -> None:
    before = kept(page)
    page.wait_for_function(
        "(before) => parseInt(document.querySelector('#blocks').textContent) > before + 1",
        arg=before,
        timeout=1000 * PATIENCE,
    )


def test_keys_of_a_real_link(live: Page, running_link: RunningLink) -> None:
    key_id = running_link.deliver()
    expect(live.locator("#deliveries .id").first).to_have_text(key_id)
    rows = live.locator("#deliveries tr", has_text=key_id)
    expect(rows).to_have_count(2)
    expect(rows.filter(has_text="SAE-A").filter(has_text="master")).to_have_count(1)
    expect(rows.filter(has_text="SAE-B").filter(has_text="slave")).to_have_count(1)


def test_an_eavesdropper_shows(live: Page) -> None:
    live.get_by_label("Eve intercepts and resends").fill("100")
    expect(live.locator("#qber")).to_have_text(re.compile(r"^2[456]\.\d+ %$"))
    expect(live.locator("#blocks-note")).to_contain_text("QBER above the threshold")
    before = kept(live)
    live.wait_for_timeout(2000)
    assert kept(live) == before
    live.get_by_label("Eve intercepts and resends").fill("0")
    wait_for_more_blocks(live)
    expect(live.locator("#qber")).to_have_text(re.compile(r"^0\.\d+ %$"))


@pytest.mark.parametrize("deed", ["change", "replay"])
def test_a_man_in_the_middle_shows(live: Page, deed: str) -> None:
    live.get_by_label("Man in the middle").select_option(deed)
    expect(live.locator("#reserve-note")).not_to_contain_text("forgeries: 0")
    expect(live.locator("#events")).to_contain_text("is not authentic")
    live.get_by_label("Man in the middle").select_option("off")
    expect(live.locator("#state")).to_have_text("running")
    wait_for_more_blocks(live)


def test_a_cut_shows(live: Page) -> None:
    live.get_by_label("Link cut").check()
    expect(live.locator("#state")).to_contain_text("down")
    live.get_by_label("Link cut").uncheck()
    expect(live.locator("#state")).to_have_text("running")
    wait_for_more_blocks(live)
