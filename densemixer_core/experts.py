"""⟨g, E_j(x)⟩ for every token and every expert of a layer.

An expert is E_j(x) = W_down · a(W_up · x + b_up) + b_down, with a gated activation a in most models. Three things make
its inner product with g cheap:

- ⟨g, W_down h⟩ = ⟨W_downᵀ g, h⟩, so no expert output of size [tokens, hidden] is ever formed;
- all experts see all tokens, so these are plain matrix products without sorting or offsets;
- only [tokens, experts] scalars remain, and the work is split by tokens to a bound on temporary memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertWeights(NamedTuple):
    """The stacked weights of a layer's experts.

    Shapes, where ``width`` is 2·ffn for gated experts and ffn for others:

    - ``up``: [experts, width, hidden], or [experts, hidden, width] if the layout is transposed;
    - ``down``: [experts, hidden, ffn], or [experts, ffn, hidden] if the layout is transposed;
    - ``up_bias``: [experts, width]; ``down_bias``: [experts, hidden];
    - ``scale``: a factor on each expert's output, [experts].
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    scale: Tensor | None = None


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
    """

    activation: Callable[[Tensor], Tensor]
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None
    identities: int = 0
    zeros: int = 0


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


def expert_dots(
    x: Tensor, g: Tensor, experts: StackedExperts, dtype: torch.dtype | None = None, workspace_bytes: int = 1 << 28
) -> Tensor:
    """⟨g_t, E_j(x_t)⟩ for every token t and expert j. To be called without gradient tracking.

    Args:
        x: The experts' input, [tokens, hidden].
        g: The gradient of the experts' output, [tokens, hidden].
        experts: The experts of the layer.
        dtype: The dtype of the matrix products, by default that of the weights. The inner products are accumulated in
            float32, or float64 if that is the dtype.
        workspace_bytes: Upper bound on the temporaries of one expert; the tokens are split to stay below it.

    Returns:
        [tokens, experts], float32 or float64.
    """
    up, down, up_bias, down_bias, scale = experts.weights
    layout = experts.layout
    dtype = dtype or up.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    # The same orientation, [experts, in, out], for both layouts; views, not copies.
    up, down = (up, down) if layout.transposed else (up.transpose(1, 2), down.transpose(1, 2))

    stacked = down.shape[0]
    count = stacked + layout.identities + layout.zeros
    dots = torch.zeros(count, x.shape[0], dtype=accumulate, device=x.device)
    if layout.identities:
        dots[stacked : stacked + layout.identities] = torch.linalg.vecdot(x.to(accumulate), g.to(accumulate))
    for expert, row in enumerate(dots[:stacked]):
        up_j, down_j = up[expert].to(dtype), down[expert].to(dtype)
        up_bias_j = None if up_bias is None else up_bias[expert].to(dtype)
        down_bias_j = None if down_bias is None else down_bias[expert].to(dtype)
        rows = max(1, workspace_bytes // _temporary_bytes_per_token(up_j, down_j))
        for x_rows, g_rows, out in zip(*(torch.split(tensor, rows) for tensor in (x, g, row)), strict=True):
            hidden = layout.activation(_affine(x_rows, up_j, up_bias_j))
            if layout.post_norm is None:
                torch.sum(hidden * (g_rows @ down_j.t()), -1, dtype=accumulate, out=out)
                if down_bias_j is not None:
                    out += (g_rows @ down_bias_j).to(accumulate)
            else:
                output = layout.post_norm(_affine(hidden, down_j, down_bias_j))
                torch.sum(output * g_rows, -1, dtype=accumulate, out=out)
    if scale is not None:
        dots[:stacked] *= scale.to(accumulate).unsqueeze(1)
    return dots.t()


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _temporary_bytes_per_token(up: Tensor, down: Tensor) -> int:
    """Room for the up projection and an activation that makes a few copies of it, or for outputs and their norm."""
    return (4 * up.shape[1] + 3 * sum(down.shape)) * up.element_size()
