"""The edge of the selection: how far apart the logits are there, and how far a router's steps can move them.

A linear router has the logits z = W·x. Adam moves each element of W by about η in a step at most, so N steps move two
logits of a token against each other by 2·N·η·‖x‖₁ at most: the **bound**. It takes that all steps agree with each other
and with the signs of x.

Where no two steps agree, each element walks at random: after N steps it is off by η·√N (the updates that Adam makes of
noise add up to that, whatever its mean over steps), and the difference of two logits by η·√(2N)·‖x‖₂, normally
distributed: the **noise**.

For a token to lose r of its k selections, the r-th weakest selected logit must fall below the r-th strongest unselected
one. So the gaps of these pairs say how many selections can change at most, and how many do by noise. That is about the
router's own steps, in this layer: where those below change, or other weights train too, x changes besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PERCENTILES = (5, 25, 50, 75, 95)

_TIED = 1e-4
"""How far a selected logit may be below an unselected one by rounding."""


class Edge(NamedTuple):
    """Of one layer, for some tokens.

    Attributes:
        gaps: The weakest selected logit less the strongest unselected one, then the next pair, and so on, [tokens, n].
        selections: k, how many experts a token selects.
        sizes: ‖x‖₁ and ‖x‖₂ of the router's input, [2, tokens]; NaN if it isn't known.
        best, following: By how much the loss falls, to first order, in nats, if the weakest selected expert is swapped
            for the best of all others, or for the strongest unselected one; zero if it rises; [tokens].
    """

    gaps: Tensor
    selections: int
    sizes: Tensor
    best: Tensor
    following: Tensor

    @property
    def by_score(self) -> bool:
        """Whether it is the strongest that are selected: no bias, groups or noise act on the selection alone."""
        return bool((self.gaps[:, 0] >= -_TIED).all())


def gaps_of(logits: Tensor, index: Tensor) -> Tensor:
    """See `Edge`; logits [tokens, experts], index [tokens, k], and n is the smaller of k and experts − k."""
    n = min(index.shape[-1], logits.shape[-1] - index.shape[-1])
    selected = logits.gather(-1, index).sort(-1).values[:, :n]
    return selected - logits.scatter(-1, index, -math.inf).topk(n, -1).values


def joined(edges: Sequence[Edge]) -> Edge:
    """Of all tokens."""
    first = edges[0]
    return Edge(
        torch.cat([edge.gaps for edge in edges]),
        first.selections,
        torch.cat([edge.sizes for edge in edges], 1),
        torch.cat([edge.best for edge in edges]),
        torch.cat([edge.following for edge in edges]),
    )


class Moves(NamedTuple):
    """What a router's steps do to the edge of its layer; NaN where that isn't known.

    Attributes:
        margins: `PERCENTILES` of the first gap.
        reach: How far two logits move at most, and by noise; the median over tokens.
        at_most, by_noise: How many selections change.
        selections: Of how many.
    """

    margins: list[float]
    reach: tuple[float, float]
    at_most: float
    by_noise: float
    selections: int


def moves(edge: Edge, steps: int, learning_rate: float) -> Moves:
    """See above; the learning rate is that of each step."""
    selections = len(edge.gaps) * edge.selections
    if not edge.by_score:
        return Moves([math.nan] * len(PERCENTILES), (math.nan, math.nan), math.nan, math.nan, selections)
    shares = torch.tensor(PERCENTILES, dtype=edge.gaps.dtype) / 100
    bound = 2 * steps * learning_rate * edge.sizes[0]
    noise = math.sqrt(2 * steps) * learning_rate * edge.sizes[1]
    unknown = bool(edge.sizes.isnan().any())
    at_most = (edge.gaps <= bound[:, None]).sum()
    by_noise = torch.special.ndtr(-edge.gaps / noise[:, None]).sum()
    return Moves(
        edge.gaps[:, 0].quantile(shares).tolist(),
        (float(bound.median()), float(noise.median())),
        math.nan if unknown else float(at_most),
        math.nan if unknown else float(by_noise),
        selections,
    )
