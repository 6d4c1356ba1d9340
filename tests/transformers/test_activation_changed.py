"""Experts that get another activation after DenseMixer has been attached: a fused kernel must compute the new one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import nn

from densemixer_adapters.transformers import apply_densemixer, attached_layers


def another_function(block: Any) -> None:
    block.experts.act_fn = nn.ReLU()


def another_limit(block: Any) -> None:
    block.experts.limit = 2.0


def another_gate(block: Any) -> None:
    block.experts._apply_gate = lambda z: torch.relu(z[..., ::2]) * z[..., 1::2]


def other_experts(block: Any) -> None:
    block.experts = copy.deepcopy(block.experts)
    another_gate(block)


class Swish(nn.Module):
    """SiLU, until its slope changes."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = 1.0

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z * (self.beta * z).sigmoid()


def another_slope(activation: Any) -> None:
    activation[0].beta = 1.5


def another_forward(activation: Any) -> None:
    activation[0].forward = torch.relu


def another_part(activation: Any) -> None:
    activation[0] = nn.ReLU()


def hooked(activation: Any) -> None:
    activation.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [another_slope, another_forward, another_part, hooked])
def test_an_activation_that_is_changed_within(change: Callable[[Any], None]) -> None:
    model: Any = FAMILIES["qwen3_moe"].build("eager")
    experts = [block.experts for block in FAMILIES["qwen3_moe"].blocks(model)]
    for each in experts:
        each.act_fn = nn.Sequential(Swish())
    apply_densemixer(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    change(experts[0].act_fn)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    z = 3 * torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    changed, other = (layer.formula for layer in attached_layers(model))
    assert other is not None  # SiLU
    torch.testing.assert_close(other(z), experts[1]._apply_gate(z))
    if changed is not None:
        torch.testing.assert_close(changed(z), experts[0]._apply_gate(z))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", another_function),
        ("gpt_oss", another_limit),
        ("gpt_oss", another_gate),
        ("gpt_oss", other_experts),
    ],
)
def test_the_formula_is_that_of_the_activation(family: str, change: Callable[[Any], None], copied: bool) -> None:
    model: Any = FAMILIES[family].build("eager")
    apply_densemixer(model)
    model = copy.deepcopy(model) if copied else model
    blocks = FAMILIES[family].blocks(model)
    change(blocks[0])
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    z = 3 * torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    for layer, block in zip(attached_layers(model), blocks, strict=True):
        experts: Any = block.experts
        assert layer.formula is not None
        torch.testing.assert_close(layer.formula(z), experts._apply_gate(z))
