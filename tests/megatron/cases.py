"""The ways to configure a Mixture-of-Experts layer of Megatron Core that are tested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import megatron.core
import torch
from megatron.core.transformer.moe import experts as experts_module
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

EXPERTS, K, HIDDEN, FFN, LATENT = 8, 2, 16, 8, 12
SEQUENCE, BATCH = 6, 2


def has(since: str) -> bool:
    """Whether this Megatron Core is of that version or newer."""
    return Version(megatron.core.__version__) >= Version(since)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to configure the layer.

    Args:
        options: For ``TransformerConfig``, besides `config`'s.
        dispatchers: Those it works with.
        experts: The class of the experts.
        uneven: Whether each rank has another number of tokens.
        host_adds: Whether Megatron adds gradients of its own (losses of the router, shared experts), which the oracle
            doesn't know: then what DenseMixer adds is compared.
        estimator: Of DenseMixer.
        budget: Of DenseMixer. Just below 1 all pairs but the pilot's share are drawn, and it is nearly exact.
        dtype: Of weights and inputs.
        since: The version of Megatron Core that has it.
        prepare: What to do with the built layer.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dispatchers: tuple[str, ...] = ("allgather", "alltoall")
    experts: str = "SequentialMLP"
    uneven: bool = False
    host_adds: bool = False
    estimator: str = "densemixer"
    budget: float = 1.0
    dtype: torch.dtype = torch.float32
    since: str = "0.13"
    prepare: Callable[[Any], None] = lambda layer: None

    @property
    def exists(self) -> bool:
        return has(self.since) and hasattr(experts_module, self.experts)


def _bias_two_experts(layer: Any) -> None:
    layer.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))


def _balance_two_experts(layer: Any) -> None:
    layer.router.qb_beta.copy_(torch.linspace(-0.3, 0.3, EXPERTS))


def jitter(shape: torch.Size) -> Tensor:
    return 1 + 0.3 * torch.sin(torch.arange(shape.numel())).view(shape)


def _know_jitter(layer: Any) -> None:
    """The noise on the router's input, which is drawn otherwise."""
    layer.router.input_jitter = jitter


def _fill_biases(layer: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    for name, parameter in layer.named_parameters():
        if name.rpartition(".")[2].startswith("bias"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def _fill_shared_experts(layer: Any) -> None:
    """So that their output is no small part of the layer's."""
    generator = torch.Generator().manual_seed(9)
    for parameter in layer.shared_experts.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def _replay(layer: Any) -> None:
    """Replay a selection that the router itself would not make."""
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    tokens = SEQUENCE * BATCH
    layer.router.router_replay.set_target_indices(torch.arange(K * tokens).reshape(tokens, K) % EXPERTS)
    layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}

LAYOUT_CASES = {
    "softmax after top-k": Case(),
    "sigmoid": Case(SIGMOID),
    "recomputed": Case({"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "uneven": Case(dispatchers=("alltoall",), uneven=True),
}
"""Under every layout."""

SPREAD_CASES = {"flexible": Case({"moe_flex_dispatcher_backend": "deepep"}, ("flex",), since="0.16")}
"""Under layouts that spread experts over ranks."""

SHARED = {"moe_shared_expert_intermediate_size": 8}
OVERLAPPED = {**SHARED, "moe_shared_expert_overlap": True}
BESIDE: dict[str, Any] = {"host_adds": True, "prepare": _fill_shared_experts}

CASES = LAYOUT_CASES | {
    "softmax before top-k": Case({"moe_router_pre_softmax": True}),
    "centered": Case(estimator="centered"),
    "centered, scaled": Case(SIGMOID, estimator="centered"),
    "top-1": Case({"moe_router_pre_softmax": True, "moe_router_topk": 1}),
    "scaled": Case({"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5}),
    "groups": Case({**SIGMOID, "moe_router_num_groups": 4, "moe_router_group_topk": 2}),
    "expert bias": Case({**SIGMOID, "moe_router_enable_expert_bias": True}, prepare=_bias_two_experts),
    "not gated": Case({"gated_linear_unit": False, "activation_func": F.gelu}),
    "router in float32": Case({"moe_router_dtype": "fp32"}),
    "router in float64": Case({"moe_router_dtype": "fp64"}),
    "fused activation": Case({"bias_activation_fusion": True}, ("alltoall",)),  # which torch.compile takes its time for
    "auxiliary loss": Case({"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}, host_adds=True),
    "sequence auxiliary loss": Case(
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}, host_adds=True
    ),
    "z loss": Case({"moe_z_loss_coeff": 0.1}, host_adds=True),
    "global auxiliary loss": Case(
        {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
        since="0.16",
        host_adds=True,
    ),
    "shared experts": Case(SHARED, **BESIDE),
    "shared experts, gated": Case({**SHARED, "moe_shared_expert_gate": True}, since="0.16", **BESIDE),
    "shared experts, overlapped": Case(OVERLAPPED, ("alltoall",), **BESIDE),
    "shared experts, overlapped, centered": Case(OVERLAPPED, ("alltoall",), estimator="centered", **BESIDE),
    "shared experts, overlapped, centered, budget": Case(
        OVERLAPPED, ("alltoall",), estimator="centered", budget=1 - 1e-9, **BESIDE
    ),
    "jitter": Case({"moe_input_jitter_eps": 0.3}, prepare=_know_jitter),
    "square root of softplus": Case({**SIGMOID, "moe_router_score_function": "sqrtsoftplus"}, since="0.19"),
    "quantile balancing": Case(
        {**SIGMOID, "moe_router_load_balancing_type": "quantile_balancing"},
        since="0.19",
        prepare=_balance_two_experts,
    ),
    "recomputed, by its old name": Case({"moe_layer_recompute": True}),
    "latent": Case({"moe_latent_size": LATENT}, since="0.16"),
    "replay": Case({"moe_enable_routing_replay": True}, since="0.16", prepare=_replay),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16, router in float32": Case({"moe_router_dtype": "fp32"}, dtype=torch.bfloat16),
    "GroupedMLP": Case(
        {"moe_grouped_gemm": True, "moe_use_legacy_grouped_gemm": True}, experts="GroupedMLP", dtype=torch.bfloat16
    ),
    "TEGroupedMLP": Case({"moe_grouped_gemm": True}, experts="TEGroupedMLP"),
    "TEGroupedMLP, biases": Case(
        {"moe_grouped_gemm": True, "add_bias_linear": True},
        experts="TEGroupedMLP",
        since="0.16",
        prepare=_fill_biases,
    ),
}
