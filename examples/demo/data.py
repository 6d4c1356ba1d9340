"""Instruction data: rows of a JSON-lines file, or functions of Python's standard library and their docstrings."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from settings import DemoError

HELD_OUT_SHARE = 0.1
QUESTION = "Write the docstring of this function.\n\n"
# Tests, tables and text; and what isn't the standard library's own.
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"}
SKIPPED |= {"site-packages", "dist-packages"}


class Example(NamedTuple):
    """One row. Rows of the same source stay on the same side of the held-out split."""

    prompt: str
    completion: str
    source: str


def library_files() -> list[Path]:
    """The source files of the standard library of this interpreter, sorted.

    Raises:
        DemoError: It came without source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if SKIPPED.isdisjoint(file.relative_to(root).parts))
    if not files:
        raise DemoError(f"no source of the standard library in {root}; give your own --model and --data")
    return files


def library_examples(files: list[Path]) -> list[Example]:
    """Every function with a docstring: its source without the docstring, and the docstring."""
    return [
        Example(QUESTION + code, docstring, str(file))
        for file in files
        for code, docstring in _functions(file.read_text(encoding="utf-8"))
    ]


def _functions(source: str) -> Iterator[tuple[str, str]]:
    lines = source.splitlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring, first = ast.get_docstring(node), node.body[0]
        # A function that is nothing but its docstring has no code to describe; one written on one line is rare.
        if not docstring or len(node.body) == 1 or first.lineno == node.lineno:
            continue
        code = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        yield textwrap.dedent("\n".join(code)), docstring


def read_examples(path: Path) -> list[Example]:
    """Rows of a JSON-lines file with the strings "prompt" and "completion", and optionally "source".

    Raises:
        DemoError: The file is missing, or a line is malformed. The message gives its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"can't read the data: {error}") from None
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _row(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DemoError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DemoError(f"{where}: must be an object with the keys prompt and completion, got {line.strip()[:60]}")
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise DemoError(f'{where}: "{key}" must be a non-empty string, got {row.get(key)!r}')
    return Example(row["prompt"], row["completion"], str(row.get("source", row["prompt"])))


def write_examples(examples: list[Example], path: Path) -> None:
    """The counterpart of `read_examples`."""
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples), encoding="utf-8")


def split(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, shuffled, no source in both.

    Raises:
        DemoError: There are too few sources to split.
    """
    examples = list(dict.fromkeys(examples))
    sources = sorted({example.source for example in examples})
    if len(sources) < 2:
        raise DemoError(f"the data has {len(sources)} distinct sources (or prompts); it takes 2 to hold some out")
    shuffle = random.Random(seed)
    shuffle.shuffle(sources)
    shuffle.shuffle(examples)
    held_out = set(sources[: max(1, round(HELD_OUT_SHARE * len(sources)))])
    return (
        [example for example in examples if example.source not in held_out],
        [example for example in examples if example.source in held_out],
    )
