"""Runs the blocks of the original `densemixer` 1.0.1 and writes down what they computed.

    python original.py OUTPUT.pt

Runs in an environment of its own (transformers 4.57): the original doesn't work with transformers 5. The file maps each
case to its configuration, weights, input, output gradient, output, and the gradients of input and weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DENSEMIXER_ENABLED"] = "1"
import densemixer  # patches transformers on import
import torch
from transformers import OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import Float64

COMMON = {"hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
QWEN2 = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, {"moe_intermediate_size": 32, "norm_topk_prob": True}),
    "qwen3_moe-not-renormalised": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig,
        {"moe_intermediate_size": 32, "norm_topk_prob": False},
    ),
    "olmoe": (OlmoeSparseMoeBlock, OlmoeConfig, {"intermediate_size": 32, "norm_topk_prob": False}),
    "qwen1.5_moe": (Qwen2MoeSparseMoeBlock, Qwen2MoeConfig, {**QWEN2, "norm_topk_prob": False}),
}


def run(block_class: Any, config_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    options = {**COMMON, **options}
    block = block_class(config_class(**options)).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 10, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 10, 64, dtype=torch.float64)
    with Float64():
        output, _ = block(x)
    output.backward(g)
    return {
        "options": options,
        "weights": block.state_dict(),
        "x": x.detach(),
        "g": g,
        "output": output.detach(),
        "gradients": {"input": x.grad, **{name: p.grad for name, p in block.named_parameters()}},
    }


if __name__ == "__main__":
    for block_class, _, _ in CASES.values():
        assert block_class.forward.__module__.startswith("densemixer."), f"{block_class.__name__} is not patched"
    torch.save({name: run(*case) for name, case in CASES.items()}, sys.argv[1])
    print(f"densemixer {densemixer.__version__}: {len(CASES)} blocks written to {sys.argv[1]}")
