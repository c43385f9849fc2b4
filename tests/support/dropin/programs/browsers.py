"""curl and Chromium, against the site of the HTTP clients without its TLS."""

from __future__ import annotations

import queue
import subprocess
import tempfile
from pathlib import Path

from tests.support.dropin.harness import DIGEST, HALF, LIMIT, PATIENCE, PAYLOAD, Program, digest, drain
from tests.support.dropin.programs.http_clients import Site
from tests.support.dropin.tunnelled import TunnelledProgram, binary, end_plainly, reset, service, version_of

__all__ = ["PROGRAMS"]


class PlainSite(Site):
    def do_GET(self) -> None:
        if self.path in ("/silent", "/end", "/cut"):
            self.break_off(HALF)
        else:
            super().do_GET()

    def break_off(self, half: bytes, kind: str = "application/octet-stream") -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(half)
        self.wfile.flush()
        {"/silent": drain, "/end": end_plainly, "/cut": reset}[self.path](self.connection)


class Curl(TunnelledProgram):
    name = "curl"

    @classmethod
    def version(cls) -> str:
        return version_of(binary("curl", "curl"), "--version")

    def start(self) -> None:
        self.curl = binary("curl", "curl")
        self.port = self.route(self.peer(lambda raw: PlainSite(raw, raw, None)))  # type: ignore[arg-type]
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def fetch(self, path: str, *options: str) -> bytes:
        result = subprocess.run(
            [self.curl, "-sS", "--noproxy", "*", *options, f"http://127.0.0.1:{self.port}{path}"],
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
        if result.returncode:
            return f"exit code {result.returncode}".encode()
        return result.stdout

    def connects(self) -> object:
        return self.fetch("/hello") == b"hello"

    def up(self) -> object:
        file = self.folder / "payload"
        file.write_bytes(PAYLOAD)
        return self.fetch("/digest", "-H", "Expect:", "--data-binary", f"@{file}") == DIGEST.encode()

    def down(self) -> object:
        return digest(self.fetch("/payload")) == DIGEST

    def timeout(self) -> object:
        return self.fetch("/silent", "--max-time", str(LIMIT))

    def eof(self) -> object:
        return self.fetch("/end")

    def truncation(self) -> object:
        return self.fetch("/cut")


PAGE = b"""<!doctype html><title>waits for tasks</title><script>
const hex = buffer => [...new Uint8Array(buffer)].map(byte => byte.toString(16).padStart(2, "0")).join("");
const tasks = {
  connects: async () => (await fetch("/hello")).text(),
  up: async () => {
    const payload = await (await fetch("/payload")).arrayBuffer();
    return (await fetch("/digest", {method: "POST", body: payload})).text();
  },
  down: async () => {
    const payload = await (await fetch("/payload", {cache: "no-store"})).arrayBuffer();
    return hex(await crypto.subtle.digest("SHA-256", payload));
  },
  timeout: async () => (await fetch("/silent", {signal: AbortSignal.timeout(LIMIT)})).text(),
  eof: async () => (await fetch("/end")).text(),
  truncation: async () => (await fetch("/cut")).text(),
};
(async () => {
  for (;;) {
    const task = await (await fetch("/task", {cache: "no-store"})).text();
    if (task == "stop") return;
    let result;
    try { result = await tasks[task](); } catch (error) { result = error.name; }
    await fetch("/result", {method: "POST", body: result});
  }
})();
</script>""".replace(b"LIMIT", str(int(LIMIT * 1000)).encode())


class Chromium(TunnelledProgram):
    name = "Chromium"

    @classmethod
    def version(cls) -> str:
        return version_of(binary("chromium", "chromium"), "--version")

    def start(self) -> None:
        chromium = binary("chromium", "chromium")
        self.tasks: queue.Queue[str] = queue.Queue()
        self.results: queue.Queue[str] = queue.Queue()
        tasks, results = self.tasks, self.results

        class TaskSite(PlainSite):
            def do_GET(self) -> None:
                if self.path == "/":
                    self.answer(PAGE, "text/html")
                elif self.path == "/task":
                    self.answer(tasks.get(timeout=PATIENCE).encode(), "text/plain")
                elif self.path == "/favicon.ico":
                    self.send_error(404)
                else:
                    super().do_GET()

            def do_POST(self) -> None:
                if self.path != "/result":
                    super().do_POST()
                    return
                results.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.answer(b"")

        self.port = self.route(self.peer(lambda raw: TaskSite(raw, raw, None)))  # type: ignore[arg-type]
        self.stack.callback(self.tasks.put, "stop")
        folder = self.stack.enter_context(
            tempfile.TemporaryDirectory(prefix="qkd-tls-chromium-", ignore_cleanup_errors=True)
        )
        options = (
            "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
            " --disable-background-networking --disable-component-update --disable-dev-shm-usage"
            f" --no-proxy-server --user-data-dir={folder}"
        )
        service(self, [chromium, *options.split(), f"http://127.0.0.1:{self.port}/"], self.port)

    def do(self, task: str) -> str:
        self.tasks.put(task)
        return self.results.get(timeout=PATIENCE)

    def connects(self) -> object:
        return self.do("connects") == "hello"

    def up(self) -> object:
        return self.do("up") == DIGEST

    def down(self) -> object:
        return self.do("down") == DIGEST

    def timeout(self) -> object:
        return self.do("timeout")

    def eof(self) -> object:
        return self.do("eof")

    def truncation(self) -> object:
        return self.do("truncation")


PROGRAMS: list[type[Program]] = [Curl, Chromium]
