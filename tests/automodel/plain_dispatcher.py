"""A stand-in in plain torch for the dispatcher of DeepEP, whose kernels need GPUs. The experts are Automodel's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from nemo_automodel.components.moe.experts import _AllGatherConcatVarlenFn
from ranks import of_all_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class PlainDispatcher:
    """Gathers all tokens, hands out those of this rank's experts, expert by expert, and sums what comes of them.

    Args:
        mesh: The ranks that the experts are spread over.
        held: How many each has.
    """

    def __init__(self, mesh: DeviceMesh, held: int) -> None:
        self.group, self.rank, self.held = mesh.get_group(), mesh.get_local_rank(), held

    def token_permutation2(
        self, hidden_states: Tensor, num_local_tokens: int, token_probs: Tensor, token_indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.lengths = of_all_ranks(num_local_tokens)

        def gather(tensor: Tensor) -> Tensor:
            return _AllGatherConcatVarlenFn.apply(tensor, self.group, self.lengths, max(self.lengths))

        x, weights, index = (gather(tensor) for tensor in (hidden_states, token_probs, token_indices))
        local = index - self.rank * self.held
        token, slot = torch.where((index >= 0) & (local >= 0) & (local < self.held))
        order = local[token, slot].argsort(stable=True)
        self.token, slot = token[order], slot[order]
        counts = torch.bincount(local[self.token, slot], minlength=self.held)
        return x[self.token], counts, weights[self.token, slot]

    def token_unpermutation(self, hidden_states: Tensor) -> Tensor:
        y = hidden_states.new_zeros(sum(self.lengths), hidden_states.shape[1])
        y = differentiable.all_reduce(y.index_add(0, self.token, hidden_states), dist.ReduceOp.SUM, self.group)
        return y.narrow(0, sum(self.lengths[: self.rank]), self.lengths[self.rank])


def use(experts: Any) -> None:
    """Have Automodel's ``GroupedExpertsDeepEP`` take it, when it is spread over ranks."""

    def init_token_dispatcher(ep_mesh: DeviceMesh) -> None:
        experts.ep_size, experts.ep_rank = ep_mesh.size(), ep_mesh.get_local_rank()
        experts.n_routed_experts = experts.config.n_routed_experts
        experts.token_dispatcher = PlainDispatcher(ep_mesh, experts.config.n_routed_experts // ep_mesh.size())

    experts.init_token_dispatcher = init_token_dispatcher
