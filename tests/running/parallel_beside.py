"""What else is to be shown under transformers' own parallelism, beside gradients in float32."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.distributed as dist
from families import FAMILIES
from parallel_gradients import UNREPORTED, Layout, load, share
from runs import loss_of, selections
from setting import Result, batch, build, full, gradients_of, judge_half, routers, truth
from torch import Tensor

from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import apply_densemixer
from densemixer_adapters.transformers.checks import OutputMismatchError
from densemixer_core import DenseMixerConfig


def half(layout: Layout) -> Result:
    """FSDP's mixed precision."""
    family = FAMILIES["qwen3_moe"]
    model = load({**layout, "fsdp_mixed_precision": True})
    apply_densemixer(model)
    with selections(family, model) as mine:
        loss_of(model, share(layout)).backward()
    indices = []
    for index in mine:
        parts = [torch.empty_like(index) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, index)
        indices.append(torch.cat(parts))
    gradients = full(gradients_of(model))
    if dist.get_rank():
        return UNREPORTED
    reference = family.oracle(build(), indices, "densemixer").bfloat16()
    loss_of(reference, batch()).backward()
    return judge_half(gradients, gradients_of(reference), indices, torch.bfloat16)


def budget(layout: Layout) -> Result:
    """The mean over draws is the exact gradient: how far it is, in some directions, in standard errors."""
    model, draws = load(layout), []
    names = routers(name for name, _ in model.named_parameters())
    layers = apply_densemixer(model).layers
    for seed in range(40):
        for layer in layers:  # attached anew, they would check themselves anew
            layer.config = DenseMixerConfig("centered", budget=0.3, seed=seed)
        model.zero_grad()
        loss_of(model, share(layout)).backward()
        gradients = gradients_of(model)
        found = full({name: gradients[name] for name in names})
        draws.append(torch.cat([found[name].flatten() for name in names]).double())
    if dist.get_rank():
        return UNREPORTED
    exact = truth("centered")
    whole = torch.cat([exact[name].flatten() for name in names])
    directions = torch.randn(10, len(whole), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = (torch.stack(draws) - whole) @ directions.t()
    bias = errors.mean(0).abs() / (errors.std(0) / len(draws) ** 0.5)
    return Result(bias.max().item(), 5.0, oracle.relative_error(draws[0], whole))


def metrics(layout: Layout) -> Result:
    """Against those of one process, after a step."""
    found = measured(load(layout), share(layout))
    alone = measured(build(), batch())
    assert found.keys() == alone.keys()
    error = max(abs(found[name] - alone[name]) / max(1.0, abs(alone[name])) for name in alone)
    return Result(error, 1e-4, alone["densemixer/routing_change"], found)


def measured(model: Any, ids: Tensor) -> dict[str, float]:
    watched = RouterMetrics(apply_densemixer(model).layers, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model, ids).backward()
    watched.before_update(optimizer)
    optimizer.step()
    watched.after_update()
    found = watched.measure()
    watched.remove()
    return found


def checkpoints(layout: Layout) -> Result:
    """Saved with DenseMixer attached, after a step, and without, gathered and in parts; and what the model returned."""
    sums = []
    for on in (True, False):
        model, ids = load(layout), share(layout)
        if on:
            apply_densemixer(model)
        loss = loss_of(model, ids)
        loss.backward()
        model.zero_grad()
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        model.save_pretrained(f"{folder[0]}/whole")
        model.save_pretrained(f"{folder[0]}/parts", distributed_checkpoint=True)
        dist.barrier()
        files = sorted(path for path in Path(folder[0]).rglob("*") if path.is_file())
        sums.append((loss.item(), {str(path.relative_to(folder[0])): fingerprint(path) for path in files}))
    assert len(sums[0][1]) > 3, sums[0]
    assert sums[0] == sums[1], sums
    return Result(0.0, 0.0, 1.0, {"files": list(sums[0][1])})


def fingerprint(path: Path) -> str:
    """Of a file's bytes. At the start of safetensors lies a mapping in JSON, whose order is left to chance."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        content = json.dumps(header, sort_keys=True).encode() + content[end:]
    return hashlib.sha256(content).hexdigest()


def changed_output(layout: Layout) -> str:
    """A hook of somebody else's changes what the experts return, on all ranks: it is an error on all."""
    model = load(layout)
    model.model.layers[0].mlp.experts.register_forward_hook(lambda module, args, output: 2 * output)
    apply_densemixer(model)
    twice = model.model.layers[1].mlp.experts
    whole = twice.forward
    twice.forward = lambda *args: 2 * whole(*args)
    try:
        loss_of(model, share(layout))
    except OutputMismatchError as error:
        return str(error)
    raise AssertionError("nothing was said")
