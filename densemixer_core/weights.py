"""The experts of a layer: their weights, and how to compute with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from densemixer_core.kernel.activations import Activation


class ExpertWeights(NamedTuple):
    """The stacked weights of a layer's experts.

    Shapes, where ``width`` is 2·ffn for gated experts and ffn for others:

    - ``up``: [experts, width, hidden], or [experts, hidden, width] if the layout is transposed;
    - ``down``: [experts, hidden, ffn], or [experts, ffn, hidden] if the layout is transposed;
    - ``up_bias``: [experts, width]; ``down_bias``: [experts, hidden];
    - ``scale``: a factor on each expert's output, [experts];
    - ``gate``: the first half of a concatenated width, where it is a tensor of its own; ``up`` then has the other half.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """How a layer computes with its stacked weights.

    Args:
        activation: From the up projection's result to the down projection's input, [n, width] → [n, ffn]. Gating, and
            whether gate and up halves are concatenated or interleaved, is its affair.
        transposed: Whether the weights are stored [experts, in, out].
        post_norm: A norm applied to each expert's output, [n, hidden] → [n, hidden], or None.
        identities: How many experts without weights follow the stacked ones that return their input.
        zeros: How many follow that return zero.
        formula: What ``activation`` computes, where that is known: a fused kernel can't call it.
    """

    activation: Callable[[Tensor], Tensor]
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None
    identities: int = 0
    zeros: int = 0
    formula: Activation | None = None


@dataclasses.dataclass(frozen=True)
class Derivation:
    """How to compute weights again that exist only during the forward, such as dequantised ones.

    Args:
        sources: What they are computed from, in the same places, of any shape and dtype.
        compute: From the sources to the weights. Called without gradient tracking.
    """

    sources: ExpertWeights
    compute: Callable[[ExpertWeights], ExpertWeights]


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """The experts of one layer: their weights and how to compute with them.

    With a ``derivation``, its sources are kept from the forward to the backward instead of the weights, and the weights
    are computed again in the backward.
    """

    weights: ExpertWeights
    layout: ExpertLayout
    derivation: Derivation | None = None

    def one_by_one(self, dtype: torch.dtype) -> Iterator[StackedExperts]:
        """Each expert with weights alone, in this dtype, its gate and up projection as one: one copy at a time."""
        layout, stacked = dataclasses.replace(self.layout, identities=0, zeros=0), self.weights
        for expert in range(len(stacked.down)):
            up, down, *others, gate = (None if w is None else w[expert : expert + 1].to(dtype) for w in stacked)
            assert up is not None
            assert down is not None
            whole = up if gate is None else torch.cat([gate, up], -1 if layout.transposed else 1)
            yield StackedExperts(ExpertWeights(whole, down, *others), layout)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the host multiplies by ``weight``: autocast's where it is on (it leaves float64 alone)."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
