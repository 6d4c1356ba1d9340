"""Router metrics on two ranks. Usage: torchrun --nproc-per-node 2 on_ranks.py REPORT.

Each rank has half of the batch. Rank 0 writes JSON: for each setting the metrics of two steps, or the error.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from running.shares import backward, my_share, wrap_fsdp1, wrap_fsdp2
from running.zero import zero_config, zero_trainer
from runs import loss_of
from setting import batch, build, checkpoint
from torch.nn.parallel import DistributedDataParallel

from densemixer_adapters.callback import DenseMixerCallback
from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.metrics.router_metrics import RouterMetrics, UnmeasuredError
from densemixer_adapters.transformers import DenseMixerHandle, apply_densemixer

RATE = 0.5
Metrics = list[dict[str, float]]


def two_steps(handle: DenseMixerHandle, model: Any, run: Callable[[], None], optimizer: Any) -> Metrics:
    """``run`` makes gradients, and steps where ``optimizer`` is None. ``model`` is what the batch is run through."""
    metrics = RouterMetrics(handle.layers, model)
    found = []
    for _ in range(2):
        run()
        if optimizer is not None:
            metrics.before_update(optimizer)
            optimizer.step()
            metrics.after_update()
            optimizer.zero_grad()
        found.append(metrics.measure())
    return found


def alone() -> Metrics:
    """The whole batch in one process."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return two_steps(apply_densemixer(model), model, lambda: loss_of(model, batch()).backward(), optimizer)


def ddp() -> Metrics:
    model = build()
    handle = apply_densemixer(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return two_steps(handle, model, lambda: backward(wrapped), optimizer)


def fsdp1() -> Metrics:
    model = build()
    handle = apply_densemixer(model)
    wrapped = wrap_fsdp1(model, ("DecoderLayer",), use_orig_params=False)
    return two_steps(handle, wrapped, lambda: backward(wrapped), torch.optim.SGD(wrapped.parameters(), lr=RATE))


def fsdp2(kind: str = "none", wrap: tuple[str, ...] = ("DecoderLayer",)) -> Metrics:
    model = build()
    handle = apply_densemixer(model)
    checkpoint(model, kind)
    wrap_fsdp2(model, wrap)
    return two_steps(handle, model, lambda: backward(model), torch.optim.SGD(model.parameters(), lr=RATE))


def zero(kind: str = "none") -> Metrics:
    model = build()
    handle = apply_densemixer(model)
    mark_leaf_modules(handle)
    checkpoint(model, kind)
    config = {**zero_config(3), "gradient_clipping": 0.0, "optimizer": {"type": "SGD", "params": {"lr": RATE}}}
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]

    def run() -> None:
        engine.backward(loss_of(engine, my_share()))
        engine.step()

    found = two_steps(handle, model, run, None)
    engine.destroy()
    return found


def zero_with_trainer() -> Metrics:
    """The callback, by the Trainer's log."""
    model = build()
    mark_leaf_modules(apply_densemixer(model))
    # The order of the data is that of the batch in each epoch, as far as a sum over it can tell.
    trainer = zero_trainer(model, RATE, DenseMixerCallback(), max_steps=2, logging_steps=1)
    trainer.train()
    return [
        {name: value for name, value in entry.items() if name.startswith("densemixer/")}
        for entry in trainer.state.log_history[:2]
    ]


def one_rank_fails() -> str:
    """What the first rank is told when the other one can't measure. Both must go on."""
    model = build()
    metrics = RouterMetrics(apply_densemixer(model).layers, model)
    wrapped = DistributedDataParallel(model)
    backward(wrapped)
    metrics.before_update(torch.optim.SGD(model.parameters(), lr=RATE) if dist.get_rank() == 0 else object())
    metrics.after_update()
    try:
        metrics.measure()
    except UnmeasuredError as error:
        metrics.remove()
        backward(wrapped)
        return str(error)
    return "nothing"


SETTINGS: dict[str, Callable[[], Metrics | str]] = {
    "alone": alone,
    "DDP": ddp,
    "FSDP1": fsdp1,
    "FSDP2": fsdp2,
    "FSDP2, routers and experts wrapped": functools.partial(fsdp2, wrap=("DecoderLayer", "Router", "Experts")),
    "FSDP2, checkpointing reentrant": functools.partial(fsdp2, "reentrant"),
    "FSDP2, checkpointing non-reentrant": functools.partial(fsdp2, "non-reentrant"),
    "ZeRO-3": zero,
    "ZeRO-3, checkpointing reentrant": functools.partial(zero, "reentrant"),
    "ZeRO-3, Trainer": zero_with_trainer,
    "one rank fails": one_rank_fails,
}


def main(report: Path) -> None:
    deepspeed.init_distributed("gloo")
    results: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        try:
            results[name] = setting()
        except Exception:
            results[name] = traceback.format_exc()
        if dist.get_rank() == 0:
            print(name, results[name], flush=True)
            report.write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


if __name__ == "__main__":
    main(Path(sys.argv[1]))
