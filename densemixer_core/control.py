"""What is known of the inner products before they are evaluated, and what a pilot makes of it.

An expert's output resembles that of the selected ones, more or less, and it resembles its outputs for other tokens:

    ⟨g, E_j(x)⟩ ≈ control = β_j·⟨g, y⟩/Σ_selected w + γ·⟨g, m_j⟩, where m_j is the mean of E_j in a pilot

The control is known for every pair, so that the draw needs to make up for the rest alone:

    estimate = (⟨g, E_j(x)⟩ − control)/π + control for a drawn pair; control for another

Whatever the coefficients are, its mean over draws is ⟨g, E_j(x)⟩, as long as they don't depend on the draw: the pilot
is another one. In sampling theory this is the difference estimator (Cochran, "Sampling Techniques", 1977).
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
        prior: The β that counts where a pilot says nothing: 1 for an estimator that takes ``along`` away from the inner
            products, 0 for others.
    """

    sensitivity: Tensor
    along: Tensor
    prior: float = 0.0


class Pilot(NamedTuple):
    """Evaluated pairs, of which all experts have the same share.

    Attributes:
        pairs: Which they are.
        dots: ⟨g, E_j(x)⟩, [pairs].
        sums: The sum of E_j(x) over the pairs of each expert, [experts, hidden].
    """

    pairs: Pairs
    dots: Tensor
    sums: Tensor


def fit(pilot: Pilot, g: Tensor, norm: Tensor, along: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """Fit the control by least squares to the pilot's inner products over ‖g‖, in which all pairs count the same.

    An expert's mean is drawn towards 0 as by `_PAIRS_FOR_MEAN` more pairs, and its β_j towards that of all experts as
    by `_PAIRS_FOR_BETA`; that one towards ``prior`` and γ towards 0 as by `_PAIRS_FOR_PRIOR`. What a pair gave to its
    expert's mean is taken out where that pair is predicted: or else the mean would seem better than it is.

    Args:
        g: The gradient of the experts' output, [tokens, hidden].
        norm: ‖g‖, [tokens].
        along: ⟨g, y⟩/Σ_selected w, [tokens].
        prior: See `Known`.

    Returns:
        The control, [experts, tokens], and what it leaves of the pilot's inner products over ‖g‖, [pairs], float64.
    """
    (place, factor, ends), dots, sums = pilot
    expert, token, counts = place // len(g), place % len(g), factor > 0
    size = ends.diff(prepend=ends.new_zeros(1)) + _PAIRS_FOR_MEAN
    along_mean = ((sums / size.unsqueeze(1)).to(g.dtype) @ g.t()).to(dots.dtype)
    along_own = along_mean[expert, token]
    along_others = (along_own * size[expert] - dots) / (size[expert] - 1)

    # Without numbers where there is no gradient, or in float16 beyond its range. In float64: its squares stay in range.
    target, output, own, others = (
        torch.where(counts, (along / norm[token]).nan_to_num(0.0, 0.0, 0.0), 0.0).to(torch.float64)
        for along in (dots, along[token], along_own, along_others)
    )
    target = target - prior * output  # the β that are fitted come on top of it
    # Each fit sees some more pairs, which are zero, of usual size. Of `own`: `others` may be nothing but rounding.
    one, one_of_mean = (along.square().sum() / counts.sum().clamp(min=1) for along in (output, own))
    apart = others - _slope(others, output, one) * output
    gamma = _slope(target, apart, _PAIRS_FOR_PRIOR * one_of_mean)
    rest = target - gamma * others
    beta = _slope(rest, output, _PAIRS_FOR_PRIOR * one)
    products = torch.stack([output * rest, output.square()])
    above, below = products.new_zeros(2, len(ends)).index_add_(1, expert, products)
    more = _PAIRS_FOR_BETA * one + torch.finfo(products.dtype).tiny
    betas = (above + more * beta) / (below + more)
    control = torch.outer((betas + prior).to(along.dtype), along) + gamma.to(along.dtype) * along_mean
    return control.nan_to_num(0.0, 0.0, 0.0), rest - betas[expert] * output


def _slope(of: Tensor, by: Tensor, more: Tensor) -> Tensor:
    """The coefficient of a least-squares fit, drawn towards 0 by ``more``."""
    return (of * by).sum() / (by.square().sum() + more + torch.finfo(by.dtype).tiny)


_PAIRS_FOR_PRIOR = 4
_PAIRS_FOR_MEAN = 4
_PAIRS_FOR_BETA = 16
