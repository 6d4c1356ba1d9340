"""What DenseMixer doesn't work with in Megatron Core: by the configuration, by what a layer is built of, by its scores.

docs/megatron-options.md has all of Megatron's options on Mixture-of-Experts layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.megatron.host_layer import HostLayer
from densemixer_core import DenseMixerConfig, RoutingMismatchError, check_routing
from densemixer_core.routing import SCORE_FUNCTIONS

_IS_QUANTISED = ("has the experts compute with quantised weights, which DenseMixer doesn't read", "train in bf16")
_MAY_QUANTISE = ("may have the experts compute with quantised weights, which DenseMixer doesn't read", "unset it")
_IS_CAPTURED = ("captures graphs, which lack what DenseMixer adds to the backward", "switch CUDA graphs off")
_IS_ELSEWHERE = ("keeps all experts of a rank in one parameter, which is not where they are read", "set it to False")
REFUSED = {
    "moe_expert_capacity_factor": (
        "drops tokens, so that an expert's output depends on the other tokens",
        "set it to None",
    ),
    "moe_expert_rank_capacity_factor": (
        "bounds the tokens of a rank: HybridEP drops those beyond it, so that an expert's output depends on the other "
        "tokens, and NCCL EP, which stops there, has not been run",
        "set it to None",
    ),
    "moe_apply_probs_on_input": (
        "scales the experts' input by the score, so that the output isn't linear in the weights",
        "set it to False",
    ),
    "overlap_moe_expert_parallel_comm": ("cuts the layer into stages without a common graph", "set it to False"),
    "moe_mlp_glu_interleave_size": ("stores gate and up projection in another order than is read here", "unset it"),
    "moe_single_grouped_weight": _IS_ELSEWHERE,
    "moe_single_grouped_bias": _IS_ELSEWHERE,
    "moe_ncclep_zero_copy": (
        "puts the experts' output into buffers that are used again before the backward",
        "set it to False",
    ),
    "fp8": _IS_QUANTISED,
    "fp4": _IS_QUANTISED,
    "quant_recipe": _MAY_QUANTISE,
    "use_kitchen": _MAY_QUANTISE,
    "enable_cuda_graph": _IS_CAPTURED,
    "external_cuda_graph": _IS_CAPTURED,
    "cuda_graph_impl": _IS_CAPTURED,
}
"""Options of Megatron Core that DenseMixer doesn't work with: what they do, and what to do instead."""


def refuse_config(config: Any, options: DenseMixerConfig) -> None:
    """Raise if DenseMixer can't train a model with this configuration.

    Nothing but the configuration is looked at, so all ranks, whichever layers they hold, do the same.

    Args:
        config: A ``TransformerConfig``.
        options: The options of DenseMixer.

    Raises:
        UnsupportedModelError: The message names the option, the reason and the fix.
    """
    balancing = config.moe_router_load_balancing_type
    expert_tensor = config.expert_tensor_parallel_size or 1
    reason = fix = ""
    for option, (why, remedy) in REFUSED.items():
        if getattr(config, option, None) not in (None, False, "none"):
            reason, fix = f"{option} {why}", remedy
    if "sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]):
        reason = "moe_router_load_balancing_type sinkhorn selects experts that don't follow from the scores"
        fix = "use another type"
    if config.add_bias_linear and expert_tensor > 1:
        reason = "add_bias_linear with expert tensor parallelism has not been tested; ranks may hold the same bias"
        fix = "set one of the two off"
    if getattr(config, "expert_gtp_weight_remat_size", 1) > 1:
        reason = "expert_tensor_parallel_num_weight_shards leaves a part of the weights on a rank that uses more"
        fix = "unset it"
    if config.moe_router_score_function not in SCORE_FUNCTIONS:
        reason = f"its moe_router_score_function {config.moe_router_score_function} is unknown"
        fix = f"use one of {', '.join(SCORE_FUNCTIONS)}"
    if reason:
        raise UnsupportedModelError(
            f"DenseMixer can't train this model: {reason}. Either {fix}, or switch DenseMixer off."
        )


def refuse_router(name: str, router: Any) -> None:
    """Raise if DenseMixer doesn't know this router.

    Raises:
        UnsupportedModelError: The message names the layer, the reason and the fix.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    if not isinstance(router, TopKRouter):
        raise UnsupportedModelError(
            f"{name}: DenseMixer can't train it: its router is a {type(router).__name__}, not Megatron's TopKRouter. "
            "Either build it with that one, or switch DenseMixer off."
        )


def check_scores(layer: HostLayer, scores: Tensor, index: Tensor, weights: Tensor) -> bool:
    """Compare what DenseMixer takes the scores to be with what Megatron made of them.

    Args:
        layer: The layer.
        scores: Of all experts, [tokens, experts].
        index, weights: The selected experts and their weights, [tokens, k] each.

    Returns:
        Whether any token has said something.

    Raises:
        RoutingMismatchError: They differ.
    """
    try:
        return check_routing(scores, index, weights, layer.renormalised, layer.epsilon)
    except RoutingMismatchError as error:
        raise RoutingMismatchError(
            f"{layer.name}: DenseMixer takes its router's scores to be the "
            f"{layer.score} of the logits, but {error}. This version of Megatron "
            "Core, or a patch of it, routes differently; the gradient would be wrong. Switch DenseMixer off."
        ) from None
