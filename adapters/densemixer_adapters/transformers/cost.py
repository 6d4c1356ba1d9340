"""How many floating-point operations DenseMixer adds, for whoever says what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from densemixer_adapters.transformers.experts import layout_of
from densemixer_adapters.transformers.layer import DenseMixerLayer
from densemixer_core.sampling import share_of_pairs

TOKENS = 1 << 20
"""Of a step, in what is said of one token in the mean: so many that a part of a pair doesn't matter."""

TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts")
"""What routers, blocks and configurations call the number of experts that a token goes through."""


def extra_operations(model: Any, layers: Sequence[DenseMixerLayer]) -> float:
    """What layers add to the backward, in floating-point operations a token.

    With all experts these are the up projection of x and the down projection of g by each of a layer's E experts with
    weights; with a budget below 1, by as many of them as `densemixer_core.sampling.share_of_pairs` says, and the
    product of g and the E experts' mean outputs. Layers whose router is frozen add nothing.

    Args:
        model: The model that they are layers of; any module.
        layers: Layers that DenseMixer is attached to.
    """
    return sum(_operations(model, layer) for layer in layers if not layer.router_is_frozen)


def selected_experts(model: Any, layer: DenseMixerLayer) -> int | None:
    """How many experts a token of a layer goes through, None if nothing says so."""
    places = [layer.router, layer.block]
    if hasattr(model, "config"):
        places.append(model.config.get_text_config())
    for place in places:
        for name in TOP_K:
            if isinstance(value := getattr(place, name, None), int):
                return value
    return None


def expert_operations(layer: DenseMixerLayer) -> float:
    """The floating-point operations of one expert of a layer for one token: two for each number in its two matrices."""
    (_, *up), (_, *down) = layer.weight_shapes
    return 2.0 * (math.prod(up) + math.prod(down))


def _operations(model: Any, layer: DenseMixerLayer) -> float:
    """Of one layer, for each token in the mean."""
    config, experts = layer.config, layer.stacked_experts
    if config.estimator == "conventional":
        return 0.0
    if config.budget == 1:
        return experts * expert_operations(layer)
    shape = layer.weight_shapes[0]
    hidden = shape[1] if layout_of(layer.experts).transposed else shape[2]
    selected = selected_experts(model, layer) or 0
    pairs = share_of_pairs(TOKENS, experts, layer.scored_experts, selected, config.budget)
    return pairs / TOKENS * expert_operations(layer) + experts * 2.0 * hidden
