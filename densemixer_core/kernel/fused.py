"""⟨g, E_j(x)⟩ for a layer's experts in another way than by products expert by expert, where that is faster."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from densemixer_core.kernel import INTERPRETED
from densemixer_core.kernel.activations import Activation
from densemixer_core.kernel.trial import trial_tokens
from densemixer_core.kernel.ways import ONE_BY_ONE, TOLERANCE, fastest, ways
from densemixer_core.products import room_for_dots, scaled
from densemixer_core.weights import ExpertLayout, ExpertWeights, StackedExperts

_INSTALLED = importlib.util.find_spec("triton") is not None

_chosen: dict[tuple[object, ...], str] = {}
"""The name of the way for a kind of layer and a number of tokens. The backward alone asks, once for each forward: no
recomputation can come to another choice."""


def supported(x: Tensor, experts: StackedExperts, dtype: torch.dtype) -> bool:
    """Whether there is another way for these experts. Looks at no values, and can be traced by torch.compile.

    Not under ``torch.use_deterministic_algorithms``: what is faster is found by timing.

    Args:
        x: The experts' input, [tokens, hidden].
        experts: The experts of the layer.
        dtype: The dtype of the matrix products.
    """
    return (
        (x.is_cuda or INTERPRETED)
        and _INSTALLED
        and experts.layout.formula is not None
        and experts.layout.post_norm is None
        and dtype in TOLERANCE
        and x.shape[0] > 0
        and not torch.are_deterministic_algorithms_enabled()
    )


def expert_dots(x: Tensor, g: Tensor, experts: StackedExperts, dtype: torch.dtype, workspace_bytes: int) -> Tensor:
    """`densemixer_core.expert_dots` for what is `supported`, with the same arguments and result."""
    up, down, up_bias, down_bias, scale, _ = experts.weights
    up = up[: len(down)]  # LongCat-Flash has unused ones
    layout = experts.layout
    assert layout.formula is not None
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    formula = layout.formula
    dots = room_for_dots(x, g, len(down), layout)
    dots[: len(down)] = _fused(
        x,
        g,
        up,
        down,
        up_bias,
        formula.function,
        formula.gate,
        formula.alpha,
        formula.limit,
        formula.offset,
        layout.transposed,
        workspace_bytes,
    )
    if down_bias is not None:
        dots[: len(down)] += down_bias.to(dtype) @ g.t()
    return scaled(dots, scale).t()


@torch.library.custom_op("densemixer::fused_expert_dots", mutates_args=())
def _fused(
    x: Tensor,
    g: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    function: str,
    gate: str | None,
    alpha: float,
    limit: float,
    offset: float,
    transposed: bool,
    workspace_bytes: int,
) -> Tensor:
    """[experts, tokens] of the stacked experts without their output's bias and scale. torch.compile looks no deeper."""
    activation = Activation(function, gate, alpha, limit, offset)
    layout = ExpertLayout(activation, transposed, formula=activation)
    candidates = ways(StackedExperts(ExpertWeights(up, down, up_bias), layout), workspace_bytes)
    precision, tokens = torch.get_float32_matmul_precision(), trial_tokens(len(x))
    kind = (
        x.device,
        x.dtype,
        precision,
        up.dtype,
        up.shape,
        down.shape,
        up_bias is None,
        activation,
        transposed,
        tokens,
    )
    if kind not in _chosen:
        # Without tensor cores there is nothing to gain, and the kernel takes a minute to compile.
        plain = x.is_cuda and x.dtype == torch.float32 and precision == "highest"
        chosen = ONE_BY_ONE if plain else fastest(candidates, x)
        if chosen is None:
            return candidates[ONE_BY_ONE](x, g)
        _chosen[kind] = chosen
    return candidates[_chosen[kind]](x, g)


@_fused.register_fake
def _(x: Tensor, g: Tensor, up: Tensor, *_: object) -> Tensor:
    return x.new_empty(up.shape[0], x.shape[0], dtype=torch.float32)
