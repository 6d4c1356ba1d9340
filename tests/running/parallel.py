"""Transformers' own parallelism: each layout in two or four processes.

Usage: DENSEMIXER_ENABLED=1 parallel.py REPORT [PART OF A NAME], where cells switch that off but for one of it.

`matrix.PARALLEL` has the layouts. The gradients must be the oracle's of the whole batch in one process. The report is
JSON, see `setting.run`; `ways` are cells of more than gradients.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matrix
import oracle
import torch
import torch.distributed as dist
from families import FAMILIES
from ranks import join
from runs import loss_of, selections
from safetensors.torch import load_file
from setting import (
    Cells,
    Gradients,
    Result,
    batch,
    build,
    checkpoint,
    compare,
    dense,
    full,
    gradients_of,
    judge,
    judge_half,
    refusal,
    routers,
    run,
    saved,
    truth,
)
from torch import Tensor, multiprocessing
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import apply_densemixer, attached_layers
from densemixer_adapters.transformers.checks import OutputMismatchError
from densemixer_core import DenseMixerConfig

STEP = 1024.0  # of SGD: large, so that the weight before it hardly rounds the gradient away
UNREPORTED = Result(0.0, 0.0, 0.0)
Layout = dict[str, Any]


def load(layout: Layout, family: str = "qwen3_moe") -> Any:
    """A model with random weights, spread over the ranks."""
    own = DistributedConfig(**layout)
    return AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32, distributed_config=own).train()


def share(layout: Layout, whole: Tensor | None = None) -> Tensor:
    """This rank's part of the batch: ranks of tensor parallelism have the same."""
    data = layout.get("fsdp_size", 1) * layout.get("dp_replicate_size", 1)
    parts = (batch() if whole is None else whole).chunk(data)
    return parts[dist.get_rank() * data // dist.get_world_size()]


def plain(
    layout: Layout,
    kind: str = "none",
    family: str = "qwen3_moe",
    estimator: str = "densemixer",
    implementation: str = "auto",
    attach: Callable[[Any, DenseMixerConfig], Any] = apply_densemixer,
) -> Result:
    model = load({**layout, "ep_implementation": implementation}, family)
    attach(model, DenseMixerConfig(estimator))
    checkpoint(model, kind)
    loss_of(model, share(layout)).backward()
    return verdict(model, estimator, family)


def verdict(model: Any, estimator: str = "densemixer", family: str = "qwen3_moe") -> Result:
    """By the first rank, whose report is written; the others need not compute the truth."""
    gradients = full(gradients_of(model))
    if dist.get_rank():
        return UNREPORTED
    return judge(gradients, truth(estimator, family), truth("conventional", family))


def hooked(layout: Layout) -> Result:
    """Somebody looks at the experts' output on one rank, from the second step on. The ranks still go together."""
    model = load(layout)
    apply_densemixer(model)
    loss_of(model, share(layout)).backward()
    model.zero_grad()
    if dist.get_rank() == 0:
        model.model.layers[0].mlp.experts.register_forward_hook(lambda *args: None)
    loss_of(model, share(layout)).backward()
    return verdict(model)


def uneven(layout: Layout) -> Result:
    """Each batch of another length."""
    model, (first, second) = load(layout), batch().chunk(2)
    apply_densemixer(model)
    parts = [first, second[:, :7]]
    loss_of(model, parts[0] if share(layout).equal(first) else parts[1]).backward()
    gradients = full(gradients_of(model))
    if dist.get_rank():
        return UNREPORTED
    found = {estimator: [of_part(part, estimator) for part in parts] for estimator in ("densemixer", "conventional")}
    mean = {kind: {name: (a[name] + b[name]) / 2 for name in a} for kind, (a, b) in found.items()}
    return judge(gradients, mean["densemixer"], mean["conventional"])


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
    for seed in range(40):
        model.zero_grad()
        with apply_densemixer(model, DenseMixerConfig("centered", budget=0.3, seed=seed)):
            loss_of(model, share(layout)).backward()
        found = full(gradients_of(model))
        draws.append(torch.cat([found[name].flatten() for name in names]).double())
    if dist.get_rank():
        return UNREPORTED
    exact = truth("centered")
    whole = torch.cat([exact[name].flatten() for name in names])
    directions = torch.randn(10, len(whole), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = (torch.stack(draws) - whole) @ directions.t()
    bias = errors.mean(0).abs() / (errors.std(0) / len(draws) ** 0.5)
    return Result(bias.max().item(), 5.0, oracle.relative_error(draws[0], whole))


def of_part(ids: Tensor, estimator: str) -> Gradients:
    model = build()
    with selections(FAMILIES["qwen3_moe"], model) as indices, torch.no_grad():
        loss_of(model, ids)
    return dense(model, indices, estimator, ids=ids)


def in_the_environment(model: Any, config: DenseMixerConfig) -> None:
    """`load` has been called with DENSEMIXER_ENABLED=1."""
    assert [layer.config for layer in attached_layers(model)] == [config] * 2


def by_environment(layout: Layout) -> Result:
    with switched(on=True):
        return plain(layout, attach=in_the_environment)


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    before = os.environ[ENABLED]
    os.environ[ENABLED] = str(int(on))
    yield
    os.environ[ENABLED] = before


def by_trainer(layout: Layout, kind: str) -> Result:
    """One step of plain SGD, whose gradients are read off the weights."""
    model = load(layout)
    apply_densemixer(model)
    before = full({name: p.detach().clone() for name, p in model.named_parameters()})
    trainer(kind, model, len(share(layout))).train()
    after = full({name: p.detach() for name, p in model.named_parameters()})
    return UNREPORTED if dist.get_rank() else compare({name: (before[name] - after[name]) / STEP for name in before})


def trainer(kind: str, model: Any, size: int) -> Trainer:
    import trl
    from accelerate.state import PartialState
    from datasets import Dataset
    from trainers import tokenizer

    PartialState(cpu=True, backend="gloo")
    common = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size,
        max_steps=1,
        optim="sgd",
        learning_rate=STEP,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},
    )
    rows = {"input_ids": batch().tolist()}
    if kind == "SFTTrainer":
        options = trl.SFTConfig(**common, max_length=24, router_aux_loss_coef=0.0)
        return trl.SFTTrainer(model, options, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer())
    # The Trainer divides by the number of labels, and a sequence's first one can't be predicted.
    rows["labels"] = [[-100, *row[1:]] for row in rows["input_ids"]]
    data = Dataset.from_dict(rows)
    return Trainer(model, TrainingArguments(**common), train_dataset=data)


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
    """Of a file's bytes; of a rank's part of a checkpoint of its tensors', which lie there in any order."""
    if not path.name.startswith("shard-"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = sorted(load_file(path).items())
    return hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in tensors)).hexdigest()


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
