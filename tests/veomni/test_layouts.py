"""VeOmni's models on two and four ranks: in each layout the gradients are those of the dense oracle."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import layouts
import pytest

CELLS = [*layouts.cells(2), *layouts.cells(4)]
GRADIENTS = [
    name for name in CELLS if name.partition(", ")[2] not in ("budget", "bfloat16", "metrics", "changed output")
]


@functools.cache
def report() -> dict[str, Any]:
    path = Path(tempfile.mkdtemp()) / "report.json"
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "DENSEMIXER_ENABLED": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    command = [sys.executable, here / "layouts.py", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-8000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def of_cell(name: str) -> Any:
    result = report()[name]
    assert "failed" not in result, result["failed"]
    return result


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_the_oracle(name: str) -> None:
    result = of_cell(name)
    assert result["error"] < 1e-5
    assert (result["difference"] > 0.1) == ("conventional" not in name)


def test_a_budget_is_exact_in_the_mean() -> None:
    result = of_cell("EP 2, budget")
    assert result["standard errors"] < 5
    assert result["of one draw"] > 0.1


def test_mixed_precision() -> None:
    result = of_cell("EP 2, bfloat16")
    assert result["cosine with the oracle"] > 0.99 > result["with conventional training"] + 0.05


def test_metrics_with_two_optimizers() -> None:
    result = of_cell("EP 2, metrics")
    assert result["optimizer"] == "MultiOptimizer"
    metrics = result["metrics"]
    assert metrics["densemixer/router_grad_norm"] == pytest.approx(result["norm"], rel=1e-4)
    assert 0.1 < metrics["densemixer/router_grad_share_unselected"] < 0.9
    assert metrics["densemixer/updates_lost"] == 0
    assert metrics["densemixer/routing_change"] > 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(rank["metrics"] == metrics for rank in result["ranks"])


def test_a_changed_output_is_an_error_on_all_ranks() -> None:
    ranks = of_cell("EP 2, changed output")["ranks"]
    assert len(ranks) == 2
    assert all(
        "isn't the sum of w_j·E_j(x) over the selected experts: it is 2 times that" in r["refused"] for r in ranks
    )
