"""No key in anything that a process writes: a client in a process of its own, with all logging at DEBUG.

It fetches keys, and meets faults. What it wrote (standard output and error, log files, temporary files) is searched for
every key that was sent to it.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12

from kms_client.emulator import DemoPKI, write_demo_pki
from kms_client.emulator.kme import server_context
from tests.support.kme_server import Answer, ScriptedKME, container, http, spellings

# The process shows all that programs and error reporters show: logs, reprs, tracebacks with chained exceptions and with
# the variables of every frame of the client and of the libraries below it.
PROGRAM = textwrap.dedent(
    """
    import faulthandler, json, logging, sys, traceback
    from pathlib import Path

    faulthandler.enable()
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    file = logging.FileHandler("debug.log")
    logging.getLogger().addHandler(file)

    import kms_client
    from kms_client import KMSError

    settings = json.loads(sys.argv[1])
    calls = settings.pop("calls")
    password = Path(settings.pop("password"))
    held = []
    client = getattr(kms_client, settings.pop("client"))(**settings, key_password=password)
    print(client, vars(client), vars(client._https), client._https._link)
    for call, *arguments in calls:
        try:
            keys = getattr(client, call)(*arguments)
            print(keys, [repr(key) for key in keys], str(keys))
            logging.info("%s %r", keys, keys)
            held.append(keys)
        except KMSError as error:
            logging.exception("failed: %r", error)
            logging.debug("everything", exc_info=error, stack_info=True)
            for shown in (error, error.__context__, error.__cause__):
                if shown is not None:
                    report = traceback.TracebackException.from_exception(shown, capture_locals=True)
                    print("".join(report.format()), file=sys.stderr)
            print(vars(error), error.args)
        print(client.quirks)
    for keys in held:
        for key in keys:
            with key.use() as secret:
                assert any(secret)
            try:
                with key.use() as secret:
                    print(secret)
            except KMSError:
                traceback.print_exc()
            print(key, vars(type(key)))
    faulthandler.dump_traceback()
    client.close()
    print("the end")
    """
)
Exchange = tuple[Any, ...]
"""A call, and the answers to the requests it makes."""
IDS = ["550e8400-e29b-41d4-a716-446655440000", "650e8400-e29b-41d4-a716-446655440abc"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> DemoPKI:
    return write_demo_pki(tmp_path_factory.mktemp("pki"))


def leaks(written: bytes, secrets: list[bytes]) -> list[str]:
    """How secrets stand in there: raw, in hexadecimal, in base64, as Python writes bytes; also the half of one."""
    found = [f"raw {secret.hex()}" for secret in secrets if secret in written or secret[:16] in written]
    text = written.decode("utf-8", "replace")
    for secret in secrets:
        found += [spelling for spelling in spellings(secret) + spellings(secret[:15]) if spelling in text]
        found += [str(list(secret))] * (str(list(secret))[1:-1] in text)
    return found


def test_the_search_finds_what_it_looks_for() -> None:
    secret = os.urandom(32)
    forms = [secret, *(spelling.encode() for spelling in spellings(secret)), str(list(secret)).encode()]
    for form in forms:
        assert leaks(b"before " + form + b" behind", [os.urandom(32), secret])
    assert not leaks(b"nothing of this kind", [secret])


def reset(answer: bytes) -> Answer:
    def cut(sock: ssl.SSLSocket) -> None:
        sock.sendall(answer[:-9])
        sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))

    return cut


def slow(answer: bytes) -> Answer:
    def stall(sock: ssl.SSLSocket) -> None:
        sock.sendall(answer[:-9])
        sock.recv(1)

    return stall


def huge(entry: str) -> Answer:
    def flood(sock: ssl.SSLSocket) -> None:
        sock.sendall(b'HTTP/1.1 200 OK\r\n\r\n{"keys": [')
        while True:
            sock.sendall(f"{entry},".encode() * 500)

    return flood


def test_nothing_that_a_process_writes_has_a_key_in_it(pki: DemoPKI, tmp_path: Path) -> None:
    secrets: list[bytes] = []

    def fresh(size: int = 32) -> bytes:
        secrets.append(os.urandom(size))
        return secrets[-1]

    def keys(*ids: str, size: int = 32) -> bytes:
        return http(200, container(*((key_id, fresh(size)) for key_id in ids)))

    def text() -> str:
        return base64.b64encode(fresh()).decode()

    get, by_id, status = ["get_keys", "SAE-B", 2], ["get_keys_by_id", "SAE-B", IDS], ["status", "SAE-B"]
    exchanges: list[Exchange] = [
        (get, keys(*IDS)),
        (by_id, keys(*IDS)),
        (by_id, keys(*IDS)),  # a second time
        (["get_keys", "SAE-C"], http(200, {"Keys": [{"key_id": "one", "key": fresh().hex(), "x": text()}]})),
        (["get_keys", "SAE-B"], http(200, {"keys": [{"key_ID": "two", "key": text().replace("+", "-")}]})),
        (get, keys(IDS[0])),
        (get, keys(*IDS, "third")),
        (get, keys("a", "b", size=16)),
        (get, keys("a", "a")),
        (by_id, keys(IDS[0], "b")),
        (by_id, keys(IDS[0])),
        (
            get,
            http(200, {"keys": [{"key_ID": "a", "key": text()}, {"key_ID": "b", "key": text()[:-3] + "!!"}]}),
        ),
        (get, http(200, {"keys": [{"key_ID": "a", "key": text()}, {"key_ID": "b"}]})),
        (get, http(200, '{"keys": [{"key": "' + text())),
        (get, http(200, json.dumps({"keys": [{"key_ID": text(), "key": text()}] * 2})[:-2] + "x")),
        (get, http(200, "<html>" + text())),
        (get, http(200, keys(*IDS), "Content-Encoding: gzip")),
        (get, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + text().encode()),
        (get, b"SSH-2.0-" + text().encode() + b"\r\n"),
        (get, http(500, {"message": f"crash: {text()}"})),
        (get, http(500, {"message": f"crash: {fresh().hex()}"})),
        (get, http(400, {"detail": "odd", **container(("a", fresh()))})),
        (by_id, http(404, {"message": "no such key", "keys": text()})),
        (status, keys(*IDS)),
        (status, http(503, text())),
        (get, reset(keys(*IDS))),
        (by_id, slow(keys(*IDS))),
        (get, huge(f'{{"key_ID": "x", "key": "{text()}"}}')),
    ]
    written = everything_written(pki, tmp_path, "Etsi014Client", exchanges, secrets)
    # It did show what it should.
    for shown in (b"kms_client.https", b"dec_keys", IDS[0].encode(), b"<QKDKey id="):
        assert shown in written
    assert written.count(b"KMSProtocolError") > 20


def test_nor_with_skip(pki: DemoPKI, tmp_path: Path) -> None:
    secrets: list[bytes] = []

    def fresh(size: int = 32) -> str:
        secrets.append(os.urandom(size))
        return secrets[-1].hex()

    def key(key_id: str, size: int = 32, **more: str) -> bytes:
        return http(200, {"keyId": key_id, "key": fresh(size), **more})

    get, by_id, status = ["get_keys", "SAE-B", 2], ["get_keys_by_id", "SAE-B", IDS], ["status", "SAE-B"]
    entropy, one, two = ["entropy"], *IDS
    capabilities = {"entropy": True, "key": True, "localSystemID": "SAE-A", "remoteSystemID": "SAE-B"}
    exchanges: list[Exchange] = [
        (get, http(200, capabilities), key(one), key(two)),
        (by_id, key(one), key(two)),
        (by_id, key(one)),  # a second time
        (get, key("a"), key("b", x=fresh())),
        (get, key("c"), key("d", size=16)),
        (get, key("e"), key("e")),
        (by_id, key("f")),
        (get, http(200, {"keyId": "g", "key": fresh()[:-1]})),
        (get, http(200, {"keyId": "h", "key": fresh() + "x"})),
        (get, http(200, {"keyId": fresh() * 4, "key": fresh()})),
        (get, http(200, {"keyId": "i", "key": [fresh()]})),
        (get, http(200, '{"keyId": "j", "key": "' + fresh())),
        (get, http(200, "<html>" + fresh())),
        (get, key("k"), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + fresh().encode()),
        (get, http(500, {"message": f"crash: {fresh()}"})),
        (by_id, http(400, {"detail": "odd", "key": fresh()})),
        (status, key("l")),
        (status, http(503, fresh())),
        (entropy, http(200, {"randomStr": fresh(16), "minentropy": 256})),
        (entropy, http(200, {"randomStr": fresh(), "minentropy": "all"})),
        (get, key("m"), reset(key("n"))),
        (by_id, slow(key(one))),
        (get, huge(fresh())),
    ]
    written = everything_written(pki, tmp_path, "SkipClient", exchanges, secrets)
    for shown in (b"kms_client.https", b"/key/", one.encode(), b"<QKDKey id=", b"delivered before is lost"):
        assert shown in written
    assert written.count(b"KMSProtocolError") > 20


def everything_written(
    pki: DemoPKI, tmp_path: Path, client: str, exchanges: list[Exchange], secrets: list[bytes]
) -> bytes:
    """Run a process that makes these calls and gets these answers; none of the secrets is in what it wrote."""
    key = serialization.load_pem_private_key(pki.sae_a_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    password = b"the password of the file"
    number = key.private_numbers().private_value.to_bytes(32, "big")
    p12, password_file = tmp_path / "sae.p12", tmp_path / "password"
    p12.write_bytes(
        pkcs12.serialize_key_and_certificates(
            None, key, x509.load_pem_x509_certificate(pki.sae_a_cert.read_bytes()), None,
            serialization.BestAvailableEncryption(password),
        )
    )  # fmt: skip
    password_file.write_bytes(password)
    password_file.chmod(0o600)
    folder = tmp_path / "cwd"
    folder.mkdir()

    server = ScriptedKME(
        server_context(pki.kme_a_cert, pki.kme_a_key, pki.kms_ca),
        [answer for _, *answers in exchanges for answer in answers],
    )
    settings = {
        "url": f"https://127.0.0.1:{server.port}",
        "sae_id": "SAE-A",
        "pkcs12": str(p12),
        "ca": str(pki.kms_ca),
        "password": str(password_file),
        "headers": {"X-Token": "the token of the gateway"},
        "read_timeout": 1.0,
        "client": client,
        "calls": [call for call, *_ in exchanges],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", PROGRAM, json.dumps({**settings})],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder), "SSLKEYLOGFILE": str(folder / "tls-keys")},
            capture_output=True,
            timeout=60,
            check=False,
        )
    finally:
        server.close()
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert done.stdout.endswith(b"the end\n"), done.stderr.decode()[-2000:]
    assert len(server.requests) >= sum(len(answers) for _, *answers in exchanges)
    assert set(files) == {"debug.log"}
    written = b"\0".join([done.stdout, done.stderr, *files.values()])
    assert b"Traceback" in written
    assert b"answer = Answer(" in written
    assert leaks(written, [*secrets, number]) == []
    assert password not in written
    return written
