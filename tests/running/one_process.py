"""Runs the cells of the matrix that need one process. Usage: one_process.py REPORT [CELL]..."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import trainers
from device import DEVICE
from runs import loss_of, selections
from setting import (
    FAMILIES,
    FAMILY,
    SHALLOW,
    Result,
    batch,
    build,
    checkpoint,
    chosen,
    compare,
    gradients_of,
    judge_half,
    run,
)
from torch import nn
from torch._dynamo.utils import counters

from densemixer_adapters.transformers import apply_densemixer

KINDS = ("non-reentrant", "reentrant", "selective")


def plain(kind: str = "none", micro_batches: int = 1, offload: bool = False, family: str = "qwen3_moe") -> Result:
    model = build(FAMILIES[family])
    apply_densemixer(model)
    checkpoint(model, kind)
    for ids in batch().chunk(micro_batches):
        with torch.autograd.graph.save_on_cpu() if offload else contextlib.nullcontext():
            loss = loss_of(model, ids)
        (loss / micro_batches).backward()
    return compare(gradients_of(model), family)


def autocast(dtype: torch.dtype, kind: str = "none", scale: float | None = None) -> Result:
    def step(model: nn.Module) -> None:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast(DEVICE, dtype):
            loss = loss_of(model, batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale or 1.0)  # else a gradient was infinite, and the step would be left out

    return half(dtype, step, build(), kind, lambda truth: truth)


def bfloat16(kind: str = "none") -> Result:
    def step(model: nn.Module) -> None:
        loss_of(model, batch()).backward()

    model = build().bfloat16()
    return half(torch.bfloat16, step, model, kind, nn.Module.bfloat16)


def half(
    dtype: torch.dtype, step: Callable[[Any], None], model: Any, kind: str, cast: Callable[[nn.Module], nn.Module]
) -> Result:
    apply_densemixer(model)
    checkpoint(model, kind)
    with selections(FAMILY, model) as indices:
        step(model)
    indices = indices[: len(model.model.layers)]  # checkpointing selects once more
    reference = cast(FAMILY.oracle(build(), indices, "densemixer").float())
    step(reference)
    return judge_half(gradients_of(model), gradients_of(reference), indices, dtype)


def compiled(
    backend: str,
    kind: str = "none",
    family: str = "qwen3_moe",
    regional: bool = False,
    eager_first: bool = False,
    implementation: str = "grouped_mm",
    **options: Any,
) -> Result:
    """The gradients of a later batch of the same shape, and the number of graphs that were compiled by each step."""
    torch._dynamo.reset()
    counters.clear()
    model = FAMILIES[family].build(implementation)
    apply_densemixer(model)
    checkpoint(model, kind)
    if eager_first:
        loss_of(model, batch()).backward()
    for module in model.model.layers if regional else [model]:
        module.compile(backend=backend, **options)
    graphs = []
    for _ in range(5):
        model.zero_grad()
        loss_of(model, batch()).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    return compare(gradients_of(model), family, graphs=graphs, breaks=list(counters["graph_break"]))


def cells() -> Iterator[tuple[str, Callable[[], Any]]]:
    way = "one process"
    yield f"{way}: plain", plain
    yield f"{way}: gradient accumulation", lambda: plain(micro_batches=2)
    yield f"{way}: DeepSeek-V3", lambda: plain(family="deepseek_v3")
    yield f"{way}: activations on the CPU", lambda: plain(offload=True)
    for kind in KINDS:
        yield f"{way}: checkpointing {kind}", functools.partial(plain, kind)
    for kind in ("none", "non-reentrant"):
        name = "plain" if kind == "none" else f"checkpointing {kind}"
        yield f"bfloat16: {name}", functools.partial(bfloat16, kind)
        yield f"autocast bfloat16: {name}", functools.partial(autocast, torch.bfloat16, kind)
        yield f"autocast float16, GradScaler: {name}", functools.partial(autocast, torch.float16, kind, 1024.0)
    # Fast to compile, as far as torch traces the model; then one case in which code is generated too.
    way, eager = "torch.compile", functools.partial(compiled, "aot_eager")
    yield f"{way}: plain", functools.partial(eager, family=SHALLOW)
    yield f"{way}: gpt-oss by layers", functools.partial(eager, family="gpt_oss", regional=True)
    # The backward of grouped_mm on the CPU in transformers 5.5.4 is no full graph.
    whole = functools.partial(compiled, eager_first=True, fullgraph=True, implementation="batched_mm")
    yield f"{way}: fullgraph after a step without", functools.partial(whole, "aot_eager")
    for kind in ("non-reentrant", "reentrant"):
        yield f"{way}: checkpointing {kind}", functools.partial(eager, kind)
    yield f"{way}: inductor by layers", functools.partial(whole, "inductor", regional=True)
    yield from trainers.cells()


if __name__ == "__main__":
    run(chosen(cells(), sys.argv[2:]), Path(sys.argv[1]))
