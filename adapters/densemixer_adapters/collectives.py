"""What ranks exchange of tokens and experts, all of it collective: rows, and numbers for pairs of the two."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def joined(ours: Tensor, count: int, in_parts: bool, group: dist.ProcessGroup) -> Tensor:
    """From numbers for our experts, or parts of them, [tokens, held], to those for all, where tokens are shared."""
    if not len(ours):
        return ours.new_zeros(0, count)
    if dist.get_world_size(group) == 1:
        return ours
    if in_parts:
        ours = ours.contiguous()
        dist.all_reduce(ours, group=group)
        return ours
    joined = ours.new_empty(count, len(ours))
    dist.all_gather_into_tensor(joined, ours.t().contiguous(), group=group)
    return joined.t()


def all_gather(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, each filled up with zeros to ``count`` rows."""
    full = F.pad(rows, (0, 0, 0, count - rows.shape[0])).contiguous()
    gathered = full.new_empty(dist.get_world_size(group) * count, full.shape[1])
    dist.all_gather_into_tensor(gathered, full, group=group)
    return gathered


def handed_out(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """From numbers for our tokens, [rows, ranks · held], to those of all ranks for our experts, [ranks · count, held].

    Each rank's rows are filled up with zeros to ``count``.
    """
    ranks = dist.get_world_size(group)
    full = F.pad(rows, (0, 0, 0, count - rows.shape[0])).view(count, ranks, -1).transpose(0, 1).contiguous()
    received = torch.empty_like(full)
    dist.all_to_all_single(received, full, group=group)
    return received.flatten(0, 1)


def given_back(ours: Tensor, columns: Tensor, shared: int, count: int, group: dist.ProcessGroup) -> Tensor:
    """From numbers for the slices of all ranks and our experts, [ranks · rows, held], to those for our tokens.

    Args:
        ours: The numbers.
        columns: The positions of the experts of all ranks, in the order of the ranks, [ranks · held].
        shared: How many ranks, one after the other, have the same tokens.
        count: The number of all experts.

    Returns:
        The slices of these ranks, [shared, rows, experts].
    """
    ranks = dist.get_world_size(group)
    rows = len(ours) // ranks
    full = ours.reshape(ranks // shared, shared * rows, -1).repeat_interleave(shared, 0)
    received = torch.empty_like(full)
    dist.all_to_all_single(received, full, group=group)
    whole = ours.new_zeros(shared * rows, count)
    whole.index_add_(1, columns, received.transpose(0, 1).flatten(1))  # which sums the parts of an expert
    return whole.view(shared, rows, count)


def bytes_sent(
    tokens: float,
    hidden: int,
    experts: int,
    ranks: int,
    *,
    shared: int = 1,
    in_parts: bool = False,
    sampled: bool = False,
    itemsize: int = 2,
) -> float:
    """What a rank sends in one layer's backward, see `expert_parallel`; each receives as much.

    - x and g: 2·itemsize·hidden·(tokens/shared)·(ranks − 1), or nothing where all ranks share their tokens;
    - inner products: 4·(experts/ranks)·tokens·(ranks − 1); for experts in parts 8·experts·tokens·(ranks − 1)/ranks, a
      sum over ranks as it is made in a ring;
    - what is known of the pairs, where they are drawn and x and g travel:
      4·(experts/ranks + 1)·(tokens/shared)·(ranks − 1).

    The numbers of tokens, 16·(ranks − 1) bytes, come on top; and rows that fill up where ranks differ in tokens.

    Args:
        tokens: Of each rank.
        hidden: The size of x and g.
        experts: Of the layer, of all ranks.
        ranks: How many the experts are spread over.
        shared: How many of them have the same tokens; all of them for experts in parts.
        in_parts: Whether each rank has a part of every expert's width instead of some experts.
        sampled: Whether the budget is below 1.
        itemsize: Bytes of a number of x and g.
    """
    others = ranks - 1
    if in_parts:
        return 8 * experts * tokens * others / ranks
    numbers = 4 * experts / ranks * others * tokens
    if shared == ranks:
        return numbers
    rows = tokens / shared * others
    return numbers + rows * (2 * itemsize * hidden + (4 * (experts / ranks + 1) if sampled else 0))
