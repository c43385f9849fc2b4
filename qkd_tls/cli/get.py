"""The command `qkd-tls get`: an HTTPS request over a hybrid connection."""

from __future__ import annotations

import argparse
import contextlib
import sys
from argparse import ArgumentParser, Namespace
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit

import requests

from qkd_tls import __version__
from qkd_tls.adapters.requests import QKDAdapter, qkd_info
from qkd_tls.cli.failure import ExitCode
from qkd_tls.cli.report import ConnectionReport
from qkd_tls.cli.settings import add_qkd_options, open_context, seconds
from qkd_tls.cli.terminal import Terminal, add_output_options, printable

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "run"]

SUMMARY = "send an HTTPS request; the body goes to standard output"
DESCRIPTION = (
    "Sends a GET request and writes the body to standard output or to a file, and what protected the connection to "
    "standard error. Like curl it follows no redirects, and whatever status the server answers is a result, not an "
    "error. Proxies and ~/.netrc are not used."
)
_CHUNK: Final = 1 << 16
# Those of a report that are known here.
_MEMBERS: Final = ("role", "peer", "server_name", "policy", "qkd", "own_certificate")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("url", metavar="URL", type=_https_url, help="https://HOST[:PORT]/PATH")
    group = parser.add_argument_group("request")
    group.add_argument("-o", "--output", metavar="FILE", help="write the body to FILE")
    group.add_argument("-i", "--include", action="store_true", help="status line and headers before the body")
    group.add_argument(
        "--repeat",
        metavar="N",
        type=_count,
        default=1,
        help="send it N times, each time on a new connection; the last body is written",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=20.0,
        help="for the server to answer (default 20)",
    )
    add_qkd_options(parser)
    add_output_options(parser, data_on_stdout=True)


def run(arguments: Namespace, terminal: Terminal) -> int:
    """Run the command."""
    answers: list[dict[str, Any]] = []
    with open_context(arguments) as context, requests.Session() as session:
        # Neither proxies nor passwords of the environment: a request goes to the server and says nothing unasked.
        session.trust_env = False
        session.headers.update({"User-Agent": f"qkd-tls/{__version__}", "Connection": "close"})
        session.mount("https://", QKDAdapter(context))
        for number in range(1, arguments.repeat + 1):
            with session.get(
                arguments.url, timeout=arguments.timeout, stream=True, allow_redirects=False
            ) as response:
                report = ConnectionReport(
                    qkd=qkd_info(response),
                    peer=urlsplit(arguments.url).netloc,
                    server_name=urlsplit(arguments.url).hostname,
                    policy=str(context.policy),
                    own_certificate=arguments.cert is not None,
                )
                milliseconds = 1000 * response.elapsed.total_seconds()
                _tell(terminal, report, response, number, arguments.repeat, milliseconds)
                last = number == arguments.repeat
                size = _write(response, arguments) if last else len(response.content)
            answers.append(
                {"status": response.status_code, "bytes": size, "milliseconds": round(milliseconds, 3)}
                | {name: value for name, value in report.as_dict().items() if name in _MEMBERS}
            )
    terminal.record({"command": "get", "url": arguments.url, "connections": answers})
    return ExitCode.OK


def _tell(
    terminal: Terminal,
    report: ConnectionReport,
    response: requests.Response,
    number: int,
    of: int,
    milliseconds: float,
) -> None:
    status = f"HTTP {response.status_code} {printable(response.reason or '')}".rstrip()
    if of == 1:
        terminal.note(f"{status}, {milliseconds:.1f} ms")
        for line in report.lines():
            terminal.note(line)
        if response.is_redirect:
            terminal.note(f"redirect     to {printable(response.headers['Location'])}, which is not followed")
        return
    qkd = report.qkd
    terminal.note(
        f"{number:3}  {status}  {qkd.protection}  {qkd.path or 'no association'}  "
        f"{'key ' + qkd.key_id if qkd.key_id else 'no QKD key'}  {milliseconds:.1f} ms"
    )


def _write(response: requests.Response, arguments: Namespace) -> int:
    size = 0
    with _output(arguments.output) as out:
        if arguments.include:
            out.write(f"HTTP/1.1 {response.status_code} {response.reason}\r\n".encode())
            for name, value in response.headers.items():
                out.write(f"{name}: {value}\r\n".encode())
            out.write(b"\r\n")
        for chunk in response.iter_content(_CHUNK):
            out.write(chunk)
            size += len(chunk)
        out.flush()
    return size


def _output(name: str | None) -> contextlib.AbstractContextManager[BinaryIO]:
    return contextlib.nullcontext(sys.stdout.buffer) if name is None else open(name, "wb")


def _https_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not an https:// URL")
    return text


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of requests")
