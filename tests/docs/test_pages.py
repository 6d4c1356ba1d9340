"""What stands on the pages, as far as that can be said without a framework; `mkdocs build --strict` checks the site."""

from __future__ import annotations

import ast
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from pages import BLOCKS, COMMANDS, PAGES, REPOSITORY, Block

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
PACKAGES = {"densemixer_adapters": REPOSITORY / "adapters", "densemixer_core": REPOSITORY}


def each(blocks: list[Block], *languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in blocks if not languages or block.language in languages]
    assert chosen
    return pytest.mark.parametrize("block", chosen, ids=str)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def named(text: str) -> list[str]:
    """What is in backticks, line by line, code blocks left out."""
    without_blocks = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", without_blocks)


def everything_named(pattern: str) -> set[tuple[str, str]]:
    """Page and name, for what matches in a command or in backticks."""
    codes = [(page, code) for page, text in TEXTS.items() for code in named(text)]
    codes += [(block.page, command) for block in COMMANDS for command in block.commands()]
    found = {(str(page.relative_to(REPOSITORY)), match) for page, code in codes for match in re.findall(pattern, code)}
    assert found
    return found


def test_the_readme_is_one_page() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


def test_all_ways_to_router_metrics_are_on_their_page() -> None:
    table = re.search(r"\| Router metrics \|.*?\n\n", TEXTS[REPOSITORY / "README.md"], re.DOTALL)
    assert table is not None
    ways = [named(row)[-1] for row in table[0].splitlines() if "metrics: true" in row]
    assert len(ways) > 2
    for way in ways:
        assert way in named(TEXTS[REPOSITORY / "docs" / "metrics.md"]), way


def test_no_block_of_code_is_overlooked() -> None:
    for page, text in TEXTS.items():
        fences = re.findall(r"^ *(?:```|~~~)", text, flags=re.MULTILINE)
        assert len(fences) == 2 * sum(block.page == page for block in BLOCKS), page


def test_the_costs_of_the_readme_are_those_of_the_page() -> None:
    """Which another test compares with the command."""
    printed = [block.text for block in COMMANDS if "$ densemixer cost" in block.text]
    short, long = ([line.split() for line in text.splitlines() if re.match(r"[01](\.\d+)? ", line)] for text in printed)
    rows = [(Fraction(a[0]), *a[1:4], b[2]) for a, b in zip(short, long, strict=True)]
    table = re.findall(r"^\| (1|1/\d+) \|(.*)\|$", TEXTS[REPOSITORY / "README.md"], flags=re.MULTILINE)
    assert [(Fraction(budget), *(cell.strip() for cell in cells.split("|"))) for budget, cells in table] == rows


@each(COMMANDS)
def test_a_command_is_run_by_a_test_or_needs_gpus(block: Block) -> None:
    if block.comment == "needs GPUs":
        return
    assert block.comment.startswith("run by "), (
        f"{block}: put a comment into the line above that names the test which runs this, <!-- run by FILE::TEST -->, "
        "or <!-- needs GPUs -->"
    )
    tests = re.findall(r"([\w./-]+\.py)::(\w+)", block.comment)
    assert tests, block
    for file, test in tests:
        assert file == "ci/noxfile.py" or test.startswith("test_"), block
        assert test in functions(REPOSITORY / file), f"{block}: no {test} in {file}"


@each(BLOCKS, "bash")
def test_shell_parses(block: Block) -> None:
    text = block.text
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}: {done.stderr}"


@each(BLOCKS, "yaml")
def test_yaml_parses(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict), block


@each(BLOCKS, "python")
def test_python_parses_and_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, filename=str(block))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                assert alias.name in defined_in(node.module), f"{block}: no {alias.name} in {node.module}"


def defined_in(module: str) -> set[str]:
    path = PACKAGES[module.split(".")[0]] / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_paths_are_there() -> None:
    folders = "adapters|benchmarks|ci|densemixer_adapters|densemixer_core|docs|examples|experiments|tests"
    for page, path in everything_named(rf"(?<![\w/.])(?:{folders})/[\w./-]*\w"):
        if "NAME" in path:
            continue  # stands for any
        where = "adapters/" if path.startswith("densemixer_adapters/") else ""
        assert (REPOSITORY / where / path).exists(), f"{page}: {path}"


def test_targets_of_make_are_there() -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    for page, target in everything_named(r"\bmake ([a-z][\w-]*)"):
        assert target in targets, f"{page}: make {target}"


def test_sessions_are_there() -> None:
    sessions = functions(REPOSITORY / "ci" / "noxfile.py")
    for page, session in everything_named(r"nox (?:-f \S+ )?-s \"?(\w+)"):
        assert session in sessions, f"{page}: {session}"


def test_subcommands_are_there() -> None:
    cli = PACKAGES["densemixer_adapters"] / "densemixer_adapters" / "cli"
    commands = set.union(*(functions(cli / f"{name}.py") for name in ("app", "launch", "preflight")))
    for page, command in everything_named(r"^densemixer ([a-z]\w*)"):
        assert command in commands, f"{page}: densemixer {command}"


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    without_blocks = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_blocks, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
