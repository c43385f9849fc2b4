"""Rules for the project's files."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import socket
import subprocess
import tomllib
from inspect import ismodule
from pathlib import Path

import pytest

import qkd_tls
from tests.support.paths import ROOT

pytestmark = pytest.mark.pure

PACKAGES = ("kms_client", "qkd_tls")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Written so that this file does not match itself.
FORBIDDEN = re.compile(
    r"/wor[k]/|/roo[t]/|/hom[e]/\w|/User[s]/\w|[/.]pyen[v]\b"
    r"|pypi\.or[g]|pythonhosted\.or[g]|registry\.npmj[s]|artifactor[y]|index-ur[l]"
)


@pytest.fixture(scope="module")
def project_files() -> list[Path]:
    result = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_a_registry(project_files: list[Path]) -> None:
    found = []
    for path in project_files:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


def test_text_files_end_in_one_newline_and_have_no_trailing_spaces(project_files: list[Path]) -> None:
    found = []
    for path in project_files:
        data = path.read_bytes()
        if b"\0" not in data and data and (not data.endswith(b"\n") or data.endswith(b"\n\n")):
            found.append(f"{path.relative_to(ROOT)}: end")
        if path.suffix in (".py", ".md", ".toml") and re.search(rb"[ \t]\n", data):
            found.append(f"{path.relative_to(ROOT)}: trailing spaces")
    assert found == []


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES
    if path.name != "__main__.py"
}


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_complete(name: str) -> None:
    """A module offers what it defines; a package offers, beside modules, all that has no underscore."""
    module = importlib.import_module(name)
    exported = module.__all__
    assert list(exported) == sorted(exported, key=sorting_key)
    if MODULES[name].name == "__init__.py":
        public = {entry for entry, value in vars(module).items() if entry[0] != "_" and not ismodule(value)}
        assert public == set(exported)
    else:
        assert set(exported) <= definitions(ast.parse(MODULES[name].read_text(encoding="utf-8")))


def sorting_key(name: str) -> tuple[int, str]:
    """As ruff sorts `__all__`: constants, classes, the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def definitions(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert qkd_tls.__version__ == project["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == project["version"]


def test_the_oldest_dependencies_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    pins = [requirement.replace(">=", "==") for group in groups for requirement in group]
    oldest = (ROOT / "tests" / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in oldest if not line.startswith("#")] == sorted(pins, key=str.lower)


def test_a_pure_test_uses_no_socket_and_starts_no_program() -> None:
    with socket.socket() as sock:
        for impure in (
            lambda: sock.bind(("127.0.0.1", 0)),
            lambda: sock.connect(("127.0.0.1", 9)),
            lambda: subprocess.run(["true"], check=True),
        ):
            with pytest.raises(pytest.fail.Exception, match="this test is marked as pure, but led to"):
                impure()


# --- README.md


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```(?:console|text|sh)?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\$ (.+)$", "\n".join(blocks), re.MULTILINE)


def test_the_readme_shows_commands() -> None:
    assert "make demo" in readme_commands()


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_exist(command: str) -> None:
    words = command.split("#")[0].split()
    match words:
        case ["make", target]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
        case ["qkd-tls" | "qkd-kme" as program, subcommand, *options]:
            parser = parser_of(program)
            assert subcommand in parser
            assert {option for option in options if option.startswith("--")} <= parser[subcommand]
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", *_] | ["git", "clone", *_] | ["cd", _]:
            pass
        case _:
            pytest.fail(f"nobody knows whether this exists: {command}")


def parser_of(program: str) -> dict[str, set[str]]:
    """The options of each subcommand, as its `--help` shows them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"][program].partition(":")
    main = getattr(importlib.import_module(module), function)
    options: dict[str, set[str]] = {}
    with pytest.MonkeyPatch.context() as patch:

        def parse_args(self: argparse.ArgumentParser, *_: object) -> None:
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    for name, parser in action.choices.items():
                        options[name] = set(parser._option_string_actions)
            raise SystemExit(0)

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(SystemExit):
            main([])
    return options


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:|#)([^)\s#]+)", README))))
def test_links_of_the_readme_lead_to_files(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_python_code_of_the_readme_compiles(sign: str) -> None:
    blocks = re.findall(r"^```diff\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        lines = [line[1:] for line in block.splitlines() if line[0] in (" ", sign)]
        compile("\n".join(lines), "README.md", "exec")
