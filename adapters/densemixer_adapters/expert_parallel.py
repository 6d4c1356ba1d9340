"""⟨g, E_j(x)⟩ for all experts of a layer that are spread over the ranks of a group, by number or by width.

Each rank evaluates the experts that it holds, or its part of each expert's width, and no pair of a token and an expert
is evaluated twice. What travels depends on whether the ranks have the same tokens:

- each its own: the experts' input x and the gradient g of their output are gathered, each rank evaluates its experts on
  all of them, and the inner products go back to the ranks that the tokens came from;
- some share theirs (tensor parallelism within the group): each of these gathers from the others, and gives to them, a
  slice of its tokens alone, and all of them get the inner products;
- all share theirs: x and g stay where they are, and the inner products are joined.

Where ranks hold parts of the same expert, its inner products are summed. With a budget below 1 each rank draws its
share of the pairs that its own experts form with all tokens; where an expert is in parts, each rank draws pairs for its
part, and the estimates of the parts are summed.

`densemixer_adapters.collectives.bytes_sent` says what that costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from densemixer_adapters.collectives import all_gather, given_back, handed_out, joined
from densemixer_core import (
    DenseMixerConfig,
    ExpertWeights,
    Known,
    StackedExperts,
    expert_dots,
    routed_output,
    sampled_dots,
)
from densemixer_core.sampling import share_of_pairs


def gathered_dots(
    x: Tensor,
    g: Tensor,
    known: Known | None,
    *,
    experts: Sequence[StackedExperts],
    indices: Sequence[int],
    count: int,
    selected: int,
    group: dist.ProcessGroup,
    budget: float,
    seed: int,
    workspace_bytes: int,
    shared: int = 1,
    scored: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """⟨g_t, E_j(x_t)⟩ for this rank's tokens and the experts of all ranks. Collective.

    Args:
        x: The experts' input, [tokens, hidden]. Ranks that don't share their tokens may have different numbers of
            them, and none.
        g: The gradient of the experts' output, [tokens, hidden].
        known: As in `densemixer_core.sampled_dots`, of all experts; None for a budget of 1.
        experts: This rank's experts, or its part of them.
        indices: Their positions among all experts, one after the other.
        count: The number of all experts with weights.
        selected: How many experts a token goes through.
        group: The ranks that the experts are spread over; the same number of experts, or parts, on each.
        budget, seed: As in `densemixer_core.DenseMixerConfig`.
        workspace_bytes: Upper bound on temporaries: half of it for what is gathered, half for the experts; all of it
            for these where nothing is gathered.
        shared: How many ranks, one after the other in the group, have the same tokens. It divides their number.
        scored: The number of all experts, by default those with weights.
        dtype: As in `densemixer_core.expert_dots`.

    Returns:
        [tokens, experts], float32 or float64, the same on ranks that share their tokens; for a budget below 1 an
        estimate, see `densemixer_core.sampled_dots`.
    """
    ranks, held = dist.get_world_size(group), len(indices)
    in_parts = ranks * held > count
    if dtype is not None:  # what travels is what is multiplied
        x, g = x.to(dtype), g.to(dtype)
    own = workspace_bytes if ranks == shared else workspace_bytes // 2  # the experts' share

    def evaluate(x: Tensor, g: Tensor, known: Known | None, tokens: int) -> Tensor:
        """Our experts alone; ``known`` is of theirs, ``tokens`` the number of rows that aren't there to fill up."""
        if known is None:
            return torch.cat([expert_dots(x, g, some, dtype, own) for some in experts], 1)
        drawn = share_of_pairs(tokens, held, scored or count, selected, budget)
        return sampled_dots(x, g, known, drawn, seed, _stack(experts), dtype, own)

    def prior(known: Known) -> float:
        """Of an expert, or of its part."""
        return known.prior * count / (ranks * held)

    if ranks == shared:
        if known is not None:
            known = Known(known.sensitivity[:, indices[0] : indices[-1] + 1], known.along, prior(known))
        return joined(evaluate(x, g, known, len(x)), count, in_parts, group)
    told = torch.empty(2 * ranks, dtype=torch.int64, device=x.device)
    dist.all_gather_into_tensor(told, told.new_tensor([len(x), indices[0]]), group=group)
    lengths, firsts = told.view(ranks, 2).t().tolist()
    columns = torch.cat([torch.arange(first, first + held, device=x.device) for first in firsts])
    slices = [-(-length // shared) for length in lengths]  # the rows of each rank's slice, before it is filled up
    rank, longest = dist.get_rank(group), max(slices)
    mine = slice(rank % shared * slices[rank], (rank % shared + 1) * slices[rank])
    numbers = held * ranks * (1 if known is None else 3) * (2 + shared) + shared * count
    step = max(1, min(longest, own // (ranks * 2 * x.shape[1] * x.element_size() + 4 * numbers)))

    def gather(rows: Tensor, start: int) -> Tensor:
        return all_gather(rows[mine][start : start + step], step, group)

    parts = []
    for start in range(0, max(1, longest), step):
        all_x, all_g = (gather(tensor, start) for tensor in (x, g))
        theirs = None
        if known is not None:
            sensitivity = known.sensitivity[mine][start : start + step][:, columns]
            theirs = Known(handed_out(sensitivity, step, group), gather(known.along, start), prior(known))
        tokens = sum(
            min(max(min(rows, length - position % shared * rows) - start, 0), step)
            for position, (rows, length) in enumerate(zip(slices, lengths, strict=True))
        )
        parts.append(given_back(evaluate(all_x, all_g, theirs, tokens), columns, shared, count, group))
    return torch.cat(parts, 1)[:, : slices[rank]].flatten(0, 1)[: len(x)]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the experts of one layer are spread over ranks. Each has all of those without weights.

    Args:
        group: The ranks.
        indices: The positions of this rank's experts among all, or of those that it has a part of.
        count: The number of all experts with weights.
        shared: How many ranks, one after the other in the group, have the same tokens.
    """

    group: dist.ProcessGroup
    indices: range
    count: int
    shared: int

    def dots(
        self,
        x: Tensor,
        g: Tensor,
        known: Known | None,
        *,
        experts: StackedExperts,
        selected: int,
        dtype: torch.dtype,
        config: DenseMixerConfig,
    ) -> Tensor:
        """What a `densemixer_core.ExpertDots` returns, see `gathered_dots`."""
        dots = gathered_dots(
            x,
            g,
            None if known is None else known._replace(sensitivity=known.sensitivity[:, : self.count]),
            experts=[self._ours(experts)],
            indices=self.indices,
            count=self.count,
            selected=selected,
            group=self.group,
            budget=config.budget,
            seed=config.seed,
            workspace_bytes=config.workspace_mb << 20,
            shared=self.shared,
            scored=self.count + experts.layout.identities + experts.layout.zeros,
            dtype=dtype,
        )
        identities, zeros = experts.layout.identities, experts.layout.zeros
        if not identities + zeros:
            return dots
        same = torch.linalg.vecdot(x.to(dots.dtype), g.to(dots.dtype)).unsqueeze(1)
        return torch.cat([dots, same.expand(-1, identities), dots.new_zeros(len(x), zeros)], 1)

    def routed_output(
        self, x: Tensor, index: Tensor, weights: Tensor, experts: StackedExperts, rows: int
    ) -> tuple[Tensor, Tensor]:
        """`densemixer_core.routed_output` of a few tokens with the experts of all ranks. Collective.

        Args:
            x, index, weights: Of this rank's tokens. ``index`` counts all experts.
            experts: This rank's.
            rows: How many tokens a rank has at most.
        """
        tokens, ranks, held = len(x), dist.get_world_size(self.group), len(self.indices)
        rank = dist.get_rank(self.group)
        if self.shared < ranks:
            x, index, weights = (all_gather(tensor, rows, self.group) for tensor in (x, index, weights))
        ours = self._ours(experts, 0 if rank else experts.layout.identities)  # which one rank adds
        local = torch.where(index < self.count, index - self.indices[0], index - self.count + held)
        others = (index < self.count) & ((local < 0) | (local >= held))
        y, size = routed_output(x, local.masked_fill(others, -1), weights, ours)
        both = torch.cat([y, size.unsqueeze(1)], 1)
        dist.all_reduce(both, group=self.group)
        if self.shared < ranks:
            both = both[rank * rows :][:tokens]
        return both[:, :-1], both[:, -1]

    def _ours(self, experts: StackedExperts, identities: int = 0) -> StackedExperts:
        """With their scales among those of all experts, and with so many experts that return their input."""
        weights = experts.weights
        if weights.scale is not None:
            weights = weights._replace(scale=weights.scale[self.indices[0] : self.indices[-1] + 1])
        return StackedExperts(weights, dataclasses.replace(experts.layout, identities=identities, zeros=0))


def _stack(experts: Sequence[StackedExperts]) -> StackedExperts:
    """All of them as one. Weights that lie apart are copied."""
    if len(experts) == 1:
        return experts[0]
    up, down, *biases = zip(*(some.weights for some in experts), strict=True)
    up_bias, down_bias = (None if bias[0] is None else torch.cat(bias) for bias in biases[:2])
    return StackedExperts(ExpertWeights(torch.cat(up), torch.cat(down), up_bias, down_bias), experts[0].layout)
