"""Whether a tag, the version of the package, the changelog and the citation agree: ``python ci/release.py v0.2.0``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def newest_change() -> str:
    """The version that the changelog names first."""
    return re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0]


def cited() -> str:
    return re.findall(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)[0]


def disagreements(tag: str) -> list[str]:
    """What differs from the version of the package, a line each."""
    ours = version()
    found = {"the tag": tag, "CHANGELOG.md": f"v{newest_change()}", "CITATION.cff": f"v{cited()}"}
    return [f"{where} says {said}, pyproject.toml v{ours}" for where, said in found.items() if said != f"v{ours}"]


if __name__ == "__main__":
    sys.exit("\n".join(disagreements(sys.argv[1])) or None)
