"""Whether the mean over draws of a budget is the exact value."""

from __future__ import annotations

import torch
from torch import Tensor


def bias(draws: Tensor, exact: Tensor, directions: Tensor | None = None) -> float:
    """How far the mean is from the exact value, in standard errors of that mean: the largest in some directions.

    Args:
        draws: [draws, ...].
        exact: [...].
        directions: [directions, ...]; ten random ones by default.
    """
    if directions is None:
        directions = torch.randn(10, exact.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return standard_errors((draws.double() - exact).flatten(1) @ directions.flatten(1).t())


def standard_errors(values: Tensor) -> float:
    """The largest mean of values [draws, directions], in its standard errors."""
    return float((values.mean(0).abs() / (values.std(0) / len(values) ** 0.5)).max())
