"""⟨g, E_j(x)⟩ for every token and every expert of a layer.

An expert is E_j(x) = W_down · a(W_up · x + b_up) + b_down, with a gated activation a in most models. Three things make
its inner product with g cheap:

- ⟨g, W_down h⟩ = ⟨W_downᵀ g, h⟩, so no expert output of size [tokens, hidden] is ever formed;
- all experts see all tokens, so these are plain matrix products without sorting or offsets;
- only [tokens, experts] scalars remain, and the work is split by tokens to a bound on temporary memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densemixer_core import products
from densemixer_core.kernel import fused
from densemixer_core.products import affine, oriented, room_for_dots
from densemixer_core.weights import StackedExperts


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
        workspace_bytes: Upper bound on the temporaries; the tokens are split to stay below it, and the experts if
            several go through at the same time.

    Returns:
        [tokens, experts], float32 or float64.
    """
    dtype = dtype or experts.weights.up.dtype
    if experts.weights.gate is not None:
        x, g = x.to(dtype), g.to(dtype)
        dots = room_for_dots(x, g, len(experts.weights.down), experts.layout)
        for row, expert in zip(dots, experts.one_by_one(dtype), strict=False):
            row.copy_(expert_dots(x, g, expert, dtype, workspace_bytes).squeeze(1))
        return dots.t()
    if fused.supported(x, experts, dtype):
        return fused.expert_dots(x, g, experts, dtype, workspace_bytes)
    return products.expert_dots(x, g, experts, dtype, workspace_bytes)


def routed_output(x: Tensor, index: Tensor, weights: Tensor, experts: StackedExperts) -> tuple[Tensor, Tensor]:
    """y = Σ_selected w_j E_j(x) by these weights, expert by expert: to compare a few tokens with what a layer returns.

    Args:
        x: The experts' input, [tokens, hidden].
        index: The selected experts, [tokens, k]. What is no expert here counts as nothing.
        weights: Their weights w, [tokens, k].
        experts: The experts of the layer.

    Returns:
        y, [tokens, hidden], and the size of what may cancel in it, [tokens]. Float32 or float64. The size is
        Σ|w_j|·‖s_j‖, where each number of s_j is the root of the summed squares of the terms of that of E_j(x).
    """
    stacked, layout = oriented(experts), experts.layout
    dtype = torch.promote_types(stacked.up.dtype, torch.float32)
    x, weights = x.to(dtype), weights.to(dtype)
    y, size = torch.zeros_like(x), x.new_zeros(len(x))
    count = stacked.down.shape[0]
    for expert in torch.unique(index).tolist():
        token, slot = torch.where(index == expert)
        if 0 <= expert < count:
            up, down, up_bias, down_bias, scale, gate = (None if w is None else w[expert].to(dtype) for w in stacked)
            assert up is not None
            assert down is not None
            up = up if gate is None else torch.cat([gate, up], -1)
            inner = layout.activation(affine(x[token], up, up_bias)).to(dtype)
            output = affine(inner, down, down_bias)
            terms = torch.linalg.vector_norm(torch.sqrt(inner.square() @ down.square()), dim=-1)
            if layout.post_norm is not None:
                normed = layout.post_norm(output).to(dtype)
                terms = terms * torch.linalg.vector_norm(normed, dim=-1) / torch.linalg.vector_norm(output, dim=-1)
                output = normed
            if scale is not None:
                output, terms = output * scale, terms * scale.abs()
        elif count <= expert < count + layout.identities:
            output, terms = x[token], x.new_zeros(len(token))
        else:
            continue
        y.index_add_(0, token, output * weights[token, slot].unsqueeze(1))
        terms = torch.maximum(terms, torch.linalg.vector_norm(output, dim=-1))
        size.index_add_(0, token, terms * weights[token, slot].abs())
    return y, size
