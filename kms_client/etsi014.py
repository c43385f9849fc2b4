"""A KMS that speaks ETSI GS QKD 014 V1.1.1: REST over HTTPS with mutual TLS."""

from __future__ import annotations

import re
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import quote

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
)
from kms_client.etsi014_messages import (
    Malformed,
    build_key_ids_request,
    build_key_request,
    error_text,
    parse_key_container,
    parse_status,
)
from kms_client.https import Answer, HTTPSClient
from kms_client.keys import QKDKey, wipe_keys
from kms_client.manager import KMSStatus, check_key_ids, check_number_and_size
from kms_client.secure_site import SecureSite

__all__ = ["DeliveredKeys", "Etsi014Client"]

_MAX_BODY = 1 << 20  # bytes, whatever was asked for
_BYTES_PER_ENTRY = 4096  # an ID and extensions
_UNASKED_KEY_BYTES = 1 << 16  # for the key itself where its size is not known beforehand
_MAX_REMEMBERED = 10_000  # keys delivered, to notice one that is delivered again
_STANDARD_STATUS = (200, 400, 401, 503)

_T = TypeVar("_T")

# Error texts decide only between kinds of refusal, never between an error and success.
_SAYS_UNKNOWN_KEY = re.compile(
    r"\bkeys?\b.*\b(not found|unknown|not exist|expired)|\b(unknown|no such) keys?\b(?! size)", re.I
)
_SAYS_UNKNOWN_SAE = re.compile(r"\bsae\b.*\b(not found|unknown|not exist|not registered)|\bunknown sae", re.I)
_SAYS_NO_KEYS = re.compile(
    r"\b(not enough|insufficient|too few|out of|no( more| further)?) (stored |available )?keys?\b(?! (size|id))"
    r"|\bkeys? (pool |store )?(is |are )?(exhausted|depleted)",
    re.I,
)


