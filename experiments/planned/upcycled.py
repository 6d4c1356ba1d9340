"""A Mixture-of-Experts model made of a dense one, whose router nobody has trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Qwen3MoeForCausalLM

RENEWED = 0.5
"""The share of each expert's hidden units that begin anew, as in drop-upcycling (arXiv 2502.19261)."""


def upcycle(dense: Any, experts: int, top_k: int) -> Any:
    """A model with ``experts`` copies of the dense network in each layer.

    In each copy, half of the hidden units, others in every expert, get new random weights: normal, with the standard
    deviation that the weights have that they replace. Routers are random, as in a new model. The same every time.

    Args:
        dense: A Qwen3-MoE with one expert a layer.
    """
    config = copy.deepcopy(dense.config)
    config.num_experts, config.num_experts_per_tok = experts, top_k
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    routers = {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    source = dense.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in routers:
                weight.copy_(source[name].expand_as(weight))
        for layer in model.model.layers:
            for expert in range(experts):
                _renew(layer.mlp.experts, expert)
    return model


def _renew(experts: Any, expert: int) -> None:
    gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]  # [2 * width, hidden], [hidden, width]
    width = down.shape[1]
    units = torch.randperm(width)[: round(RENEWED * width)]
    for rows in (units, width + units):
        gate_up[rows] = torch.randn(len(rows), gate_up.shape[1]) * gate_up[rows].std()
    down[:, units] = torch.randn(down.shape[0], len(units)) * down[:, units].std()
