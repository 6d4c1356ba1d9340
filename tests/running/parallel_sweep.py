"""Each architecture of the installed transformers on two ranks, by expert and by tensor parallelism.

Usage: PYTHONPATH=tests python tests/running/parallel_sweep.py [FOLDER]...

For each it prints how far the gradients are from those of one process: conventional ones, which are the host's affair,
and the routers' with DenseMixer, which one process computes as `tests/transformers/test_architectures.py` shows. No
part of the test session: it takes minutes.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from typing import Any

import architectures
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer

LAYOUTS = {"EP": {"fsdp_size": 2, "ep_size": 2}, "TP": {"tp_size": 2}}


def step(model: nn.Module, parts: int = 1) -> dict[str, Tensor]:
    """Gradients of a loss in a random direction of the first output, of this rank's part of the batch."""
    model.zero_grad()
    part = dist.get_rank() % parts
    inputs = architectures.inputs(model)
    mine = {name: value.chunk(parts)[part] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    output = model(**mine)[0]
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn((len(output) * parts, *output.shape[1:]), generator=generator).chunk(parts)[part]
    (output * direction).sum().mul(parts).backward()  # FSDP takes the mean
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    errors = [(found[name] - truth[name]).abs().max() / truth[name].abs().max() for name in truth if truth[name].any()]
    return max(error.item() for error in errors)


def outcome(folder: str, cls: Any, layout: dict[str, int]) -> str:
    model, place = architectures.build(folder, cls), [tempfile.mkdtemp()]
    dist.broadcast_object_list(place)
    if dist.get_rank() == 0:
        model.save_pretrained(place[0])
    dist.barrier()
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "experts_implementation": "eager",
        "attn_implementation": "eager",
    }
    try:
        spread = cls.from_pretrained(place[0], distributed_config=DistributedConfig(**layout), **options).train()
        parts = layout.get("fsdp_size", 1)
        conventional = worst(step(spread, parts), step(model))
    except Exception as error:
        return f"transformers itself: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    try:
        apply_densemixer(spread)
    except UnsupportedModelError as error:
        return f"refused: {error}"
    found = step(spread, parts)
    with apply_densemixer(model) as handle:
        names = tuple(f"{layer.router_name}." for layer in handle.layers)
        truth = {name: gradient for name, gradient in step(model).items() if name.startswith(names)}
    return f"conventional {conventional:.1e}, routers with DenseMixer {worst(found, truth):.1e}"


def run(rank: int, store: str, folders: list[str]) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    os.environ["LOCAL_RANK"] = str(rank)
    for folder in folders:
        for cls in architectures.model_classes(folder):
            for name, layout in LAYOUTS.items():
                found = outcome(folder, cls, layout)
                if rank == 0:
                    print(f"{folder} ({cls.__name__}), {name}: {found}", flush=True)
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive what they belong to


if __name__ == "__main__":
    arguments = (tempfile.mktemp(), sys.argv[1:] or architectures.found())
    multiprocessing.start_processes(run, arguments, nprocs=2, start_method="fork")
