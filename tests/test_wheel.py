"""The wheel in an empty environment, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import qkd_tls
from tests.support.paths import ROOT
from tests.support.sizes import FULL

PACKAGES = ("kms_client", "qkd_tls")
Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of an empty environment in an empty directory."""
    away = tmp_path_factory.mktemp("away")
    venv.create(away / "environment")
    directory = away / "here"
    directory.mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = [str(away / "environment/bin" / command)]
        if command == "pip":
            # Ours, for the other environment: what is never imported need not be compiled.
            program = [sys.executable, "-m", "pip", "--python", str(away / "environment/bin/python")]
            arguments = (*arguments, "--no-compile")
        result = subprocess.run(
            [*program, *arguments],
            cwd=directory,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not list(directory.iterdir())
        return result

    return run


def test_what_is_in_the_packages(packages: tuple[Path, Path]) -> None:
    sdist, wheel = packages
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "kms_client",
        "qkd_tls",
        f"qkd_tls-{qkd_tls.__version__}.dist-info",
    }
    sources = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert sources | {"kms_client/py.typed", "qkd_tls/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "tests/test_wheel.py",
    } <= files


def test_the_wheel_runs_the_demo(packages: tuple[Path, Path], run: Run) -> None:
    """At full size; else its commands start."""
    wheel = packages[1]
    installed = run("pip", "install", "--quiet", str(wheel))
    assert installed.returncode == 0, installed.stderr

    assert run("qkd-tls", "--version").stdout == f"qkd-tls {qkd_tls.__version__}\n"
    without = run("qkd-tls", "demo")
    assert without.returncode == 2
    assert without.stderr == (
        "qkd-tls demo: the KME emulator needs aiohttp and NumPy; install them with: pip install aiohttp numpy\n"
    )

    installed = run("pip", "install", "--quiet", f"{wheel}[emulator]")
    assert installed.returncode == 0, installed.stderr
    assert "usage: qkd-kme" in run("qkd-kme", "--help").stdout
    if FULL:
        demo = run("qkd-tls", "demo")
        assert demo.returncode == 0, demo.stdout + demo.stderr
        assert "Everything was as it should be" in demo.stdout
