"""Random experts, rows for them, and their inner products in float64: what the checks of the core look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from densemixer_core import Activation, ExpertLayout, ExpertWeights, StackedExperts

SILU = Activation("silu", "concatenated")
CLAMPED = Activation("silu", "interleaved", alpha=1.702, limit=1.0, offset=1.0)
"""That of gpt-oss, with a limit that random numbers reach."""


class Sizes(NamedTuple):
    """The extents of a layer."""

    tokens: int = 96
    hidden: int = 64
    ffn: int = 32
    experts: int = 8


SMALL = Sizes()


def experts(
    dtype: torch.dtype,
    device: str,
    like_gpt_oss: bool,
    activation: Activation = SILU,
    sizes: Sizes = SMALL,
    formula: bool = False,
) -> StackedExperts:
    """Random ones.

    Args:
        dtype: Of the weights.
        device: Where they are.
        like_gpt_oss: Whether they lie [in, out], and have biases and scales.
        activation: What they compute.
        sizes: Their extents.
        formula: Whether the other ways may compute them; otherwise only the products one by one do.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        numbers: Tensor = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return numbers.to(device, dtype)

    _, hidden, ffn, count = sizes
    width = ffn if activation.gate is None else 2 * ffn
    up, down = random(count, width, hidden), random(count, hidden, ffn)
    layout = ExpertLayout(activation, like_gpt_oss, formula=activation if formula else None)
    if not like_gpt_oss:
        return StackedExperts(ExpertWeights(up, down), layout)
    scale = 0.5 + torch.rand(count, generator=generator).to(device)
    up, down = up.mT.contiguous(), down.mT.contiguous()
    return StackedExperts(ExpertWeights(up, down, random(count, width), random(count, hidden), scale), layout)


def rows(dtype: torch.dtype, device: str, sizes: Sizes = SMALL) -> tuple[Tensor, Tensor]:
    """x and g, [tokens, hidden]."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, sizes.tokens, sizes.hidden, generator=generator).to(device, dtype)
    return x, g


def truth(x: Tensor, g: Tensor, stacked: StackedExperts) -> Tensor:
    """[tokens, experts] by the formula, in float64, expert by expert."""
    columns = []
    for expert in range(len(stacked.weights.down)):
        up, down, up_bias, down_bias, scale = (
            None if w is None else w[expert].double() for w in stacked.weights._replace(gate=None)[:5]
        )
        assert up is not None
        assert down is not None
        assert isinstance(stacked.layout.activation, Activation)
        up, down = (up, down) if stacked.layout.transposed else (up.t(), down.t())
        inner = x.double() @ up + (0.0 if up_bias is None else up_bias)
        output = _activated(inner, stacked.layout.activation) @ down + (0.0 if down_bias is None else down_bias)
        columns.append((output * g.double()).sum(-1) * (1.0 if scale is None else scale))
    return torch.stack(columns, 1)


def _activated(z: Tensor, activation: Activation) -> Tensor:
    """What the activation says, by nothing of the core's."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda z: z * torch.sigmoid(activation.alpha * z),
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda z: F.relu(z) ** 2,
    }
    function = functions[activation.function]
    if activation.gate is None:
        return function(z)
    gate, up = z.chunk(2, -1) if activation.gate == "concatenated" else (z[..., 0::2], z[..., 1::2])
    limit = activation.limit
    return function(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + activation.offset)
