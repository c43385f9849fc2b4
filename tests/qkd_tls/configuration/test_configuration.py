"""Contexts from a configuration file: what the file says is done, and each mistake is named by file, table and key."""

from __future__ import annotations

import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates
from cryptography.x509 import load_pem_x509_certificates

from kms_client import (
    Etsi014Client,
    FailoverKeyManager,
    KeyPool,
    KMSAuthenticationError,
    KMSError,
    KMSOutsideSecureSite,
    KMSUnavailable,
    SkipClient,
)
from kms_client.emulator import RunningPair, run_pair
from qkd_tls import Policy, Protection, QKDContext
from qkd_tls.configuration import ConfigError, Sections, Table, read_file
from qkd_tls.errors import QKDKeyMismatch
from tests.support.paths import ROOT
from tests.support.sockets import Authority, Server, talk

EXAMPLE = ROOT / "examples" / "qkd-tls.toml"
MANUAL = ROOT / "docs" / "howto-configuration.md"
SECRET = "xyzzy-plugh"


@dataclass
class Site:
    """Two links between two sites, each with a KME at both ends, and the files that a configuration names."""

    folder: Path
    north: RunningPair
    south: RunningPair

    def url(self, which: str, side: str) -> str:
        pair = self.north if which == "north" else self.south
        return pair.url_a if side == "a" else pair.url_b

    def kme(self, name: str, side: str = "a", more: str = "") -> str:
        return (
            f'[kme.{name}]\nurl = "{self.url(name, side)}"\nsae_id = "SAE-{side.upper()}"\n'
            f'cert = "sae-{side}.pem"\nkey = "sae-{side}.key"\nca = "kms-ca.pem"\n{more}\n'
        )

    def kmes(self, side: str = "a") -> str:
        return self.kme("north", side) + self.kme("south", side)

    def write(self, text: str) -> Path:
        file = self.folder / "qkd-tls.toml"
        file.write_text(text)
        return file


