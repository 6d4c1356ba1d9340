"""The settings that `make bench` times do what their names say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shapes import SHAPES
from torch.utils.flop_counter import FlopCounterMode
from worker import Specification, make_step, saved_bytes


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


def test_saved_bytes() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x.exp().sum().backward()) == 4000
