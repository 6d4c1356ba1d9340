"""Automodel's own layer, spread over two and four ranks as Automodel does it, beside the oracle with the whole batch.

Usage: layers_on_ranks.py REPORT. The report is JSON: for each cell the errors of all gradients on the worst rank, or
what it was refused with.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import oracle
import plain_dispatcher
import torch
import torch.distributed as dist
from layers import Layer, batches, build, expected
from nemo_automodel.components.moe.parallelizer import ExpertParallel
from ranks import join, of_all_ranks
from torch import Tensor, multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from densemixer_adapters.automodel import apply_densemixer
from densemixer_core import DenseMixerConfig

DRAWS = 300


@dataclasses.dataclass(frozen=True)
class Cell:
    """How a layer is spread, and what it is.

    Args:
        lengths: How many tokens each rank has.
        ep: Over how many ranks the experts are spread; FSDP shards each one's over the others.
        units: Which modules FSDP has as units of their own.
        after: Whether DenseMixer is attached after all that, as the key does it, or before.
        case, experts: See `layers.build`.
        dispatcher: Of `deepep`, there is a stand-in.
    """

    lengths: tuple[int, ...]
    ep: int = 1
    units: tuple[str, ...] = ()
    after: bool = True
    case: str = "softmax, renormalised"
    experts: str = "torch"
    dispatcher: str = "torch"
    estimator: str = "densemixer"
    padding: bool = False


CELLS = {
    "EP 2": Cell((12, 9), ep=2),
    "EP 2, centered": Cell((12, 9), ep=2, estimator="centered"),
    "EP 2, grouped product, padding": Cell((12, 9), ep=2, experts="torch_mm", padding=True),
    "EP 2, nothing but padding on a rank": Cell((12, 2), ep=2, padding=True),
    "EP 2, gpt-oss": Cell((12, 9), ep=2, case="gpt-oss"),
    "EP 2, sigmoid, groups, a bias": Cell((12, 9), ep=2, case="sigmoid, groups, a bias", estimator="centered"),
    "EP 2, latent": Cell((12, 9), ep=2, case="latent"),
    "EP 2, auxiliary loss": Cell((12, 9), ep=2, case="auxiliary loss"),
    "EP 2, DeepEP": Cell((12, 9), ep=2, experts="torch_mm", dispatcher="deepep", padding=True),
    "EP 2, DeepEP, gpt-oss": Cell((12, 9), ep=2, experts="torch_mm", dispatcher="deepep", case="gpt-oss"),
    "FSDP, experts and gate units": Cell((12, 9), units=("experts", "gate")),
    "FSDP, experts and gate units, attached before": Cell((12, 9), units=("experts", "gate"), after=False),
    "FSDP, the layer a unit": Cell((12, 9), units=("",), experts="torch_mm", padding=True),
    "EP 2 on four": Cell((12, 9, 7, 10), ep=2, units=("experts",)),
    "EP 4": Cell((12, 9, 3, 10), ep=4),
}


def spread(layer: Layer, cell: Cell, mesh: DeviceMesh) -> None:
    """As Automodel's ``apply_ep`` and ``apply_fsdp`` do it to a layer."""
    if cell.ep > 1:
        parallelize_module(layer.moe.experts, mesh["ep"], ExpertParallel())
    for unit in cell.units:
        placement = (lambda parameter: Shard(1)) if unit == "experts" else None
        module = layer.moe.get_submodule(unit)
        fully_shard(module, mesh=mesh["ep_shard"], reshard_after_forward=True, shard_placement_fn=placement)


def whole(name: str, parameter: Tensor, cell: Cell) -> Tensor:
    """A parameter's gradient of the sum over all ranks. FSDP takes the mean over those that it shards over."""
    gradient = parameter.grad
    assert gradient is not None
    in_unit = any(name.startswith(unit) for unit in cell.units)
    ranks = dist.get_world_size() // cell.ep
    if isinstance(gradient, DTensor):
        full = gradient.full_tensor() * (ranks if in_unit else 1)
        return full
    full = gradient.clone()
    dist.all_reduce(full)
    return full


