"""A server's context in gunicorn's own process."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from kms_client import Etsi014Client
from qkd_tls import create_default_context

__all__ = ["make"]


def make(site: Mapping[str, str]) -> ssl.SSLContext:
    context: ssl.SSLContext
    if site["hybrid"]:
        kme = Etsi014Client(
            site["kme"],
            sae_id=site["sae_id"],
            cert=site["kme_cert"],
            key=site["kme_key"],
            ca=site["kme_ca"],
        )
        context = create_default_context(ssl.Purpose.CLIENT_AUTH, key_manager=kme)
    else:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(site["cert"], site["key"])
    return context