CLIENT = '[tls.client]\nrole = "client"\nkme = ["north", "south"]\nca = "ca.pem"\n'
SERVER = (
    '[tls.server]\nrole = "server"\nkme = ["north", "south"]\ncertificate = "server.pem"\nkey = "server.key"\n'
    'verify_client = "none"\n'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ca = Authority(folder)
    for name, hosts in (("server", ["localhost"]), ("client", ["client.example"])):
        identity = ca.issue(name, hosts)
        identity.key_file.chmod(0o600)
        for file, suffix in ((identity.cert_file, "pem"), (identity.key_file, "key")):
            if file != folder / f"{name}.{suffix}":
                (folder / f"{name}.{suffix}").symlink_to(file)
    if ca.file != folder / "ca.pem":
        (folder / "ca.pem").symlink_to(ca.file)
    password = folder / "password"
    password.touch(0o600)
    password.write_text(f"{SECRET}\n")
    with run_pair(folder / "kme") as north, run_pair(folder / "kme") as south:
        pki = north.pki
        for name, target in {
            "sae-a.pem": pki.sae_a_cert,
            "sae-a.key": pki.sae_a_key,
            "sae-b.pem": pki.sae_b_cert,
            "sae-b.key": pki.sae_b_key,
            "kms-ca.pem": pki.kms_ca,
        }.items():
            (folder / name).symlink_to(target)
        [certificate] = load_pem_x509_certificates(pki.sae_a_cert.read_bytes())[:1]
        key: Any = load_pem_private_key(pki.sae_a_key.read_bytes(), None)
        pkcs12 = folder / "sae-a.p12"
        pkcs12.touch(0o600)
        pkcs12.write_bytes(
            serialize_key_and_certificates(
                None, key, certificate, None, BestAvailableEncryption(SECRET.encode())
            )
        )
        yield Site(folder, north, south)


@contextmanager
def contexts(*files_and_tables: tuple[Path, str]) -> Iterator[list[QKDContext]]:
    with ExitStack() as stack:
        made = []
        for file, table in files_and_tables:
            context = QKDContext.from_config(file, table=table)
            assert context.key_manager is not None
            stack.callback(context.key_manager.close)
            made.append(context)
        yield made


def load(file: Path, **which: Any) -> QKDContext:
    """A context whose key manager is closed at once."""
    context = QKDContext.from_config(file, **which)
    if context.key_manager is not None:
        context.key_manager.close()
    return context


def files_of_both_sites(site: Site, a: str, b: str) -> tuple[Path, Path]:
    files = site.folder / "a.toml", site.folder / "b.toml"
    for file, text in zip(files, (a, b), strict=True):
        file.write_text(text)
    return files


class TestConnections:
    def test_pool_and_failover(self, site: Site) -> None:
        """The client takes pooled keys of the KME that answers; both sides name the KME that had the key."""
        near, far = files_of_both_sites(
            site,
            f'{site.kmes()}{CLIENT}[peers]\nlocalhost = "SAE-B"\n[pool]\nlow_water = 1\nhigh_water = 2\n',
            f"{site.kmes('b')}{SERVER}[failover]\nthreshold = 1\n",
        )
        with (
            contexts((near, "client"), (far, "server")) as (client, server),
            Server(server) as service,
        ):
            assert isinstance(client.key_manager, KeyPool)
            assert isinstance(server.key_manager, FailoverKeyManager)
            with service.connect(client) as sock:
                talk(sock)
                info, theirs = sock.qkd, service.seen_info()
            assert info is not None
            assert info.protection is Protection.HYBRID
            assert (info.kms, theirs.kms) == (site.north.url_a, site.north.url_b)
            client.forget_associations()
            site.north.stop_kme("a")
            try:
                # At most what is pooled comes from the KME that is off now.
                urls = []
                for _ in range(4):
                    client.forget_associations()
                    with service.connect(client) as sock:
                        talk(sock)
                        assert sock.qkd is not None
                        urls.append((sock.qkd.kms, service.seen_info().kms))
            finally:
                site.north.start_kme("a")
            assert urls[-1] == (site.south.url_a, site.south.url_b)
            assert set(urls) <= {
                (site.north.url_a, site.north.url_b),
                (site.south.url_a, site.south.url_b),
            }

    def test_a_mismatch_names_the_kme_that_delivered(self, site: Site) -> None:
        near, far = files_of_both_sites(
            site, site.kmes() + CLIENT + 'peer_sae_id = "SAE-B"\n', site.kmes("b") + SERVER
        )
        with (
            contexts((near, "client"), (far, "server")) as (client, server),
            Server(server) as service,
        ):
            site.north.faults("b").corrupt_keys = True
            try:
                with pytest.raises(QKDKeyMismatch) as caught:
                    service.connect(client)
            finally:
                site.north.faults("b").corrupt_keys = False
            assert caught.value.kms == site.north.url_a
            theirs = service.seen().error
            assert isinstance(theirs, QKDKeyMismatch)
            assert theirs.kms == site.north.url_b

    def test_skip_and_pkcs12(self, site: Site) -> None:
        """One KME of each interface, an encrypted credential, header fields and a name of its own."""
        password = 'key_password_file = "password"\n'
        kme = site.kme("north", more=f'pkcs12 = "sae-a.p12"\n{password}protocol = "skip"')
        kme = kme.replace('cert = "sae-a.pem"\nkey = "sae-a.key"\n', "")
        south = site.kme(
            "south",
            more='server_hostname = "localhost"\nheaders = { X-Site = "A", X-Key = { file = "password" } }',
        )
        failover = '[failover]\nprotocol = "etsi-014"\n'
        north = CLIENT.replace('["north", "south"]', '"north"') + 'peer_sae_id = "SAE-B"\n'
        near, far = files_of_both_sites(
            site,
            kme + south + failover + north + CLIENT.replace("[tls.client]", "[tls.both]"),
            site.kme("north", "b", 'protocol = "skip"') + SERVER.replace('["north", "south"]', '"north"'),
        )
        assert load(near, table="both").key_manager is not None
        with (
            contexts((near, "client"), (far, "server")) as (client, server),
            Server(server) as service,
        ):
            assert isinstance(client.key_manager, SkipClient)
            with service.connect(client) as sock:
                talk(sock)
                assert sock.qkd is not None
                assert sock.qkd.kms_protocol == "skip"

    def test_the_example(self, site: Site) -> None:
        """The file of the manual as it is, with the addresses of real KMEs, at both sites."""

        def of_side(side: str) -> str:
            text = EXAMPLE.read_text()
            for name in ("north", "south"):
                assert f"https://kme-{name}.example" in text
                text = text.replace(f"https://kme-{name}.example", site.url(name, side))
            text = text.replace('"db.site-b.example"', "localhost")
            if side == "b":
                swapped = {"SAE-A": "SAE-B", "SAE-B": "SAE-A", "sae-a": "sae-b"}
                text = re.sub("|".join(swapped), lambda match: swapped[match[0]], text)
            return text

        near, far = files_of_both_sites(site, of_side("a"), of_side("b"))
        with (
            contexts((near, "to-site-b"), (far, "service")) as (client, server),
            Server(server) as service,
        ):
            for _ in range(2):
                with service.connect(client) as sock:
                    talk(sock)
                    assert sock.qkd is not None
                    assert sock.qkd.protection is Protection.HYBRID
                    seen = service.seen()
                    assert seen.certificate is not None
            assert sock.qkd is not None
            assert sock.qkd.announced

    def test_the_example_has_every_key(self, site: Site) -> None:
        """With all comments that are settings taken away it is still read, but for what excludes something else."""
        text = re.sub(r"^# (?=[\w-]+ = [^.]|\[)", "", EXAMPLE.read_text(), flags=re.M)
        lines = [line for line in text.splitlines() if not line.startswith(("pkcs12", "crl", "alpn"))]
        text = "\n".join(lines).replace("password.txt", "password").replace("gateway.key", "password")
        file = site.write(text)
        for table in ("to-site-b", "service"):
            load(file, table=table)


class TestWhatIsMade:
    def test_the_only_table(self, site: Site) -> None:
        client = load(site.write(site.kmes() + CLIENT))
        assert client.policy is Policy.REQUIRE
        assert client.verify_mode is ssl.CERT_REQUIRED
        assert isinstance(client.key_manager, FailoverKeyManager)

    def test_the_role_may_be_an_argument(self, site: Site) -> None:
        file = site.write(site.kme("north") + '[tls.x]\nkme = "north"\nca = "ca.pem"\n')
        context = load(file, role="client")
        assert context.protocol is ssl.PROTOCOL_TLS_CLIENT
        assert isinstance(context.key_manager, Etsi014Client)

    def test_no_kme_under_policy_off(self, site: Site) -> None:
        file = site.write('[tls.x]\nrole = "client"\npolicy = "off"\nalpn = ["http/1.1"]\n')
        context = load(file)
        assert context.key_manager is None
        assert context.policy is Policy.OFF

    def test_a_class_of_one_s_own(self, site: Site) -> None:
        class Own(QKDContext):
            pass

        assert type(Own.from_config(site.write('[tls.x]\nrole = "client"\npolicy = "off"\n'))) is Own

    def test_certificate_and_key_in_one_file(self, site: Site) -> None:
        for name in ("sae-a", "client"):
            both = site.folder / f"{name}-both.pem"
            both.touch(0o600)
            both.write_bytes(b"".join((site.folder / f"{name}.{end}").read_bytes() for end in ("pem", "key")))
        text = site.kme("north") + CLIENT.replace('["north", "south"]', '"north"')
        text = text.replace('cert = "sae-a.pem"\nkey = "sae-a.key"\n', 'cert = "sae-a-both.pem"\n')
        file = site.write(text + 'certificate = "client-both.pem"\n')
        load(file)
        for name, key in (("sae-a", "cert"), ("client", "certificate")):
            both = site.folder / f"{name}-both.pem"
            both.chmod(0o644)
            refused(file, f": {key}: everybody on this machine may read")
            both.chmod(0o600)

    def test_links_of_kmes(self, site: Site) -> None:
        """A KME without a link to the peer is not asked."""
        text = site.kme("north", more='peers = ["SAE-C"]') + site.kme("south", more='peers = ["SAE-B"]')
        with contexts((site.write(text + CLIENT), "client")) as [client]:
            assert client.key_manager is not None
            [key] = client.key_manager.get_keys("SAE-B")
            assert key.kms == site.south.url_a

    @pytest.mark.parametrize(
        ("setting", "error"),
        [
            ("this_host = false", KMSOutsideSecureSite),
            ('unix_socket = "no.sock"', KMSUnavailable),
            ('server_hostname = "other.example"', KMSAuthenticationError),
        ],
    )
    def test_where_the_kme_is(self, site: Site, setting: str, error: type[KMSError]) -> None:
        text = site.kme("north", more=setting) + CLIENT.replace('["north", "south"]', '"north"')
        with contexts((site.write(text), "client")) as [client]:
            assert client.key_manager is not None
            with pytest.raises(error):
                client.key_manager.get_keys("SAE-B")

    def test_a_failed_context_leaves_nothing_running(self, site: Site) -> None:
        text = site.kmes() + '[pool]\npeers = ["SAE-B"]\n' + CLIENT
        before = set(threading.enumerate())
        refused(site.write(text + 'groups = ["X"]\n'), "[tls.client]: groups: ")
        assert set(threading.enumerate()) == before

    def test_the_module_is_loaded_when_it_is_needed(self) -> None:
        code = "import sys, qkd_tls; sys.exit('qkd_tls.configuration' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def refused(file: Path, problem: str, **which: Any) -> ConfigError:
    """The error, which begins with the file and has no secret in it, nor in what it came from."""
    with pytest.raises(ConfigError) as caught:
        QKDContext.from_config(file, **which)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert problem in text
    assert SECRET not in text
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in repr(error)
        error = error.__context__
    return caught.value


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


def after(line: str, new: str) -> Callable[[str], str]:
    return replaced(f"{line}\n", f"{line}\n{new}\n")


def north(new: str) -> Callable[[str], str]:
    return after("[kme.north]", new)


def client(new: str) -> Callable[[str], str]:
    return after("[tls.client]", new)


# Change, table, key, problem.
MISTAKES: list[tuple[Callable[[str], str], str, str, str]] = [
    # the top
    (lambda text: f'polcy = "x"\n{text}', "", "polcy", "is not known here; "),
    (replaced("[pool]", "[pol]"), "", "pol", "is not known here; did you mean pool?"),
    # KMEs
    (north('user = "x"'), "[kme.north]", "user", "is not known here"),
    (north(f'key_password = "{SECRET}"'), "[kme.north]", "key_password", "did you mean key_password_file?"),
    (north("connect_timeout = '3'"), "[kme.north]", "connect_timeout", "must be a number of seconds"),
    (north('protocol = "etsi-004"'), "[kme.north]", "protocol", "must be etsi-014 or skip"),
    (north('pkcs12 = "sae-a.p12"'), "[kme.north]", "pkcs12", "stands beside cert or key"),
    (
        replaced('cert = "sae-a.pem"\nkey = "sae-a.key"\n', ""),
        "[kme.north]",
        "cert",
        "is missing: give cert and key, or",
    ),
    (replaced('"sae-a.pem"', '"no.pem"'), "[kme.north]", "cert", "cannot read "),
    (replaced('"sae-a.pem"', '"ca.pem"'), "[kme.north]", "cert", "this SAE's certificate and key cannot be"),
    (
        replaced('ca = "kms-ca.pem"', 'ca = "password"'),
        "[kme.north]",
        "ca",
        "password: [X509: NO_CERTIFICATE_OR_CRL_FOUND]",
    ),
    (replaced('ca = "kms-ca.pem"\n', ""), "[kme.north]", "ca", "is missing"),
    (
        replaced('cert = "sae-a.pem"\nkey = "sae-a.key"\n', 'pkcs12 = "sae-a.p12"\n'),
        "[kme.north]",
        "pkcs12",
        "Check key_password_file, and",
    ),
    (replaced('url = "https', f'url = "ftp://u:{SECRET}@'), "[kme.north]", "url", "a KME's URL is https://"),
    (replaced('"SAE-A"', '".."'), "[kme.north]", "sae_id", "'..' cannot be an SAE ID"),
    (replaced('"SAE-A"', '"a\\nb"'), "[kme.north]", "sae_id", "an SAE ID must be 1 to 255 bytes"),
    (replaced('"SAE-A"', "7"), "[kme.north]", "sae_id", "must be a string, not 7"),
    (north("key_size = 257"), "[kme.north]", "key_size", "must be a multiple of 8 bits"),
    (north('site = ["10.0.0.1/8"]'), "[kme.north]", "site", "'10.0.0.1/8' is not a network"),
    (north('this_host = "no"'), "[kme.north]", "this_host", "must be true or false"),
    (north('peers = ["."]'), "[kme.north]", "peers", "'.' cannot be an SAE ID"),
    (north(f'headers = {{ "a b" = "{SECRET}" }}'), "[kme.north]", "headers", "header field 'a b' cannot be"),
    (north("headers = { Key = 1 }"), "[kme.north.headers]", "Key", "must be a string, or { file ="),
    (north('headers = { Key = { file = "x" } }'), "[kme.north.headers.Key]", "file", "cannot read"),
    (north('headers = { K = { fil = "x" } }'), "[kme.north.headers.K]", "file", "is missing"),
    (north('key_password_file = "ca.pem"'), "[kme.north]", "key_password_file", "everybody on this machine"),
    (north("key_password_file = 4711"), "[kme.north]", "key_password_file", "must be a string, the path of"),
    (
        north('protocol = "skip"\nmaster_in_key_ids = true'),
        "[kme.north]",
        "master_in_key_ids",
        "is not",
    ),
    # KMEs together
    (
        replaced('["north", "south"]', '["north", "west"]'),
        "[tls.client]",
        "kme",
        "there is no [kme.west]; there",
    ),
    (replaced('["north", "south"]', '["north", "north"]'), "[tls.client]", "kme", "has a name twice"),
    (replaced('["north", "south"]', "3"), "[tls.client]", "kme", "must be a name or a list of names"),
    (replaced('["north", "south"]', "[]"), "[tls.client]", "kme", "must be a list of one or more"),
    (replaced('kme = ["north", "south"]\n', ""), "[tls.client]", "kme", "is missing"),
    (north("key_size = 512"), "[tls.client]", "kme", "must have one key_size, not [256, 512]"),
    (north('protocol = "skip"'), "[tls.client]", "kme", "speak etsi-014 and skip: if all"),
    (after("[failover]", "threshold = 0"), "[failover]", "threshold", "must be 1 to"),
    (after("[failover]", 'protocol = "x"'), "[failover]", "protocol", "must be etsi-014 or skip"),
    (after("[failover]", "min_backoff = 9\nmax_backoff = 2"), "[failover]", "max_backoff", "not be less"),
    (after("[pool]", "low_water = 9\nhigh_water = 8"), "[pool]", "high_water", "must be 9 to"),
    (after("[pool]", "max_age = 0"), "[pool]", "max_age", "must be a positive number of seconds"),
    (after("[pool]", "size = 1"), "[pool]", "size", "is not known here"),
    (after("[peers]", '"x" = ".."'), "[peers]", "x", "'..' cannot be an SAE ID"),
    (after("[peers]", 'x.example = "SAE-B"'), "[peers]", "x", "a key with a dot in it is written in quotes"),
    # TLS
    (replaced('role = "client"\n', ""), "[tls.client]", "role", "is missing"),
    (replaced('role = "client"', 'role = "proxy"'), "[tls.client]", "role", "must be client or server"),
    (client('policy = "require?"'), "[tls.client]", "policy", "must be require or prefer or off"),
    (client('allowed_peer_sae_ids = [".."]'), "[tls.client]", "allowed_peer_sae_ids", "cannot be an SAE ID"),
    (client('peer_sae_id = "."'), "[tls.client]", "peer_sae_id", "cannot be an SAE ID"),
    (client('groups = ["X"]'), "[tls.client]", "groups", "OpenSSL"),
    (client('kem = "X"'), "[tls.client]", "kem", "'X' is not available here"),
    (
        client('alpn = [" "]\ncrl = "password"'),
        "[tls.client]",
        "crl",
        "password: [X509: NO_CERTIFICATE_OR_CRL_FOUND]",
    ),
    (client('alpn = ["qkd-tls/1"]'), "[tls.client]", "alpn", "is not an application's protocol"),
    (client("announced_keys = 64"), "[tls.client]", "announced_keys", "must be 0 to 63"),
    (client("max_keys = 64"), "[tls.client]", "max_keys", "is not known here"),
    (client('key = "client.key"'), "[tls.client]", "key", "is of no use without certificate"),
    (
        replaced('ca = "ca.pem"', 'ca = "password"'),
        "[tls.client]",
        "ca",
        "password: [X509: NO_CERTIFICATE_OR_CRL_FOUND]",
    ),
    (
        client('certificate = "password"'),
        "[tls.client]",
        "certificate",
        "password: it has no certificate in PEM",
    ),
    (
        client('certificate = "client.pem"\nkey = "server.key"'),
        "[tls.client]",
        "key",
        "not be the certificate's",
    ),
]


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "table", "key", "problem"), MISTAKES, ids=[f"{entry[1]} {entry[2]}" for entry in MISTAKES]
    )
    def test_one(self, site: Site, change: Callable[[str], str], table: str, key: str, problem: str) -> None:
        good = f"\n{site.kmes()}[failover]\n[pool]\n[peers]\n{CLIENT}"
        load(site.write(good))
        file = site.write(change(good))
        error = refused(file, problem)
        assert (error.file, error.table, error.key) == (file, table, key)
        assert str(error) == ": ".join([str(file), *filter(None, (table, key)), error.problem])
        assert error.problem

    def test_a_key_that_everybody_may_read(self, site: Site) -> None:
        for name, table, key in (
            ("sae-a.key", "[kme.north]", "key"),
            ("sae-a.p12", "[kme.north]", "pkcs12"),
            ("password", "[kme.north]", "key_password_file"),
            ("client.key", "[tls.client]", "key"),
        ):
            open_to_all = site.folder / "open"
            open_to_all.write_bytes((site.folder / name).read_bytes())
            open_to_all.chmod(0o604)
            text = site.kmes() + CLIENT
            if key == "pkcs12":
                text = text.replace('cert = "sae-a.pem"\nkey = "sae-a.key"\n', 'pkcs12 = "open"\n', 1)
            elif key == "key_password_file":
                text = north('key_password_file = "open"')(text)
            elif table == "[tls.client]":
                text = client('certificate = "client.pem"\nkey = "open"')(text)
            else:
                text = text.replace('key = "sae-a.key"', 'key = "open"', 1)
            error = refused(site.write(text), f"may read or change {open_to_all} (mode 0604): chmod 600 it")
            assert (error.table, error.key) == (table, key)

    @pytest.mark.parametrize(
        ("tables", "which", "problem"),
        [
            ("", {}, "tls: there must be one table [tls.NAME], and there is none"),
            (CLIENT + SERVER, {}, "and there is [tls.client], [tls.server]: say which"),
            (CLIENT, {"table": "x"}, "tls: there is no [tls.x]"),
            (CLIENT, {"role": "server"}, "[tls.client]: role: is client, and a server's context is wanted"),
            ("[kme]\nx = 1\n", {}, "kme: must hold tables [kme.NAME], and 'x' is none"),
        ],
    )
    def test_which_table(self, site: Site, tables: str, which: Any, problem: str) -> None:
        kmes = "" if tables.startswith("[kme]") else site.kmes()
        refused(site.write(kmes + tables), problem, **which)

    def test_a_context_without_keys(self, site: Site) -> None:
        refused(site.write('[tls.x]\nrole = "client"\npolicy = "off"\ngroups = ["X"]\n'), "[tls.x]: groups: ")

    def test_no_kme_at_all(self, site: Site) -> None:
        refused(site.write(CLIENT), "[tls.client]: kme: there is no [kme.north]; there is none")

    def test_no_secret_is_shown(self, site: Site) -> None:
        """Neither in settings nor in what is made of them."""
        text = site.kme("north", more=f'headers = {{ Key = "{SECRET}", Other = {{ file = "password" }} }}')
        file = site.write(text + CLIENT.replace('["north", "south"]', '"north"'))
        settings = Sections(read_file(file)).tls("client")
        assert settings.source is not None
        assert dict(settings.source.kmes[0].headers) == {"Key": SECRET, "Other": SECRET}
        context = load(file)
        for shown in (settings, settings.source, context, context.key_manager):
            assert SECRET not in repr(shown)

    def test_a_key_that_is_there_for_none(self) -> None:
        table = Table(Path("x.toml"), "[t]", {"word": "other"})
        with pytest.raises(ConfigError, match="word: must be one, not 'other'"):
            table.take_choice("word", ("one",), None)
        assert table.take_choice("nothing", ("one",), None) is None
        assert table.take_names("nothing", None) is None


