# mypy: ignore-errors
"""One KME: the three calls of ETSI GS QKD 014 V1.1.1 (clause 6), and SKIP, over HTTPS with mutual TLS.

The caller's SAE ID is taken from its client certificate: of the SAN's URIs (`urn:sae:` and the
percent-encoded ID, or the ID itself), its DNS names and the subject's common name, exactly one must be a
registered SAE.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from kms_client.emulator.kme_sync import LinkDown, LinkEnd
from kms_client.emulator.pki import SAE_URI_PREFIX
from kms_client.emulator.refusal import Refused, query_integer
from kms_client.emulator.skip import SkipInterface
from kms_client.emulator.store import Delivery, KeyStore, NotASlave, NotFound, Role

__all__ = ["KME", "Faults", "Limits", "server_context"]

_STOP_TIMEOUT = 0.2  # seconds that requests under way get when the KME stops


@dataclass(frozen=True)
class Limits:
    """What the KME says in its status; sizes in bits."""

    max_key_per_request: int = 128
    max_key_size: int = 4096
    min_key_size: int = 64
    max_sae_id_count: int = 4


@dataclass
class Faults:
    """Misbehaviour to switch on in tests."""

    delay: float = 0.0  # seconds before any answer
    answer_with: tuple[int, str] | None = None  # status and body of every answer instead of the real one
    corrupt_keys: bool = False  # deliver other keys to slaves than were delivered to masters


class KME:
    """One KME on one port.

    Args:
        kme_id: its ID.
        peer_kme_id: that of the KME at the other end of the link.
        sae_ids: SAEs of this KME.
        peer_sae_ids: SAEs of the other KME, with which those of this one can share keys.
        store: this end's keys.
        link: to the other KME.
        limits: of requests.
        local_slaves: whether SAEs of this KME can share keys with each other, and with themselves; some programs that
            examine a KME have one certificate only.
        on_delivery: called with every delivery, after it was put down in `store.deliveries`.
    """

    def __init__(
        self,
        kme_id: str,
        peer_kme_id: str,
        sae_ids: Iterable[str],
        peer_sae_ids: Iterable[str],
        store: KeyStore,
        link: LinkEnd,
        *,
        limits: Limits = Limits(),
        local_slaves: bool = False,
        on_delivery: Callable[[Delivery], None] | None = None,
    ) -> None:
        """Serve with `start`."""
        self.kme_id = kme_id
        self.peer_kme_id = peer_kme_id
        self.sae_ids = frozenset(sae_ids)
        self.peer_sae_ids = frozenset(peer_sae_ids) | (self.sae_ids if local_slaves else frozenset())
        self.store = store
        self.limits = limits
        self.faults = Faults()
        self.port = 0
        self._link = link
        self._on_delivery = on_delivery
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """Listen on `host` and `port` (a free one for 0; then see the attribute `port`)."""
        app = web.Application(middlewares=[self._answer_errors, self._misbehave])
        resource = "/api/v1/keys/{sae_id}/"
        app.router.add_get(resource + "status", self._status, allow_head=False)
        for method in ("GET", "POST"):
            app.router.add_route(method, resource + "enc_keys", self._enc_keys)
            app.router.add_route(method, resource + "dec_keys", self._dec_keys)
        SkipInterface(self).add_routes(app.router)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_STOP_TIMEOUT)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=context, reuse_address=True).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and close all connections; keys and port are kept for the next `start`."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            server = runner.server
            kept_alive = [] if server is None else [handler.transport for handler in server.connections]
            await runner.cleanup()
            for transport in kept_alive:
                if transport is not None:
                    # Closing TLS waits for the client's close_notify, which an idle client never sends.
                    transport.abort()
            await asyncio.sleep(0)

    async def _status(self, request: web.Request) -> web.Response:
        master = self.caller(request)
        slave = self.checked_peer(request.match_info["sae_id"])
        store, limits = self.store, self.limits
        return web.json_response(
            {
                "source_KME_ID": self.kme_id,
                "target_KME_ID": self.kme_id if slave in self.sae_ids else self.peer_kme_id,
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
        master = self.caller(request)
        slave = self.checked_peer(request.match_info["sae_id"])
        if request.method == "GET":
            query = {name: query_integer(request, name) for name in ("number", "size")}
            wanted: dict[str, Any] = {name: value for name, value in query.items() if value is not None}
        else:
            wanted = await _json(request)
        number, size = self._number(wanted), self.checked_size(wanted.get("size"))
        slaves = (slave, *(sae for sae in self._additional_slaves(wanted) if sae != slave))
        _check_extensions(wanted)
        return self._deliver(await self.take(number, size, master, slaves), master, "master")

    async def _dec_keys(self, request: web.Request) -> web.Response:
        slave = self.caller(request)
        master = self.checked_peer(request.match_info["sae_id"])
        if request.method == "GET":
            key_ids = request.query.getall("key_ID", [])
            if len(key_ids) != 1:
                raise Refused(400, "GET needs exactly one key_ID, POST takes several")
        else:
            key_ids = _key_ids(await _json(request))
        return self._deliver(zip(key_ids, self.fetch(key_ids, master, slave), strict=True), slave, "slave")

    def _deliver(self, keys: Iterable[tuple[str, bytearray]], sae_id: str, role: Role) -> web.Response:
        container = []
        for key_id, secret in keys:
            container.append({"key_ID": key_id, "key": base64.b64encode(secret).decode()})
            self.delivered(key_id, secret, sae_id, role)
        return web.json_response({"keys": container})

    # --- what all interfaces do

    async def take(
        self, number: int, size: int, master: str, slaves: tuple[str, ...]
    ) -> list[tuple[str, bytearray]]:
        """New keys with their IDs, for `master`; the other KME knows who their slaves are.

        Raises:
            Refused: there are too few, or the link is down.
        """
        needed = number * self.store.parts_needed(size)
        if not self._link.up:
            raise self._link_down()
        if needed > self.store.available_count:
            raise Refused(
                503,
                f"not enough keys: {needed} of {self.store.key_size} bits needed,"
                f" {self.store.available_count} stored",
            )
        taken = [self.store.take(size, master, slaves) for _ in range(number)]
        try:
            await self._link.assign([assignment.without(self.sae_ids) for assignment, _ in taken])
        except LinkDown:
            for _, secret in taken:
                _zero(secret)
            raise self._link_down() from None
        for assignment, secret in taken:
            self.store.keep(assignment.without(self.peer_sae_ids - self.sae_ids), secret)
        return [(assignment.key_id, secret) for assignment, secret in taken]

    def fetch(self, key_ids: Sequence[str], master: str, slave: str) -> list[bytearray]:
        """The keys with these IDs, for one of their slaves.

        Raises:
            Refused: one is not here (any more), or is not for this slave; none is taken.
        """
        try:
            secrets = self.store.fetch(key_ids, master, slave)
        except NotFound:
            raise Refused(400, "one or more keys specified are not found on KME") from None
        except NotASlave:
            raise Refused(401, f"SAE {slave} is not a slave of one or more of the keys") from None
        if self.faults.corrupt_keys:
            for secret in secrets:
                secret[0] ^= 1
        return secrets

    def delivered(self, key_id: str, secret: bytearray, sae_id: str, role: Role) -> None:
        """Put the delivery down, and wipe the key."""
        _zero(secret)
        delivery = Delivery(key_id, sae_id, role)
        self.store.deliveries.append(delivery)
        if self._on_delivery is not None:
            self._on_delivery(delivery)

    def caller(self, request: web.Request) -> str:
        """The SAE that the client's certificate names."""
        assert request.transport is not None
        certificate = request.transport.get_extra_info("peercert") or {}
        known = self.sae_ids.intersection(_certificate_names(certificate))
        if len(known) != 1:
            raise Refused(401, f"the client certificate does not name one SAE registered with {self.kme_id}")
        return next(iter(known))

    def checked_peer(self, sae_id: str) -> str:
        """`sae_id`, if it is an SAE that keys can be shared with."""
        if sae_id not in self.peer_sae_ids:
            raise Refused(400, f"SAE not found: {self.kme_id} has no link to its KME")
        return sae_id

    def _number(self, wanted: Mapping[str, Any]) -> int:
        number = wanted.get("number")
        if number is None:
            return 1
        if not _is_integer(number) or not 1 <= number <= self.limits.max_key_per_request:
            raise Refused(400, f"number shall be an integer from 1 to {self.limits.max_key_per_request}")
        return int(number)

    def checked_size(self, size: object) -> int:
        """Size of keys in bits, if it is one within the limits; None stands for the link's own."""
        if size is None:
            return self.store.key_size
        if not isinstance(size, int) or isinstance(size, bool) or size % 8:
            raise Refused(400, "size shall be a multiple of 8")
        smallest, largest = self.limits.min_key_size, self.limits.max_key_size
        if not smallest <= size <= largest:
            raise Refused(400, f"size shall be from {smallest} to {largest} bits")
        return size

    def _additional_slaves(self, wanted: Mapping[str, Any]) -> list[str]:
        slaves = wanted.get("additional_slave_SAE_IDs")
        if slaves is None:
            return []
        if not isinstance(slaves, list) or not all(isinstance(slave, str) for slave in slaves):
            raise Refused(400, "additional_slave_SAE_IDs shall be a list of SAE IDs")
        if len(slaves) > self.limits.max_sae_id_count:
            raise Refused(
                400, f"at most {self.limits.max_sae_id_count} additional_slave_SAE_IDs are supported"
            )
        if not self.peer_sae_ids.issuperset(slaves):
            raise Refused(400, "SAE not found: one or more of additional_slave_SAE_IDs")
        return list(dict.fromkeys(slaves))

    def _link_down(self) -> Refused:
        return Refused(503, f"the QKD link to {self.peer_kme_id} is down")

    @web.middleware
    async def _answer_errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refused as refusal:
            body: dict[str, Any] = {"message": str(refusal)}
            if refusal.details:
                body["details"] = refusal.details
            return web.json_response(body, status=refusal.status)
        except web.HTTPException as error:  # no such path, wrong method, body too large
            return web.json_response({"message": error.reason}, status=error.status, headers=_allow(error))

    @web.middleware
    async def _misbehave(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self.faults.delay:
            await asyncio.sleep(self.faults.delay)
        if self.faults.answer_with is not None:
            status, text = self.faults.answer_with
            return web.Response(status=status, text=text, content_type="application/json")
        return await handler(request)


def server_context(cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """TLS for a KME: its certificate, and a client certificate of the CA required."""
    # Not create_default_context: it writes the keys of the connection to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)
    return context


def _certificate_names(certificate: Mapping[str, Any]) -> set[str]:
    names = {value for rdn in certificate.get("subject", ()) for kind, value in rdn if kind == "commonName"}
    for kind, value in certificate.get("subjectAltName", ()):
        if kind in ("URI", "DNS"):
            names.add(
                unquote(value.removeprefix(SAE_URI_PREFIX)) if value.startswith(SAE_URI_PREFIX) else value
            )
    return names


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
    # None of extension_optional is known here; they may be ignored (clause 6.2).


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


def _zero(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
