"""Experts that are spread over two processes, against one process."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from densemixer_adapters.collectives import all_gather, given_back, handed_out
from densemixer_adapters.expert_parallel import gathered_dots
from densemixer_adapters.selftest import samples
from densemixer_adapters.selftest.gradients import ALL_DRAWN, FLOOR, FLOOR_DRAWN
from densemixer_adapters.selftest.outcome import Outcome, compared
from densemixer_adapters.selftest.products import known
from densemixer_adapters.selftest.reference import relative_error
from densemixer_core import ExpertWeights, Known, StackedExperts

RANKS = 2
EXACT = "exact"
SPLIT = (60, samples.SMALL.tokens)
"""Where each rank's tokens end: not the same number on each."""


def check_spread(device: str) -> Iterator[Outcome]:
    """Over gloo on the CPU; with a GPU also its collectives over NCCL, with the one process that one GPU allows."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _run(Path(folder) / "gloo", RANKS, "gloo", "cpu")
        if device == "cuda":
            yield from _run(Path(folder) / "nccl", 1, "nccl", "cuda")


def _run(meeting: Path, ranks: int, backend: str, device: str) -> Iterator[Outcome]:
    case = f"{backend}, {ranks} process{'es' if ranks > 1 else ''}"
    try:
        spawn(_rank, (ranks, str(meeting), backend, device), ranks)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a process died of
        yield Outcome("expert parallelism", case, "failed", str(error).strip().splitlines()[-1])
        return
    for rank in range(ranks):
        found = torch.load(f"{meeting}.{rank}")
        for what, (dots, truth) in found.items():
            off = relative_error(dots, truth)
            allowed = FLOOR if what == EXACT else FLOOR_DRAWN
            yield compared("expert parallelism", f"{case}, rank {rank}, {what}", off, allowed)


@torch.no_grad()
def _rank(rank: int, ranks: int, meeting: str, backend: str, device: str) -> None:
    """One process: its tokens and its experts alone; what it finds goes to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # the names of collectives that torch before 2.13 has no other for
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    x, g = samples.rows(torch.float32, device)
    everything = samples.experts(torch.float32, device, False)
    start, end = (0, *SPLIT)[rank : rank + 2] if ranks > 1 else (0, samples.SMALL.tokens)
    held = samples.SMALL.experts // ranks
    ours = slice(rank * held, (rank + 1) * held)
    weights = ExpertWeights(everything.weights.up[ours], everything.weights.down[ours])
    here = slice(start, end)
    truth = samples.truth(x, g, everything)
    # Two experts of each token count as selected, one on each rank: so each has as many pairs as a budget allows it.
    first = torch.arange(len(x), device=x.device).unsqueeze(1) % (samples.SMALL.experts // RANKS)
    unselected = torch.ones_like(truth).scatter(1, torch.cat([first, first + samples.SMALL.experts // RANKS], 1), 0.0)
    sampled = known(truth)._replace(sensitivity=unselected.float())
    found = {}
    for what, budget, of in ((EXACT, 1.0, torch.ones_like(truth)), ("all pairs drawn", ALL_DRAWN, unselected)):
        dots = gathered_dots(
            x[here],
            g[here],
            None if what == EXACT else Known(sampled.sensitivity[here], sampled.along[here], sampled.prior),
            experts=[StackedExperts(weights, everything.layout)],
            indices=range(ours.start, ours.stop),
            count=samples.SMALL.experts,
            selected=RANKS,
            group=dist.group.WORLD,  # type: ignore[arg-type]
            budget=budget,
            seed=0,
            workspace_bytes=1 << 20,
        )
        if ranks == 1:  # which exchanges nothing: have the backend hand all of it from this process to itself
            dots = _through_the_backend(dots, dist.group.WORLD)  # type: ignore[arg-type]
        found[what] = ((dots * of[here]).cpu(), (truth * of)[here].cpu())
    torch.save(found, f"{meeting}.{rank}")
    dist.destroy_process_group()


def _through_the_backend(dots: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same inner products, after each collective that is made where experts are spread over ranks."""
    rows, count = dots.shape
    columns = torch.arange(count, device=dots.device)
    return given_back(handed_out(all_gather(dots, rows, group), rows, group), columns, 1, count, group)[0]
