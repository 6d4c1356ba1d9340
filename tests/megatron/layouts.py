"""Runs each of `LAYOUTS` in two or four processes. Usage: layouts.py REPORT.

Each rank has tokens of its own, and its gradients must be the oracle's, which has all experts in one process. The
report is JSON: for each layout, dispatcher and case what was found on each rank, or the error that stopped it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import training
from megatron.core import parallel_state
from megatron_setting import LAYOUT_CASES, check, drawing, gathering, refusal
from torch import multiprocessing

CENTRE = "EP2"
"""The layout in which models train."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; the rest is data parallel. Sequence parallelism goes with tensor parallelism."""

    processes: int
    expert: int = 1
    tensor: int = 1
    expert_tensor: int = 1


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


def cells(layout: Layout) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        f"{dispatcher}, {name}": lambda case=case, dispatcher=dispatcher: dataclasses.asdict(check(case, dispatcher))
        for name, case in LAYOUT_CASES.items()
        for dispatcher in case.dispatchers
    }
    found["gathered in parts"] = gathering
    found["budget"] = drawing if layout.expert_tensor == 1 else refusal
    if layout == LAYOUTS[CENTRE]:
        for flag in (False, True):
            found[f"training, {flag}"] = lambda flag=flag: training.train(training.build(moe_densemixer=flag))
    return found


def run(rank: int, processes: int, store: str, report: Path) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, list[Any]] = {}
    for name, layout in LAYOUTS.items():
        if layout.processes != processes:
            continue
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        for cell, check_it in cells(layout).items():
            result: Any
            try:
                result = check_it()
            except Exception:
                result = {"failed": traceback.format_exc()}
            ranks: list[Any] = [None] * processes
            dist.all_gather_object(ranks, result)
            results[f"{name}: {cell}"] = ranks
        parallel_state.destroy_model_parallel()
    if rank == 0:
        before = json.loads(report.read_text()) if report.exists() else {}
        report.write_text(json.dumps(before | results))
    dist.destroy_process_group()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for processes in sorted({layout.processes for layout in LAYOUTS.values()}):
        # Forked: importing Megatron Core takes longer than all that is done with it here.
        arguments = (processes, f"{path}-{processes}", path)
        multiprocessing.start_processes(run, arguments, nprocs=processes, start_method="fork")
