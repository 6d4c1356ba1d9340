"""Runs the distributed cells of the matrix. Usage: torchrun --nproc-per-node 2 two_ranks.py REPORT [CELL]....

Each rank has half of the batch, and the gradients must be the oracle's of the whole batch in one process.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from device import BACKEND, DEVICE
from packaging.version import Version
from running.sharded import ddp, fsdp1, fsdp2, half_fsdp1, half_fsdp2
from running.shares import backward
from running.zero import zero, zero_with_accelerate, zero_with_trainer
from setting import Result, chosen, compare, full, gradients_of, refusal, run, saved
from torch.distributed.fsdp import CPUOffloadPolicy, ShardingStrategy

from densemixer_adapters.transformers import apply_densemixer

KINDS = ("non-reentrant", "reentrant", "selective")


def load(family: str, **distributed: Any) -> Any:
    """With a plan of transformers' own."""
    from transformers.distributed import DistributedConfig

    own = {"distributed_config": DistributedConfig(**distributed)} if distributed else {"tp_plan": "auto"}
    return transformers.AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32, **own).train()


def own_fsdp() -> Result:
    model = load("qwen3_moe", fsdp_size=2)
    apply_densemixer(model)
    backward(model)
    return compare(full(gradients_of(model)))


def cells() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "DDP: plain", ddp
    yield "DDP: gradient accumulation", lambda: ddp(micro_batches=2)
    yield "DDP: static graph", lambda: ddp(static_graph=True)
    yield "DDP: find unused parameters", lambda: ddp(find_unused_parameters=True)
    for original in (True, False):
        way = f"FSDP1, use_orig_params={original}"
        one = functools.partial(fsdp1, use_orig_params=original)
        yield f"{way}: plain", one
        yield f"{way}: gradient accumulation", functools.partial(one, micro_batches=2)
        yield f"{way}: SHARD_GRAD_OP", functools.partial(one, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
        yield f"{way}: routers and experts wrapped", functools.partial(one, wrap=("DecoderLayer", "Router", "Experts"))
        yield f"{way}: gpt-oss", functools.partial(one, family="gpt_oss")
        for kind in KINDS:
            yield f"{way}: checkpointing {kind}", functools.partial(one, kind)
    for reshard in (True, False):
        way = f"FSDP2, reshard_after_forward={reshard}"
        two = functools.partial(fsdp2, reshard_after_forward=reshard)
        yield f"{way}: plain", two
        yield f"{way}: gradient accumulation", functools.partial(two, micro_batches=2)
        yield f"{way}: routers and experts wrapped", functools.partial(two, wrap=("DecoderLayer", "Router", "Experts"))
        yield f"{way}: attached after it", functools.partial(two, attach_first=False)
        yield f"{way}: CPU offload", functools.partial(two, offload_policy=CPUOffloadPolicy(pin_memory=False))
        yield f"{way}: gpt-oss", functools.partial(two, family="gpt_oss")
        for kind in KINDS:
            yield f"{way}: checkpointing {kind}", functools.partial(two, kind)
    for kind in KINDS:
        yield f"DDP: checkpointing {kind}", functools.partial(ddp, kind)
    yield "FSDP1, bfloat16: plain", half_fsdp1
    yield "FSDP2, bfloat16: plain", half_fsdp2
    yield "FSDP2, bfloat16: checkpointing non-reentrant", lambda: half_fsdp2("non-reentrant")
    if Version(transformers.__version__) >= Version("5.23"):
        yield "FSDP2 of transformers (fsdp_size): plain", own_fsdp
    else:  # the newer ones are cells of parallel.py
        yield (
            "refused: expert parallelism",
            lambda: refusal(lambda: apply_densemixer(load("gpt_oss", enable_expert_parallel=True))),
        )
        yield "refused: tensor parallelism", lambda: refusal(lambda: apply_densemixer(load("qwen3_moe")))
    for stage in (1, 2, 3):
        way, ds = f"ZeRO-{stage}", functools.partial(zero, stage)
        yield f"{way}: plain", functools.partial(ds, count_steps=stage == 3)
        yield f"{way}: gradient accumulation", functools.partial(ds, micro_batches=2)
        for kind in KINDS:
            yield f"{way}: checkpointing {kind}", functools.partial(ds, kind)
        if stage > 1:
            yield f"{way}: optimizer on the CPU", functools.partial(ds, offload_optimizer={"device": "cpu"})
    yield "ZeRO-3: parameters on the CPU", lambda: zero(3, offload_param={"device": "cpu"})
    yield "ZeRO-3: without leaf modules", lambda: zero(3, leaf=False, count_steps=True)
    yield "ZeRO-3: gpt-oss", lambda: zero(3, family="gpt_oss")
    yield "ZeRO-3: through accelerate", zero_with_accelerate
    yield "ZeRO-3: through the Trainer", zero_with_trainer


def main(report: Path, *names: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(BACKEND)
    run(chosen(cells(), names), report, write=dist.get_rank() == 0)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
