"""`make bench-budget` in small, and what it and `make bench-large` refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import budget_error
import one_process
from budget_error import ESTIMATORS, compare, exact, now, synthetic

from densemixer_core import DenseMixerConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_compared(estimator: str) -> None:
    """All pairs are the truth; of an eighth, control variates make more where experts resemble each other."""
    layer = synthetic("copies", 256)
    assert compare(layer, estimator, 1, 1)[1] == pytest.approx(1, abs=1e-12)
    without, with_variates = compare(layer, estimator, 1 / 8, 8)
    assert 0.5 < without < with_variates < 1


def test_a_cosine_says_how_much_longer_the_estimate_is() -> None:
    """Without bias, what chance adds is orthogonal to the exact gradient in the mean."""
    (layer,) = synthetic("random", 1024)
    truth = exact(layer, "densemixer")
    draws = [now(layer, DenseMixerConfig("densemixer", budget=1 / 8, seed=seed)) for seed in range(16)]
    cosine = torch.stack([torch.cosine_similarity(draw, truth, dim=0) for draw in draws]).mean().item()
    length = torch.stack([draw.norm() / truth.norm() for draw in draws]).mean().item()
    assert cosine < 0.8
    assert length == pytest.approx(1 / cosine, rel=0.1)


def test_its_tables() -> None:
    folders = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "demo"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    small = "import budget_error; budget_error.MODELS = 1; budget_error.main()"
    options = ("--budgets", "0.125", "--tokens", "256", "--train", "1", "--seeds", "1")
    command = [sys.executable, "-c", small, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    layers = ["copies", "random", "specialists", *(f"trained {n}" for n in range(3)), *(f"demo {n}" for n in range(4))]
    wanted = [[layer, estimator] for layer in [*layers, "all that were trained"] for estimator in ESTIMATORS]
    assert [row[1:3] for row in rows] == wanted
    assert all((" → " in row[3]) == (row[1] in layers) for row in rows)


@pytest.mark.parametrize(
    ("program", "option", "value", "message"),
    [
        (budget_error, "--tokens", "64", "--tokens must be multiples of 256, the length of a sequence; got 64"),
        (budget_error, "--seeds", "0", "--seeds must be at least 1, got 0"),
        (one_process, "--rounds", "0", "--rounds must be at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_table(
    program: ModuleType,
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["", option, value])
    with pytest.raises(SystemExit):
        program.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")
