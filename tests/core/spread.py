"""Experts of a layer spread over two and four ranks in every way, beside the formula written out in float64.

Usage: spread.py REPORT. The report is JSON: for each way what each rank found, or the error that stopped it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.distributed as dist
from draws import bias
from layers import concatenated
from ranks import add_to, found_by_all, join
from torch import Tensor, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from densemixer_adapters.collectives import bytes_sent
from densemixer_adapters.expert_parallel import Spread, gathered_dots
from densemixer_core import DenseMixerConfig, ExpertLayout, ExpertWeights, Known, StackedExperts, routed_output

EXPERTS, K, HIDDEN, FFN = 8, 2, 15, 12  # of which no grouped product is made, so that all are counted
DRAWS = 100


@dataclasses.dataclass(frozen=True)
class Way:
    """How tokens and experts are spread.

    Args:
        tokens: Of each rank.
        shared: How many ranks, one after the other, have the same.
        parts: In how many parts the width of each expert is.
        identities: How many experts without weights there are besides.
    """

    tokens: tuple[int, ...]
    shared: int = 1
    parts: int = 1
    identities: int = 0

    @property
    def is_even(self) -> bool:
        return len({*self.tokens}) == 1 and self.tokens[0] % self.shared == 0


WAYS = {
    "own tokens": Way((6, 6)),
    "own tokens, uneven": Way((5, 3)),
    "own tokens, none on a rank": Way((5, 0)),
    "none at all": Way((0, 0)),
    "the same tokens": Way((7, 7), shared=2),
    "the same tokens, none": Way((0, 0), shared=2),
    "the same tokens, identities": Way((7, 7), shared=2, identities=2),
    "own tokens, identities": Way((5, 3), identities=2),
    "parts": Way((7, 7), shared=2, parts=2),
    "parts, identities": Way((7, 7), shared=2, parts=2, identities=2),
    "parts, own tokens": Way((5, 3), parts=2),
    "own tokens on four": Way((6, 6, 6, 6)),
    "pairs with the same": Way((6, 6, 6, 6), shared=2),
    "pairs with the same, uneven": Way((5, 5, 8, 8), shared=2),
    "pairs with the same, none": Way((1, 1, 0, 0), shared=2),
    "the same on four": Way((6, 6, 6, 6), shared=4),
    "parts on four": Way((6, 6, 6, 6), shared=4, parts=4),
    "parts of some on four": Way((5, 0, 3, 7), parts=2),
}
SAMPLED = ("own tokens, uneven", "the same tokens, identities", "parts", "parts, own tokens", "pairs with the same")
COUNTED = ("own tokens", "the same tokens", "parts", "own tokens on four", "pairs with the same", "parts on four")


class Traffic(TorchDispatchMode):
    """Bytes that a rank sends, where sums are made in a ring; the numbers of tokens, in int64, aside."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = func.overloadpacket.__name__, self.ranks - 1
        if name == "_allgather_base_" and args[1].dtype != torch.int64:
            self.sent += args[1].nbytes * others
        elif name == "alltoall_base_":
            self.sent += args[1].nbytes * others / self.ranks
        elif name == "allreduce_":
            self.sent += sum(2 * tensor.nbytes * others / self.ranks for tensor in args[0])
        elif "all" in name and func.namespace == "c10d" and name != "_allgather_base_":
            raise AssertionError(f"{name} isn't counted")
        return func(*args, **(kwargs or {}))


