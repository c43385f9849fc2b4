"""ETSI GS QKD 014 V1.1.1, served by a KME: the three calls of clause 6."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from json import JSONDecodeError
from typing import Any

from aiohttp import web

from kms_client.emulator.delivery import KeyDelivery
from kms_client.emulator.refusal import Refused, query_integer
from kms_client.emulator.store import SAERole

__all__ = ["Etsi014Interface"]


class Etsi014Interface:
    """The three calls."""

    def __init__(self, kme: KeyDelivery) -> None:
        """Answer with the keys of `kme`."""
        self._kme = kme

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add GET and POST; aiohttp answers other methods with 405."""
        resource = "/api/v1/keys/{sae_id}/"
        router.add_get(resource + "status", self._status, allow_head=False)
        for method in ("GET", "POST"):
            router.add_route(method, resource + "enc_keys", self._enc_keys)
            router.add_route(method, resource + "dec_keys", self._dec_keys)

    async def _status(self, request: web.Request) -> web.Response:
        master = self._kme.caller(request)
        slave = self._kme.checked_peer(request.match_info["sae_id"])
        store, limits = self._kme.store, self._kme.limits
        return web.json_response(
            {
                "source_KME_ID": self._kme.kme_id,
                "target_KME_ID": self._kme.kme_id if slave in self._kme.sae_ids else self._kme.peer_kme_id,
                "master_SAE_ID": master,
                "slave_SAE_ID": slave,
                "key_size": store.key_size,
                "stored_key_count": store.available_count,
                "max_key_count": store.max_key_count,
                "max_key_per_request": limits.max_key_per_request,
                "max_key_size": limits.max_key_size,
                "min_key_size": limits.min_key_size,
                "max_SAE_ID_count": limits.max_sae_id_count,
            }
        )

    async def _enc_keys(self, request: web.Request) -> web.Response:
        master = self._kme.caller(request)
        slave = self._kme.checked_peer(request.match_info["sae_id"])
        if request.method == "GET":
            query = {name: query_integer(request, name) for name in ("number", "size")}
            wanted: dict[str, Any] = {name: value for name, value in query.items() if value is not None}
        else:
            wanted = await _json(request)
        number, size = self._number(wanted), self._kme.checked_size(wanted.get("size"))
        slaves = (slave, *(sae for sae in self._additional_slaves(wanted) if sae != slave))
        _check_extensions(wanted)
        return self._deliver(await self._kme.take(number, size, master, slaves), master, "master")

    async def _dec_keys(self, request: web.Request) -> web.Response:
        slave = self._kme.caller(request)
        master = self._kme.checked_peer(request.match_info["sae_id"])
        if request.method == "GET":
            key_ids = request.query.getall("key_ID", [])
            if len(key_ids) != 1:
                raise Refused(400, "GET needs exactly one key_ID, POST takes several")
        else:
            key_ids = _key_ids(await _json(request))
        return self._deliver(
            zip(key_ids, self._kme.fetch(key_ids, master, slave), strict=True), slave, "slave"
        )

    def _deliver(self, keys: Iterable[tuple[str, bytearray]], sae_id: str, role: SAERole) -> web.Response:
        container = []
        for key_id, secret in keys:
            container.append({"key_ID": key_id, "key": base64.b64encode(secret).decode()})
            self._kme.delivered(key_id, secret, sae_id, role)
        return web.json_response({"keys": container})

    def _number(self, wanted: Mapping[str, Any]) -> int:
        number = wanted.get("number")
        if number is None:
            return 1
        if not _is_integer(number) or not 1 <= number <= self._kme.limits.max_key_per_request:
            raise Refused(400, f"number shall be an integer from 1 to {self._kme.limits.max_key_per_request}")
        return int(number)

    def _additional_slaves(self, wanted: Mapping[str, Any]) -> list[str]:
        slaves = wanted.get("additional_slave_SAE_IDs")
        if slaves is None:
            return []
        if not isinstance(slaves, list) or not all(isinstance(slave, str) for slave in slaves):
            raise Refused(400, "additional_slave_SAE_IDs shall be a list of SAE IDs")
        if len(slaves) > self._kme.limits.max_sae_id_count:
            raise Refused(
                400, f"at most {self._kme.limits.max_sae_id_count} additional_slave_SAE_IDs are supported"
            )
        if not self._kme.peer_sae_ids.issuperset(slaves):
            raise Refused(400, "SAE not found: one or more of additional_slave_SAE_IDs")
        return list(dict.fromkeys(slaves))


async def _json(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json() if request.can_read_body else {}
    except (JSONDecodeError, UnicodeDecodeError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "the request body is not a JSON object")
    return body


def _key_ids(body: Mapping[str, Any]) -> list[str]:
    entries = body.get("key_IDs")
    if not isinstance(entries, list) or not entries:
        raise Refused(400, "key_IDs shall be a list of one or more objects")
    key_ids = [entry.get("key_ID") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(key_id, str) for key_id in key_ids):
        raise Refused(400, "each of key_IDs shall be an object with a key_ID")
    if len(set(key_ids)) != len(key_ids):
        raise Refused(400, "a key_ID is given twice")
    return [str(key_id) for key_id in key_ids]


def _check_extensions(wanted: Mapping[str, Any]) -> None:
    for name in ("extension_mandatory", "extension_optional"):
        value = wanted.get(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        ):
            raise Refused(400, f"{name} shall be a list of objects")
    if mandatory := wanted.get("extension_mandatory"):
        raise Refused(
            400,
            "not all extension_mandatory parameters are supported",
            *({"extension_mandatory_unsupported": name} for entry in mandatory for name in entry),
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
