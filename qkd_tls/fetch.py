"""Answers an engine's request for keys by asking a key manager."""

from __future__ import annotations

from kms_client import KeyManager, KMSError, QKDKey
from qkd_tls.engine import FetchKeys, FetchKeysByID

__all__ = ["fetch_keys"]


def fetch_keys(request: FetchKeys | FetchKeysByID, manager: KeyManager) -> list[QKDKey] | KMSError:
    """The keys, or why there are none; for `Engine.keys`. Blocks as long as the KMS client's time limits allow."""
    try:
        if isinstance(request, FetchKeys):
            return manager.get_keys(request.peer_sae_id, request.number)
        return manager.get_keys_by_id(request.peer_sae_id, request.key_ids)
    except KMSError as error:
        return error
