"""Configuration files: every mistake is found, and said with file, table and key. And the PROXY protocol by bytes."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kms_client import KeyPool, KMSUnavailable
from qkd_tls.configuration import ConfigError, read_file
from qkd_tls.policy import Policy
from qkd_tls.tunnel import check, run
from qkd_tls.tunnel.address import TCP, Activated, Unix, parse
from qkd_tls.tunnel.contexts import Contexts
from qkd_tls.tunnel.dial import connect, listen
from qkd_tls.tunnel.metrics import Metrics
from qkd_tls.tunnel.proxy_protocol import encode_header, encode_tlv
from qkd_tls.tunnel.settings import load
from tests.support.paths import EXAMPLES
from tests.support.tunnels import Sites, tunnel


@pytest.fixture
def good(sites: Sites, tmp_path: Path) -> Callable[[str], Path]:
    def write(side: str = "client") -> Path:
        file = tmp_path / "tunnel.toml"
        file.write_text(sites.config(side, tunnel(side, ("server.example", 5432))))
        return file

    return write


def test_a_good_file(good: Any) -> None:
    for side in ("client", "server"):
        check(good(side))
    settings = load(good("client"))
    [entry] = settings.tunnels
    assert (entry.name, entry.mode, entry.listen) == ("t", "client", TCP("127.0.0.1", 0))
    assert (entry.connect, entry.server_name) == (TCP("server.example", 5432), "localhost")
    assert (entry.limits.max_connections, entry.limits.idle_timeout, entry.limits.max_age) == (
        1000,
        None,
        None,
    )
    assert settings.tls["main"].policy is Policy.REQUIRE
    assert settings.tls["main"].verify is ssl.CERT_REQUIRED
    assert load(good("server")).tls["main"].verify is ssl.CERT_REQUIRED


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


def added(table: str, line: str) -> Callable[[str], str]:
    return replaced(f"{table}\n", f"{table}\n{line}\n")


TUNNEL = "[[tunnel]] 't'"

MISTAKES = [
    (
        "client",
        added("[service]", "drain_timout = 1"),
        "[service]: drain_timout: is not known here; did you mean drain_timeout?",
    ),
    ("client", added("[service]", "x = 1"), "[service]: x: is not known here; known are "),
    ("client", added("[service]", "drain_timeout = -1"), "drain_timeout: must be 0 or a positive number"),
    ("client", added("[service]", "drain_timeout = nan"), "drain_timeout: must be"),
    ("client", added("[service]", "drain_timeout = true"), "must be a number of seconds, not True"),
    ("client", added("[service]", 'health = "0.0.0.0:1"'), "health: must be a loopback address or unix:PATH"),
    ("client", added("[service]", 'health = "example:1"'), "health: must be a loopback address or unix:PATH"),
    ("client", added("[service]", 'health = "systemd:x"'), "health: must be a loopback address or unix:PATH"),
    (
        "client",
        lambda text: "kme = 1\n" + text[: text.index("[kme")],
        "kme: must be tables [kme.NAME], not 1",
    ),
    ("client", replaced("[tls.main]", "[tls]"), "tls: must hold tables [tls.NAME], and 'kme' is none"),
    ("client", replaced("[[tunnel]]", "[tunnel]"), "tunnel: must be tables [[tunnel]]"),
    ("client", lambda text: text.partition("[[tunnel]]")[0], "tunnel: there must be one [[tunnel]] or more"),
    ("client", lambda text: "tunnel = [1]\n" + text.partition("[[tunnel]]")[0], "tunnel: must be tables"),
    ("client", lambda text: "x = 1\n" + text, "toml: x: is not known here"),
    ("client", lambda text: text + text.partition("[[tunnel]]")[2].join(["[[tunnel]]", ""]), "stands in two"),
    ("client", replaced('name = "t"\n', ""), "[[tunnel]] number 1: name: is missing"),
    ("client", replaced('name = "t"', 'name = ""'), "name: must not be empty"),
    (
        "client",
        replaced('mode = "client"', 'mode = "x"'),
        f"{TUNNEL}: mode: must be client or server, not 'x'",
    ),
    ("client", replaced('"127.0.0.1:0"', '"127.0.0.1"'), "listen: '127.0.0.1' must be HOST:PORT"),
    ("client", replaced('"127.0.0.1:0"', '"127.0.0.1:70000"'), "must be HOST:PORT"),
    ("client", replaced('"127.0.0.1:0"', '"systemd:"'), "listen: systemd: must be followed by the name"),
    ("client", replaced('"127.0.0.1:0"', '"unix:"'), "listen: 'unix:' must be unix:PATH"),
    ("client", replaced('"127.0.0.1:0"', f'"unix:{"x" * 108}"'), "with a path of 1 to 107 bytes"),
    ("client", replaced('"server.example:5432"', '":5432"'), "connect: must name a host and a port"),
    ("client", replaced('"server.example:5432"', '"x:0"'), "connect: must name a host and a port"),
    ("client", replaced('"server.example:5432"', '"systemd:x"'), "connect: must name a host and a port"),
    ("client", replaced('tls = "main"', 'tls = "other"'), "tls: there is no [tls.other]"),
    ("client", replaced('tls = "main"', 'tls = "main"\nmax_connections = 0'), "must be 1 to 1000000, not 0"),
    ("client", replaced('tls = "main"', 'tls = "main"\nmax_connections = 1.5'), "must be a whole number"),
    (
        "client",
        replaced('tls = "main"', 'tls = "main"\nidle_timeout = 0'),
        "must be a positive number of sec",
    ),
    (
        "client",
        replaced('tls = "main"', 'tls = "main"\nproxy_protocol = true'),
        "proxy_protocol: is not known",
    ),
    (
        "client",
        replaced('tls = "main"', 'tls = "main"\nsocket_mode = "0660"'),
        "socket_mode: is for listen =",
    ),
    ("client", replaced('tls = "main"', 'tls = "main"\nsocket_mode = "9"'), "must be an octal number"),
    ("server", replaced('tls = "main"', 'tls = "main"\nserver_name = "x"'), "server_name: is not known here"),
    ("server", replaced('tls = "main"', 'tls = "main"\nproxy_protocol = 1'), "must be true or false, not 1"),
    (
        "client",
        lambda text: text.replace('server_name = "localhost"\n', "").replace("server.example:5432", "unix:x"),
        "server_name: is missing: a Unix path says nothing",
    ),
    (
        "client",
        replaced("[tls.main]", '[tls.main]\npolicy = "x"'),
        "[tls.main]: policy: must be require or prefer",
    ),
    ("client", replaced('kme = "site"', 'kme = "x"'), "[tls.main]: kme: there is no [kme.x]"),
    ("client", replaced('kme = "site"\n', ""), "[tls.main]: kme: is missing"),
    ("client", added("[tls.main]", 'groups = ["x"]'), "[tls.main]: groups: OpenSSL"),
    ("client", added("[tls.main]", "groups = []"), "groups: must be a list of one or more non-empty strings"),
    ("client", added("[tls.main]", 'groups = "X25519"'), "groups: must be a list of strings, not 'X25519'"),
    ("client", added("[tls.main]", 'kem = "ROT13"'), "[tls.main]: kem: 'ROT13' is not available here"),
    ("client", added("[tls.main]", 'kdf = "md5"'), "kdf: must be sha384 or sha256"),
    ("client", added("[tls.main]", 'alpn = ["qkd-tls/1"]'), "is not an application's protocol"),
    ("client", added("[tls.main]", 'verify_client = "none"'), "verify_client: is not known here"),
    ("client", added("[tls.main]", 'crl = "no.pem"'), "crl: cannot read "),
    ("server", added("[tls.main]", 'peer_sae_id = "x"'), "peer_sae_id: is not known here"),
    (
        "server",
        added("[tls.main]", 'verify_client = "x"'),
        "verify_client: must be require or optional or none",
    ),
    (
        "client",
        replaced("[kme.site]", "[kme.site]\nkey_size = 128"),
        "key_size: must be 256 to 65536, not 128",
    ),
    (
        "client",
        replaced("[kme.site]", '[kme.site]\nsite = ["kme.example"]'),
        "[kme.site]: site: 'kme.example' is not a network of the secure site",
    ),
    ("client", replaced("[kme.site]", '[kme.site]\nuser = "x"'), "[kme.site]: user: is not known here"),
    ("client", replaced('url = "https', 'url = "ftp'), "[kme.site]: "),
    ("client", lambda text: text + "\xe9nonsense", "is not TOML: "),
]


@pytest.mark.parametrize(("side", "change", "problem"), MISTAKES, ids=[entry[2][:40] for entry in MISTAKES])
def test_mistakes(good: Any, side: str, change: Callable[[str], str], problem: str) -> None:
    file = good(side)
    file.write_text(change(file.read_text()))
    with pytest.raises(ConfigError) as caught:
        check(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert problem in str(caught.value)


def lines_of(text: str, key: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{key} = ")]


class TestFiles:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no\.toml: cannot be read: No such file") as caught:
            read_file(tmp_path / "no.toml")
        assert (caught.value.table, caught.value.key) == ("", "")

    def test_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "x.toml"
        file.write_bytes(b"\xff")
        with pytest.raises(ConfigError, match="is not UTF-8 text"):
            read_file(file)

    @pytest.mark.parametrize("mode", [0o644, 0o602])
    @pytest.mark.parametrize("which", [0, 1], ids=["kme", "tls"])
    def test_a_key_that_everybody_may_read(self, good: Any, tmp_path: Path, which: int, mode: int) -> None:
        file = good("client")
        text = file.read_text()
        line = lines_of(text, "key")[which]
        copy = tmp_path / "copy.key"
        copy.write_bytes(Path(line.split('"')[1]).read_bytes())
        copy.chmod(mode)
        file.write_text(text.replace(line, f'key = "{copy}"'))
        with pytest.raises(
            ConfigError, match=rf"key: everybody on this machine .* \(mode {mode:04o}\): chmod"
        ):
            check(file)
        copy.chmod(0o640)
        check(file)

    def test_a_key_in_the_file_itself(self, good: Any) -> None:
        file = good("client")
        text = file.read_text()
        file.write_text(text.replace(lines_of(text, "key")[0], 'key = "-----BEGIN PRIVATE KEY-----"'))
        with pytest.raises(ConfigError, match="key: must be the path of a file, not the content"):
            check(file)

    def test_certificate_and_key_in_one_file(self, good: Any, sites: Sites, tmp_path: Path) -> None:
        both = tmp_path / "both.pem"
        both.touch(0o600)
        both.write_bytes(sites.client.cert_file.read_bytes() + sites.client.key_file.read_bytes())
        file = good("client")
        text = file.read_text()
        text = text.replace(f"{lines_of(text, 'key')[1]}\n", "")
        file.write_text(text.replace(lines_of(text, "certificate")[0], f'certificate = "{both.name}"'))
        check(file)
        both.chmod(0o644)
        with pytest.raises(ConfigError, match="certificate: everybody on this machine"):
            check(file)

    def test_a_key_without_a_certificate(self, good: Any) -> None:
        file = good("client")
        text = file.read_text()
        file.write_text(text.replace(f"{lines_of(text, 'certificate')[0]}\n", ""))
        with pytest.raises(ConfigError, match="key: is of no use without certificate"):
            check(file)

    def test_neither_certificate_nor_ca(self, good: Any) -> None:
        """The system's CAs, and no client certificate."""
        file = good("client")
        text = file.read_text()
        for line in (lines_of(text, "certificate")[0], lines_of(text, "key")[1], lines_of(text, "ca")[1]):
            text = text.replace(f"{line}\n", "")
        file.write_text(text)
        check(file)

    def test_a_key_with_a_password(self, good: Any, sites: Sites, tmp_path: Path) -> None:
        locked = sites.ca.issue("locked", password=b"secret")
        locked.key_file.chmod(0o600)
        file = good("client")
        text = file.read_text()
        for key, path in (("certificate", locked.cert_file), ("key", locked.key_file)):
            text = text.replace(lines_of(text, key)[-1], f'{key} = "{path}"')
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"\[tls\.main\]: .*cannot read the private key"):
            check(file)
        password = tmp_path / "password"
        password.write_text("secret\n")
        password.chmod(0o600)
        file.write_text(text.replace("[tls.main]", '[tls.main]\nkey_password_file = "password"'))
        check(file)

    def test_a_revocation_list(self, good: Any, sites: Sites, tmp_path: Path) -> None:
        (tmp_path / "crl.pem").write_text(sites.ca.revoke(sites.server))
        file = good("client")
        file.write_text(file.read_text().replace("[tls.main]", '[tls.main]\ncrl = "crl.pem"'))
        check(file)
        context = load(file).tls["main"]
        assert context.files[-1] == tmp_path / "crl.pem"

    def test_the_sae_s_certificate_is_none(self, good: Any, tmp_path: Path) -> None:
        (tmp_path / "empty.pem").write_text("")
        file = good("client")
        text = file.read_text()
        file.write_text(text.replace(lines_of(text, "cert")[0], 'cert = "empty.pem"'))
        with pytest.raises(ConfigError, match=r"\[kme\.site\]: .*certificate"):
            check(file)

    def test_one_table_for_both_sides(self, good: Any, sites: Sites) -> None:
        file = good("client")
        entry = tunnel("server", ("localhost", 1), name="other")
        file.write_text(file.read_text() + entry)
        with pytest.raises(ConfigError, match="is used by a client and by a server tunnel"):
            check(file)

    def test_what_a_reload_does_not_change_is_kept(self, good: Any) -> None:
        """Context and pool stay while the settings do; another setting of the pool makes both anew."""
        file = good("client")
        text = file.read_text().replace('kme = "site"', 'kme = ["site"]')
        file.write_text(f"{text}[pool]\n")
        metrics = Metrics()
        first = Contexts.make(load(file), metrics)
        [manager] = first.managers.values()
        assert isinstance(manager, KeyPool)
        again = Contexts.make(load(file), metrics, first)
        assert again.tls["main"] is first.tls["main"]
        assert list(again.managers.values()) == [manager]
        file.write_text(f"{text}[pool]\nmax_age = 1\n")
        changed = Contexts.make(load(file), metrics, again)
        assert changed.tls["main"] is not first.tls["main"]
        assert list(changed.managers.values()) != [manager]
        again.replaced_by(changed)
        with pytest.raises(KMSUnavailable, match="closed"):
            manager.get_keys("SAE-B")
        changed.replaced_by(Contexts())

    def test_a_context_that_two_tunnels_use(self, good: Any, sites: Sites) -> None:
        """Two tables of one KME share its client."""
        file = good("client")
        more = sites.tls("client").replace("[tls.main]", "[tls.other]")
        entry = tunnel("client", ("server.example", 5433), name="u").replace('"main"', '"other"')
        file.write_text(file.read_text() + more + entry)
        contexts = Contexts.make(load(file), Metrics())
        assert len(contexts.managers) == 1
        assert contexts.tls["main"].key_manager is contexts.tls["other"].key_manager
        contexts.replaced_by(Contexts())

    def test_no_kme_under_policy_off(self, good: Any) -> None:
        file = good("client")
        text = file.read_text().replace('kme = "site"', 'policy = "off"')
        file.write_text(text)
        check(file)


