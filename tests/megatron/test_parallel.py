"""Experts and tokens spread over two and four processes, against the oracle with all of them in one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs megatron-core; run `nox -s megatron`")

import oracle
import torch
import training
from layouts import CENTRE, LAYOUTS, cells

CELLS = [(layout, cell) for layout in LAYOUTS for cell in cells(LAYOUTS[layout])]
TRAININGS = {"training, False", "training, True"}
BUDGET = "budget"


@functools.cache
def report() -> dict[str, Any] | str:
    """What each rank found, by layout and cell; or what stopped the processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(Path(__file__).with_name("layouts.py")), str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        return json.loads(path.read_text()) if done.returncode == 0 else done.stderr[-5000:]


def found(layout: str, cell: str) -> list[Any]:
    """On each rank."""
    everything = report()
    assert isinstance(everything, dict), everything
    ranks: list[Any] = everything[f"{layout}: {cell}"]
    for result in ranks:
        assert "failed" not in result, result["failed"]
    return ranks


@pytest.mark.parametrize(("layout", "cell"), [each for each in CELLS if each[1] not in {*TRAININGS, BUDGET}])
def test_gradients(layout: str, cell: str) -> None:
    for result in found(layout, cell):
        if cell == "gathered in parts":
            assert max(result.values()) <= 1e-6, result
            continue
        assert all(error <= result["allowed"][what] for what, error in result["errors"].items()), result
        assert result["difference"] > 0.1, result
        assert result["same_output"], result
        assert result["same_experts"], result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_budget(layout: str) -> None:
    """The mean over draws is the exact gradient, whichever rank holds the experts."""
    for result in found(layout, BUDGET):
        if LAYOUTS[layout].expert_tensor > 1:
            assert "Set expert_tensor_parallel_size to 1" in result
            continue
        assert result["output"] == 0, result
        assert result["mean"] < 0.15, result
        assert result["draw"] > 3 * result["mean"], result
        assert result["bias"] < 5, result  # the largest of some 200 normal variables over all cells


@pytest.mark.parametrize("flag", [False, True])
def test_a_model_trains_as_in_one_process(flag: bool) -> None:
    """With the experts on two ranks and half of the batch on each, through Megatron's DDP and optimizer."""
    alone = training.train(training.build(moe_densemixer=flag))
    for result in found(CENTRE, f"training, {flag}"):
        assert oracle.worst_error(torch.tensor(result["gradients"]), torch.tensor(alone["gradients"])) <= 1e-5
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
