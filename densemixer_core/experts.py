"""⟨g, E_j(x)⟩ for every token and every expert of a layer.

An expert is E_j(x) = W_down · a(W_up · x + b_up) + b_down, with a gated activation a in most models. Three things make
its inner product with g cheap:

- ⟨g, W_down h⟩ = ⟨W_downᵀ g, h⟩, so no expert output of size [tokens, hidden] is ever formed;
- all experts see all tokens, so these are plain matrix products without sorting or offsets;
- only [tokens, experts] scalars remain, and the work is split by tokens to a bound on temporary memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densemixer_core import products
from densemixer_core.control import Known, Pilot, fit
from densemixer_core.kernel import fused
from densemixer_core.products import Matrix, affine, oriented, room_for_dots, row_dots, row_outputs, temporary_bytes
from densemixer_core.sampling import Pairs, draw_pairs, offsets, typical_size
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
        workspace_bytes: Upper bound on the temporaries of one expert; the tokens are split to stay below it.

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


def sampled_dots(
    x: Tensor,
    g: Tensor,
    known: Known,
    count: int,
    seed: int,
    experts: StackedExperts,
    dtype: torch.dtype | None = None,
    workspace_bytes: int = 1 << 28,
) -> Tensor:
    """An estimate of ⟨g_t, E_j(x_t)⟩ for every token t and expert j that evaluates ``count`` of the pairs.

    The rows of a pair are gathered, and all pairs go through one grouped matrix product for each projection. A few of
    the pairs are a pilot: they tell how large the inner products of each expert are, and how much of them is known
    beforehand, see `control`. Their own inner products are exact then, so the others are drawn from the rest. Experts
    without weights cost nothing, so all their pairs are exact, on top of ``count``.

    Args:
        x: As in `expert_dots`, and so are ``g``, ``experts`` and ``dtype``.
        known: What is known of the pairs.
        count: How many pairs are evaluated.
        seed: Chooses the draws, see `sampling.offsets`.
        workspace_bytes: Upper bound on the temporaries; the pairs are split to stay below it. A copy of the weights in
            another dtype comes on top, and some 40 bytes for each pair of a token and an expert while they are drawn.

    Returns:
        [tokens, experts], float32 or float64; on average over draws `expert_dots`, where the sensitivity isn't zero.
    """
    weights, layout = oriented(experts), experts.layout
    dtype = dtype or weights.up.dtype
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    tokens, stacked = x.shape[0], weights.down.shape[0]
    dots = room_for_dots(x, g, stacked, layout)
    if count == 0:
        return dots.t()
    up, down = weights.up.to(dtype), weights.down.to(dtype)
    inner: Matrix = up if weights.gate is None else (weights.gate.to(dtype), up)
    biases = [None if bias is None else bias.to(dtype) for bias in weights[2:4]]
    rows = max(1, workspace_bytes // (temporary_bytes(weights, dtype) + 2 * x.shape[1] * dtype.itemsize))

    def split(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor, tuple[Any, ...]]]:
        """Expert and token of as many pairs at a time as fit, and how these experts compute."""
        start = 0
        for place in torch.split(pairs.place, rows):
            expert, token = place // tokens, place % tokens
            up_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
            grouped = functools.partial(_grouped_affine, (pairs.ends - start).clamp(0, len(place)))
            yield expert, token, (inner, down, up_bias, down_bias, layout, grouped)
            start += len(place)

    scale = dots.new_ones(stacked) if weights.scale is None else weights.scale.to(dots.dtype)

    def evaluate(pairs: Pairs) -> Tensor:
        return torch.cat([row_dots(x[token], g[token], *how) * scale[expert] for expert, token, how in split(pairs)])

    def evaluate_outputs(pairs: Pairs) -> Pilot:
        sums, parts = dots.new_zeros(stacked, x.shape[1]), []
        for expert, token, how in split(pairs):
            outputs = row_outputs(x[token], *how)
            parts.append(torch.sum(outputs * g[token], -1, dtype=dots.dtype) * scale[expert])
            sums.index_add_(0, expert, outputs.to(dots.dtype))
        return Pilot(pairs, torch.cat(parts), sums * scale.unsqueeze(1))

    norm = torch.linalg.vector_norm(g, dim=-1, dtype=dots.dtype)
    # A token without numbers must not take the draw from the others.
    importance = (known.sensitivity[:, :stacked] * norm.unsqueeze(1)).nan_to_num(0.0, 0.0, 0.0)
    # Of what doesn't depend on the pilot: on a GPU its sums differ in their rounding from run to run.
    offset, next_offset = offsets(importance, seed)
    along = known.along.squeeze(1).to(dots.dtype)
    if pilots := count // PAIRS_PER_PILOT:
        pairs = draw_pairs(importance / importance.sum(0).clamp(min=1e-30), pilots, offset)
        pilot = evaluate_outputs(pairs)
        dots[:stacked], rest = fit(pilot, g, along, known.prior)
        dots.view(-1)[pairs.place] = pilot.dots
        importance = importance * typical_size(rest, pairs, tokens).to(importance.dtype)
        importance = importance.t().reshape(-1).index_fill(0, pairs.place, 0.0).view(stacked, tokens).t()
    else:
        dots[:stacked] = known.prior * along
        importance = importance * scale.abs().to(importance.dtype)
    pairs = draw_pairs(importance, count - pilots, next_offset)
    rest = (evaluate(pairs) - dots.view(-1)[pairs.place]) * pairs.factor.to(dots.dtype)
    dots.view(-1).index_add_(0, pairs.place, torch.where(pairs.factor > 0, rest, 0))
    return dots.t()


PAIRS_PER_PILOT = 10
"""Of so many pairs one is spent on the pilot."""


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


def _grouped_affine(ends: Tensor, x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """Each row by the matrix of its expert; the rows of expert j, and of ``bias``, come before ``ends[j]``."""
    product = _opaque_grouped_product if torch.compiler.is_compiling() else _grouped_product
    if isinstance(weight, Tensor):
        output = product(x, weight, ends)
    else:
        output = torch.cat([product(x, half, ends) for half in weight], -1)
    return output if bias is None else output + bias


def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    aligned = all(extent * x.element_size() % 16 == 0 for extent in weight.shape[1:])
    if aligned and x.dtype != torch.float64 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weight, offs=ends)
    groups = torch.split(x, ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])


# torch.compile takes torch's grouped product in bfloat16 only.
_opaque_grouped_product = torch.library.custom_op("densemixer::grouped_product", _grouped_product, mutates_args=())


@_opaque_grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])