class TestCommand:
    def test_without_the_extra(self, good: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        file = good("client")
        with pytest.raises(
            ConfigError, match="needs prometheus-client; install it with: pip install prometheus-client"
        ):
            check(file)
        assert run(str(file)) == 2
        assert "needs prometheus-client" in capsys.readouterr().err

    def test_usage(self) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "qkd_tls.tunnel"], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (1, "usage: python -m qkd_tls.tunnel CONFIG\n")

    def test_examples(self, sites: Sites, tmp_path: Path) -> None:
        """The files of the manual are in order once the files that they name are there."""
        pki = sites.kmes.pki
        for name, files in {
            "ca.pem": sites.ca.file,
            "client.pem": sites.client.cert_file,
            "client.key": sites.client.key_file,
            "server.pem": sites.server.cert_file,
            "server.key": sites.server.key_file,
            "sae-a.pem": pki.sae_a_cert,
            "sae-a.key": pki.sae_a_key,
            "sae-b.pem": pki.sae_b_cert,
            "sae-b.key": pki.sae_b_key,
            "kms-ca.pem": pki.kms_ca,
        }.items():
            (tmp_path / name).symlink_to(files)
        for example in ("tunnel-client.toml", "tunnel-server.toml"):
            copy = tmp_path / example
            copy.write_text((EXAMPLES / example).read_text())
            check(copy)


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("localhost:1", TCP("localhost", 1)),
            ("[::1]:65535", TCP("::1", 65535)),
            ("[fe80::1%eth0]:1", TCP("fe80::1%eth0", 1)),
            (":1", TCP("", 1)),
            ("unix:x", Unix(Path("/run/x"))),
            ("unix:/x", Unix(Path("/x"))),
            ("systemd:x", Activated("x")),
        ],
    )
    def test_parse(self, text: str, address: Any) -> None:
        assert parse(text, Path("/run")) == address
        assert str(address).removeprefix("unix:/run/") in text or text in str(address)

    def test_loopback(self) -> None:
        loopback = ["localhost", "127.1.2.3", "::1"]
        assert [TCP(host, 1).is_loopback for host in [*loopback, "", "10.0.0.1", "x"]] == [True] * 3 + [
            False
        ] * 3

    def test_listening_on_all_addresses(self) -> None:
        sockets = listen(TCP("", 0), {})
        try:
            assert {sock.family for sock in sockets} <= {socket.AF_INET, socket.AF_INET6}
            assert all(sock.getsockname()[1] for sock in sockets)
        finally:
            for sock in sockets:
                sock.close()

    def test_a_host_without_an_address(self) -> None:
        with pytest.raises(OSError, match=r"Name|name|address"):
            asyncio.run(connect(TCP("no-such-host.invalid", 1), 5))

    def test_a_full_unix_backlog_is_waited_for(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen(0)

            async def scenario() -> None:
                first = await connect(Unix(path), 5)
                waiting = asyncio.create_task(connect(Unix(path), 20))
                await asyncio.sleep(0.05)
                assert not waiting.done()
                accepted, _ = server.accept()
                second = await waiting
                for sock in (first, second, accepted):
                    sock.close()

            asyncio.run(scenario())


class TestProxyHeader:
    """Against bytes written down from the specification."""

    def test_ipv4(self) -> None:
        assert encode_header(("192.0.2.1", 56324), ("192.0.2.2", 443)) == bytes.fromhex(
            "0d0a0d0a000d0a515549540a 21 11 000c c0000201 c0000202 dc04 01bb"
        )

    def test_ipv6_with_a_field(self) -> None:
        header = encode_header(("2001:db8::1%eth0", 1), ("2001:db8::2", 2), [encode_tlv(0x05, b"id")])
        assert header == bytes.fromhex(
            "0d0a0d0a000d0a515549540a 21 21 0029"
            "20010db8000000000000000000000001 20010db8000000000000000000000002 0001 0002 05 0002 6964"
        )

    def test_unix(self) -> None:
        header = encode_header("/a", "")
        assert header[12:16] == bytes.fromhex("21 31 00d8")
        assert header[16:] == b"/a".ljust(216, b"\0")

    def test_what_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="different IP versions"):
            encode_header(("192.0.2.1", 1), ("::1", 1))
        with pytest.raises(ValueError, match="different kinds"):
            encode_header(("192.0.2.1", 1), "/a")
        with pytest.raises(ValueError, match="at most 65,535"):
            encode_tlv(1, bytes(65536))
        with pytest.raises(ValueError, match="at most 65,535"):
            encode_header(("192.0.2.1", 1), ("192.0.2.1", 1), [encode_tlv(1, bytes(65535))])


def test_umask_is_restored(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        [sock] = listen(Unix(tmp_path / "s"), {}, socket_mode=0o666)
        sock.close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
