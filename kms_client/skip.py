"""A key provider that speaks SKIP, the Secure Key Integration Protocol (draft-cisco-skip-02), over TLS."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar
from urllib.parse import quote, urlencode

from kms_client.credentials import FilePath, Password, hidden
from kms_client.errors import (
    KMSAuthenticationError,
    KMSError,
    KMSProtocolError,
    KMSRequestError,
    KMSTimeout,
    KMSUnavailable,
    NoKeysLeft,
    UnknownKey,
    UnknownSAE,
    shown,
)
from kms_client.etsi014 import DeliveredKeys
from kms_client.etsi014_messages import Malformed, error_text
from kms_client.https import Answer, HTTPSClient, WrapsSockets
from kms_client.keys import QKDKey, wipe_keys
from kms_client.manager import KMSStatus, check_key_ids, check_number_and_size
from kms_client.secure_site import SecureSite
from kms_client.skip_messages import SkipCapabilities, parse_capabilities, parse_entropy, parse_key

__all__ = ["SkipClient"]

_MAX_BODY = 1 << 20  # bytes
_DEFAULT_SIZE = 256  # bits, of a key where none is asked for
_UNTOLD = 1 << 16  # stands for numbers of keys and sizes that SKIP does not tell
_STANDARD_STATUS = (200, 400, 404, 405, 500, 503)
_CAPABILITIES, _NEW_KEY, _KEY_BY_ID, _ENTROPY = "capabilities", "key", "key by ID", "entropy"

_T = TypeVar("_T")


class SkipClient:
    """A `KeyManager` on a key provider that speaks SKIP.

    Keys cross this link, so it belongs inside one secure site: the client connects to addresses of this host only,
    unless `site` names others.

    Args:
        url: the provider's URL: `https://host[:port]`, port 443 by default.
        sae_id: the provider's `localSystemID`, which peers know this end by.
        cert: path of this program's certificate chain, PEM.
        key: path of its private key, PEM; may be left out if it is in the same file.
        ca: path of the CA certificates for the provider's certificate, PEM. The host name is checked.
        pkcs12: as of `Etsi014Client`; so are `key_password`, `ssl_context`, `server_hostname`, `unix_socket`, `site`,
            `headers` and the timeouts.
        psk_context: instead of certificates, a maker of TLS connections from a pre-shared key that the
            provider knows too, such as a `qkd_tls.psk_context.PSKContext`.
        size: of a key in bits if `get_keys` is not told; None for the provider's own.

    Attributes:
        quirks: names of the deviations from the draft met so far.

    Raises:
        ValueError: the URL, an ID, the size or a header field is impossible; certificates are missing or given twice.
        KMSAuthenticationError: the certificates cannot be loaded.

    SKIP gives one key per request. So a call for several keys makes several requests; if one of them fails,
    the keys that came before are wiped and lost.

    Before the first key the provider is asked for its capabilities, once, to see that it calls this end `sae_id`.

    No key request is ever sent twice. The last 10,000 keys that came are remembered by their IDs: if the
    provider delivers one again, it is wiped and the call raises.

    Every method may be called from any thread.
    """

    protocol = "skip"

    def __init__(
        self,
        url: str,
        *,
        sae_id: str,
        cert: FilePath | None = None,
        key: FilePath | None = None,
        ca: FilePath | None = None,
        pkcs12: FilePath | None = None,
        key_password: Password | None = None,
        ssl_context: ssl.SSLContext | None = None,
        psk_context: WrapsSockets | None = None,
        server_hostname: str | None = None,
        unix_socket: FilePath | None = None,
        site: SecureSite | None = None,
        headers: Mapping[str, str] | None = None,
        connect_timeout: float = 3.0,
        read_timeout: float = 5.0,
        size: int | None = 256,
    ) -> None:
        """Check the arguments; the provider is not contacted yet."""
        key_password = hidden(key_password)
        self.name, self.sae_id = "", sae_id  # for the repr in reports of what fails below
        check_number_and_size(1, size)
        if not sae_id:
            raise ValueError("sae_id must not be empty: give the provider's localSystemID")
        self.quirks: set[str] = set()
        self._https = HTTPSClient(
            url,
            cert=cert,
            key=key,
            ca=ca,
            pkcs12=pkcs12,
            key_password=key_password,
            ssl_context=ssl_context,
            psk_context=psk_context,
            server_hostname=server_hostname,
            unix_socket=unix_socket,
            site=site,
            headers=headers,
            quirks=self.quirks,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )
        self.name = self._https.url
        self._size = size
        self._delivered = DeliveredKeys()
        self._known: SkipCapabilities | None = None

    def capabilities(self) -> SkipCapabilities:
        """Ask now for the provider's capabilities: its offer, and the systems it serves.

        Raises:
            KMSAuthenticationError: a certificate or the PSK was refused; or the provider calls this end by another ID.
            KMSUnavailable, KMSTimeout, KMSRequestError, KMSProtocolError.
        """
        return self._ask_capabilities(None)

    def status(self, peer_sae_id: str) -> KMSStatus:
        """Return the state of the keys shared with `peer_sae_id`, as far as SKIP tells; sizes in bits.

        SKIP tells neither numbers nor sizes. 65,536 stands for the keys that a provider has and can store, if
        it gives keys at all, and for the largest size. `status_extension` has the members that SKIP tells:
        `entropy`, `key`, `algorithm`.

        Raises:
            UnknownSAE: the provider shares no keys with that system.
            KMSAuthenticationError, KMSUnavailable, KMSTimeout, KMSRequestError, KMSProtocolError: as `capabilities`.
        """
        found = self._ask_capabilities(peer_sae_id)
        if not found.shares_keys_with(peer_sae_id):
            raise UnknownSAE(
                "the key provider names no such remote system", kms=self.name, peer=peer_sae_id, status=200
            )
        return KMSStatus(
            source_kme_id=found.local_system_id,
            target_kme_id=peer_sae_id,
            master_sae_id=self.sae_id,
            slave_sae_id=peer_sae_id,
            key_size=self._size or _DEFAULT_SIZE,
            stored_key_count=_UNTOLD if found.key else 0,
            max_key_count=_UNTOLD if found.key else 0,
            max_key_per_request=1,
            max_key_size=_UNTOLD,
            min_key_size=8,
            max_sae_id_count=0,
            status_extension={"entropy": found.entropy, "key": found.key, "algorithm": found.algorithm},
        )

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = None) -> list[QKDKey]:
        """Return `number` new keys shared with responder `peer_sae_id`, as initiator; one request for each.

        Args:
            peer_sae_id: the provider's `remoteSystemID` of the peer.
            number: how many, 1 or more.
            size: of each key in bits, a multiple of 8; None for this client's own size.

        Raises:
            NoKeysLeft: the provider has no key now (status 503).
            KMSProtocolError: an answer is malformed, or a key is of another size than asked for or came before.
            KMSUnavailable, KMSTimeout: a key that the provider took out of its store meanwhile is lost.
            KMSAuthenticationError, KMSRequestError, UnknownSAE: the provider refused.
            ValueError: `number` or `size` is impossible.

        If an error has `keys_may_be_lost`, keys that came before were wiped, or the provider may have taken
        one. Not idempotent: a repeated call gives other keys.
        """
        size = self._size if size is None else size
        check_number_and_size(number, size)
        query = {"remoteSystemID": peer_sae_id} | ({} if size is None else {"size": str(size)})
        path = f"/key?{urlencode(query, quote_via=quote, safe='')}"
        if self._known is None:
            self._ask_capabilities(peer_sae_id)
        return self._one_by_one(self._new_key(peer_sae_id, path, size) for _ in range(number))

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Return the keys whose IDs the initiator `peer_sae_id` told, as responder; one request per key.

        Args:
            peer_sae_id: the provider's `remoteSystemID` of the initiator.
            key_ids: one or more, all different, exactly as they were told.

        Returns:
            One key for each ID in the order asked. Their size is for the caller to check.

        Raises:
            UnknownKey: the provider does not have one of them (any more).
            KMSProtocolError: an answer is malformed, or has another key than was asked for.
            KMSUnavailable, KMSTimeout: a key that the provider delivered meanwhile is lost.
            KMSAuthenticationError, KMSRequestError, UnknownSAE: the provider refused.
            ValueError: no ID, an empty one, or the same one twice.

        If an error has `keys_may_be_lost`, keys that came before were wiped, or the provider may have
        delivered one. Not idempotent: a repeated call is refused, because a key is delivered once.
        """
        check_key_ids(key_ids)
        paths = [_key_path(key_id, peer_sae_id) for key_id in key_ids]
        if self._known is None:
            self._ask_capabilities(peer_sae_id, key_ids)
        return self._one_by_one(
            self._key_by_id(peer_sae_id, path, key_id) for path, key_id in zip(paths, key_ids, strict=True)
        )

    def entropy(self, bits: int = 256) -> bytearray:
        """Return random bytes of the provider with `bits` bits of entropy or more. Wipe them after use.

        Raises:
            KMSUnavailable: the provider has not enough (status 503), or cannot be reached.
            KMSProtocolError: the answer is malformed, or has less than was asked for.
            KMSAuthenticationError, KMSTimeout, KMSRequestError.
            ValueError: `bits` is below 1.
        """
        if bits < 1:
            raise ValueError(f"bits of entropy must be 1 or more, not {bits}")
        random, told = self._ask(
            _ENTROPY,
            f"/entropy?minentropy={bits}",
            lambda body: parse_entropy(body, quirks=self.quirks),
            max_size=_MAX_BODY + bits,
        )
        if min(told, 8 * len(random)) < bits:
            problem = f"{bits} bits of entropy were asked for, {min(told, 8 * len(random))} delivered"
            _zero(random)
            raise KMSProtocolError(problem, kms=self.name, status=200, keys_may_be_lost=False)
        return random

    def close(self) -> None:
        """Close the connections to the provider. Later calls raise `KMSUnavailable`."""
        self._https.close()

    def __repr__(self) -> str:
        """Show the provider and this system."""
        return f"<SkipClient {self.name} sae_id={self.sae_id}>"

    def _ask_capabilities(self, peer: str | None, key_ids: Sequence[str] = ()) -> SkipCapabilities:
        found = self._ask(
            _CAPABILITIES,
            "/capabilities",
            lambda body: parse_capabilities(body, quirks=self.quirks),
            peer=peer,
            key_ids=key_ids,
        )
        if found.local_system_id != self.sae_id:
            raise KMSAuthenticationError(
                f"the key provider's localSystemID is {shown(found.local_system_id)!r}, not {shown(self.sae_id)!r}",
                kms=self.name,
                peer=peer,
                key_ids=key_ids,
                hint="Give that one as sae_id, or check that URL and credentials are those of this system.",
            )
        self._known = found
        return found

    def _new_key(self, peer: str, path: str, size: int | None) -> QKDKey:
        key = self._ask_key(_NEW_KEY, path, peer, size=size)
        problem = hint = ""
        if size is not None and key.size != size:
            self.quirks.add("keys of another size than asked for")
            problem = f"a key of {size} bits was asked for, one of {key.size} bits was delivered"
            hint = "Ask for a size that the key provider has."
        elif self._delivered.again(_NEW_KEY, peer, [key]):
            self.quirks.add("delivered keys are delivered again")
            problem = "the key provider delivered a key a second time"
            hint = "Ask the provider's vendor: a key must leave its store when it is delivered."
        if problem:
            key.wipe()
            raise KMSProtocolError(
                problem, kms=self.name, peer=peer, key_ids=[key.key_id], status=200, hint=hint
            )
        return key

    def _key_by_id(self, peer: str, path: str, key_id: str) -> QKDKey:
        key = self._ask_key(_KEY_BY_ID, path, peer, key_id)
        if key.key_id != key_id:
            self.quirks.add("keys that were not asked for")
            key.wipe()
            raise KMSProtocolError(
                f"the key provider delivered key {shown(key.key_id)} instead",
                kms=self.name,
                peer=peer,
                key_ids=[key_id],
                status=200,
            )
        if self._delivered.again(_KEY_BY_ID, peer, [key]):
            # What a provider that keeps to the draft would have answered.
            self.quirks.add("delivered keys are delivered again")
            key.wipe()
            raise UnknownKey(
                "the key provider delivered a key a second time", kms=self.name, peer=peer, key_ids=[key_id]
            )
        return key

    def _one_by_one(self, requests: Iterator[QKDKey]) -> list[QKDKey]:
        """Return all keys, or none."""
        keys: list[QKDKey] = []
        try:
            # Not extend(): what came before an error would be gone.
            for key in requests:
                keys.append(key)
        except KMSError as error:
            wipe_keys(keys)
            if keys:
                error.message += f"; {len(keys)} delivered before {'is' if len(keys) == 1 else 'are'} lost"
                error.keys_may_be_lost = True
            raise
        return keys

    def _ask_key(
        self, call: str, path: str, peer: str, key_id: str | None = None, size: int | None = None
    ) -> QKDKey:
        return self._ask(
            call,
            path,
            lambda body: parse_key(body, kms=self.name, quirks=self.quirks),
            peer=peer,
            key_ids=() if key_id is None else (key_id,),
            max_size=_MAX_BODY + (size or 0),
        )

    def _ask(
        self,
        call: str,
        path: str,
        parse: Callable[[bytearray], _T],
        *,
        peer: str | None = None,
        key_ids: Sequence[str] = (),
        max_size: int = _MAX_BODY,
    ) -> _T:
        """Return the parsed answer with status 200; raise for any other."""
        takes_keys = call in (_NEW_KEY, _KEY_BY_ID)
        try:
            answer = self._https.request("GET", path, None, max_size)
        except KMSError as error:
            error.peer, error.key_ids = peer, tuple(key_ids)
            error.keys_may_be_lost = error.keys_may_be_lost and takes_keys
            raise
        if answer.status != 200:
            raise self._refusal(call, answer, peer, key_ids)
        try:
            return parse(answer.body)
        except Malformed as error:
            problem = str(error)
        finally:
            _zero(answer.body)
        # Outside the except block: the traceback of Malformed leads to frames that hold keys.
        raise KMSProtocolError(
            problem, kms=self.name, peer=peer, key_ids=key_ids, status=200, keys_may_be_lost=takes_keys
        )

    def _refusal(self, call: str, answer: Answer, peer: str | None, key_ids: Sequence[str]) -> KMSError:
        """Return the error for an HTTP status other than 200.

        The draft has 400, 404, 405, 500 and 503, and no body for them.
        """
        status = answer.status
        text = error_text(answer.body, quirks=set())
        _zero(answer.body)
        if status not in _STANDARD_STATUS or (status == 404 and call == _KEY_BY_ID):
            self.quirks.add(f"status {status} for {call}")
        says = f"the key provider refused: {text}" if text else "the key provider refused without saying why"
        kind: type[KMSError] = KMSRequestError
        hint = ""
        unknown_peer = peer is not None and self._known is not None and not self._known.shares_keys_with(peer)
        if status < 400 or status == 405:
            kind, says = KMSProtocolError, "the key provider does not answer as SKIP has it"
        elif status in (408, 504):
            kind, says = KMSTimeout, "the key provider timed out" + (f": {text}" if text else "")
        elif status == 429 or status >= 500:
            kind = NoKeysLeft if call == _NEW_KEY and status == 503 else KMSUnavailable
            says = "the key provider cannot serve" + (f": {text}" if text else "")
        elif status in (401, 403):
            kind = KMSAuthenticationError
        elif unknown_peer:
            kind = UnknownSAE
        elif call == _KEY_BY_ID and status in (400, 404, 410):
            kind = UnknownKey
        elif status == 404:
            hint = "Check the key provider's URL: SKIP has no path of its own before /capabilities and /key."
        return kind(
            says,
            kms=self.name,
            peer=peer,
            key_ids=key_ids,
            status=status,
            hint=hint,
            # These do not say how far the provider came; the other refusals come instead of keys.
            keys_may_be_lost=call in (_NEW_KEY, _KEY_BY_ID) and status in (408, 500, 502, 504),
        )


def _key_path(key_id: str, peer: str) -> str:
    # "." and ".." stay as they are in percent-encoding and would be taken for steps in the path.
    if key_id in (".", ".."):
        raise ValueError(f"{key_id!r} cannot be a key ID")
    return f"/key/{quote(key_id, safe='')}?{urlencode({'remoteSystemID': peer}, quote_via=quote, safe='')}"


def _zero(body: bytearray) -> None:
    body[:] = bytes(len(body))
