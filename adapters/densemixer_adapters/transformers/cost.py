"""How many floating-point operations DenseMixer adds, for whoever says what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from densemixer_adapters.transformers.experts import layout_of
from densemixer_adapters.transformers.layer import DenseMixerLayer

TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts")
"""What routers, blocks and configurations call the number of experts that a token goes through."""


def extra_operations(model: Any, layers: Sequence[DenseMixerLayer]) -> float:
    """What layers add to the backward, in floating-point operations a token.

    With all experts these are the up projection of x and the down projection of g by each of a layer's E experts; with
    a budget b below 1, by b·(E − k) of them, where k are selected, and the product of g and the E experts' mean
    outputs. Layers whose router is frozen add nothing.

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


def _operations(model: Any, layer: DenseMixerLayer) -> float:
    """Of one layer, for each token in the mean."""
    config, ((experts, *up), (_, *down)) = layer.config, layer.matrices
    pair = 2.0 * (math.prod(up) + math.prod(down))
    if config.estimator == "conventional":
        return 0.0
    if config.budget == 1:
        return experts * pair
    hidden = up[0] if layout_of(layer.experts).transposed else up[1]
    return config.budget * (experts - (selected_experts(model, layer) or 0)) * pair + experts * 2.0 * hidden
