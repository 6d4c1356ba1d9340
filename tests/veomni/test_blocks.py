"""Every Mixture-of-Experts block that VeOmni has rewritten, by itself."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import stand_ins
import torch
from small_models import COMMON, DEEPSEEK, QWEN, Family, gradients_of, make_dense, softmax, worst
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    GlmMoeDsaConfig,
    GptOssConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeTextConfig,
)
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

from densemixer_adapters.transformers import apply_densemixer

QWEN_3_5 = {**QWEN, "shared_expert_intermediate_size": 16}
V4 = {**COMMON, "num_local_experts": 8, "moe_intermediate_size": 16, "mlp_layer_types": ["moe"] * 2}

BLOCKS: dict[str, tuple[str, Family]] = {
    "deepseek_v3": ("MoE", Family(lambda: DeepseekV3Config(**DEEPSEEK), torch.sigmoid, True, 1.5, 1e-20)),
    "deepseek_v4": (
        "SparseMoeBlock",
        Family(lambda: DeepseekV4Config(**V4), lambda z: F.softplus(z).sqrt(), True, 1.5, 1e-20),
    ),
    "glm_moe_dsa": ("MoE", Family(lambda: GlmMoeDsaConfig(**DEEPSEEK), torch.sigmoid, True, 1.5, 1e-20)),
    "gpt_oss": ("MLP", Family(lambda: GptOssConfig(**COMMON, num_local_experts=8), softmax, True)),
    "qwen3_5_moe": ("SparseMoeBlock", Family(lambda: Qwen3_5MoeTextConfig(**QWEN_3_5), softmax, True)),
    "qwen3_moe": ("SparseMoeBlock", Family(lambda: Qwen3MoeConfig(**QWEN), softmax, True)),
    "qwen3_omni_moe": ("ThinkerTextSparseMoeBlock", Family(lambda: Qwen3OmniMoeTextConfig(**QWEN), softmax, True)),
    "qwen3_vl_moe": ("TextSparseMoeBlock", Family(lambda: Qwen3VLMoeTextConfig(**QWEN), softmax, True)),
}
"""By the folder of the architecture: the end of the block's name, and what it computes."""

GENERATED = "veomni.models.transformers.{0}.generated.patched_modeling_{0}_gpu"


def module_of(folder: str) -> Any:
    from veomni.models.auto import _bind_veomni_ops

    module = importlib.import_module(GENERATED.format(folder))
    _bind_veomni_ops(module, stand_ins.operations())
    return module


def build(folder: str) -> Any:
    end, family = BLOCKS[folder]
    module = module_of(folder)
    (name,) = re.findall(rf"^class (\w+{end})\(", Path(module.__file__).read_text(), re.MULTILINE)
    kind: Callable[..., Any] = getattr(module, name)
    torch.manual_seed(0)
    block = kind(family.config(), 0) if folder == "deepseek_v4" else kind(family.config())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


@pytest.mark.parametrize("folder", BLOCKS)
def test_gradients_equal_the_oracle(folder: str) -> None:
    block, family = build(folder), BLOCKS[folder][1]
    truth = make_dense(copy.deepcopy(block), family, "densemixer")
    conventional = make_dense(copy.deepcopy(block), family, "conventional")
    apply_densemixer(block)
    x, g = torch.randn(2, 2, 7, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for one in (block, truth, conventional):
        dtype = next(one.parameters()).dtype
        with contextlib.nullcontext() if one is block else oracle.Float64():
            output = one(x.to(dtype))
            (output[0] if isinstance(output, tuple) else output).backward(g.to(dtype))
        found.append(gradients_of(one))
    assert worst(found[0], found[1]) < 1e-5
    router = "gate.weight" if hasattr(block, "gate") else "router.weight"
    assert worst(found[0], found[2], router) > 0.1


def test_these_are_all() -> None:
    import veomni.models.transformers

    folder = Path(veomni.models.transformers.__file__).parent
    sources = {path.parts[-3]: path.read_text() for path in folder.glob("*/generated/patched_modeling_*_gpu.py")}
    assert {name for name, source in sources.items() if "self.experts = " in source} == set(BLOCKS)
