"""What `make gpu` calls, without a GPU: its parts exist, it ends what hangs, and a dry run goes through."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from installs import is_installed

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
import gpu
from gpu_parts import PARTS, Part

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "ci" / "gpu.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)


def part(code: str, limit: int = 60, **options: tuple[str, ...]) -> Part:
    return Part("some", ("-c", code), limit, "", **options)


@pytest.mark.skipif(not is_installed("triton"), reason="needs triton; run `nox -s transformers`")
def test_a_dry_run(tmp_path: Path) -> None:
    """Of all parts; what it skips runs in `make test` by itself."""
    done = call("--dry-run", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + "".join(log.read_text() for log in tmp_path.glob("*.log"))
    with (tmp_path / "parts.csv").open() as file:
        parts = list(csv.DictReader(file))
    assert {row["machine"] for row in parts} == {"CPU, dry run"}
    assert [(row["part"], row["state"]) for row in parts] == [
        (one.name, "skipped" if one.dry is None else "ok") for one in PARTS
    ]
    with (tmp_path / "kernel.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["large product", "fused kernel", "all at once", "one by one"]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) < 1e-5


def test_it_wants_a_gpu(tmp_path: Path) -> None:
    done = call("--output", tmp_path)
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr


def test_parts_have_names_of_their_own_and_those_on_the_page() -> None:
    names = [one.name for one in PARTS]
    page = (ROOT / "docs" / "gpu.md").read_text()
    table = [cell for line in page.splitlines() if line.startswith("| `") for cell in line.split("|")[1].split(", ")]
    assert len({*names}) == len(names)
    assert {cell.strip(" `") for cell in table} == {*names}


@pytest.mark.parametrize("one", [one for one in PARTS if "pytest" in one.command], ids=lambda one: one.name)
def test_each_part_selects_tests(one: Part) -> None:
    """Each word that it chooses by is there, in the tests or in the table of the ways of running."""
    (path,) = (ROOT / argument for argument in one.command if argument.startswith("tests/"))
    files = [path] if path.suffix else [*path.glob("test_*.py")]
    files += path.parent.glob("matrix.py")
    text = "".join(file.read_text() for file in files)
    assert "def test_" in text
    wanted = one.command[one.command.index("-k") + 1] if "-k" in one.command else ""
    for word in set(re.findall(r"\w+", wanted)) - {"or", "and", "not"}:
        assert word in text, word


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True);"
        "time.sleep(600)"
    )
    start = time.monotonic()
    outcome = gpu.run(part(code, limit=5), tmp_path, dry=False)  # time for Python to start, where others work
    assert time.monotonic() - start < 60
    assert (outcome.state, outcome.found) == ("ended", "took more than 5 s, see some.log")
    child = int((tmp_path / "some.log").read_text())
    while runs(child):  # what is killed takes a moment to be gone
        assert time.monotonic() - start < 60
        time.sleep(0.05)


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_becomes_of_a_part(tmp_path: Path) -> None:
    cases = {
        "ok": part("print('first'); print('== 3 passed ==')"),
        "failed": part("print('first'); raise SystemExit('last')"),
        "skipped": part("print('never')", needs=("sys", "does_not_exist")),
    }
    found = [gpu.run(one, tmp_path, dry=False) for one in cases.values()]
    assert [outcome.state for outcome in found] == [*cases]
    assert [outcome.found for outcome in found] == ["3 passed", "last", "needs does_not_exist"]
    assert [line.split()[0] for line in gpu.table(found).splitlines()] == [*cases]


def test_parts_find_the_packages_of_this_repository_and_no_gpu_in_a_dry_run(tmp_path: Path) -> None:
    found = "importlib.util.find_spec('densemixer_core').origin, os.environ.get('TEST_DEVICE')"
    code = f"import importlib.util, os; print({found})"
    one = Part("some", ("-c", code), 60, "", dry=("-c", code))
    expected = str(ROOT / "densemixer_core" / "__init__.py")
    assert gpu.run(one, tmp_path, dry=False).found == f"{expected} cuda"
    assert gpu.run(one, tmp_path, dry=True).found == f"{expected} None"
