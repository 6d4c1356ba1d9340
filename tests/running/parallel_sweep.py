"""Each architecture of the installed transformers on two ranks, by expert and by tensor parallelism.

Usage: PYTHONPATH=tests python tests/running/parallel_sweep.py REPORT [FOLDER]...

The gradients are compared with those of one process: conventional ones, which are the host's affair, and the routers'
with DenseMixer, which one process computes as `tests/transformers/test_architectures.py` shows. The report is JSON: for
each architecture and way its `Outcome`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import architectures
import torch
import torch.distributed as dist
import transformers
from ranks import join
from torch import Tensor, multiprocessing, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from densemixer_adapters.transformers import UnsupportedModelError, apply_densemixer

LAYOUTS = {"EP": {"fsdp_size": 2, "ep_size": 2}, "TP": {"tp_size": 2}}
BATCH = 6  # architectures a process: each model leaves groups of gloo behind, with threads that slow all others down
HOST = 1e-4  # in float32; transformers' own gradients are right to 3e-5, or wrong by 0.5 and more


@dataclasses.dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        kind: One of `matrix_table.SWEEP`.
        error: Of the routers' gradients with DenseMixer; None if there are none.
        more: What transformers or DenseMixer said.
    """

    kind: str
    error: float | None = None
    more: str = ""


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


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def first_of_ranks(said: str) -> str:
    """What the first rank says that says anything."""
    ranks = [""] * dist.get_world_size()
    dist.all_gather_object(ranks, said)
    return next(filter(None, ranks), "")


def outcome(folder: str, cls: Any, layout: dict[str, int]) -> Outcome:
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
    parts = layout.get("fsdp_size", 1)
    spread, said = None, ""
    try:
        spread = cls.from_pretrained(place[0], distributed_config=DistributedConfig(**layout), **options).train()
    except Exception as error:
        said = words(error)
    if said := first_of_ranks(said):  # one rank alone may fail to load its part
        return Outcome("no plan" if "_plan`" in said else "fails", more=said)
    try:
        found, truth = step(spread, parts), step(model)
        conventional = worst(found, truth)
    except Exception as error:
        return Outcome("fails", more=words(error))
    try:
        apply_densemixer(spread)
    except UnsupportedModelError as error:
        return Outcome("refused", more=str(error))
    with apply_densemixer(model) as handle:
        names = tuple(f"{layer.router_name}." for layer in handle.layers)
        dense = {name: gradient for name, gradient in step(model).items() if name.startswith(names)}
    if worst(found, {name: truth[name] for name in dense}) > HOST:
        return Outcome("wrong")
    error = worst(step(spread, parts), dense)
    return Outcome("exact" if conventional <= HOST else "elsewhere", error)


def run(rank: int, store: str, folders: list[str], report: Path) -> None:
    join(rank, 2, store)
    os.environ["LOCAL_RANK"] = str(rank)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = json.loads(report.read_text())
    for folder in folders:
        classes = architectures.model_classes(folder)
        for cls in classes:
            name = folder if len(classes) == 1 else f"{folder} ({cls.__name__})"
            found[name] = {way: vars(outcome(folder, cls, layout)) for way, layout in LAYOUTS.items()}
            if rank == 0:
                print(name, found[name], flush=True)
    dist.barrier()
    if rank == 0:
        report.write_text(json.dumps(found))
    os._exit(0)  # threads of gloo may outlive what they belong to


def main(report: Path, *chosen: str) -> None:
    folders = list(chosen) or architectures.found()
    report.write_text("{}")
    for start in range(0, len(folders), BATCH):
        # Forked: importing transformers takes longer than most that is done with it here.
        arguments = (tempfile.mktemp(), folders[start : start + BATCH], report)
        multiprocessing.start_processes(run, arguments, nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
