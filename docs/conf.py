"""Settings of `sphinx-build -W -n --keep-going docs docs/_build/html`, which needs no network."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util import inspect

_ROOT = Path(__file__).resolve().parent.parent

project = "qkd-tls"
author = "the qkd-tls authors"
copyright = author
release = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"qkd-tls {release}"
html_static_path = ["_static"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# The docstrings write code in single backticks.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

nitpicky = True
nitpick_ignore_regex = [
    # The standard library and the packages beneath: there is no inventory of them offline.
    (
        r"py:.*",
        r"(ssl|socket|os|io|enum|collections|contextlib|dataclasses|pathlib|threading|types|typing)(\..*)?",
    ),
    (r"py:.*", r"(requests|urllib3|cryptography|OpenSSL|asyncio|_ssl)(\..*)?"),
    (r"py:.*", r"(aiohttp|anyio|httpx|httpcore|hypercorn|redis|uvicorn|yarl|multidict)(\..*)?"),
    (r"py:class", r"(Trace|ClientSession)"),
    (
        r"py:exc",
        r"(SSL\w*Error|\w*Warning|OSError|TimeoutError|ValueError|TypeError|RuntimeError|ImportError)",
    ),
    (
        r"py:class",
        r"(StrPath|ReadableBuffer|WriteableBuffer|Buffer|PathLike|Purpose|SSLContext|SSLSocket|SSLObject)",
    ),
    (r"py:class", r"(MemoryBIO|VerifyMode|VerifyFlags|TLSVersion|Options|SSLSession|[Ss]ocket|Any|Self)"),
    # "Raises: A, B." without a description ends in a full stop.
    (r"py:exc", r"\w+\."),
    # Our own modules that are not part of the public API, and private names.
    (r"py:.*", r"qkd_tls\.(\w+)\..*"),
    (r"py:.*", r"kms_client\.(\w+)\..*"),
    (r"py:.*", r"(.*\.)?_\w+"),
]

_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")


def _fit_readme(_app: Any, path: Path, _parent: str, content: list[str]) -> None:
    """Fit README.md, the front page: strip docs/ from its links, and drop links out of the manual."""

    def fitted(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if target.startswith("docs/"):
            return f"{image}[{text}]({target.removeprefix('docs/')})"
        if target.startswith(("#", "http:", "https:", "mailto:")):
            return link[0]
        return text

    if Path(path).name == "README.md":
        content[0] = _LINK.sub(fitted, content[0])


def _split_sections(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read "Args:" and "Raises:". As an extension, napoleon takes "Name: ..." under an attribute for a type."""
    if what not in ("attribute", "data", "property"):
        config = Config(
            napoleon_numpy_docstring=False,
            napoleon_use_ivar=True,
            napoleon_custom_sections=[("A request raises", "params_style")],
        )
        lines[:] = GoogleDocstring(lines, config, app, what, name, obj, options).lines()


def _init_signature(
    _app: Any, what: str, _name: str, obj: Any, _options: Any, signature: str | None, _returns: Any
) -> tuple[str, None] | None:
    """Show the arguments of `__init__` if `__new__` passes everything on ("**_")."""
    if what != "class" or "**_" not in (signature or ""):
        return None
    taken = inspect.signature(obj.__init__, bound_method=True)
    return inspect.stringify_signature(taken, unqualified_typehints=True), None


def setup(app: Any) -> None:
    """Connect the handlers; called by Sphinx."""
    app.connect("autodoc-process-signature", _init_signature)
    app.connect("autodoc-process-docstring", _split_sections)
    app.connect("include-read", _fit_readme)
