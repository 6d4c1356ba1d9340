"""What torch.compile makes of one block: one graph with its backward, and no more of them than without DenseMixer.

`tests/running` compiles whole models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from torch._dynamo.utils import counters

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

SAME = [(2, 32)] * 5
OTHERS = [(2, 36), (2, 28), (2, 48), (2, 40)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def block(attached: bool, compiled: bool = True, budget: float = 1) -> Any:
    """DenseMixer compares its routing at the first forward, which comes before it is compiled."""
    model = FAMILIES["qwen3_moe"].build("batched_mm", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    if attached:
        apply_densemixer(model, DenseMixerConfig(budget=budget))
        gradient(mlp, (1, 2))
    if compiled:
        mlp.compile(backend="aot_eager", fullgraph=True)
    return mlp


def gradient(mlp: Any, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    x, g = torch.randn(2, *shape, 64, generator=generator)
    return torch.autograd.grad(mlp(x.requires_grad_()), mlp.gate.weight, g)[0]


def graphs(attached: bool, budget: float = 1) -> list[int]:
    """How many graphs there are after each step, of the same shape and then of others."""
    mlp, found = block(attached, budget=budget), []
    for shape in SAME + OTHERS:
        gradient(mlp, shape)
        found.append(counters["stats"]["unique_graphs"])
    return found


def test_as_many_graphs_as_without() -> None:
    ours = graphs(attached=True)
    torch._dynamo.reset()
    counters.clear()
    assert ours == graphs(attached=False)
    assert ours == [1] * 5 + [2] * 4


def test_a_budget_adds_no_graphs_either() -> None:
    assert graphs(attached=True, budget=0.5) == [1] * 5 + [2] * 4


@pytest.mark.parametrize("budget", [1, 0.5])
def test_a_compiled_block_has_the_same_gradients(budget: float) -> None:
    mlp, (shape, *_) = block(attached=True, budget=budget), SAME
    gradient(mlp, shape)
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours = gradient(mlp, shape)
    torch.testing.assert_close(ours, gradient(block(attached=True, compiled=False, budget=budget), shape))
    assert not torch.allclose(ours, gradient(block(attached=False, compiled=False), shape), rtol=0.1)
