"""Prometheus metrics of a tunnel process. Labels are names from the configuration and fixed words; never a key."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

import qkd_tls

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 24 * 3600.0)


class Metrics:
    """All metrics, in a registry of their own."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "qkd_tls_tunnel_"
        self.active = Gauge(f"{prefix}connections_active", "Open connections.", ["tunnel"], registry=registry)
        self.connections = Counter(
            f"{prefix}connections", "Connections that ended, by how.", ["tunnel", "ended"], registry=registry
        )
        self.handshakes = Counter(
            f"{prefix}handshakes",
            "Handshakes by outcome (ok, or what failed), protection and path (none where there is none).",
            ["tunnel", "outcome", "protection", "path"],
            registry=registry,
        )
        self.bytes = Counter(
            f"{prefix}bytes",
            "Application data passed on: to_hybrid was read at the plain side, to_plain at the hybrid side.",
            ["tunnel", "direction"],
            registry=registry,
        )
        self.handshake_seconds = Histogram(
            f"{prefix}handshake_seconds",
            "Time of a successful handshake, KMEs included.",
            ["tunnel"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.connection_seconds = Histogram(
            f"{prefix}connection_seconds",
            "Time from accepting a connection to its end.",
            ["tunnel"],
            buckets=_LONG,
            registry=registry,
        )
        self.limit_reached = Counter(
            f"{prefix}limit_reached", "Times that max_connections was reached.", ["tunnel"], registry=registry
        )
        self.kme_requests = Counter(
            f"{prefix}kme_requests",
            "Requests to a KME by operation and outcome (ok, or the error's class).",
            ["kme", "operation", "outcome"],
            registry=registry,
        )
        self.kme_seconds = Histogram(
            f"{prefix}kme_request_seconds",
            "Time of a request to a KME.",
            ["kme", "operation"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.reloads = Counter(f"{prefix}reloads", "Reloads by outcome.", ["outcome"], registry=registry)
        info = Gauge(f"{prefix}info", "Always 1; the version.", ["version"], registry=registry)
        info.labels(qkd_tls.__version__).set(1)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
