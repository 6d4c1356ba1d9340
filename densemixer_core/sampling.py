"""Which (token, unselected expert) pairs are evaluated when the budget doesn't allow all of them.

Each pair is drawn with a probability π, and what a drawn pair adds to what was known of it beforehand (`control`)
counts 1/π times. The mean over draws is therefore the exact gradient (Horvitz & Thompson, "A Generalization of Sampling
Without Replacement From a Finite Universe", 1952). The draw is systematic: the pairs lie one after the other on a line,
each as long as its π, and a comb with teeth at distance 1 and a random offset picks them. So the number of pairs is
known without asking the device, each expert and each stretch of tokens gets its due share, and the pairs come sorted by
expert.

The error is least if π is proportional to ‖dp_j/dz‖·c·|⟨g, E_j(x)⟩ − control|, which moves the router's logits. Of that
the first two factors are known (`routing.score_sensitivity`), and the difference is ‖g‖ times a size that is typical of
the expert; a pilot, a draw of its own in which all experts have the same share, measures these sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = (1 << 34) - 1  # a shift to the right by 30 of a 64-bit number, without its sign


class Pairs(NamedTuple):
    """Drawn pairs, sorted by expert and then by token.

    Attributes:
        place: expert · tokens + token, [pairs].
        factor: 1/π, or 0 for a tooth of the comb beyond the last pair, [pairs], float64.
        ends: For each expert the number of pairs up to its last one, [experts], int32.
    """

    place: Tensor
    factor: Tensor
    ends: Tensor


def draw_pairs(importance: Tensor, count: int, offset: Tensor) -> Pairs:
    """Draw ``count`` pairs, without waiting for the device.

    Args:
        importance: Nonnegative, [tokens, experts]; pairs with zero are never drawn.
        count: How many, at least 1. If fewer have an importance above zero, each of these is drawn once, and the rest
            has the factor 0.
        offset: Of the comb, a scalar between 0 and 1, float64.
    """
    tokens, experts = importance.shape
    probability = inclusion_probabilities(importance.t().to(torch.float64).contiguous(), count).flatten()
    line = (probability * _UNIT).round().to(torch.int64)
    ends = line.cumsum(0)
    teeth = (offset * _UNIT).to(torch.int64) + torch.arange(count, device=line.device) * _UNIT
    # Not-a-number, as a gradient scaler expects it at times, must not lead out of the line.
    drawn = torch.searchsorted(ends, teeth, right=True).clamp(max=line.numel() - 1)
    factor = torch.where(teeth < ends[-1], _UNIT / line[drawn].to(torch.float64), 0.0)
    last = torch.arange(1, experts + 1, device=line.device) * tokens
    return Pairs(drawn, factor, torch.searchsorted(drawn, last, out_int32=True))


_UNIT = 1 << 34
"""The line is measured in whole numbers: their sums are the same in any order, so also on a GPU, where torch has no
deterministic cumulative sum of others. Room for 2^28 pairs; what is below 2^-35 of one in the mean is never drawn."""


def share_of_pairs(tokens: int, experts: int, scored: int, selected: int, budget: float) -> int:
    """How many pairs a budget allows, at least one of any; in whole numbers, which torch.compile can leave open.

    Args:
        tokens: How many there are.
        experts: How many with weights are evaluated here.
        scored: How many experts the router scores. Those without weights cost nothing, so none of the budget is theirs.
        selected: How many of these a token goes through: of the experts here in the mean the same part.
        budget: The share of the pairs of a token and an unselected expert.
    """
    pairs = -(-tokens * experts * (scored - selected) // scored)
    return min(pairs, max(1, (pairs * round(budget * (1 << 20)) + (1 << 19)) // (1 << 20)))


def typical_size(size: Tensor, pairs: Pairs, tokens: int) -> Tensor:
    """The root mean square for each expert of what a pilot measured, drawn towards that of all experts by one pair.

    Args:
        size: What was measured, [pairs], float64: its squares leave the range of float32 where it doesn't.
        pairs: The pilot.
        tokens: How many tokens there are.

    Returns:
        [experts].
    """
    counts = pairs.factor > 0
    squares = torch.zeros(2, len(pairs.ends), dtype=size.dtype, device=size.device)
    values = torch.stack([torch.where(counts, size.square(), 0), counts.to(size.dtype)])
    total, number = squares.index_add_(1, pairs.place // tokens, values).unbind()
    overall = total.sum() / number.sum().clamp(min=1)
    overall = torch.where(overall == 0, 1, overall)  # an expert that seems silent must keep its chance
    return torch.sqrt((total + overall) / (number + 1))


def inclusion_probabilities(importance: Tensor, count: int) -> Tensor:
    """min(1, λ·importance), with the λ for which they sum to ``count`` (to less, if fewer are above zero).

    Each round caps those that reach 1 and distributes the rest anew. The sum approaches ``count`` from below,
    the sooner the fewer are drawn: 6 rounds leave out a 10 000th of a quarter of importances 1/u² with a uniform u.
    """
    scale = count / importance.sum().clamp(min=1e-300)
    for _ in range(6 if 4 * count <= importance.numel() else 10):
        capped = importance >= 1 / scale
        rest = torch.where(capped, 0.0, importance).sum().clamp(min=1e-300)
        scale = torch.maximum(scale, (count - capped.sum()) / rest)
    return (scale.clamp(max=1e300) * importance).clamp(max=1)


def offsets(numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two offsets for `draw_pairs`: hashes of the numbers and the seed, independent and uniform over seeds and data.

    So a run that is repeated or resumed draws the same, ranks with different tokens draw differently and ranks with the
    same tokens the same, and no random generator of the host's is touched.

    Args:
        numbers: At least one of them, of any shape.
        seed: Any integer.
    """
    bits = numbers.to(torch.float64).contiguous().view(torch.int64).sum()
    return _hash(bits, 2 * seed), _hash(bits, 2 * seed + 1)


def _hash(bits: Tensor, seed: int) -> Tensor:
    """Between 0 and 1, float64: the finaliser of SplitMix64 (Steele et al., 2014)."""
    bits = bits + (seed * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        bits = (bits ^ ((bits >> 30) & _MASK)) * (factor - 2**64)
    return ((bits ^ ((bits >> 31) & _MASK >> 1)) & ((1 << 53) - 1)).to(torch.float64) / 2**53
