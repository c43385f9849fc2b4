"""The KME as a key provider that speaks SKIP (draft-cisco-skip-02), on the same port and from the same keys.

The local system is the SAE that the client certificate names, the remote systems are the SAEs of the other KME. A
keyId is the key ID of ETSI GS QKD 014 without its hyphens, so that the two ends may use different interfaces.
"""

from __future__ import annotations

import re
import secrets
import uuid

from aiohttp import web

from kms_client.emulator.delivery import KeyDelivery
from kms_client.emulator.refusal import Refused, query_integer
from kms_client.emulator.store import SAERole

__all__ = ["SkipInterface"]

_ALGORITHM = "emulated-qkd"
_DEFAULT_ENTROPY = 256  # bits
_MAX_ENTROPY = 8192
_KEY_ID = re.compile("[0-9a-f]{32}")


class SkipInterface:
    """The four requests of SKIP."""

    def __init__(self, kme: KeyDelivery) -> None:
        """Answer with the keys of `kme`."""
        self._kme = kme

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add GET only; aiohttp answers other methods with 405."""
        router.add_get("/capabilities", self._capabilities, allow_head=False)
        router.add_get("/key", self._new_key, allow_head=False)
        router.add_get("/key/{key_id}", self._key_by_id, allow_head=False)
        router.add_get("/entropy", self._entropy, allow_head=False)

    async def _capabilities(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "entropy": True,
                "key": True,
                "algorithm": _ALGORITHM,
                "localSystemID": self._kme.caller(request),
                "remoteSystemID": [_literal(sae_id) for sae_id in sorted(self._kme.peer_sae_ids)],
            }
        )

    async def _new_key(self, request: web.Request) -> web.Response:
        initiator = self._kme.caller(request)
        responder = self._remote_system(request)
        size = self._kme.checked_size(query_integer(request, "size"))
        [(key_id, secret)] = await self._kme.take(1, size, initiator, (responder,))
        return self._deliver(key_id, secret, initiator, "master")

    async def _key_by_id(self, request: web.Request) -> web.Response:
        responder = self._kme.caller(request)
        initiator = self._remote_system(request)
        given = request.match_info["key_id"]
        if not _KEY_ID.fullmatch(given):
            raise Refused(400, "a keyId has 32 hexadecimal digits in lower case")
        key_id = str(uuid.UUID(given))
        try:
            [secret] = self._kme.fetch([key_id], initiator, responder)
        except Refused as refusal:
            # SKIP knows nothing of keys that are there, but for others.
            raise Refused(400, str(refusal)) from None
        return self._deliver(key_id, secret, responder, "slave")

    async def _entropy(self, request: web.Request) -> web.Response:
        self._kme.caller(request)
        bits = query_integer(request, "minentropy")
        bits = _DEFAULT_ENTROPY if bits is None else bits
        if not 1 <= bits <= _MAX_ENTROPY:
            raise Refused(400, f"minentropy shall be from 1 to {_MAX_ENTROPY} bits")
        size = -(-bits // 8)
        return web.json_response({"randomStr": secrets.token_hex(size), "minentropy": 8 * size})

    def _remote_system(self, request: web.Request) -> str:
        return self._kme.checked_peer(request.query.get("remoteSystemID", ""))

    def _deliver(self, key_id: str, secret: bytearray, sae_id: str, role: SAERole) -> web.Response:
        body = {"keyId": uuid.UUID(key_id).hex, "key": secret.hex()}
        self._kme.delivered(key_id, secret, sae_id, role)
        return web.json_response(body)


def _literal(sae_id: str) -> str:
    """Return the glob that matches this ID and no other."""
    return re.sub(r"[*?[]", r"[\g<0>]", sae_id)