class Etsi014Client:
    """A `KeyManager` on a KME that speaks ETSI GS QKD 014 V1.1.1.

    The interface is meant for use inside one secure site: keys cross it under ordinary TLS. So the client connects to
    addresses of this host only, unless `site` names others.

    Args:
        url: the KME's URL, with a path prefix if it has one before `/api/v1`.
        sae_id: this program's SAE ID; the KME takes it from the certificate.
        cert: path of this SAE's certificate chain, PEM.
        key: path of its private key, PEM; may be left out if it is in the same file.
        ca: path of the CA certificates for the KME's certificate, PEM. The host name is checked.
        pkcs12: path of a PKCS#12 file with certificate chain and private key, instead of `cert` and `key`.
        key_password: of the private key or of the PKCS#12 file: the password as `str` or `bytes`, a
            `pathlib.Path` of a file that holds it and is not world-readable, or a function that returns it.
            It is read once, here.
        ssl_context: a context instead of `cert`, `key`, `ca`, `pkcs12` and `key_password`, which has all of that
            loaded, and must check certificate and host name: such as a `qkd_tls.QKDContext` with policy "off", which
            protects the link with ML-KEM if the KME supports it.
        server_hostname: the name that the KME's certificate must have, if it is not the URL's host: for a KME that
            is reached by its address, or whose certificate has no subject alternative name but one in its subject.
        unix_socket: path of a Unix socket that the KME listens at, with TLS as ever, instead of the URL's host and
            port.
        site: the addresses that a KME may have; by default those of this host.
        headers: further header fields of each request, for a gateway in front of the KME.
        connect_timeout: seconds to connect, for each address of the host; once more for the TLS handshake.
            Looking up the host name takes as long as the system's resolver takes.
        read_timeout: seconds for the whole answer, however it trickles in.
        size: of a key in bits if `get_keys` is not told; None for the KME's own.
        master_in_key_ids: put the master's SAE ID into each entry of `key_IDs`, as one vendor requires.

    Attributes:
        quirks: names of the deviations from the standard met so far.

    Raises:
        ValueError: the URL, an SAE ID, the size or a header field is impossible; certificates are missing or given
            twice.
        KMSAuthenticationError: the certificates cannot be loaded.

    Certificates are loaded once: after they were renewed, make a new client.

    Requests are sent by POST with a JSON body. GET is defined for the simple cases too, but KMEs were seen
    to ignore `number` and `size` in a query, and key IDs in URLs end up in access logs.

    No key request is ever sent twice. Repeating one costs keys: a KME that carried it out has taken the keys
    from its store, whether or not the answer arrived. A kept-alive connection that the KME has closed is
    replaced before anything is sent. `status` takes no keys and is tried a second time if the connection was
    refused or lost before an answer.

    A delivered key passes through Python strings (its JSON and base64 text) which cannot be wiped; they are
    let go at once. The received body, the decoded copies and the `QKDKey` are wiped.

    The last 10,000 keys that were returned are remembered by their IDs: if a KME delivers one again, it is
    wiped and the call raises.

    Every method may be called from any thread.
    """

    protocol = "etsi-014"

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
        server_hostname: str | None = None,
        unix_socket: FilePath | None = None,
        site: SecureSite | None = None,
        headers: Mapping[str, str] | None = None,
        connect_timeout: float = 3.0,
        read_timeout: float = 5.0,
        size: int | None = 256,
        master_in_key_ids: bool = False,
    ) -> None:
        """Check the arguments; the KME is not contacted yet."""
        key_password = hidden(key_password)
        self.name, self.sae_id = "", sae_id  # for the repr in reports of what fails below
        check_number_and_size(1, size)
        _path(sae_id, "status")
        self.quirks: set[str] = set()
        self._https = HTTPSClient(
            url,
            cert=cert,
            key=key,
            ca=ca,
            pkcs12=pkcs12,
            key_password=key_password,
            ssl_context=ssl_context,
            server_hostname=server_hostname,
            unix_socket=unix_socket,
            site=site,
            headers=headers,
            quirks=self.quirks,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )
        self.name = self._https.url
        self._delivered = DeliveredKeys()
        self._size = size
        self._master_in_key_ids = master_in_key_ids

    def status(self, peer_sae_id: str) -> KMSStatus:
        """Get status (clause 6.1) of the keys shared with `peer_sae_id`; sizes in bits.

        Raises:
            KMSUnavailable, KMSTimeout, KMSAuthenticationError, KMSRequestError, UnknownSAE, KMSProtocolError.
        """
        try:
            return self._ask_status(peer_sae_id)
        except KMSError as error:
            error.keys_may_be_lost = False  # none were asked for
            raise

    def get_keys(self, peer_sae_id: str, number: int = 1, size: int | None = None) -> list[QKDKey]:
        """Get key (clause 6.2), as master: exactly `number` new keys shared with the slave `peer_sae_id`.

        Args:
            peer_sae_id: SAE ID of the slave.
            number: how many, 1 or more; the KME refuses more than its `max_key_per_request`.
            size: of each key in bits, a multiple of 8; None for this client's own size.

        Raises:
            NoKeysLeft: the KME has fewer keys, or delivered fewer; those are wiped and lost.
            KMSProtocolError: the answer is malformed, or the keys are more or of another size than asked for;
                they are wiped and lost.
            KMSUnavailable, KMSTimeout: keys the KME took out of its store meanwhile are lost.
            KMSAuthenticationError, KMSRequestError, UnknownSAE: no key was delivered.
            ValueError: `number` or `size` is impossible.

        Not idempotent: a repeated call gives other keys.
        """
        size = self._size if size is None else size
        check_number_and_size(number, size)
        request = build_key_request(number, size)
        per_key = _BYTES_PER_ENTRY + (size // 4 if size else _UNASKED_KEY_BYTES)
        answer = self._call("POST", peer_sae_id, "enc_keys", request, _MAX_BODY + number * per_key)
        keys = self._parse_keys(answer, peer_sae_id)
        problem: KMSError | None = None
        if len(keys) < number:
            self.quirks.add("fewer keys than asked for")
            problem = NoKeysLeft(
                f"{number} keys were asked for, {len(keys)} delivered",
                kms=self.name,
                peer=peer_sae_id,
                keys_may_be_lost=bool(keys),
            )
        elif len(keys) > number:
            self.quirks.add("more keys than asked for")
            problem = KMSProtocolError(
                f"{number} keys were asked for, {len(keys)} delivered", kms=self.name, peer=peer_sae_id
            )
        elif wrong := [key for key in keys if size is not None and key.size != size]:
            self.quirks.add("keys of another size than asked for")
            problem = KMSProtocolError(
                f"keys of {size} bits were asked for, one of {wrong[0].size} bits was delivered",
                kms=self.name,
                peer=peer_sae_id,
                key_ids=[key.key_id for key in wrong],
                hint="Ask for the key_size of the KME's status.",
            )
        elif again := self._delivered.again("enc_keys", peer_sae_id, keys):
            self.quirks.add("delivered keys are delivered again")
            problem = KMSProtocolError(
                "the KME delivered keys a second time",
                kms=self.name,
                peer=peer_sae_id,
                key_ids=again,
                hint="Ask the KME's vendor: a key must leave its store when it is delivered.",
            )
        if problem is not None:
            wipe_keys(keys)
            raise problem
        return keys

    def get_keys_by_id(self, peer_sae_id: str, key_ids: Sequence[str]) -> list[QKDKey]:
        """Get key with key IDs (clause 6.3), as slave: the keys the master `peer_sae_id` has told the IDs of.

        Args:
            peer_sae_id: SAE ID of the master.
            key_ids: one or more, all different. Compared exactly, or without letter case if a KME changes it.

        Returns:
            One key for each ID in the order asked, under the ID asked. Their size is for the caller to check.

        Raises:
            UnknownKey: the KME does not have one of them (any more), or delivered only some; those are wiped
                and lost.
            KMSProtocolError: the answer is malformed, or has keys not asked for; they are wiped and lost.
            KMSUnavailable, KMSTimeout: keys the KME delivered meanwhile are lost.
            KMSAuthenticationError: a certificate was refused, or this SAE is not a slave of these keys.
            KMSRequestError, UnknownSAE: no key was delivered.
            ValueError: no ID, an empty one, or the same one twice.

        Not idempotent: a repeated call is refused, because a key is delivered once.
        """
        check_key_ids(key_ids)
        request = build_key_ids_request(key_ids, peer_sae_id if self._master_in_key_ids else None)
        max_size = _MAX_BODY + len(key_ids) * (_BYTES_PER_ENTRY + _UNASKED_KEY_BYTES)
        answer = self._call("POST", peer_sae_id, "dec_keys", request, max_size, key_ids)
        keys = self._parse_keys(answer, peer_sae_id, key_ids)
        found = {key.key_id: key for key in keys}
        ordered = []
        for key_id in key_ids:
            key = found.pop(key_id, None) or self._other_case(found, key_id)
            if key is not None:
                ordered.append(key)
        if found:
            self.quirks.add("keys that were not asked for")
            wipe_keys(keys)
            raise KMSProtocolError(
                "the KME delivered keys that were not asked for",
                kms=self.name,
                peer=peer_sae_id,
                key_ids=list(found),
            )
        if len(ordered) < len(key_ids):
            self.quirks.add("fewer keys than asked for")
            wipe_keys(ordered)
            delivered = {key.key_id for key in ordered}
            raise UnknownKey(
                f"{len(key_ids)} keys were asked for, {len(keys)} delivered",
                kms=self.name,
                peer=peer_sae_id,
                key_ids=[key_id for key_id in key_ids if key_id not in delivered],
                keys_may_be_lost=bool(keys),
            )
        if again := self._delivered.again("dec_keys", peer_sae_id, ordered):
            # What a KME that keeps to the standard would have answered.
            self.quirks.add("delivered keys are delivered again")
            wipe_keys(ordered)
            raise UnknownKey(
                "the KME delivered keys a second time", kms=self.name, peer=peer_sae_id, key_ids=again
            )
        return ordered

    def close(self) -> None:
        """Close the connections to the KME. Later calls raise `KMSUnavailable`."""
        self._https.close()

    def __repr__(self) -> str:
        """Show the KME and this SAE."""
        return f"<Etsi014Client {self.name} sae_id={self.sae_id}>"

    def _ask_status(self, peer: str) -> KMSStatus:
        try:
            answer = self._call("GET", peer, "status", None, _MAX_BODY)
        except KMSUnavailable as error:
            if error.status is not None or isinstance(error, KMSTimeout):
                raise
            answer = self._call("GET", peer, "status", None, _MAX_BODY)
        return self._parsed(lambda body: parse_status(body, quirks=self.quirks), answer, peer)

    def _other_case(self, found: dict[str, QKDKey], key_id: str) -> QKDKey | None:
        """Return the one key in `found` whose ID is `key_id` in other letter case, under the ID asked."""
        same = [other for other in found if other.lower() == key_id.lower()]
        if len(same) != 1:
            return None
        self.quirks.add("letter case of key ID changed")
        with found.pop(same[0]).use() as secret:
            return QKDKey(key_id, secret, kms=self.name)

    def _call(
        self,
        method: str,
        peer_sae_id: str,
        call: str,
        body: bytes | None,
        max_size: int,
        key_ids: Sequence[str] = (),
    ) -> Answer:
        """Return the answer with status 200; raise for any other."""
        path = _path(peer_sae_id, call)
        try:
            answer = self._https.request(method, path, body, max_size)
        except KMSError as error:
            error.peer = peer_sae_id
            error.key_ids = tuple(key_ids)
            raise
        if answer.status == 200:
            return answer
        if answer.status not in _STANDARD_STATUS:
            self.quirks.add(f"status {answer.status} for {call}")
        # The standard says nothing about the body of a 401.
        text = error_text(answer.body, quirks=self.quirks if answer.status != 401 else set())
        _zero(answer.body)
        raise _refusal(call, answer.status, text, kms=self.name, peer=peer_sae_id, key_ids=key_ids)

    def _parse_keys(self, answer: Answer, peer: str, key_ids: Sequence[str] = ()) -> list[QKDKey]:
        return self._parsed(
            lambda body: parse_key_container(body, kms=self.name, quirks=self.quirks), answer, peer, key_ids
        )

    def _parsed(
        self, parse: Callable[[bytearray], _T], answer: Answer, peer: str, key_ids: Sequence[str] = ()
    ) -> _T:
        try:
            return parse(answer.body)
        except Malformed as error:
            problem = str(error)
        finally:
            _zero(answer.body)
        # Outside the except block: the traceback of Malformed leads to frames that hold keys.
        raise KMSProtocolError(problem, kms=self.name, peer=peer, key_ids=key_ids, status=answer.status)


class DeliveredKeys:
    """The keys delivered last, by call, peer and ID."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._known: set[tuple[str, str, str]] = set()
        self._order: deque[tuple[str, str, str]] = deque()

    def again(self, call: str, peer: str, keys: Iterable[QKDKey]) -> list[str]:
        """Return the IDs of keys that were delivered before; from now on all of `keys` count as delivered."""
        again = []
        with self._lock:
            for key in keys:
                entry = (call, peer, key.key_id)
                if entry in self._known:
                    again.append(key.key_id)
                    continue
                self._known.add(entry)
                self._order.append(entry)
                if len(self._order) > _MAX_REMEMBERED:
                    self._known.remove(self._order.popleft())
        return again


def _path(sae_id: str, call: str) -> str:
    # "." and ".." stay as they are in percent-encoding and would be taken for steps in the path.
    if sae_id in ("", ".", ".."):
        raise ValueError(f"{sae_id!r} cannot be an SAE ID")
    return f"/api/v1/keys/{quote(sae_id, safe='')}/{call}"


def _refusal(call: str, status: int, text: str, *, kms: str, peer: str, key_ids: Sequence[str]) -> KMSError:
    """Return the error for an HTTP status other than 200.

    The standard has 400, 401 and 503 (clause 6); the others were seen from running KMEs.
    """
    says = f"the KME refused: {text}" if text else "the KME refused without saying why"
    kind: type[KMSError] = KMSRequestError
    hint = ""
    if status < 400:
        kind, says = KMSProtocolError, "the KME answered neither keys nor an error"
    elif status in (408, 504):
        kind, says = KMSTimeout, f"the KME timed out: {text}" if text else "the KME timed out"
    elif call == "enc_keys" and _SAYS_NO_KEYS.search(text):
        kind = NoKeysLeft
    elif call == "dec_keys" and status < 500 and (status in (404, 410) or _SAYS_UNKNOWN_KEY.search(text)):
        kind = UnknownKey
    elif status in (401, 403):
        kind = KMSAuthenticationError
        if call == "dec_keys":
            hint = "Check that this SAE is a slave of these keys, and its certificate and SAE ID."
    elif status < 500 and (status == 404 or _SAYS_UNKNOWN_SAE.search(text)):
        kind = UnknownSAE
        if not text:
            hint = "Check the peer's SAE ID, and the path in the KME's URL."
    elif status == 429 or status >= 500:
        kind, says = KMSUnavailable, f"the KME cannot serve: {text}" if text else "the KME cannot serve"
    # 500 and 502 do not say how far the KME came; the other refusals come instead of keys.
    lost = True if status in (500, 502) else None
    return kind(says, kms=kms, peer=peer, key_ids=key_ids, status=status, hint=hint, keys_may_be_lost=lost)


def _zero(body: bytearray) -> None:
    body[:] = bytes(len(body))
