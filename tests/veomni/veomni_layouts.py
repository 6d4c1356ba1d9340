"""VeOmni's expert parallelism and FSDP2, in two and in four processes, whose ranks have different numbers of tokens.

Usage: DENSEMIXER_ENABLED=1 veomni_layouts.py REPORT [PART OF A NAME], where cells switch that off but for one of it.

The report is JSON: for each cell the largest error of a gradient against the oracle, and the smallest difference of a
router's gradient from conventional training; or what else it says.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stand_ins
import torch
import torch.distributed as dist
import transformers.modeling_utils  # noqa: F401  # while the environment asks for DenseMixer
from ranks import join, of_all_ranks
from small_models import FAMILIES, Gradients, full, ids_of, is_router, loss_of, truth
from torch import Tensor, multiprocessing
from veomni_spread import STATES, build, gradients, parallelised, plain

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import apply_densemixer, attached_layers
from densemixer_core import DenseMixerConfig


def by_environment(ep: int) -> dict[str, Any]:
    os.environ[ENABLED] = "1"
    try:
        return plain(ep, attach=lambda model, config: check_attached(model))
    finally:
        os.environ[ENABLED] = "0"


def check_attached(model: Any) -> None:
    assert len(attached_layers(model)) == 2


def outputs(ep: int) -> dict[str, Any]:
    """The loss, bit for bit, and the names, shapes and numbers of what is saved, with DenseMixer and without."""
    found = []
    for on in (True, False):
        model = build(ep, "qwen3_moe")
        if on:
            apply_densemixer(model)
        model = parallelised(model, "qwen3_moe")
        loss = loss_of(model, ids_of(dist.get_rank()))
        loss.backward()
        state = full(model.state_dict(), STATES[ep])
        found.append((loss.item(), {name: value.clone() for name, value in state.items()}))
    (loss, state), (plain_loss, plain_state) = found
    assert loss == plain_loss
    assert list(state) == list(plain_state)
    assert all(state[name].equal(plain_state[name]) for name in state)
    return {"error": 0.0, "difference": 1.0}


def budget(ep: int) -> dict[str, Any]:
    """The mean over draws is the exact gradient: how far it is, in some directions, in standard errors."""
    model, draws = parallelised(build(ep, "qwen3_moe"), "qwen3_moe"), []
    for seed in range(30):
        model.zero_grad()
        with apply_densemixer(model, DenseMixerConfig("centered", budget=0.3, seed=seed)):
            loss_of(model, ids_of(dist.get_rank())).backward()
        draws.append(of_routers(gradients(model, ep)))
    exact = of_routers(truth("qwen3_moe", "centered", dist.get_world_size()))
    directions = torch.randn(10, len(exact), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = (torch.stack(draws) - exact) @ directions.t()
    bias = errors.mean(0).abs() / (errors.std(0) / len(draws) ** 0.5)
    return {"standard errors": bias.max().item(), "of one draw": ((draws[0] - exact).norm() / exact.norm()).item()}


def of_routers(found: Gradients) -> Tensor:
    return torch.cat([found[name].flatten().double() for name in sorted(found) if is_router(name)])


def half(ep: int) -> dict[str, Any]:
    """FSDP2's mixed precision in bfloat16: routers' gradients, off by a few roundings."""
    model = build(ep, "qwen3_moe")
    apply_densemixer(model)
    model = parallelised(model, "qwen3_moe", mixed=True)
    loss_of(model, ids_of(dist.get_rank())).backward()
    found = {name: value for name, value in gradients(model, ep).items() if is_router(name)}
    exact, conventional = (truth("qwen3_moe", kind, dist.get_world_size()) for kind in ("densemixer", "conventional"))
    cosines = {kind: cosine(of_routers(found), of_routers(of)) for kind, of in (("on", exact), ("off", conventional))}
    return {"cosine with the oracle": cosines["on"], "with conventional training": cosines["off"]}


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def metrics(ep: int) -> dict[str, Any]:
    """Of a step of VeOmni's own optimizer, in which experts that are spread have one of their own."""
    from veomni.optim import build_optimizer

    model = build(ep, "qwen3_moe")
    layers = apply_densemixer(model).layers
    model = parallelised(model, "qwen3_moe")
    watched, optimizer = RouterMetrics(layers, model), build_optimizer(model, lr=1e-2)
    loss_of(model, ids_of(dist.get_rank())).backward()
    norm = of_routers(gradients(model, ep)).norm().item()
    watched.before_update(optimizer)
    optimizer.step()
    watched.after_update()
    return {"metrics": watched.measure(), "norm": norm, "optimizer": type(optimizer).__name__}


