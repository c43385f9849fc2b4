"""Explicit KEMs: ML-KEM for real, liboqs by a double, by a stub library, and for real where it is installed."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import ClassVar, Self

import pytest
from cryptography.exceptions import UnsupportedAlgorithm

from qkd_tls import kems
from qkd_tls.kems import KEMError, UnsupportedKEM, encapsulate, generate, names
from tests.support.memory import World
from tests.support.requirements import C_COMPILER, LIBOQS, needs

MLKEM = {"ML-KEM-768": (1184, 1088), "ML-KEM-1024": (1568, 1568)}


def forget() -> None:
    for cached in (names, kems._liboqs_names, kems._oqs):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing remembered of what is available, before the test and after it."""
    forget()
    yield
    monkeypatch.undo()
    forget()


class ToyKEM:
    """Behaves as `oqs.KeyEncapsulation`, and counts what is not freed. Protects nothing."""

    living: ClassVar[int] = 0
    SIZES: ClassVar[dict[str, tuple[int, int]]] = {
        "ML-KEM-768": (1184, 1088),
        "Toy": (32, 24),
        "Big-Key": (45_001, 100),
        "Big-Ciphertext": (100, 45_001),
    }

    def __init__(self, name: str) -> None:
        public_key, ciphertext = self.SIZES[name]
        self.details = {"length_public_key": public_key, "length_ciphertext": ciphertext}
        ToyKEM.living += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def generate_keypair(self) -> bytes:
        self.secret_key = secrets.token_bytes(self.details["length_public_key"])
        return self.secret_key

    def encap_secret(self, public_key: bytes) -> tuple[bytes, bytes]:
        if public_key == bytes(self.details["length_public_key"]):
            raise RuntimeError("Can not encapsulate secret")
        ciphertext = secrets.token_bytes(self.details["length_ciphertext"])
        return ciphertext, public_key + ciphertext

    def decap_secret(self, ciphertext: bytes) -> bytes:
        if ciphertext == bytes(self.details["length_ciphertext"]):
            raise RuntimeError("Can not decapsulate secret")
        return self.secret_key + ciphertext

    def free(self) -> None:
        ToyKEM.living -= 1


