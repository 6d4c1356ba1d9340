"""Runs each of `LAYOUTS` and `TRAININGS` in two or four processes. Usage: layouts.py REPORT.

Each rank has tokens of its own, and its gradients must be the oracle's, which has all experts in one process. The
report is JSON: for each layout, dispatcher and case what was found on each rank, or the error that stopped it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import training
from cases import LAYOUT_CASES, SPREAD_CASES, has
from changes import one_alone, refusals, without_tokens
from checks import check, drawing, gathering, measuring
from megatron.core import parallel_state
from ranks import add_to, found_by_all, join
from small_models import build_stage
from torch import multiprocessing


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; the rest is data parallel. Sequence parallelism goes with tensor parallelism.

    ``chunks`` is how many parts of the model each stage of an interleaved pipeline has.
    """

    processes: int
    expert: int = 1
    tensor: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    chunks: int | None = None
    context: int = 1

    def initialize(self) -> None:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.chunks,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=self.expert_tensor,
        )


LAYOUTS = {
    "DP2": Layout(2),
    "EP2": Layout(2, expert=2),
    "ETP2": Layout(2, expert_tensor=2),
    "TP2 EP2": Layout(2, expert=2, tensor=2),
    "TP2 ETP2": Layout(2, tensor=2, expert_tensor=2),
    "EP4": Layout(4, expert=4),
    "EP2 DP2": Layout(4, expert=2),
    "TP2 EP4": Layout(4, expert=4, tensor=2),
    "TP2 EP2 ETP2": Layout(4, expert=2, tensor=2, expert_tensor=2),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model trains on some ranks.

    Args:
        layout: The ranks.
        model: For `small_models.build_stage`.
        distributed: For `training.train`.
        since: The version of Megatron Core that has it.
        untaught: The layers in which experts that are never selected teach the router nothing.
    """

    layout: Layout
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    distributed: dict[str, Any] = dataclasses.field(default_factory=dict)
    since: str = "0.13"
    untaught: tuple[str, ...] = ()


FOUR = {"num_layers": 4}
SHARED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
HYBRID_EXPERTS = "0.16"
"""The version of Megatron Core from which hybrid models may have experts."""
HYBRID = {"pattern": "*E*EE*"}
TRAININGS = {
    "EP2, without DenseMixer": Training(Layout(2, expert=2), {"moe_densemixer": False}, untaught=("1", "2")),
    "EP2": Training(Layout(2, expert=2)),
    "EP2, distributed optimizer": Training(Layout(2, expert=2), distributed=SHARED),
    "EP2, multi-token prediction": Training(Layout(2, expert=2), {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}),
    "PP2": Training(Layout(2, pipeline=2)),
    "PP2, interleaved": Training(Layout(2, pipeline=2, chunks=2), FOUR),
    "PP2, hybrid": Training(Layout(2, pipeline=2), HYBRID, since=HYBRID_EXPERTS),
    "PP2, hybrid, some layers": Training(
        Layout(2, pipeline=2),
        {**HYBRID, "moe_densemixer": {"layers": [0, -1], "metrics": True}},
        since=HYBRID_EXPERTS,
        untaught=("4",),
    ),
    "PP2, some layers": Training(
        Layout(2, pipeline=2),
        {**FOUR, "moe_layer_freq": [0, 1, 1, 1], "moe_densemixer": {"layers": "::2", "metrics": True}},
        untaught=("3",),
    ),
    "PP2, experts in one stage": Training(
        Layout(2, pipeline=2), {**FOUR, "moe_layer_freq": [0, 0, 0, 1], "moe_densemixer": {"metrics": True}}
    ),
    "CP2": Training(Layout(2, context=2), {"own_values": True}),
    "CP2, loss per token": Training(Layout(2, context=2), {"own_values": True, "calculate_per_token_loss": True}),
    "PP2 EP2": Training(Layout(4, pipeline=2, expert=2)),
    "PP2 EP2, interleaved, distributed optimizer": Training(
        Layout(4, pipeline=2, chunks=2, expert=2), FOUR, {"use_distributed_optimizer": True}
    ),
    "PP2 CP2 EP2": Training(Layout(4, pipeline=2, context=2, expert=2), {"own_values": True}),
}
"""Ways to train a model."""


def cells(layout: Layout) -> dict[str, Callable[[], Any]]:
    cases = LAYOUT_CASES | (SPREAD_CASES if layout.expert * layout.expert_tensor > 1 else {})
    found: dict[str, Callable[[], Any]] = {
        f"{dispatcher}, {name}": lambda case=case, dispatcher=dispatcher: dataclasses.asdict(check(case, dispatcher))
        for name, case in cases.items()
        for dispatcher in case.dispatchers
        if case.exists
    }
    found["gathered in parts"] = gathering
    found["metrics"] = measuring
    if layout.processes == 2:
        found["changed experts"] = refusals
        found["changed experts, some without tokens"] = without_tokens
        if layout.expert * layout.expert_tensor == 1:
            found["changed experts of one rank"] = one_alone
    if layout.tensor > 1 and layout.expert == 1:  # with both, 0.13 refuses it
        found["metrics, tokens not split"] = functools.partial(measuring, split=False)
    if layout.processes == 2 or layout.expert_tensor > 1:  # the others spread tokens and experts as two ranks do
        found["budget"] = drawing
    return found


def train(way: Training) -> dict[str, Any]:
    """On this rank."""
    model = build_stage(**{"moe_densemixer": {"metrics": True}, **way.model})
    return training.train(model, steps=3, **way.distributed)


def run(rank: int, processes: int, store: str, report: Path) -> None:
    join(rank, processes, store)
    wanted = {name: (layout, cells(layout)) for name, layout in LAYOUTS.items()}
    for name, way in TRAININGS.items():
        if has(way.since):
            wanted[f"training, {name}"] = way.layout, {"": functools.partial(train, way)}
    for name, (layout, checks) in wanted.items():
        if layout.processes == processes:
            layout.initialize()
            add_to(report, found_by_all({f"{name}: {cell}": check_it for cell, check_it in checks.items()}))
            parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for processes in sorted({layout.processes for layout in LAYOUTS.values()}):
        # Forked: importing Megatron Core takes longer than all that is done with it here.
        arguments = (processes, f"{path}-{processes}", path)
        multiprocessing.start_processes(run, arguments, nprocs=processes, start_method="fork")
