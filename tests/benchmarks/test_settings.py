"""The settings that `make bench` times do what their names say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shapes import SHAPES
from torch.utils.flop_counter import FlopCounterMode
from worker import Specification, make_step, saved_bytes
from worker_process import HERE, Worker


def operations(setting: str, name: str, layers: int) -> int:
    shape = SHAPES[name].scaled(16)
    step = make_step(Specification(setting, shape, 64, layers, False, "eager", "float64", "cpu"))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "layers"), [*((name, 0) for name in SHAPES), ("Qwen3-30B-A3B", 2)])
def test_the_floor_counts_what_is_added(name: str, layers: int) -> None:
    conventional, exact, budgeted = (operations(setting, name, layers) for setting in ("conventional", "1", "0.125"))
    shape = SHAPES[name].scaled(16)
    assert exact - conventional == max(1, layers) * shape.extra_operations(64)
    assert budgeted - conventional == pytest.approx(max(1, layers) * shape.extra_operations(64, 0.125), rel=0.01)


def test_one_process_keeps_its_memory() -> None:
    program = (
        "import sys; sys.argv += ['--scale=16', '--tokens=64', '--rounds=2']\n"
        "import one_process, resource, torch\n"
        "one_process.main()\n"
        "for _ in range(2):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(1 << 26)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    run = [sys.executable, "-c", program]
    printed = subprocess.run(run, cwd=HERE, capture_output=True, text=True, check=True, timeout=300).stdout
    *_, medians, taken, again = printed.splitlines()
    assert medians.startswith("medians: ")
    assert int(again) < 1000 < int(taken)  # pages


def test_saved_bytes() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x.exp().sum().backward()) == 4000


def specification(dtype: str) -> Specification:
    return Specification("matmul", SHAPES["Qwen3-30B-A3B"].scaled(64), 8, 0, False, "eager", dtype, "cpu")


def test_a_worker_that_dies_says_why() -> None:
    """Also where it did so before it was asked anything."""
    with Worker(specification("float33")) as worker:
        worker._process.wait()
        with pytest.raises(RuntimeError, match="'matmul' died with exit status 1") as caught:
            worker.step()
    assert str(caught.value).splitlines()[-1] == "AttributeError: module 'torch' has no attribute 'float33'"


def test_a_worker_where_python_leaves_out_the_folder_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with Worker(specification("float32")) as worker:
        assert worker.step() > 0
