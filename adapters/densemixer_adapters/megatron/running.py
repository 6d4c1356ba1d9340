"""What is known of a training forward of a layer, between dispatch and combination."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Running:
    """A training forward.

    Attributes:
        router_input: The router's input, [sequence, batch, hidden], for router metrics.
        logits: What came of it, [sequence, batch, experts].
        scores: p of all experts, [tokens, experts]; None if DenseMixer adds nothing.
        index, weights: The selected experts and their weights, [tokens, k] each.
        x: The experts' input, [..., hidden].
    """

    router_input: Tensor | None
    logits: Tensor
    scores: Tensor | None
    index: Tensor
    weights: Tensor
    x: Tensor


def selection(routing_map: Tensor, probs: Tensor, selected: int) -> tuple[Tensor, Tensor]:
    """The selected experts and their weights, [tokens, k] each.

    Args:
        routing_map, probs: What the token dispatcher gets, [tokens, experts] each. A hook on the router, or a forward
            of its own, may have changed them after its routing.
        selected: k.
    """
    index = routing_map.to(torch.uint8).topk(selected, -1).indices
    return index, probs.detach().gather(-1, index)