def run(cell: Cell, mesh: DeviceMesh, attached: bool = True) -> dict[str, Any]:
    rank = dist.get_rank()
    layer = build(cell.case, cell.experts, dispatcher=cell.dispatcher)
    if cell.dispatcher != "torch":
        plain_dispatcher.use(layer.moe.experts)
    options = DenseMixerConfig(estimator=cell.estimator)
    if attached and not cell.after:
        apply_densemixer(layer.moe, options)
    spread(layer, cell, mesh)
    if attached and cell.after:
        apply_densemixer(layer.moe, options)
    xs, gs, masks = batches(cell.lengths, cell.padding)
    index: list[Tensor] = []
    layer.moe.gate.register_forward_hook(lambda module, args, output: index.append(output[1]))
    x = xs[rank].clone().requires_grad_()
    y = layer.moe(x[None], padding_mask=~masks[rank][None])[0]
    y.backward(gradient=gs[rank])
    indices = of_all_ranks(index[0])

    inputs = [each.double().requires_grad_() for each in xs]
    outputs = [expected(layer, inputs[r], indices[r], masks[r], cell.estimator) for r in range(len(xs))]
    torch.autograd.backward(outputs, [g.double() for g in gs])
    compared = {"y": (y.detach(), outputs[rank].detach()), "x": (x.grad, inputs[rank].grad)}
    for name, parameter in layer.moe.named_parameters():
        compared[name] = (whole(name, parameter, cell), layer.truth[name].grad)
    errors = {name: oracle.worst_error(found, truth) for name, (found, truth) in compared.items() if found.any()}
    return {"errors": errors, "y": y.detach(), "gate": compared["gate.weight"][0]}


def measure(cell: Cell, mesh: DeviceMesh) -> dict[str, Any]:
    plain, ours = run(dataclasses.replace(cell, estimator="conventional"), mesh, attached=False), run(cell, mesh)
    found = of_all_ranks(
        {
            "error": max(ours["errors"].values()),
            "error without": max(plain["errors"].values()),
            "bitwise": torch.equal(plain["y"], ours["y"]),
            "difference": oracle.relative_error(plain["gate"], ours["gate"]),
        }
    )
    return {
        "error": max(each["error"] for each in found),
        "error without": max(each["error without"] for each in found),
        "bitwise": all(each["bitwise"] for each in found),
        "difference": min(each["difference"] for each in found),
    }


def budget(mesh: DeviceMesh) -> dict[str, float]:
    """The mean over draws against all experts, in units of its spread; and that spread."""
    cell = CELLS["EP 2"]
    rank, exact = dist.get_rank(), run(cell, mesh)["gate"]
    layer = build(cell.case)
    spread(layer, cell, mesh)
    attached = apply_densemixer(layer.moe, DenseMixerConfig(budget=0.5)).layers[0]
    xs, gs, _ = batches(cell.lengths, False)
    y = layer.moe(xs[rank][None])[0]
    draws = []
    for seed in range(DRAWS):
        attached.config = dataclasses.replace(attached.config, seed=seed)
        layer.moe.gate.weight.grad = None
        y.backward(gradient=gs[rank], retain_graph=True)
        draws.append(whole("gate.weight", layer.moe.gate.weight, cell).double())
    expected_spread = torch.stack(draws).std(0).norm() / len(draws) ** 0.5
    off = (torch.stack(draws).mean(0) - exact).norm()
    return {"off": (off / expected_spread).item(), "spread": (expected_spread / exact.norm()).item()}


def start(rank: int, processes: int, store: str, report: Path, only: str) -> None:
    torch.set_num_threads(1)
    join(rank, processes, store, seconds=120)
    meshes: dict[int, DeviceMesh] = {}
    found: dict[str, Any] = {}
    for name, cell in CELLS.items():
        if len(cell.lengths) != processes or only not in name:
            continue
        if cell.ep not in meshes:
            shape = (processes // cell.ep, cell.ep)
            meshes[cell.ep] = init_device_mesh("cpu", shape, mesh_dim_names=("ep_shard", "ep"))
        try:
            found[name] = measure(cell, meshes[cell.ep])
        except ValueError as error:  # on all ranks alike
            found[name] = {"refused": str(error)}
    if "EP 2" in found:
        found["budget"] = budget(meshes[2])
    if rank == 0:
        report.write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive what they belong to


def main(report: Path, only: str = "") -> None:
    found: dict[str, Any] = {}
    for processes in (2, 4):
        own = Path(f"{report}-{processes}")
        arguments = (processes, tempfile.mktemp(), own, only)
        # Forked: importing Automodel takes longer than all that is done with it here.
        multiprocessing.start_processes(start, arguments, nprocs=processes, start_method="fork")
        found |= json.loads(own.read_text())
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
