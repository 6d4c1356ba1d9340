"""⟨g, E_j(x)⟩ by plain matrix products, expert by expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densemixer_core.weights import ExpertLayout, ExpertWeights, StackedExperts


def expert_dots(x: Tensor, g: Tensor, experts: StackedExperts, dtype: torch.dtype, workspace_bytes: int) -> Tensor:
    """`densemixer_core.expert_dots`, with the same arguments and result."""
    weights, layout = oriented(experts), experts.layout
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    stacked = weights.down.shape[0]
    dots = room_for_dots(x, g, stacked, layout)
    rows = max(1, workspace_bytes // temporary_bytes(weights, dtype))
    if x.device.type == "cpu" and dtype.itemsize >= 4 and not torch.compiler.is_compiling():
        rows = min(rows, _CACHED_ROWS)
    for expert, row in enumerate(dots[:stacked]):
        up_bias, down_bias = (None if bias is None else bias[expert].to(dtype) for bias in weights[2:4])
        one = Rows(weights.up[expert].to(dtype), weights.down[expert].to(dtype), up_bias, down_bias, layout)
        for x_rows, g_rows, out in zip(*(torch.split(tensor, rows) for tensor in (x, g, row)), strict=True):
            out.copy_(one.dots(x_rows, g_rows))
    return scaled(dots, weights.scale).t()


_CACHED_ROWS = 1024
"""How many tokens at a time keep a CPU's temporaries in its cache. (Half precision is faster in one piece. A compiled
graph has one for each number of pieces.)"""

Matrix = Tensor | tuple[Tensor, Tensor]
"""Weights; or a gate and an up projection that lie apart, whose results follow each other."""


def oriented(experts: StackedExperts) -> ExpertWeights:
    """The same orientation, [experts, in, out], for both layouts, and as many experts; views, not copies."""
    weights = experts.weights
    weights = weights._replace(up=weights.up[: len(weights.down)])  # LongCat-Flash has unused ones
    if experts.layout.transposed:
        return weights
    gate = None if weights.gate is None else weights.gate.transpose(1, 2)
    return weights._replace(up=weights.up.transpose(1, 2), down=weights.down.transpose(1, 2), gate=gate)


def room_for_dots(x: Tensor, g: Tensor, stacked: int, layout: ExpertLayout) -> Tensor:
    """Room for the inner products, [experts, tokens], with those of the experts without weights."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    count = stacked + layout.identities + layout.zeros
    dots = torch.zeros(count, x.shape[0], dtype=accumulate, device=x.device)
    if layout.identities:
        dots[stacked : stacked + layout.identities] = torch.linalg.vecdot(x.to(accumulate), g.to(accumulate))
    return dots


def scaled(dots: Tensor, scale: Tensor | None) -> Tensor:
    """[experts, tokens], in place, by the factors on the first experts' outputs."""
    if scale is not None:
        dots[: len(scale)] *= scale.to(dots.dtype).unsqueeze(1)
    return dots


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What experts compute for rows of x, without their scales.

    Attributes:
        up: Of one expert, [in, out], or of several for a ``multiply`` that knows which row is whose; so are the others.
        down: The same.
        up_bias: Of one expert, [out], or for each row that of its expert, [rows, out].
        down_bias: The same.
        layout: How the experts compute.
        multiply: From rows, a `Matrix` and a bias to their product.
    """

    up: Matrix
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    layout: ExpertLayout
    multiply: Callable[[Tensor, Any, Tensor | None], Tensor] = affine

    def outputs(self, x: Tensor) -> Tensor:
        """The expert's output for each row of x, [rows, hidden]."""
        output = self.multiply(
            self.layout.activation(self.multiply(x, self.up, self.up_bias)), self.down, self.down_bias
        )
        return output if self.layout.post_norm is None else self.layout.post_norm(output)

    def dots(self, x: Tensor, g: Tensor) -> Tensor:
        """The inner product of each row of g, [rows, hidden], with the expert's output for that row of x, [rows]."""
        accumulate = torch.promote_types(x.dtype, torch.float32)
        if self.layout.post_norm is not None:
            return torch.sum(self.outputs(x) * g, -1, dtype=accumulate)
        hidden = self.layout.activation(self.multiply(x, self.up, self.up_bias))
        dots = torch.sum(self.multiply(g, self.down.mT, None).mul_(hidden), -1, dtype=accumulate)
        return dots if self.down_bias is None else dots + torch.sum(g * self.down_bias, -1, dtype=accumulate)


def temporary_bytes(weights: ExpertWeights, dtype: torch.dtype) -> int:
    """For one row: the up projection and an activation that makes a few copies of it, or an output and its norm."""
    width = weights.up.shape[2] * (1 if weights.gate is None else 2)
    return (4 * width + 3 * sum(weights.down.shape[1:])) * dtype.itemsize
