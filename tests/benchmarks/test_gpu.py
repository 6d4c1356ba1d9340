"""What `make gpu` calls, without a GPU: its parts exist, it ends what hangs, and a dry run goes through."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from installs import is_installed

sys.path.insert(0, str(Path(__file__).parents[2] / "ci"))
import gpu
from gpu_parts import PARTS, Part

ROOT = Path(__file__).parents[2]


def call(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **settings}
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


def test_the_page_says_how_long_the_first_parts_may_take() -> None:
    limit = sum(one.limit for one in PARTS[:4])
    assert f"first four parts in at most {limit // 60} minutes" in (ROOT / "docs" / "gpu.md").read_text()


def test_it_wants_a_gpu(tmp_path: Path) -> None:
    done = call("--output", tmp_path)
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit status -11"),
        ("raise ImportError('libcudart.so.13: not found')", "libcudart.so.13: not found"),
        (
            "import types, warnings; warnings.warn('The NVIDIA driver on your system is too old');"
            "cuda = types.SimpleNamespace(is_available=lambda: False)",
            "The NVIDIA driver on your system is too old",
        ),
    ],
    ids=["it dies", "it raises", "it warns"],
)
def test_why_torch_has_no_gpu(torch: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(torch)
    done = call("--output", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert said in done.stderr


def test_where_python_leaves_out_the_folder_of_a_program(tmp_path: Path) -> None:
    done = call("--dry-run", "--parts", "OLMoE", "--output", tmp_path, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr


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


SLEEPS = "import time; print('waits', flush=True); time.sleep(600)"
# A child with a session of its own, as torchrun gives its workers, whose parent ends before the part does.
ORPHAN = f"import subprocess; subprocess.run(['sh', '-c', 'setsid sleep 600 & echo $!']); {SLEEPS}"


def started(output: Path, one: Part) -> subprocess.Popen[str]:
    """`main` with one part, and nothing of a GPU."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'ci')!r}); import gpu; Part = gpu.Part; gpu.PARTS = ({one!r},);"
        f"sys.argv = ['gpu.py', '--dry-run', '--output', {str(output)!r}]; gpu.main()"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def inherited(name: str, action: signal.Handlers) -> Iterator[None]:
    """What is started meanwhile begins with this action, whatever started the tests: `nohup` and `&` ignore some."""
    before = signal.signal(signal.Signals[name], action)
    try:
        yield
    finally:
        signal.signal(signal.Signals[name], before)


def row(output: Path) -> dict[str, str]:
    """The only one of the table."""
    with (output / "parts.csv").open() as file:
        (found,) = csv.DictReader(file)
    return found


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    process = started(tmp_path, part("", limit=10, dry=("-c", ORPHAN)))
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert printed.splitlines()[-1].startswith("ended     some")
    assert (row(tmp_path)["state"], row(tmp_path)["found"]) == ("ended", "took more than 10 s, see some.log")
    assert process.returncode == 1
    assert not runs(int((tmp_path / "some.log").read_text().split()[0]))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_cuts_it_short_with_all_that_it_started(name: str, tmp_path: Path) -> None:
    with inherited(name, signal.SIG_DFL):
        process = started(tmp_path, part("", dry=("-c", ORPHAN)))
    log = tmp_path / "some.log"
    start = time.monotonic()
    while not (log.exists() and "waits" in log.read_text()):
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    for _ in range(2):  # as `timeout` does, to it and to its group
        process.send_signal(signal.Signals[name])
    printed, _ = process.communicate(timeout=60)
    assert printed.splitlines()[-1].startswith("cut short some")
    assert (row(tmp_path)["state"], row(tmp_path)["found"]) == ("cut short", f"by {name}, see some.log")
    assert process.returncode == 1
    assert not runs(int(log.read_text().split()[0]))


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As SIGHUP under nohup."""
    with inherited("SIGHUP", signal.SIG_IGN):
        process = started(tmp_path, part("", dry=("-c", "import time; print('waits', flush=True); time.sleep(1)")))
    start = time.monotonic()
    while not (tmp_path / "some.log").exists():
        assert time.monotonic() - start < 60
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert row(tmp_path)["state"] == "ok"


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_becomes_of_a_part(tmp_path: Path) -> None:
    cases = {
        "ok": part("print('first'); print('== 3 passed ==')"),
        "failed": part("print('first'); raise SystemExit('last')"),
        "died": part("import os, signal; print('first', flush=True); os.kill(os.getpid(), signal.SIGKILL)"),
        "skipped": part("print('never')", needs=("sys", "does_not_exist")),
    }
    found = [gpu.run(one, tmp_path, dry=False) for one in cases.values()]
    states = ["ok", "failed", "failed", "skipped"]
    assert [outcome.state for outcome in found] == states
    assert [outcome.found for outcome in found] == ["3 passed", "last", "exit status -9, first", "needs does_not_exist"]
    assert [line.split()[0] for line in gpu.table(found).splitlines()] == states


def test_parts_find_the_packages_of_this_repository_and_no_gpu_in_a_dry_run(tmp_path: Path) -> None:
    found = "importlib.util.find_spec('densemixer_core').origin, os.environ.get('TEST_DEVICE')"
    code = f"import importlib.util, os; print({found})"
    one = Part("some", ("-c", code), 60, "", dry=("-c", code))
    expected = str(ROOT / "densemixer_core" / "__init__.py")
    assert gpu.run(one, tmp_path, dry=False).found == f"{expected} cuda"
    assert gpu.run(one, tmp_path, dry=True).found == f"{expected} None"