class Layer:
    """This rank's part of the experts, its tokens, and the whole."""

    def __init__(self, way: Way) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        up, down = normal(EXPERTS, 2 * FFN, HIDDEN), normal(EXPERTS, HIDDEN, FFN)
        bias = (None, None) if way.parts > 1 else (normal(EXPERTS, 2 * FFN), normal(EXPERTS, HIDDEN))
        self.layout = ExpertLayout(concatenated, identities=way.identities)
        whole = ExpertWeights(up, down, *bias, scale=normal(EXPERTS).abs())
        self.whole = StackedExperts(
            ExpertWeights(*(None if weight is None else weight.double() for weight in whole)), self.layout
        )
        held = EXPERTS * way.parts // ranks
        first = rank // way.parts * held
        self.indices = range(first, first + held)
        mine = [None if weight is None else weight[first : first + held] for weight in whole[:4]]
        part = rank % way.parts
        if way.parts > 1:  # gate and up projection are split each by itself
            mine[0] = torch.cat([half.chunk(way.parts, 1)[part] for half in mine[0].chunk(2, 1)], 1)
            mine[1] = mine[1].chunk(way.parts, 2)[part]
        self.experts = StackedExperts(ExpertWeights(*mine, scale=whole.scale), self.layout)
        self.spread = Spread(dist.group.WORLD, self.indices, EXPERTS, way.shared)
        own = torch.Generator().manual_seed(1 + rank // way.shared)
        tokens = way.tokens[rank]
        self.x, self.g = torch.randn(2, tokens, HIDDEN, generator=own)
        every = EXPERTS + way.identities
        # No pair matters so little that it is hardly ever drawn, and then counts for very many.
        self.known = Known(0.5 + torch.rand(tokens, every, generator=own), torch.randn(tokens, 1, generator=own))
        self.index = torch.rand(tokens, every, generator=own).topk(K).indices
        self.weights = torch.rand(tokens, K, generator=own)

    def dots(self, **options: Any) -> Tensor:
        config = DenseMixerConfig(**options)
        known = self.known if config.budget < 1 else None
        return self.spread.dots(
            self.x, self.g, known, experts=self.experts, selected=K, dtype=torch.float32, config=config
        )

    def in_pieces(self) -> Tensor:
        """Of a few tokens at a time."""
        experts = StackedExperts(
            self.experts.weights._replace(scale=self.experts.weights.scale[list(self.indices)]),
            dataclasses.replace(self.layout, identities=0),
        )
        return gathered_dots(
            self.x,
            self.g,
            None,
            experts=[experts],
            indices=self.indices,
            count=EXPERTS,
            selected=K,
            group=dist.group.WORLD,
            budget=1.0,
            seed=0,
            workspace_bytes=3 << 10,
            shared=self.spread.shared,
        )

    def exact(self) -> Tensor:
        """The formula written out."""
        x, g, weights = self.x.double(), self.g.double(), self.whole.weights
        biases = (0, 0) if weights.up_bias is None else weights[2:4]
        up = torch.einsum("th,ewh->tew", x, weights.up) + biases[0]
        y = torch.einsum("tew,ehw->teh", concatenated(up), weights.down) + biases[1]
        dots = torch.einsum("teh,th->te", y * weights.scale.unsqueeze(1), g)
        return torch.cat([dots, (x * g).sum(1, keepdim=True).expand(-1, self.layout.identities)], 1)


def error(value: Tensor, truth: Tensor) -> float:
    return oracle.worst_error(value, truth) if len(truth) else float(value.shape != truth.shape)


def check(name: str, way: Way) -> dict[str, Any]:
    layer, ranks = Layer(way), dist.get_world_size()
    exact = layer.exact()
    dots = layer.dots()
    found: dict[str, Any] = {
        "error": error(dots, exact),
        "in pieces": error(layer.in_pieces(), exact[:, :EXPERTS]),
    }
    y, _ = layer.spread.routed_output(layer.x, layer.index, layer.weights, layer.experts, max(way.tokens))
    found["output"] = error(y, routed_output(layer.x.double(), layer.index, layer.weights.double(), layer.whole)[0])
    if name in SAMPLED:
        found |= sample(layer, exact)
    if name in COUNTED:
        found |= {f"counted at {budget}": count(layer, way, budget) for budget in (1.0, 0.5)}
    if way.shared > 1 and way.tokens[0]:  # bit for bit the same where the tokens are
        pair = [torch.empty_like(dots) for _ in range(ranks)] if way.is_even else []
        if pair:
            dist.all_gather(pair, dots.contiguous())
            found["alike"] = all(torch.equal(one, pair[i // way.shared * way.shared]) for i, one in enumerate(pair))
    return found


def sample(layer: Layer, exact: Tensor) -> dict[str, Any]:
    """How far the mean over draws is from the exact numbers, in standard errors, in some directions."""
    draws = torch.stack([layer.dots(budget=0.3, seed=seed).double() for seed in range(DRAWS)])
    return {
        "bias": bias(draws, exact),
        "draw": oracle.relative_error(draws[0], exact),
        "mean": oracle.relative_error(draws.mean(0), exact),
    }


def count(layer: Layer, way: Way, budget: float) -> dict[str, float]:
    ranks = dist.get_world_size()
    with Traffic(ranks) as traffic, FlopCounterMode(display=False) as counter:
        layer.dots(budget=budget)
    tokens = way.tokens[0]
    pairs = tokens * EXPERTS if budget == 1 else round(budget * tokens * (EXPERTS - K))
    # Each pair is evaluated once, and the ranks that share their tokens divide it.
    flops = pairs * 6 * HIDDEN * FFN / way.shared
    if budget < 1:  # the product of g with the mean output of each expert, or part of it
        flops += 2 * tokens * EXPERTS * HIDDEN * way.parts / way.shared
    sent = bytes_sent(
        tokens,
        HIDDEN,
        EXPERTS,
        ranks,
        shared=way.shared,
        in_parts=way.parts > 1,
        sampled=budget < 1,
        itemsize=4,
    )
    return {
        "sent": traffic.sent,
        "sent by formula": sent,
        "operations": counter.get_total_flops(),
        "operations by formula": flops,
    }


def run(rank: int, processes: int, store: str, report: Path) -> None:
    join(rank, processes, store)
    checks = {name: functools.partial(check, name, way) for name, way in WAYS.items() if len(way.tokens) == processes}
    with torch.no_grad():
        add_to(report, found_by_all(checks))
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive what they belong to


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for processes in (2, 4):
        arguments = (processes, f"{path}-{processes}", path)
        multiprocessing.start_processes(run, arguments, nprocs=processes, start_method="fork")
