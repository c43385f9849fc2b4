"""`qkd-tls explain`, and the pictures that it draws."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from qkd_tls.cli.failure import CommandError
from qkd_tls.cli.picture import attacker_needs, draw, draw_svg
from qkd_tls.cli.report import Certificate, ConnectionReport, secrets_of
from tests.support.commands import Site, record, running_server, text

HYBRID: dict[str, Any] = {
    "protection": "hybrid",
    "group": "X25519MLKEM768",
    "cipher": "TLS_AES_256_GCM_SHA384",
    "path": "bootstrap",
    "key_id": "e603f726-1b5c-4f8e-8a57-3c2d6c1b9a10",
    "kms": "https://kme-a.example",
    "kms_protocol": "etsi-014",
    "client_sae_id": "SAE-A",
    "server_sae_id": "SAE-B",
    "association": "923df76dc35ad224c86993f57233229f",
    "announced": False,
    "kms_round_trips": 1,
}
WITHOUT_QKD: dict[str, Any] = {
    "protection": "pq-only",
    "group": "X25519MLKEM768",
    "cipher": "TLS_AES_256_GCM_SHA384",
    "fallback": "no QKD key: cannot connect: Connection refused (KMS https://kme-a.example; peer SAE SAE-B)",
}


def report(base: dict[str, Any] = HYBRID, *, role: str = "client", **changes: Any) -> ConnectionReport:
    return ConnectionReport.from_dict({"role": role, "peer": "server.example:8443", "qkd": base | changes})


def test_a_connection_that_it_makes(client_site: Site, echo: str) -> None:
    result = client_site.run("explain", echo, "-q")
    assert (result.returncode, result.stderr) == (0, b"")
    drawn = result.stdout.decode()
    [key_id] = set(re.findall(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b", drawn))
    assert f"Key ID {key_id}; this side got it from {client_site.environment['QKD_TLS_KME']}" in drawn
    assert (
        "This client checked the server's certificate: CN=Demo server; issued by CN=Demo application CA"
        in drawn
    )
    assert re.search(r"│ +KME of the client +│.*│ +KME of the server +│", drawn)
    assert max(map(len, drawn.splitlines())) <= 100


def test_the_json_of_connect(client_site: Site, echo: str, tmp_path: Path) -> None:
    """The last of its connections."""
    file, picture = tmp_path / "connect.json", tmp_path / "picture.svg"
    file.write_bytes(client_site.run("connect", echo, "--twice", "--json").stderr)
    key_ids = [one["qkd"]["key_id"] for one in json.loads(file.read_text())["connections"]]
    result = client_site.run("explain", "--from-json", str(file), "--svg", str(picture), KME=None)
    assert result.returncode == 0
    assert text(result) == f"{picture}: written\n"
    drawn = result.stdout.decode()
    assert key_ids[1] in drawn
    assert key_ids[0] not in drawn
    assert "when the association was made: CN=Demo server" in drawn
    root = xml.etree.ElementTree.parse(picture).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "\n".join(root.itertext()).count(key_ids[1]) == drawn.count(key_ids[1])


def test_standard_input_and_json(client_site: Site) -> None:
    result = client_site.run(
        "explain", "--from-json", "-", "--json", input=json.dumps({"qkd": HYBRID}).encode()
    )
    assert result.returncode == 0
    said = record(result.stdout)
    assert said["command"] == "explain"
    assert said["qkd"]["key_id"] == HYBRID["key_id"]
    assert len(said["attacker_needs"]) == 4


def test_a_line_of_the_servers_json_and_of_a_tunnels_audit_log(client_site: Site, server_site: Site) -> None:
    with running_server(server_site) as running:
        assert client_site.run("connect", running.address, "-q").returncode == 0
        seen = running.record()
    drawn = "\n".join(draw(ConnectionReport.from_dict(seen)))
    assert "The server asked the client for no certificate." in drawn
    assert seen["qkd"]["key_id"] in drawn
    line = {
        "mode": "server",
        "from": "192.0.2.1:1234",
        "to": "127.0.0.1:80",
        "peer_subject": "CN=client",
        **HYBRID,
    }
    audited = ConnectionReport.from_dict(line)
    assert (audited.role, audited.peer) == ("server", "192.0.2.1:1234")
    assert "This server checked the client's certificate: CN=client." in "\n".join(draw(audited))
    assert ConnectionReport.from_dict(line | {"mode": "client"}).peer == "127.0.0.1:80"


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "- is not one JSON object"),
        (b'{"a": 1}\n{"a": 2}\n', "- is not one JSON object: Extra data"),
        (b"[]", "it is not a JSON object"),
        (b'{"connections": []}', "it is not a JSON object"),
        (b'{"qkd": null}', "no member 'protection'"),
        (b'{"protection": "strong"}', "'strong' is not a valid Protection"),
        (b'{"protection": "hybrid"}', "a hybrid connection without a key_id"),
        (b'{"protection": "pq-only", "group": 7}', "member 'group' is not text"),
        (b'{"protection": "pq-only", "certificate": "none"}', "TypeError"),
        (b"\xff", "- is not text in UTF-8"),
    ],
)
def test_what_tells_of_no_connection(client_site: Site, data: bytes, error: str) -> None:
    result = client_site.run("explain", "--from-json", "-", input=data)
    assert result.returncode == 2
    assert error in text(result)
    assert "\nhint: " in text(result)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "one of the arguments HOST:PORT --from-json is required"),
        (["localhost:1", "--from-json", "-"], "not allowed with argument"),
        (["--from-json", "/no/such.json"], "/no/such.json: No such file or directory"),
    ],
)
def test_usage(client_site: Site, arguments: list[str], error: str) -> None:
    result = client_site.run("explain", *arguments)
    assert result.returncode == 2
    assert error in text(result)


# --- what is drawn


@pytest.mark.parametrize(
    ("base", "changes", "secrets"),
    [
        (HYBRID, {}, ["X25519", "ML-KEM-768", "QKD key"]),
        (HYBRID, {"kem": "ML-KEM-1024"}, ["X25519", "ML-KEM-768", "ML-KEM-1024 (explicit)", "QKD key"]),
        (HYBRID, {"group": "X25519", "kem": "ML-KEM-768"}, ["X25519", "ML-KEM-768", "QKD key"]),
        (HYBRID, {"group": "X25519"}, ["X25519", "ML-KEM (association)", "QKD key"]),
        (HYBRID, {"group": "SecP256r1MLKEM768"}, ["SecP256r1MLKEM768", "QKD key"]),
        (WITHOUT_QKD, {}, ["X25519", "ML-KEM-768"]),
        (WITHOUT_QKD, {"protection": "classical", "group": "X25519"}, ["X25519"]),
    ],
)
def test_secrets(base: dict[str, Any], changes: dict[str, Any], secrets: list[str]) -> None:
    one = report(base, **changes)
    assert secrets_of(one.qkd) == secrets
    drawn = draw(one)
    begin = drawn.index("") + 1
    rows = drawn[begin : drawn.index("", begin)]
    if one.qkd.key_id is None:
        assert rows.pop() == "no QKD key"
    assert [row.startswith(f"{secret}  ") for secret, row in zip(secrets, rows, strict=True)] == [True] * len(
        rows
    )
    corners = "".join(re.findall("[─┐┤┘┼┴](?=$|─▶ TLS_AES_256_GCM_SHA384$)", "\n".join(rows), re.MULTILINE))
    assert corners == {1: "─", 2: "┐┴", 3: "┐┼┘", 4: "┐┤┼┘"}[len(rows)]
    assert len({re.search(" ─[─┐┤┘┼┴]", row).start() for row in rows}) == 1  # type: ignore[union-attr]
    assert max(map(len, drawn)) <= 100


def test_attacker() -> None:
    recording, live, kme, _ = attacker_needs(report())
    assert recording.startswith(
        "To read a recording: break X25519 and ML-KEM-768, and obtain QKD key e603f726"
    )
    assert "and the QKD key before the connection is made" in live
    assert "which alone opens nothing" in kme
    assert "when the association was made" in attacker_needs(report(path="associated"))[1]
    recording, live, _ = attacker_needs(report(WITHOUT_QKD))
    assert recording == (
        "To read a recording: break X25519 and ML-KEM-768. That is enough; no QKD key is in the way."
    )
    assert "QKD" not in live
    [recording, *_] = attacker_needs(report(WITHOUT_QKD, protection="classical", group="X25519"))
    assert "a large quantum computer would do" in recording


def test_the_key() -> None:
    assert "announced: both sides fetched it with an earlier connection" in "\n".join(
        draw(report(announced=True))
    )
    assert "There is none: no QKD key: cannot connect" in "\n".join(draw(report(WITHOUT_QKD)))
    assert "There is none: the policy is 'off'" in "\n".join(draw(report(WITHOUT_QKD, fallback=None)))
    assert "association" not in "\n".join(draw(report(association=None)))


def test_the_server_and_the_client_with_a_certificate() -> None:
    drawn = "\n".join(draw(report(role="server")))
    assert re.search(r"│ +client +│ .* │ +server +│\n│ +server.example:8443 +│.*│ +this program +│", drawn)
    mine = ConnectionReport.from_dict(
        {"qkd": HYBRID, "own_certificate": True, "certificate": {"subject": "CN=s"}}
    )
    assert "The client has a certificate to show" in "\n".join(draw(mine))


def test_nothing_commands_the_terminal_or_leaves_its_element() -> None:
    nasty = report(fallback="\x1b[2J\n</text><script>", base=WITHOUT_QKD)
    assert not any("\x1b" in line or "\n" in line for line in draw(nasty))
    xml.etree.ElementTree.fromstring(draw_svg(nasty))
    assert "<script>" not in draw_svg(nasty)
    long = report(kms="https://" + 50 * "x", key_id=200 * "k")
    assert max(len(line) for line in draw(long) if "Key ID" not in line) <= 100


def test_a_certificate_that_cannot_be_read() -> None:
    certificate = Certificate.from_der(b"junk")
    assert str(certificate).startswith("(cannot be read: ")
    assert certificate.issuer is None


def test_no_record_is_a_usage_error() -> None:
    with pytest.raises(CommandError, match="it is not a JSON object"):
        ConnectionReport.from_dict("hello")
