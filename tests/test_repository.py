"""Rules for the project's files."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import socket
import subprocess
import time
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from importlib.util import find_spec
from inspect import ismodule
from itertools import pairwise
from pathlib import Path

import pytest

import qkd_tls
from tests.support.paths import ROOT

pytestmark = pytest.mark.pure

PACKAGES = ("kms_client", "qkd_tls")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

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


# A name of ours behind "install": no index has it before the first release.
FROM_AN_INDEX = re.compile(
    r"""install\s+(?:-\S+\s+)*["'`]?(?:qkd[-_]tls|kms[-_]client)(?=["'`\s\[.,;:)]|$)|\bqkd[-_]tls\["""
)


def test_no_file_tells_to_install_from_an_index_what_none_has(project_files: list[Path]) -> None:
    found = []
    for path in project_files:
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FROM_AN_INDEX.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pip install NAME", True),
        ("pip install -U --pre\n'NAME[emulator]'", True),
        ("python -m pip install NAME.", True),
        ("with the extra emulator of NAME[emulator]", True),
        ("pip install '.[emulator]'\n$ NAME demo", False),
        ("pip install dist/NAME-0.1.0-py3-none-any.whl", False),
        ("pip install aiohttp numpy", False),
    ],
)
@pytest.mark.parametrize("name", ["qkd-tls", "qkd_tls"])
def test_what_tells_to_install_from_an_index(text: str, told: bool, name: str) -> None:
    assert bool(FROM_AN_INDEX.search(text.replace("NAME", name))) is told


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
    for node in [
        *tree.body,
        *(node for branch in tree.body if isinstance(branch, ast.If) for node in branch.body),
    ]:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_begin_with_a_verb_or_a_noun(name: str) -> None:
    """Of functions, ruff sees to it. Attributes have a string below them."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    strings = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    questions = re.compile(r"(What|Whether|Where|How|Which|When|Why|Who)(ever|soever)?\b")
    assert [text for text in strings if questions.match(text)] == []


def test_folders_of_tests_hold_tests_only() -> None:
    """What tests share is in `support`, and fixtures that folders share are in the one conftest.py."""
    folders = [
        path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name not in ("shim", "support")
    ]
    names = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")}
    assert [name for name in names if not re.search(r"/(test_\w+|__init__)\.py$", name)] == []


def classes_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]


def test_no_two_public_classes_have_one_name() -> None:
    names = Counter(name for path in SOURCES for name in classes_of(path))
    assert [name for name, number in names.items() if number > 1] == []


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it. All imports are absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), names=aliases):
                paths = {f"{module}.{alias.name}" for alias in aliases}
                names |= {path if path in MODULES else module for path in paths}
    return names


def test_no_module_imports_itself_through_others() -> None:
    # Raises CycleError, which names the circle.
    TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).prepare()


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


def test_a_pure_test_uses_no_socket_starts_no_program_and_does_not_sleep() -> None:
    with socket.socket() as sock:
        for impure in (
            lambda: sock.bind(("127.0.0.1", 0)),
            lambda: sock.connect(("127.0.0.1", 9)),
            lambda: subprocess.run(["true"], check=True),
            lambda: time.sleep(0),
        ):
            with pytest.raises(pytest.fail.Exception, match="this test is marked as pure, but led to"):
                impure()


# --- README.md, CONTRIBUTING.md, SECURITY.md

PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")
}


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^ *```(?:console|text|sh)?\n(.*?)^ *```", PAGES[page], re.MULTILINE | re.DOTALL)
    return re.findall(r"^ *\$ (.+)$", "\n".join(blocks), re.MULTILINE)


def test_the_pages_show_commands() -> None:
    assert "make demo" in commands("README.md")
    assert ".venv/bin/python -m pytest tests/qkd_tls -k truncation" in commands("CONTRIBUTING.md")


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_commands_of_the_pages_exist(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    words = shlex.split(command, comments=True)
    match [words[0].removeprefix(".venv/bin/"), *words[1:]]:
        case ["make", target]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
        case ["qkd-tls" | "qkd-kme" as program, subcommand, *options]:
            parser = parser_of(program)
            assert subcommand in parser
            assert {option for option in options if option.startswith("--")} <= parser[subcommand]
        case ["python", "-m", "pytest", *arguments]:
            assert [argument for argument in arguments if "/" in argument and not collects(argument)] == []
        case ["python" | "python3", "-m", module, *_]:
            assert find_spec(module) is not None
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", *arguments]:
            groups = {group for option, group in pairwise(arguments) if option == "--group"}
            assert groups <= set(project["dependency-groups"])
            for what, extra in re.findall(r"(\.|dist/\S+whl)(?:\[(\w+)\])?(?: |$)", " ".join(arguments)):
                assert what in (".", f"dist/qkd_tls-{qkd_tls.__version__}-py3-none-any.whl")
                assert extra in ("", *project["project"]["optional-dependencies"])
        case ["git", "clone" | "log", *_] | ["cd", _]:
            pass
        case _:
            pytest.fail(f"nobody knows whether this exists: {command}")


def collects(argument: str) -> bool:
    """Whether what pytest is told to run is there: a file or folder, and class and test in it."""
    path, *names = argument.split("::")
    if not (ROOT / path).exists():
        return False
    nodes: list[ast.AST] = [ast.parse((ROOT / path).read_text(encoding="utf-8"))] if names else []
    for name in names:
        inside = [child for node in nodes for child in ast.iter_child_nodes(node)]
        nodes = [child for child in inside if getattr(child, "name", None) == name]
    return not names or nodes != []


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


def links(page: str) -> set[tuple[str, str]]:
    """File and heading that a page links to."""
    return set(re.findall(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)", PAGES[page]))


@pytest.mark.parametrize(("target", "heading"), sorted({link for page in PAGES for link in links(page)}))
def test_links_of_the_pages_lead_to_files_and_headings(target: str, heading: str) -> None:
    assert (ROOT / target).exists()
    if heading:
        text = (ROOT / target).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]


def test_what_a_change_can_break_is_there() -> None:
    """Both columns of CONTRIBUTING.md's table; a name without a folder is in that of the first one of its cell."""
    found = re.search(
        r"^### What a change can break\n(.*?)^#", PAGES["CONTRIBUTING.md"], re.MULTILINE | re.DOTALL
    )
    assert found is not None
    rows = columns(found.group(1))
    assert len(rows) > 10
    for changed, run in rows:
        first, *others = re.findall(r"`([^`]+)`", changed)
        assert list(ROOT.glob(first)), first
        for other in others:
            folder = ROOT if "/" in other else (ROOT / first).parent
            assert list(folder.glob(other)), other
        tests = re.findall(r"`(tests/[^`]+)`", run)
        assert tests
        assert [one for one in tests if not (ROOT / one).exists()] == []


