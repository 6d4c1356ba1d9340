"""torchtitan's Trainer on one, two and four ranks: all gradients against a float64 model with the oracle in it."""

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

pytest.importorskip("torchtitan", reason="needs torchtitan; run `nox -s torchtitan`")

from titan_ranks import LAYOUTS


@functools.cache
def report() -> dict[str, Any] | str:
    """What each rank found, by layout; or what stopped the process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(Path(__file__).with_name("titan_ranks.py")), str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        return json.loads(path.read_text()) if done.returncode == 0 else done.stderr[-5000:]


def found(layout: str) -> list[Any]:
    """On each rank."""
    everything = report()
    assert isinstance(everything, dict), everything
    ranks: list[Any] = everything[layout]
    for result in ranks:
        assert "failed" not in result, result["failed"]
    assert len(ranks) == LAYOUTS[layout].processes
    return ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout: str) -> None:
    for result in found(layout):
        worst = max(result["errors"], key=result["errors"].get)
        assert result["errors"][worst] <= 1e-5, worst
        assert len(result["errors"]) > 50
        assert result["difference"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_bitwise_as_without(layout: str) -> None:
    assert all(result["same_loss"] for result in found(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_in_checkpoints_are_as_without(layout: str) -> None:
    assert all(result["same_names"] for result in found(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_override_reaches_all_layers(layout: str) -> None:
    """With the names of checkpoints, whatever wraps the blocks."""
    for result in found(layout):
        assert result["layers"] == ["layers.0.moe", "layers.1.moe"]


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.draws])
def test_a_budget_is_unbiased(layout: str, estimator: str) -> None:
    """Whether each rank holds some experts, or a part of each."""
    for result in found(layout):
        draws = result["draws"][estimator]
        assert draws["spread"] > 0.02, draws  # one draw is no more than an estimate
        assert draws["mean"] < 2, draws
