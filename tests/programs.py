"""Trains a tiny model of 128 experts by a framework's own program, with a probe in it (`tests/running/probe.py`)."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from installs import REPOSITORY, run

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = Path(sys.executable).parent
TESTS = REPOSITORY / "tests"

OF_ONE_STEP = 1e-5
"""What a gradient in float32 may be off."""

RATE = 0.05
"""Of plain SGD: rounding moves a row by less than a billionth, and a gradient by more than a thousandth."""


def make_tiny(folder: Path) -> Path:
    """A checkpoint with 128 experts, most of which no token selects, and data; the folder."""
    runpy.run_path(str(EXAMPLES / "llamafactory" / "make_tiny.py"))["main"](folder, 128)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)  # experts as large as trained ones
    model.save_pretrained(folder / "model")
    return folder


@dataclasses.dataclass(frozen=True)
class Report:
    """What the probe wrote down.

    Attributes:
        log: All that the program printed.
        ranks: How many processes trained.
        apart: The largest difference between them in the change of those rows.
        attached: How many layers DenseMixer was attached to.
        losses: Of each step, with all digits.
        errors: Of the first step's gradients, the worst against the oracle's, for each estimator.
        never: How many experts no token selected in any step, over all layers.
        typical_change, largest_change: Of their rows in the routers' weights, the norm: the median, and the maximum.
    """

    log: str
    ranks: int
    apart: float
    attached: int
    losses: list[float]
    errors: dict[str, float]
    never: int
    typical_change: float
    largest_change: float


def start(
    command: list[str | Path], folder: Path, plugins: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, as its users do. Doesn't raise if it fails."""
    paths = (TESTS, TESTS / "running", TESTS / "transformers", plugins)
    return run(
        ["bash", "-c", 'cd "$0" && exec "$@"', folder, *command],
        **{
            "PATH": f"{SCRIPTS}:/usr/bin:/bin",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def call(command: list[str | Path], folder: Path, plugins: Path, **environment: str) -> str:
    """What a program printed that ended well."""
    done = start(command, folder, plugins, **environment)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return log


def train(command: list[str | Path], folder: Path, plugins: Path, **environment: str) -> Report:
    """Train in a folder of its own."""
    log = call(command, folder, plugins, PROBE=str(folder / "report.json"), **environment)
    return read(folder / "report.json", log)


def read(report: Path, log: str) -> Report:
    return Report(log=log, **json.loads(report.read_text()))


def assert_only_the_routers_gradient_differs(run: Report, plain: Report) -> None:
    """The forward is the host's, gradients are the oracle's, and routers learn from experts that nobody selected."""
    assert (run.attached, plain.attached) == (2, 0)
    assert run.losses[0] == plain.losses[0]
    assert run.losses[1] != plain.losses[1]
    assert run.errors["densemixer"] <= OF_ONE_STEP < run.errors["conventional"]
    assert plain.errors["conventional"] <= OF_ONE_STEP < plain.errors["densemixer"]
    assert min(run.never, plain.never) > 20
    assert plain.largest_change <= 1e-9
    assert run.typical_change > 1e-3
