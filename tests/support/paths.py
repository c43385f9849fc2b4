"""Where the project's files are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"
EXAMPLES: Final = ROOT / "examples"
VECTORS: Final = ROOT / "interop" / "vectors"
