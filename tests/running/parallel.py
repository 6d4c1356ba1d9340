"""Transformers' own parallelism: each layout in two or four processes.

Usage: DENSEMIXER_ENABLED=1 parallel.py REPORT [PART OF A NAME], where cells switch that off but for one of it.

`matrix.PARALLEL` has the layouts. The gradients must be the oracle's of the whole batch in one process. The report is
JSON, see `setting.run`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import torch.distributed as dist
from families import FAMILIES
from parallel_beside import budget, changed_output, checkpoints, half, metrics
from parallel_gradients import (
    Layout,
    beside_another,
    by_environment,
    by_trainer,
    compiled,
    hooked,
    load,
    plain,
    switched,
    uneven,
)
from parallel_lora import EXPERTS, ROUTER, adapters, lora, their_error
from ranks import join
from setting import Cells, refusal, run
from torch import multiprocessing

from densemixer_adapters.transformers import apply_densemixer


def mega(layout: Layout) -> Any:
    model = load(layout)
    for block in FAMILIES["qwen3_moe"].blocks(model):
        block.experts.config._experts_implementation = "deepgemm_megamoe"
    return model


VARIATIONS: dict[str, Callable[[Layout], Any]] = {
    "plain": plain,
    "centered": lambda layout: plain(layout, estimator="centered"),
    **{f"checkpointing {kind}": functools.partial(plain, kind=kind) for kind in ("non-reentrant", "reentrant")},
    **{
        f"ep_implementation {name}": functools.partial(plain, implementation=name)
        for name in ("all_to_all", "all_reduce")
    },
    "gpt-oss": functools.partial(plain, family="gpt_oss"),
    "DeepSeek-V3": functools.partial(plain, family="deepseek_v3"),
    "Qwen2-MoE": functools.partial(plain, family="qwen2_moe"),
    "Mixtral": functools.partial(plain, family="mixtral"),
    "beside a model of another layout": functools.partial(plain, attach=beside_another),
    "torch.compile": compiled,
    "LoRA on routers": functools.partial(lora, wrap=adapters()),
    "LoRA on attention and routers": functools.partial(lora, wrap=adapters(["q_proj", "v_proj"])),
    "LoRA on routers and experts": functools.partial(lora, wrap=adapters(parameters=[ROUTER, *EXPERTS])),
    "LoRA with routers in full": functools.partial(lora, wrap=adapters(["v_proj"], [], saved=["mlp.gate"])),
    "batches of different lengths": uneven,
    "a hook on one rank": hooked,
    "bfloat16": half,
    "budget": budget,
    "DENSEMIXER_ENABLED=1": by_environment,
    "Trainer": lambda layout: by_trainer(layout, "Trainer"),
    "SFTTrainer": lambda layout: by_trainer(layout, "SFTTrainer"),
    "router metrics": metrics,
    "saved checkpoints": checkpoints,
    "changed output": changed_output,
    "PEFT's error: experts": functools.partial(their_error, wrap=adapters(parameters=[ROUTER, EXPERTS[0]])),
    "PEFT's error: down_proj of experts": functools.partial(their_error, wrap=adapters(parameters=EXPERTS[1:])),
    "PEFT's error: attention": functools.partial(their_error, wrap=adapters(["v_proj"])),
    "PEFT's error: o_proj": functools.partial(their_error, wrap=adapters(["o_proj"])),
    "PEFT's error: routers in full": functools.partial(their_error, wrap=adapters(["v_proj"], [], saved=["mlp.gate"])),
    "refused: pipeline parallelism": lambda layout: refusal(lambda: apply_densemixer(load({"pp_size": 2}))),
    "refused: kernels of Mega MoE": lambda layout: refusal(lambda: apply_densemixer(mega(layout))),
    "refused: a part of a model": lambda layout: refusal(lambda: apply_densemixer(load(layout).model.layers[0])),
}


def cells(processes: int) -> Cells:
    return {
        f"{way}: {variation}": functools.partial(VARIATIONS[variation], layout)
        for way, (layout, variations) in matrix.PARALLEL.items()
        if matrix.processes(layout) == processes
        for variation in variations
    }


def start(rank: int, processes: int, store: str, report: Path, part: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29591"}
    join(rank, processes, store, seconds=120)
    with switched(on=False):
        run({name: cell for name, cell in cells(processes).items() if part in name}, report, write=rank == 0)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


def main(report: Path, part: str = "") -> None:
    found: dict[str, Any] = {}
    for processes in (2, 4):
        if not any(part in name for name in cells(processes)):
            continue
        own = Path(f"{report}-{processes}")
        store = tempfile.mktemp()
        # Forked: importing transformers takes longer than most that is done with it here.
        multiprocessing.start_processes(start, (processes, store, own, part), nprocs=processes, start_method="fork")
        found |= json.loads(own.read_text())
        own.unlink()
        report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
