"""Tiny random models of each supported family, and what the oracle needs to know about their layers.

The formulas here are written down from the papers and model cards, independently of
`densemixer_adapters.transformers.routers`.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import oracle
import tiny_models
import torch
from device import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: how to build a tiny one, and the formula of its layers."""

    name: str
    options: dict[str, Any]
    score: Callable[[Tensor], Tensor]
    renormalised: bool
    scaling: float = 1.0
    router: str = "gate"

    def build(self, implementation: str = "grouped_mm", seed: int = 0, **overrides: Any) -> nn.Module:
        model: nn.Module = tiny_models.build(self.name, seed, implementation, **{**self.options, **overrides})
        tiny_models.randomise(model.named_parameters())
        biases = [each for each in model.named_buffers() if each[0].endswith("e_score_correction_bias")]
        tiny_models.randomise(biases, std=0.1)
        return model.to(DEVICE).train()

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [m for m in model.modules() if hasattr(m, "experts") and hasattr(m, self.router)]

    def formula(self, block: nn.Module) -> oracle.Formula:
        return oracle.Formula(
            [self._expert(block.experts, j) for j in range(block.experts.num_experts)],
            self.score,
            self.renormalised,
            self.scaling,
        )

    def _expert(self, experts: Any, j: int) -> Callable[[Tensor], Tensor]:
        if self.name == "GptOss":
            return lambda x: _gpt_oss_expert(experts, j, x)
        gate, up = experts.gate_up_proj[j].chunk(2)
        return oracle.gated_expert(gate, up, experts.down_proj[j], F.silu)

    def logits(self, block: nn.Module, x: Tensor) -> Tensor:
        router = getattr(block, self.router)
        return F.linear(x, router.weight, getattr(router, "bias", None))

    def oracle(self, model: nn.Module, indices: list[Tensor], estimator: str) -> nn.Module:
        """A copy of the model in float64 whose layers are the oracle's, with the given selections (one a layer)."""
        truth = copy.deepcopy(model).double()
        for block, index in zip(self.blocks(truth), indices, strict=True):
            block.forward = types.MethodType(self.oracle_forward(index, estimator), block)
        return truth

    def oracle_forward(
        self, index: Tensor, estimator: str, after: Callable[[Tensor], Tensor] = lambda y: y
    ) -> Callable[[nn.Module, Tensor], Any]:
        """The layer by the oracle. ``after`` is what somebody does to the routed experts' output."""

        def forward(block: Any, hidden_states: Tensor) -> Any:
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            y = after(oracle.densemixer(x, self.logits(block, x), index, self.formula(block), estimator))
            if hasattr(block, "shared_expert"):
                y = y + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
            if hasattr(block, "shared_experts"):
                y = y + block.shared_experts(x)
            y = y.reshape(hidden_states.shape)
            return (y, None) if self.name == "GptOss" else y

        return forward


def _gpt_oss_expert(experts: Any, j: int, x: Tensor) -> Tensor:
    gate_up = x @ experts.gate_up_proj[j] + experts.gate_up_proj_bias[j]
    gate, up = gate_up[:, 0::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ experts.down_proj[j] + experts.down_proj_bias[j]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _qwen(prefix: str, renormalised: bool, **options: Any) -> Family:
    return Family(
        prefix,
        {**tiny_models.QWEN, "norm_topk_prob": renormalised, **options},
        _softmax,
        renormalised,
    )


def _olmoe(renormalised: bool) -> Family:
    options = dict(num_experts=8, norm_topk_prob=renormalised)
    return Family("Olmoe", options, _softmax, renormalised)


def _deepseek(renormalised: bool, scaling: float) -> Family:
    options = dict(
        n_routed_experts=8,
        n_shared_experts=1,
        moe_intermediate_size=48,
        first_k_dense_replace=0,
        n_group=4,
        topk_group=2,
        norm_topk_prob=renormalised,
        routed_scaling_factor=scaling,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    return Family("DeepseekV3", options, torch.sigmoid, renormalised, scaling)


FAMILIES: dict[str, Family] = {
    "qwen2_moe": _qwen("Qwen2Moe", False, shared_expert_intermediate_size=32),
    "qwen2_moe-renormalised": _qwen("Qwen2Moe", True, shared_expert_intermediate_size=32),
    "qwen3_moe": _qwen("Qwen3Moe", True),
    "qwen3_moe-not-renormalised": _qwen("Qwen3Moe", False),
    "olmoe": _olmoe(False),
    "olmoe-renormalised": _olmoe(True),
    "mixtral": Family("Mixtral", dict(num_local_experts=8), _softmax, True),
    "deepseek_v3": _deepseek(True, 2.5),
    "deepseek_v3-not-renormalised": _deepseek(False, 1.0),
    "gpt_oss": Family(
        "GptOss",
        dict(num_local_experts=8, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        _softmax,
        True,
        router="router",
    ),
}


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
