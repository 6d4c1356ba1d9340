"""What lets Megatron Core run where there is no GPU. Test support, no part of the package.

Megatron asks for CUDA devices, streams and random states also where all of its tensors are on the CPU. Each line says
what needs it; what computes is Megatron's own, but for four stand-ins at the end, in plain torch, for kernels that
exist for GPUs alone. Import this before anything of Megatron.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Stream:
    """Work on the CPU is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> Stream:
        return self


torch.cuda.current_device = lambda: torch.device("cpu")  # where routers, buffers and DDP's gradients are put
torch.cuda.Stream = Stream  # type: ignore[assignment,misc]  # of shared experts and of the alltoall dispatcher
torch.cuda.current_stream = torch.cuda.default_stream = lambda *args: Stream()  # what these wait for
torch.cuda.synchronize = lambda *args: None  # after each exchange between stages of a pipeline
torch.cuda.stream = lambda *args: contextlib.nullcontext()  # type: ignore[assignment,return-value]

from megatron.core.tensor_parallel import mappings, random  # noqa: E402
from megatron.core.transformer.moe import experts, moe_layer, moe_utils, token_dispatcher  # noqa: E402

# Recomputation saves and restores the state of the GPU's generator. There is no dropout in the tests.
random._get_cuda_rng_state = lambda *args, **kwargs: None
random._set_cuda_rng_state = lambda *args, **kwargs: None
# Weights are made, and dropout is run, under a generator of their own.
random.CudaRNGStatesTracker.fork = lambda *args, **kwargs: contextlib.nullcontext()
# 0.13 to 0.16 define the name only where Transformer Engine is installed, and read it everywhere.
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
# The alltoall dispatcher makes numpy arrays of the numbers of tokens while it moves them from the GPU, else not at all.
token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
    tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
)


# With alltoall, a split expert's tokens are of another number on each rank. NCCL gathers and scatters these, gloo
# doesn't: one tensor after the other.
_all_gather, _reduce_scatter = dist.all_gather, dist.reduce_scatter


def all_gather(outputs: list[Tensor], value: Tensor, group: Any = None) -> None:
    if len({output.shape for output in outputs}) == 1:
        _all_gather(outputs, value, group=group)
        return
    for rank, output in enumerate(outputs):
        if rank == dist.get_rank(group):
            output.copy_(value)
        dist.broadcast(output, dist.get_global_rank(group, rank), group=group)


def reduce_scatter(output: Tensor, values: list[Tensor], group: Any = None) -> None:
    if len({value.shape for value in values}) == 1:
        _reduce_scatter(output, values, group=group)
        return
    for rank, value in enumerate(values):
        total = value.clone()
        dist.all_reduce(total, group=group)
        if rank == dist.get_rank(group):
            output.copy_(total)


dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


class CudaIsCpu(TorchFunctionMode):
    """For schedules and optimizers: they make small tensors on the GPU, and optimizers ask for the type of others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def grouped_gemm(x: Tensor, weights: Tensor, counts: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm's ``gmm``: each group of rows times its own matrix."""
    assert not trans_b
    parts = torch.split(x, counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


if hasattr(experts, "gg"):  # gone with GroupedMLP in later versions
    experts.gg = SimpleNamespace(ops=SimpleNamespace(gmm=grouped_gemm), assert_grouped_gemm_is_available=lambda: None)


class GroupedLinear(nn.Module):
    """Transformer Engine's grouped linear layer without tensor parallelism: its parameters' names and its call."""

    def __init__(
        self, count: int, size_in: int, size_out: int, *, bias: bool, skip_bias_add: bool, **kwargs: Any
    ) -> None:
        super().__init__()
        self.count, self.bias, self.skip_bias_add = count, bias, skip_bias_add
        for position in range(count):
            self.register_parameter(f"weight{position}", nn.Parameter(torch.empty(size_out, size_in)))
            # Empty where there is no bias, as it has them.
            self.register_parameter(f"bias{position}", nn.Parameter(torch.empty(size_out if bias else 0)))

    def forward(self, x: Tensor, counts: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        biases = [getattr(self, f"bias{position}") for position in range(self.count)]
        parts = [part @ getattr(self, f"weight{i}").t() for i, part in enumerate(torch.split(x, counts))]
        if self.bias and not self.skip_bias_add:
            parts = [part + bias for part, bias in zip(parts, biases, strict=True)]
        return torch.cat(parts), biases if self.bias and self.skip_bias_add else None


class Linear(nn.Module):
    """Transformer Engine's linear layer, for the projections around the experts of a latent Mixture-of-Experts."""

    def __init__(self, size_in: int, size_out: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.t(), None


moe_layer.HAVE_TE, moe_layer.TELinear = True, Linear


def fused_dispatch(
    x: Tensor, index: Tensor, probs: Tensor, count: int, group: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DeepEP's: each token once to each rank that holds some of its experts. Unlike it, it gathers all tokens first."""
    ranks, held = dist.get_world_size(group), count // dist.get_world_size(group)
    all_index = index.new_empty(ranks * len(index), index.shape[1])
    dist.all_gather_into_tensor(all_index, index, group=group)
    all_x, all_probs = (mappings.gather_from_sequence_parallel_region(rows, group=group) for rows in (x, probs))
    here = all_index - held * dist.get_rank(group)
    mine = (here >= 0) & (here < held)
    received = mine.any(-1)
    counts = here[mine].bincount(minlength=held)
    return all_x[received], here.where(mine, -1)[received], (all_probs * mine)[received], counts, received


def fused_combine(x: Tensor, group: Any, received: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """DeepEP's, of what `fused_dispatch` gave away: the sum over ranks for each token."""
    whole = x.new_zeros(len(received), x.shape[1]).index_put((received.nonzero().squeeze(-1),), x)
    return mappings.reduce_scatter_to_sequence_parallel_region(whole, group=group), None


token_dispatcher.fused_dispatch, token_dispatcher.fused_combine = fused_dispatch, fused_combine
token_dispatcher.set_deepep_num_sms = lambda count: None
