"""How far gradients of different data agree: whether they are signal or noise.

Each batch has a gradient: a mean μ that all share, the signal, and noise of its own. Of two halves of the batches, with
n tokens each, the cosine is about ρ/(1 + ρ), with ρ = ‖μ‖²/(noise²/n): 0 where there is only noise, ½ where both are as
large, 1 where there is none. With how many tokens both are as large, the **gradient noise scale** (McCandlish et al.,
"An Empirical Model of Large-Batch Training", 2018), follows from the same inner products: a batch's square is
‖μ‖² + noise²/tokens in the mean, the product of two is ‖μ‖².
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from densemixer_adapters.metrics.gradients import mean

Gradients = list[list[list[Tensor]]]
"""Of each batch, by layer, of each parameter of its router."""


HALVES = 500
"""So many ways to halve are enough. Of 12 batches there are 462, of 32 there are 300 million."""


def products(gradients: Gradients) -> list[Tensor]:
    """The inner products of the batches' gradients, [batches, batches] in float64, by layer."""
    found = []
    for layer in zip(*gradients, strict=True):
        parts = [torch.stack([gradient.double().flatten() for gradient in p]) for p in zip(*layer, strict=True)]
        zero = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
        found.append(sum(((part @ part.T).cpu() for part in parts), zero))
    return found


def cosine_of_halves(products: Tensor) -> float:
    """The mean over all ways to halve the batches, or over `HALVES` of them; NaN without a gradient."""
    one = _halves(len(products)).to(products.dtype)
    other = 1 - one
    ones, others = one @ products, other @ products
    squares = (ones * one).sum(-1) * (others * other).sum(-1)
    return mean(((ones * other).sum(-1) / squares.sqrt()).tolist())


def _halves(count: int) -> Tensor:
    """Which batches are in the half of the first one, [ways, batches]."""
    if math.comb(count - 1, count // 2 - 1) <= HALVES:
        chosen = [[0, *rest] for rest in itertools.combinations(range(1, count), count // 2 - 1)]
    else:
        random = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(count, generator=random)[: count // 2].tolist() for _ in range(HALVES)]
    return torch.zeros(len(chosen), count).scatter_(1, torch.tensor(chosen), 1.0)


def noise_tokens(products: Tensor, tokens: float) -> float:
    """With how many tokens the noise is as large as the signal.

    Args:
        products: As `products` returns them.
        tokens: Of a batch.

    Returns:
        Infinity if gradients of different batches don't point the same way in the mean; NaN without a gradient.
    """
    count = len(products)
    square = float(products.trace()) / count
    signal = float(products.sum() - products.trace()) / (count * (count - 1))
    if not square:
        return math.nan
    return tokens * max(square - signal, 0.0) / signal if signal > 0 else math.inf
