"""The same gradients as the original `densemixer` 1.0.1 on the same weights and inputs."""

from __future__ import annotations

import os
from typing import Any

import oracle
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from densemixer_adapters.transformers import apply_densemixer

BLOCKS: dict[str, tuple[Any, Any]] = {
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, transformers.Qwen3MoeConfig),
    "qwen3_moe-not-renormalised": (Qwen3MoeSparseMoeBlock, transformers.Qwen3MoeConfig),
    "olmoe": (OlmoeSparseMoeBlock, transformers.OlmoeConfig),
    "qwen1.5_moe": (Qwen2MoeSparseMoeBlock, transformers.Qwen2MoeConfig),
}


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    path = os.environ.get("ORIGINAL_DENSEMIXER")
    if path is None:
        pytest.skip("ORIGINAL_DENSEMIXER names no file; `make test` runs the original and sets it, see ci/noxfile.py")
    return torch.load(path)


def stacked(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a transformers 4 block under the names of transformers 5: one stack for all experts."""
    experts = 1 + max(int(name.split(".")[1]) for name in named if name.startswith("experts."))

    def stack(projection: str) -> Tensor:
        return torch.stack([named[f"experts.{j}.{projection}.weight"] for j in range(experts)])

    return {
        **{name: tensor for name, tensor in named.items() if not name.startswith("experts.")},
        "experts.gate_up_proj": torch.cat([stack("gate_proj"), stack("up_proj")], 1),
        "experts.down_proj": stack("down_proj"),
    }


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("case", BLOCKS)
def test_gradients_are_the_originals(case: str, implementation: str, original: dict[str, Any]) -> None:
    there = original[case]
    block_class, config_class = BLOCKS[case]
    config = config_class(**there["options"])
    config._experts_implementation = implementation
    block = block_class(config).double()
    block.load_state_dict(stacked(there["weights"]))
    x = there["x"].clone().requires_grad_()
    with apply_densemixer(block), oracle.Float64():
        output = block(x)
    output.backward(there["g"])

    torch.testing.assert_close(output, there["output"], rtol=0, atol=1e-12)
    ours = {"input": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    theirs = stacked(there["gradients"])
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert oracle.worst_error(ours[name], expected) <= 1e-10, name
