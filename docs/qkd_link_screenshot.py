"""Run a link, for a while with an eavesdropper and a man in the middle, and take a picture of its page.

`python docs/qkd_link_screenshot.py` from the top folder; needs the group `test` and Chromium, and takes a
minute.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from kms_client import Etsi014Client

PICTURE = Path(__file__).parent / "_static" / "qkd-link-page.png"


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pki"
        options = ["--dir", str(folder), "--buffer", "20000", "--page-port", "0", "--json"]
        command = [sys.executable, "-m", "kms_client", "link", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            try:
                assert process.stdout is not None
                look(json.loads(process.stdout.readline()), folder)
            finally:
                process.terminate()


def look(ready: dict[str, str], folder: Path) -> None:
    """Act out the events that the picture shows, and take it."""
    urls = [kme["url"] for kme in ready["kmes"]]  # type: ignore[index]
    master, slave = (
        Etsi014Client(
            url,
            sae_id=f"SAE-{side.upper()}",
            cert=folder / f"sae-{side}.pem",
            key=folder / f"sae-{side}.key",
            ca=folder / "kms-ca.pem",
        )
        for side, url in zip("ab", urls, strict=True)
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 1400})
        page.goto(ready["page"])
        page.wait_for_function(
            "() => parseInt(document.querySelector('#blocks').textContent) > 3", timeout=60_000
        )
        page.wait_for_timeout(8000)
        page.get_by_label("Man in the middle").select_option("change")
        page.wait_for_timeout(3000)
        page.get_by_label("Man in the middle").select_option("off")
        page.wait_for_timeout(6000)
        page.get_by_label("Eve intercepts and resends").fill("40")
        page.wait_for_timeout(9000)
        page.get_by_label("Eve intercepts and resends").fill("5")
        page.wait_for_timeout(12_000)
        for _ in range(3):
            (key,) = master.get_keys("SAE-B", 1, 256)
            slave.get_keys_by_id("SAE-A", [key.key_id])
        page.locator("h1").click()
        page.wait_for_timeout(2500)
        page.screenshot(path=PICTURE)
        browser.close()
    master.close()
    slave.close()


if __name__ == "__main__":
    main()