@pytest.fixture
def _toy(_fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(KeyEncapsulation=ToyKEM, get_enabled_kem_mechanisms=lambda: tuple(ToyKEM.SIZES))
    monkeypatch.setattr(kems, "_oqs", lambda: module)
    monkeypatch.setattr(ToyKEM, "living", 0)


@pytest.mark.parametrize("name", MLKEM)
class TestMLKEM:
    def test_round_trip(self, name: str) -> None:
        key = generate(name)
        ciphertext, secret = encapsulate(name, key.encapsulation_key)
        assert (len(key.encapsulation_key), len(ciphertext)) == MLKEM[name]
        assert len(secret) == 32
        assert key.decapsulate(ciphertext) == secret

    def test_fresh_each_time(self, name: str) -> None:
        first, second = generate(name), generate(name)
        assert first.encapsulation_key != second.encapsulation_key
        one, other = (encapsulate(name, first.encapsulation_key) for _ in range(2))
        assert one[0] != other[0]
        assert one[1] != other[1]

    def test_a_ciphertext_for_another_key_gives_another_secret(self, name: str) -> None:
        ciphertext, secret = encapsulate(name, generate(name).encapsulation_key)
        assert generate(name).decapsulate(ciphertext) != secret

    def test_a_key_is_for_one_use(self, name: str) -> None:
        key = generate(name)
        ciphertext, _ = encapsulate(name, key.encapsulation_key)
        assert repr(key) == f"<KEMKey {name} unused>"
        key.decapsulate(ciphertext)
        assert repr(key) == f"<KEMKey {name} used>"
        with pytest.raises(KEMError, match="used already"):
            key.decapsulate(ciphertext)

    @pytest.mark.parametrize("change", [-1, 1, -1088])
    def test_size_of_the_ciphertext(self, name: str, change: int) -> None:
        key = generate(name)
        with pytest.raises(KEMError, match=f"no {name} ciphertext"):
            key.decapsulate(bytes(MLKEM[name][1] + change))
        # The attempt used the key up.
        with pytest.raises(KEMError, match="used already"):
            key.decapsulate(bytes(MLKEM[name][1]))

    def test_bad_encapsulation_key(self, name: str) -> None:
        size = MLKEM[name][0]
        # All ones are coefficients above the modulus (FIPS 203 section 7.2).
        for key in (b"", bytes(size - 1), bytes(size + 1), b"\xff" * size):
            with pytest.raises(KEMError, match=f"{len(key)} bytes that are no {name} encapsulation key"):
                encapsulate(name, key)

    @pytest.mark.usefixtures("_fresh")
    def test_openssl_without_it(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        key = generate(name).encapsulation_key

        def unsupported(_: object = None) -> None:
            raise UnsupportedAlgorithm("no ML-KEM")

        lacking = SimpleNamespace(generate=unsupported, from_public_bytes=unsupported)
        monkeypatch.setattr(kems, "_MLKEM", {**kems._MLKEM, name: (lacking, lacking)})
        monkeypatch.setattr(kems, "_oqs", lambda: None)
        assert names() == tuple(other for other in MLKEM if other != name)
        for use in (lambda: generate(name), lambda: encapsulate(name, key)):
            with pytest.raises(UnsupportedKEM, match=f"'{name}' is not available here; available: ML-KEM"):
                use()


@pytest.mark.filterwarnings("ignore:liboqs version")
def test_names() -> None:
    assert names()[:2] == tuple(MLKEM)
    assert names() is names()


@pytest.mark.filterwarnings("ignore:liboqs version")
@pytest.mark.parametrize("name", ["", "ml-kem-768", "ML-KEM-767", "x\n"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnsupportedKEM, match="is not available here; available: ML-KEM-768"):
        generate(name)
    with pytest.raises(UnsupportedKEM):
        encapsulate(name, b"")


@pytest.mark.usefixtures("_toy")
class TestLiboqsByADouble:
    def test_names(self) -> None:
        """ML-KEM comes from `cryptography`; what does not fit into a control message is left out."""
        assert names() == ("ML-KEM-768", "ML-KEM-1024", "Toy")
        assert ToyKEM.living == 0

    def test_round_trip(self) -> None:
        key = generate("Toy")
        ciphertext, secret = encapsulate("Toy", key.encapsulation_key)
        assert ToyKEM.living == 1
        assert key.decapsulate(ciphertext) == secret
        assert ToyKEM.living == 0
        with pytest.raises(KEMError, match="used already"):
            key.decapsulate(ciphertext)
        del key
        gc.collect()
        assert ToyKEM.living == 0

    def test_an_unused_key_is_freed(self) -> None:
        key = generate("Toy")
        assert ToyKEM.living == 1
        del key
        gc.collect()
        assert ToyKEM.living == 0

    @pytest.mark.parametrize("ciphertext", [b"", bytes(23), bytes(25), bytes(24)])
    def test_bad_ciphertext(self, ciphertext: bytes) -> None:
        key = generate("Toy")
        with pytest.raises(KEMError, match="no Toy ciphertext"):
            key.decapsulate(ciphertext)
        assert ToyKEM.living == 0

    @pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), bytes(32)])
    def test_bad_encapsulation_key(self, key: bytes) -> None:
        with pytest.raises(KEMError, match="no Toy encapsulation key"):
            encapsulate("Toy", key)
        assert ToyKEM.living == 0

    @pytest.mark.parametrize("name", ["Big-Key", "Big-Ciphertext", "Other"])
    def test_what_is_left_out_is_unsupported(self, name: str) -> None:
        with pytest.raises(UnsupportedKEM):
            generate(name)
        with pytest.raises(UnsupportedKEM):
            encapsulate(name, b"")


