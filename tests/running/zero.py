"""DeepSpeed's ZeRO on two ranks, by its engine, accelerate and the Trainer."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import deepspeed
import torch
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from device import BACKEND
from families import tokens
from running.shares import my_share
from runs import loss_of
from setting import FAMILIES, STEP, Result, batch, build, checkpoint, compare

from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig


def zero(
    stage: int,
    kind: str = "none",
    micro_batches: int = 1,
    leaf: bool = True,
    count_steps: bool = False,
    family: str = "qwen3_moe",
    **optimisation: Any,
) -> Result:
    model = build(FAMILIES[family])
    handle = apply_densemixer(model, DenseMixerConfig(workspace_mb=1))
    mark_leaf_modules(handle)
    if not leaf:
        mark_leaf_modules(handle, False)
    assert get_z3_leaf_modules(model) == [layer.block for layer in handle.layers if leaf]
    checkpoint(model, kind)
    config = {
        **zero_config(stage, **optimisation),
        "train_micro_batch_size_per_gpu": 2 // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    for ids in my_share().chunk(micro_batches):
        engine.backward(loss_of(engine, ids))
        if micro_batches > 1 and not engine.is_gradient_accumulation_boundary():
            engine.step()  # counts the micro-batch, no more
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
    more = {"out of order": steps_out_of_order(engine)} if count_steps else {}
    engine.destroy()
    return compare(gradients, family, **more)


def zero_config(stage: int, **optimisation: Any) -> dict[str, Any]:
    # DeepSpeed itself knows the classes of some blocks as leaf modules.
    own = {"stage3_param_persistence_threshold": 0, "leaf_module": {"classes": []}}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **own, **optimisation},
    }


def steps_out_of_order(engine: Any) -> int:
    """In how many steps ZeRO-3 gave up the order of modules that it had recorded. Then it can't prefetch.

    The batches' sizes differ, and with them the number of chunks in which DenseMixer runs the experts.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    count = 0
    for length in (8, 600, 8):
        engine.backward(loss_of(engine, tokens(length=length)))
        count += coordinator.is_invalid_trace()
        engine.step()
    return count


def zero_with_accelerate() -> Result:
    model = build()
    mark_leaf_modules(apply_densemixer(model))
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_config(3)))
    engine, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    engine.backward(loss_of(engine, my_share()))
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
    engine.destroy()
    AcceleratorState._reset_state(True)
    return compare(gradients)


def zero_trainer(model: Any, learning_rate: float, *callbacks: Any, **options: Any) -> transformers.Trainer:
    """The HF Trainer with ZeRO-3 and plain SGD, for this rank's share of the batch in each step."""
    # Without a GPU, the Trainer's own accelerate would take each rank for the only one.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend=BACKEND)
    share = len(my_share())
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        deepspeed={**zero_config(3), "gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": share},
        per_device_train_batch_size=share,
        optim="sgd",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        accelerator_config={"use_configured_state": True},
        **options,
    )
    # The Trainer divides by the number of labels, and a sequence's first one can't be predicted.
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in batch().tolist()]
    return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def zero_with_trainer() -> Result:
    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    mark_leaf_modules(apply_densemixer(model))
    zero_trainer(model, STEP, max_steps=1).train()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return compare({name: (before[name] - value.detach()) / STEP for name, value in model.named_parameters()})
