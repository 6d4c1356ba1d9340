"""How the expert parallelism of VeOmni spreads a layer's experts over ranks.

VeOmni cuts the stacked weights by the number of the expert, and FSDP2 shards what each rank has left over the others
that have the same. In the forward and the backward of the layer the weights are plain tensors of this rank's experts,
while the selected experts' positions count all. The ranks of the group have different tokens, also where Ulysses or
context parallelism splits the sequences between them.
"""

from __future__ import annotations

import sys

from torch import nn

from densemixer_adapters.expert_parallel import Spread


def spread_of(experts: nn.Module, held: int, scored: int) -> Spread | None:
    """How they are spread; None if VeOmni hasn't done it.

    Args:
        experts: The module with the stacked weights.
        held: How many experts this rank has.
        scored: How many experts the router scores.
    """
    found = sys.modules.get("veomni.distributed.parallel_state")
    # FSDP2 has put a class of its own in front.
    if found is None or not any(kind.__module__.startswith("veomni.") for kind in type(experts).__mro__):
        return None
    state = found.get_parallel_state()  # the one of the forward that is under way
    if not state.ep_enabled or held * state.ep_size != scored:
        return None
    first = state.ep_rank * held
    return Spread(state.ep_group, range(first, first + held), scored, shared=1)