@pytest.mark.usefixtures("_fresh")
class TestLookup:
    @pytest.fixture(autouse=True)
    def _no_system_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
        monkeypatch.setenv("OQS_INSTALL_PATH", str(tmp_path))

    @pytest.mark.parametrize(
        ("system", "files"),
        [
            ("Linux", ["lib/liboqs.so", "lib64/liboqs.so"]),
            ("FreeBSD", ["lib/liboqs.so", "lib64/liboqs.so"]),
            ("Darwin", ["lib/liboqs.dylib", "lib64/liboqs.dylib"]),
            ("Windows", ["bin/oqs.dll", "bin/liboqs.dll"]),
        ],
    )
    def test_paths(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, files: list[str]
    ) -> None:
        monkeypatch.setattr(platform, "system", lambda: system)
        assert list(kems._liboqs_paths()) == [str(tmp_path / file) for file in files]

    def test_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("OQS_INSTALL_PATH")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        assert all(path.startswith(str(tmp_path / "_oqs" / "lib")) for path in kems._liboqs_paths())

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("OQS_INSTALL_PATH")
        monkeypatch.setattr(Path, "home", no_home)
        assert not kems._liboqs_loads()

    def test_system_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"/nowhere/{name}.so")
        assert list(kems._liboqs_paths())[:2] == ["/nowhere/oqs.so", "/nowhere/liboqs.so"]
        assert not kems._liboqs_loads()

    def test_the_second_path_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(path: str) -> None:
            if "lib64" not in path:
                raise OSError("cannot open shared object file")

        monkeypatch.setattr(platform, "system", lambda: "Linux")
        monkeypatch.setattr(ctypes, "CDLL", load)
        assert kems._liboqs_loads()

    def test_a_file_that_is_no_library(self, tmp_path: Path) -> None:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "liboqs.so").write_bytes(b"not ELF")
        assert not kems._liboqs_loads()
        assert names() == tuple(MLKEM)

    def test_package_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(kems, "_liboqs_loads", lambda: pytest.fail("looked for nothing"))
        assert names() == tuple(MLKEM)

    @pytest.mark.parametrize("error", [AttributeError, RuntimeError, SystemExit])
    def test_library_that_does_not_fit_the_package(
        self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        def fail(_: str) -> None:
            raise error("undefined symbol")

        self._installed(monkeypatch)
        monkeypatch.setattr(importlib, "import_module", fail)
        assert names() == tuple(MLKEM)

    def test_another_package_of_that_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._installed(monkeypatch)
        monkeypatch.setattr(importlib, "import_module", lambda _: SimpleNamespace())
        assert names() == tuple(MLKEM)

    def test_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = SimpleNamespace(KeyEncapsulation=ToyKEM, get_enabled_kem_mechanisms=lambda: ("Toy",))
        self._installed(monkeypatch)
        monkeypatch.setattr(importlib, "import_module", lambda _: module)
        assert names() == (*MLKEM, "Toy")

    @staticmethod
    def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
        monkeypatch.setattr(kems, "_liboqs_loads", lambda: True)


# In a process of its own, for what is imported and loaded cannot be undone.


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where `git` and `cmake` only leave a mark, and liboqs is looked for in an empty folder."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("git", "cmake"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/download-started\nexit 1\n")
        (tools / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "OQS_INSTALL_PATH": str(tmp_path / "liboqs"),
    }


def run(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("oqs") is None, reason="the package liboqs-python is not installed"
)
needs_no_library = pytest.mark.skipif(
    ctypes.util.find_library("oqs") is not None, reason="liboqs is among this system's libraries"
)


@needs_package
@needs_no_library
class TestNoDownload:
    def test_import_of_the_package_would_start_one(self, environment: dict[str, str], tmp_path: Path) -> None:
        """That the mark is left, so that the next test means something."""
        run("import time; time.sleep = lambda _: None; import oqs", environment)
        assert (tmp_path / "download-started").exists()

    def test_names_starts_none(self, environment: dict[str, str], tmp_path: Path) -> None:
        script = (
            "import sys; from qkd_tls import kems; assert 'oqs' not in sys.modules; print(kems.names());"
            "assert 'oqs' not in sys.modules"
        )
        result = run(script, environment)
        assert result.stderr == ""
        assert result.stdout.strip() == str(tuple(MLKEM))
        assert not (tmp_path / "download-started").exists()


