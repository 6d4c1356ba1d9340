"""VeOmni's models on two and four ranks: in each layout the gradients are those of the dense oracle."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import veomni_layouts

CELLS = [*veomni_layouts.cells(2), *veomni_layouts.cells(4)]
GRADIENTS = [
    name for name in CELLS if name.partition(", ")[2] not in ("budget", "bfloat16", "metrics", "changed output")
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("layouts") / "report.json"
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "DENSEMIXER_ENABLED": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    command = [sys.executable, here / "veomni_layouts.py", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-8000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def of_cell(report: dict[str, Any], name: str) -> Any:
    result = report[name]
    assert "failed" not in result, result["failed"]
    return result


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_the_oracle(report: dict[str, Any], name: str) -> None:
    result = of_cell(report, name)
    assert result["error"] < 1e-5
    assert (result["difference"] > 0.1) == ("conventional" not in name)


def test_a_budget_is_exact_in_the_mean(report: dict[str, Any]) -> None:
    result = of_cell(report, "EP 2, budget")
    assert result["standard errors"] < 5
    assert result["of one draw"] > 0.1


def test_mixed_precision(report: dict[str, Any]) -> None:
    result = of_cell(report, "EP 2, bfloat16")
    assert result["cosine with the oracle"] > 0.99 > result["with conventional training"] + 0.05


def test_metrics_with_two_optimizers(report: dict[str, Any]) -> None:
    result = of_cell(report, "EP 2, metrics")
    assert result["optimizer"] == "MultiOptimizer"
    metrics = result["metrics"]
    assert metrics["densemixer/router_grad_norm"] == pytest.approx(result["norm"], rel=1e-4)
    assert 0.1 < metrics["densemixer/router_grad_share_unselected"] < 0.9
    assert metrics["densemixer/updates_lost"] == 0
    assert metrics["densemixer/routing_change"] > 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(rank["metrics"] == metrics for rank in result["ranks"])


def test_a_changed_output_is_an_error_on_all_ranks(report: dict[str, Any]) -> None:
    ranks = of_cell(report, "EP 2, changed output")["ranks"]
    assert len(ranks) == 2
    assert all(
        "isn't the sum of w_j·E_j(x) over the selected experts: it is 2 times that" in r["refused"] for r in ranks
    )
