"""No module imports, be it in a function or for its types, one that imports it in turn."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"densemixer_core": ROOT, "densemixer_adapters": ROOT / "adapters"}


def module_of(file: Path, base: Path) -> str:
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circles(package: str) -> None:
    base = PACKAGES[package]
    files = {module_of(file, base): file for file in (base / package).rglob("*.py")}
    graph = {
        name: {other for other in imported(ast.parse(file.read_text()), set(files)) if other in files and other != name}
        for name, file in files.items()
    }
    assert len(graph) > 5
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which shows the circle
