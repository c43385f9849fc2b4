"""The programs, in the order of the table."""

from __future__ import annotations

from tests.support.dropin.harness import Program
from tests.support.dropin.programs import (
    brokers,
    browsers,
    databases,
    databases_over_tls,
    dns,
    event_loops,
    ftp,
    http2,
    http_clients,
    http_servers,
    kafka_clients,
    mail,
    streams,
    web_servers,
    web_sockets,
)

__all__ = ["PROGRAMS"]

PROGRAMS: list[type[Program]] = [
    *http_clients.PROGRAMS,
    *http2.PROGRAMS,
    *dns.PROGRAMS,
    *mail.PROGRAMS,
    *ftp.PROGRAMS,
    *http_servers.PROGRAMS,
    *web_servers.PROGRAMS,
    *web_sockets.PROGRAMS,
    *streams.PROGRAMS,
    *event_loops.PROGRAMS,
    *databases_over_tls.PROGRAMS,
    *brokers.PROGRAMS,
    *kafka_clients.PROGRAMS,
    *databases.PROGRAMS,
    *browsers.PROGRAMS,
]