class TestManual:
    def test_mistakes(self, site: Site) -> None:
        """Each line of the manual's transcript, put into the example, gives the message below it."""
        block = MANUAL.read_text().partition("```text\n")[2].partition("```")[0]
        pairs = [entry.split("\n    ") for entry in block.strip().split("\n\n")]
        assert len(pairs) > 10
        for setting, message in pairs:
            header, _, line = setting.partition("] ")
            table, key = f"{header}]", line.partition(" = ")[0]
            before, content, rest = re.split(
                rf"(?m)^({re.escape(table)}.*(?:\n(?!\[).*)*)", EXAMPLE.read_text()
            )
            content = re.sub(rf"(?m)^{re.escape(key)} = .*\n", "", content)
            title, _, settings = content.partition("\n")
            file = site.write(f"{before}{title}\n{line}\n{settings}{rest}")
            error = refused(file, "", table="to-site-b")
            assert str(error).replace(f"{site.folder}/", "") == message

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_every_key(self, site: Site, side: str) -> None:
        """The manual's tables have the keys that are known, and no others."""
        sections = {
            title: set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| ((?:`\w+`(?:, )?)+) \|", text))))
            for title, text in re.findall(r"(?m)^### `\[(.*?)\]`\n((?:(?!##).*\n)*)", MANUAL.read_text())
        }
        rows = re.findall(r"(?m)^\| ((?:`\w+`(?:, )?)+) \|.*\| (both|client|server) \|", MANUAL.read_text())
        sides = {key: of for keys, of in rows for key in re.findall(r"\w+", keys)}
        top = f"{site.kmes()}[failover]\n[pool]\n{CLIENT if side == 'client' else SERVER}"
        for title, name in {
            "kme.NAME": "kme.north",
            "failover": "failover",
            "pool": "pool",
            "tls.NAME": f"tls.{side}",
        }.items():
            error = refused(
                site.write(after(f"[{name}]", "zzzzzzzz = 1")(top)), "zzzzzzzz: is not known here"
            )
            known = set(error.problem.partition("known are ")[2].split(", "))
            assert known == {
                key for key in sections[title] if title != "tls.NAME" or sides[key] in ("both", side)
            }