STUB = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct {
    const char *method_name, *alg_version;
    uint8_t claimed_nist_level, ind_cca;
    size_t length_public_key, length_secret_key, length_ciphertext, length_shared_secret, length_seed;
    void *keypair_derand, *keypair, *encaps, *decaps;
} KEM;
static const char *const NAMES[] = {"Stub", "Stub-Too-Big", "Stub-Disabled"};
void OQS_init(void) {}
const char *OQS_version(void) { return VERSION; }
int OQS_KEM_alg_count(void) { return 3; }
const char *OQS_KEM_alg_identifier(size_t i) { return NAMES[i]; }
int OQS_KEM_alg_is_enabled(const char *name) { return strcmp(name, "Stub-Disabled") != 0; }
KEM *OQS_KEM_new(const char *name) {
    int big = strcmp(name, "Stub") != 0;
    KEM *kem = calloc(1, sizeof *kem);
    kem->method_name = NAMES[big];
    kem->alg_version = "1";
    kem->length_public_key = big ? 261120 : 32;
    kem->length_secret_key = kem->length_shared_secret = 32;
    kem->length_ciphertext = 24;
    return kem;
}
void OQS_KEM_free(KEM *kem) { free(kem); }
int OQS_KEM_keypair(const KEM *kem, uint8_t *pk, uint8_t *sk) {
    for (size_t i = 0; i < 32; i++) pk[i] = sk[i] = (uint8_t)(i + 1);
    return 0;
}
int OQS_KEM_decaps(const KEM *kem, uint8_t *ss, const uint8_t *ct, const uint8_t *sk) {
    for (size_t i = 0; i < 32; i++) ss[i] = sk[i] ^ ct[i % 24];
    return 0;
}
int OQS_KEM_encaps(const KEM *kem, uint8_t *ct, uint8_t *ss, const uint8_t *pk) {
    memset(ct, 7, 24);
    return OQS_KEM_decaps(kem, ss, ct, pk);
}
void OQS_MEM_cleanse(void *p, size_t n) { memset(p, 0, n); }
#define UNUSED(name) int name(void) { return 0; }
UNUSED(OQS_KEM_keypair_derand) UNUSED(OQS_MEM_secure_free)
UNUSED(OQS_SIG_alg_count) UNUSED(OQS_SIG_alg_identifier) UNUSED(OQS_SIG_alg_is_enabled) UNUSED(OQS_SIG_free)
UNUSED(OQS_SIG_new) UNUSED(OQS_SIG_supports_ctx_str)
UNUSED(OQS_SIG_STFL_alg_count) UNUSED(OQS_SIG_STFL_alg_identifier) UNUSED(OQS_SIG_STFL_alg_is_enabled)
UNUSED(OQS_SIG_STFL_SECRET_KEY_SET_store_cb) UNUSED(OQS_SIG_STFL_SECRET_KEY_deserialize)
UNUSED(OQS_SIG_STFL_SECRET_KEY_free) UNUSED(OQS_SIG_STFL_SECRET_KEY_new)
UNUSED(OQS_SIG_STFL_SECRET_KEY_serialize) UNUSED(OQS_SIG_STFL_free) UNUSED(OQS_SIG_STFL_keypair)
UNUSED(OQS_SIG_STFL_new) UNUSED(OQS_SIG_STFL_sign) UNUSED(OQS_SIG_STFL_sigs_remaining)
UNUSED(OQS_SIG_STFL_sigs_total) UNUSED(OQS_SIG_STFL_verify)
"""

ROUND_TRIP = """
import gc
from qkd_tls import kems
print(kems.names())
key = kems.generate("Stub")
ciphertext, secret = kems.encapsulate("Stub", key.encapsulation_key)
assert (len(key.encapsulation_key), len(ciphertext), len(secret)) == (32, 24, 32)
assert key.decapsulate(ciphertext) == secret
for misuse in (
    lambda: key.decapsulate(ciphertext),
    lambda: kems.generate("Stub").decapsulate(ciphertext[:-1]),
    lambda: kems.encapsulate("Stub", key.encapsulation_key + b"x"),
):
    try:
        misuse()
    except kems.KEMError:
        continue
    raise AssertionError("no KEMError")
for _ in range(100):
    kems.generate("Stub")
gc.collect()
"""


@needs_package
@needs_no_library
@needs(C_COMPILER, shutil.which("cc") is not None)
@pytest.mark.skipif(sys.platform != "linux", reason="the stub library is built for Linux")
@pytest.mark.parametrize("folder", ["lib", "lib64"])
def test_the_real_package_on_a_stub_library(environment: dict[str, str], tmp_path: Path, folder: str) -> None:
    """Lookup, import and calls of liboqs-python as it is; only the C library behind it is a stub."""
    version = importlib.metadata.version("liboqs-python")
    library = tmp_path / "liboqs" / folder / "liboqs.so"
    library.parent.mkdir(parents=True)
    compiler = ["cc", "-shared", "-fPIC", f'-DVERSION="{version}"', "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=STUB, text=True, check=True)

    result = run(ROUND_TRIP, environment)

    assert result.stderr == ""
    assert result.stdout.strip() == str((*MLKEM, "Stub"))
    assert not (tmp_path / "download-started").exists()


# liboqs-python warns where its version and that of liboqs differ.
@pytest.mark.filterwarnings("ignore:liboqs version")
def test_every_kem_of_a_real_liboqs() -> None:
    liboqs_names = kems._liboqs_names()
    if not liboqs_names:
        assert "OQS_INSTALL_PATH" not in os.environ, "the liboqs in OQS_INSTALL_PATH is not usable"
        raise LIBOQS.missing()
    for name in liboqs_names:
        key = generate(name)
        ciphertext, secret = encapsulate(name, key.encapsulation_key)
        assert key.decapsulate(ciphertext) == secret
        assert [info.kem for info in World(client={"kem": name}).connect().infos] == [name, name]