def changed_output(ep: int) -> dict[str, Any]:
    """Somebody changes what experts return: an error on all ranks."""
    model = build(ep, "qwen3_moe")
    apply_densemixer(model)
    model = parallelised(model, "qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    whole = experts.forward
    experts.forward = lambda *args: 2 * whole(*args)
    try:
        loss_of(model, ids_of(dist.get_rank()))
    except RuntimeError as error:
        return {"refused": str(error)}
    return {"refused": "nothing was said"}


Cell = Callable[[], dict[str, Any]]
CHECKPOINTING = {"enable_gradient_checkpointing": True}


def cells(processes: int) -> dict[str, Cell]:
    if processes == 4:
        return {
            "EP 2 of 4": lambda: plain(2),
            "EP 2 of 4, gpt-oss": lambda: plain(2, "gpt_oss"),
            "EP 2 of 4, checkpointing": lambda: plain(2, **CHECKPOINTING),
            "EP 4 of 4, DeepSeek-V3": lambda: plain(4, "deepseek_v3"),
        }
    return {
        "EP 1": lambda: plain(1),
        "EP 1, gpt-oss": lambda: plain(1, "gpt_oss"),
        "EP 1, checkpointing": lambda: plain(1, **CHECKPOINTING),
        "EP 1, outputs": lambda: outputs(1),
        "EP 2": lambda: plain(2),
        "EP 2, centered": lambda: plain(2, estimator="centered"),
        "EP 2, conventional": lambda: plain(2, estimator="conventional"),
        "EP 2, gpt-oss": lambda: plain(2, "gpt_oss"),
        "EP 2, DeepSeek-V3": lambda: plain(2, "deepseek_v3"),
        "EP 2, checkpointing": lambda: plain(2, **CHECKPOINTING),
        "EP 2, weights kept after the forward": lambda: plain(2, enable_reshard_after_forward=False),
        "EP 2, attached after it": lambda: plain(2, afterwards=True),
        "EP 2, DENSEMIXER_ENABLED=1": lambda: by_environment(2),
        "EP 2, outputs": lambda: outputs(2),
        "EP 2, budget": lambda: budget(2),
        "EP 2, bfloat16": lambda: half(2),
        "EP 2, metrics": lambda: metrics(2),
        "EP 2, changed output": lambda: changed_output(2),
    }


def start(rank: int, processes: int, store: str, report: Path, part: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29593"}
    join(rank, processes, store, seconds=120)
    results = {}
    for name, cell in cells(processes).items():
        if part not in name:
            continue
        try:
            result = cell()
        except Exception:
            result = {"failed": traceback.format_exc()}
        everyone = of_all_ranks(result)
        results[name] = next((one for one in everyone if "failed" in one), {**result, "ranks": everyone})
        if rank == 0:
            print(name, results[name], flush=True)
            report.write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


def main(report: Path, part: str = "") -> None:
    os.environ[ENABLED] = "0"
    logging.disable(logging.INFO)
    stand_ins.install()
    chosen = {n: [name for name in cells(n) if part in name] for n in (2, 4)}
    for family in FAMILIES:  # all truths in this process, of which the ranks are forked
        for estimator in ("densemixer", "conventional", *(["centered"] if family == "qwen3_moe" else [])):
            truth(family, estimator, 4)
    found: dict[str, Any] = {}
    for processes in (n for n in chosen if chosen[n]):
        own = Path(f"{report}-{processes}")
        arguments = (processes, tempfile.mktemp(), own, part)
        multiprocessing.start_processes(start, arguments, nprocs=processes, start_method="fork")
        found |= json.loads(own.read_text())
        own.unlink()
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
