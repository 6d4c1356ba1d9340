"""Runs torchtitan's Trainer in each of `LAYOUTS`, in processes forked from this one. Usage: titan_ranks.py REPORT.

The report is JSON: for each layout what was found on each rank, or the error that stopped it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "torchtitan"))

import oracle
import torch
import torch.distributed as dist
from ranks import join, of_all_ranks
from titan_model import SWITCH, float32_experts, initial_weights, load, step, trainer, truth
from torch import Tensor, multiprocessing

from densemixer_adapters.torchtitan import apply_densemixer, attached_handle
from densemixer_core import DenseMixerConfig

DRAWS = 40


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is spread; what isn't tensor parallel is FSDP2.

    Args:
        draws: Whether budgets below 1 are tried too.
    """

    processes: int
    expert: int = 1
    tensor: int = 1
    backend: str = "partial_dtensor"
    checkpointing: str = "none"
    draws: bool = False

    @property
    def even(self) -> bool:
        """Whether all ranks must have as many tokens."""
        return self.backend == "full_dtensor"


LAYOUTS = {
    "one rank": Layout(1, backend="spmd_types"),
    "FSDP2": Layout(2, checkpointing="selective"),
    "EP2": Layout(2, expert=2, draws=True),
    "TP2": Layout(2, tensor=2, checkpointing="full", draws=True),
    "TP2 EP2": Layout(2, expert=2, tensor=2),
    "FSDP2 EP2": Layout(4, expert=2, checkpointing="full"),
    "FSDP2 TP2": Layout(4, tensor=2),
    "FSDP2 TP2 EP4": Layout(4, expert=4, tensor=2, checkpointing="selective"),
    "FSDP2 TP2 EP2, full_dtensor": Layout(4, expert=2, tensor=2, backend="full_dtensor"),
}


def examine(layout: Layout, weights: dict[str, Tensor], truths: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """On this rank."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(
            folder,
            [(SWITCH, {"estimator": "centered"})],
            expert=layout.expert,
            tensor=layout.tensor,
            backend=layout.backend,
            checkpointing=layout.checkpointing,
        )
        (model,) = run.model_parts
        load(model, weights)
        routers = [name for name in weights if "router" in name]
        found = {"centered": step(run, layout.even)}  # by the override
        layers = [layer.name for layer in attached_handle(run.model_parts).layers]
        names = saved_names(run)
        attached_handle(run.model_parts).remove()
        found["conventional"] = step(run, layout.even)
        with apply_densemixer(run.model_parts):
            found["densemixer"] = step(run, layout.even)
        result: dict[str, Any] = {
            "layers": layers,
            "same_names": names == saved_names(run),
            "same_loss": all(torch.equal(loss, found["conventional"][0]) for loss, _ in found.values()),
            "errors": {
                f"{estimator} {name}": oracle.worst_error(gradients[name], truths[estimator][name])
                for estimator, (_, gradients) in found.items()
                for name in truths[estimator]
            },
            "difference": min(
                oracle.relative_error(found["conventional"][1][name], found[estimator][1][name])
                for name in routers
                for estimator in ("densemixer", "centered")
            ),
        }
        if layout.draws:
            result["draws"] = {estimator: drawing(run, layout, routers, truths, estimator) for estimator in truths}
        run.optimizers.step()
        run.close()
    return result


def saved_names(run: Any) -> list[str]:
    """Of what a checkpoint has of the model and its optimizers."""
    return [*run.model_parts[0].state_dict(), *run.optimizers.state_dict()]


def drawing(run: Any, layout: Layout, routers: list[str], truths: Any, estimator: str) -> dict[str, float]:
    """How far draws, and their mean, are from the exact gradient of the routers."""
    if estimator == "conventional":
        return {}
    exact = torch.cat([truths[estimator][name] for name in routers])
    draws = []
    for seed in range(DRAWS):
        with apply_densemixer(run.model_parts, DenseMixerConfig(estimator, budget=0.25, seed=seed)):
            gradients = step(run, layout.even)[1]
        draws.append(torch.cat([gradients[name] for name in routers]))
    errors = torch.stack(draws).double() - exact
    spread = float(errors.square().sum((1, 2)).mean().sqrt())
    mean = float(errors.mean(0).norm()) / (spread / DRAWS**0.5)
    return {"spread": spread / float(exact.norm()), "mean": mean}


def run_layout(rank: int, layout: Layout, store: str, path: str, weights: Any, truths: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(layout.processes))
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the process group itself
    join(rank, layout.processes, store, seconds=120)
    try:
        found: Any = examine(layout, weights, truths)
    except Exception:
        found = {"failed": traceback.format_exc()[-4000:]}
        Path(f"{path}.{rank}").write_text(json.dumps(found))
        os._exit(1)  # the others may wait for this rank
    everything = of_all_ranks(found)
    if rank == 0:
        Path(path).write_text(json.dumps(everything))
    dist.destroy_process_group()


def main(report: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    float32_experts()
    weights = initial_weights()
    truths = {estimator: truth(weights, estimator) for estimator in ("conventional", "densemixer", "centered")}
    results: dict[str, Any] = {}
    for name in chosen or LAYOUTS:
        layout = LAYOUTS[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "found"
            try:
                multiprocessing.start_processes(
                    run_layout,
                    (layout, f"{folder}/store", str(path), weights, truths),
                    nprocs=layout.processes,
                    start_method="fork",
                )
                results[name] = json.loads(path.read_text())
            except Exception as error:
                failures = [json.loads(other.read_text()) for other in sorted(Path(folder).glob("found.*"))]
                results[name] = failures or [{"failed": str(error)[-4000:]}]
    report.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
