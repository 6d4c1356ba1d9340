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
