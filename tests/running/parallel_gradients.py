"""Gradients in float32 under transformers' own parallelism, by each door."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from families import FAMILIES
from runs import loss_of, selections
from setting import (
    SHALLOW,
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
    saved,
    truth,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from densemixer_adapters._boot import ENABLED
from densemixer_adapters.transformers import apply_densemixer, attached_layers
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


def beside_another(model: Any, config: DenseMixerConfig) -> None:
    """After one whose ranks have the same tokens, within one module, as a student beside its teacher."""
    apply_densemixer(nn.ModuleList([load({"tp_size": 2, "ep_size": 2}), model]), config)


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


def compiled(layout: Layout) -> Result:
    """After a step without it, which does the checks; and how many graphs there are after each further one."""
    torch._dynamo.reset()
    counters.clear()
    model, graphs = load(layout, SHALLOW), []
    apply_densemixer(model)
    loss_of(model, share(layout)).backward()
    model.compile(backend="aot_eager")
    for _ in range(3):
        model.zero_grad()
        loss_of(model, share(layout)).backward()
        graphs.append(counters["stats"]["unique_graphs"])
    result = verdict(model, family=SHALLOW)
    result.more["graphs"] = graphs
    return result


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
