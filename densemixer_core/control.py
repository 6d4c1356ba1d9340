"""What is known of each pair before it is drawn, and what a pilot makes of it.

An expert's output resembles that of the selected ones, more or less: ⟨g, E_j(x)⟩ is near β_j·⟨g, y/Σ_selected w⟩, with
a β_j of 1 where all experts are nearly one network, and of 0 where they have nothing in common. That inner product is
known for every token, so that the drawn pairs need to make up for the rest alone:

    estimate = (⟨g, E_j(x)⟩ − control)/π + control for a drawn pair, control for another; control = β_j·⟨g, y/Σ w⟩

Whatever the β_j are, its mean over draws is ⟨g, E_j(x)⟩, as long as they don't depend on the draw itself: they are fitted
on the pilot, another draw. This is a control variate, in sampling theory the difference estimator (Cochran, "Sampling
Techniques", 1977, chapter 7).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densemixer_core.sampling import Pairs


class Known(NamedTuple):
    """What the backward knows of the pairs before any of them is evaluated.

    Attributes:
        sensitivity: How much the inner product of each pair matters, [tokens, experts]; pairs with zero are left out.
        along: ⟨g, y⟩/Σ_selected w, [tokens, 1]; zero where that isn't finite.
    """

    sensitivity: Tensor
    along: Tensor


def fit(size: Tensor, along: Tensor, pairs: Pairs, tokens: int) -> tuple[Tensor, Tensor]:
    """Fit β_j by least squares on a pilot, in which all experts have the same share.

    All pairs count the same. An expert's β_j is drawn towards the one of all experts by as much as `_COMMON_PAIRS` pairs
    would, and that one towards 0 by one pair.

    Args:
        size: ⟨g, E_j(x)⟩/‖g‖ of the pilot's pairs, [pairs].
        along: ⟨g, y⟩/(‖g‖·Σ_selected w) of their tokens, [pairs].
        pairs: The pilot.
        tokens: How many tokens there are.

    Returns:
        β_j, [experts], and size − β_j·along, [pairs].
    """
    counts = pairs.factor > 0
    expert = pairs.place // tokens
    products = torch.where(counts, torch.stack([size * along, along.square()]), 0)
    moments = products.new_zeros(2, len(pairs.ends)).index_add_(1, expert, products)
    together, alone = moments.sum(1)
    pair = alone / counts.sum().clamp(min=1)
    smallest = torch.finfo(size.dtype).tiny
    common = together / (alone + pair).clamp(min=smallest)
    coefficient = (moments[0] + _COMMON_PAIRS * pair * common) / (moments[1] + _COMMON_PAIRS * pair).clamp(min=smallest)
    return coefficient, size - coefficient[expert] * along


_COMMON_PAIRS = 4