def test_make_targets_of_contributing_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make (\w+)`", PAGES["CONTRIBUTING.md"]))
    assert "check" in targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_python_code_of_the_readme_compiles(sign: str) -> None:
    blocks = re.findall(r"^```diff\n(.*?)^```", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        lines = [line[1:] for line in block.splitlines() if line[0] in (" ", sign)]
        compile("\n".join(lines), "README.md", "exec")


# --- docs/architecture.md

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = ("kms_client", "kms_client/emulator", "kms_client/emulator/link", "qkd_tls")


def section(heading: str) -> str:
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found.group(1)


def columns(text: str) -> list[list[str]]:
    """The cells of a page's table, without its head."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_architecture_names_all_that_is_in_a_folder(folder: str) -> None:
    """A module by its name, a folder with a slash; nothing twice, and nothing that is not there."""
    named = [name for first, *_ in columns(section(folder)) for name in re.findall(r"`([^`]+)`", first)]
    modules = {path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("__")}
    folders = {f"{path.relative_to(ROOT / folder).parts[0]}/" for path in (ROOT / folder).glob("*/*.*")}
    assert sorted(named) == sorted(modules | folders - {"__pycache__/"})


def test_the_architecture_sends_changes_to_paths_that_exist() -> None:
    rows = columns(section("Where to make which change"))
    paths = [path for _, second in rows for path in re.findall(r"`([\w./]+(?:\.py|\.md|/))`", second)]
    assert len(paths) > len(rows)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("folder", "uses"),
    [("kms_client", "kms_client"), ("kms_client/emulator/link", "kms_client.emulator.link")],
)
def test_imports_go_one_way(folder: str, uses: str) -> None:
    found = {module for path in (ROOT / folder).rglob("*.py") for module in imported(path)}
    ours = {module for module in found if module.partition(".")[0] in PACKAGES}
    assert ours
    assert {module for module in ours if module != uses and not module.startswith(f"{uses}.")} == set()


def test_commands_alone_use_the_emulator() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(module.startswith("kms_client.emulator") for module in imported(path))
    }
    assert {name for name in users if not name.startswith("kms_client/emulator/")} == {
        "kms_client/cli.py",
        "qkd_tls/demo/story.py",
    }


def test_terms_of_the_glossary_are_sorted_and_there_once() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [term.casefold() for term in re.findall(r"^(\S.*)\n: ", glossary, re.MULTILINE)]
    assert terms == sorted(set(terms))
