"""Runs the distributed cells of the matrix. Usage: torchrun --nproc-per-node 2 two_ranks.py REPORT [CELL]....

Each rank has half of the batch, and the gradients must be the oracle's of the whole batch in one process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from families import tokens
from packaging.version import Version
from runs import loss_of, selections
from setting import (
    FAMILIES,
    FAMILY,
    Gradients,
    Result,
    batch,
    build,
    checkpoint,
    chosen,
    compare,
    full,
    gradients_of,
    judge_half,
    refusal,
    run,
    saved,
)
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from densemixer_adapters.deepspeed import mark_leaf_modules
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

KINDS = ("non-reentrant", "reentrant", "selective")
STEP = 1024.0  # of SGD: large, so that the weight before it hardly rounds the gradient away


def my_share() -> Tensor:
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def backward(model: nn.Module, micro_batches: int = 1, last: Callable[[bool], Any] = lambda last: None) -> None:
    """Gradients of this rank's share. ``last`` is told, or gives a context, whether a micro-batch is the last."""
    parts = my_share().chunk(micro_batches)
    for position, ids in enumerate(parts):
        with last(position == len(parts) - 1) or contextlib.nullcontext():
            (loss_of(model, ids) / len(parts)).backward()


def ddp(kind: str = "none", micro_batches: int = 1, **options: Any) -> Result:
    model = build()
    apply_densemixer(model)
    checkpoint(model, kind)
    wrapped = DistributedDataParallel(model, **options)
    backward(wrapped, micro_batches, lambda last: None if last else wrapped.no_sync())
    return compare(gradients_of(model))


def fsdp1(
    kind: str = "none",
    micro_batches: int = 1,
    wrap: tuple[str, ...] = ("DecoderLayer",),
    family: str = "qwen3_moe",
    **options: Any,
) -> Result:
    model = build(FAMILIES[family])
    apply_densemixer(model)
    checkpoint(model, kind)
    wrapped = wrap_fsdp1(model, wrap, **options)
    before = weights_under_fsdp1(wrapped)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=STEP)
    backward(wrapped, micro_batches, lambda last: None if last else wrapped.no_sync())
    optimizer.step()  # the only place where gradients of every setting have a name
    after = weights_under_fsdp1(wrapped)
    return compare({name: (before[name] - after[name]) / STEP for name in before}, family)


def wrap_fsdp1(model: nn.Module, wrap: tuple[str, ...], **options: Any) -> FullyShardedDataParallel:
    classes = {type(module) for module in model.modules() if type(module).__name__.endswith(wrap)}
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(classes), device_id=torch.device("cpu"), **options
    )


def weights_under_fsdp1(wrapped: FullyShardedDataParallel) -> Gradients:
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        named = wrapped.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named}


def fsdp2(
    kind: str = "none",
    micro_batches: int = 1,
    wrap: tuple[str, ...] = ("DecoderLayer",),
    attach_first: bool = True,
    family: str = "qwen3_moe",
    **options: Any,
) -> Result:
    model = build(FAMILIES[family])
    if attach_first:
        apply_densemixer(model)
    checkpoint(model, kind)
    wrap_fsdp2(model, wrap, **options)
    if not attach_first:
        apply_densemixer(model)
    backward(model, micro_batches, model.set_requires_gradient_sync)
    return compare(full(gradients_of(model)), family)


def wrap_fsdp2(model: Any, wrap: tuple[str, ...] = ("DecoderLayer",), **options: Any) -> None:
    for module in reversed([m for m in model.modules() if type(m).__name__.endswith(wrap)]):  # inner ones first
        fully_shard(module, **options)
    fully_shard(model, **options)


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
    """The HF Trainer with ZeRO-3 and plain SGD, for this rank's half of the batch in each step."""
    # Without a GPU, the Trainer's own accelerate would take each rank for the only one.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        deepspeed={**zero_config(3), "gradient_clipping": 0.0},
        per_device_train_batch_size=2,
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


def half_fsdp1() -> Result:
    model = build()
    apply_densemixer(model)
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped = wrap_fsdp1(model, ("DecoderLayer",), mixed_precision=precision, use_orig_params=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=STEP)
    before = weights_under_fsdp1(wrapped)
    with selections(FAMILY, model) as indices:
        backward(wrapped)
    optimizer.step()
    after = weights_under_fsdp1(wrapped)
    return half({name: (before[name] - after[name]) / STEP for name in before}, indices)


def half_fsdp2(kind: str = "none") -> Result:
    model = build()
    apply_densemixer(model)
    checkpoint(model, kind)
    wrap_fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    with selections(FAMILY, model) as indices:
        backward(model)
    return half(full(gradients_of(model)), indices[: len(model.model.layers)])


def half(gradients: Gradients, indices: list[Tensor]) -> Result:
    """Of weights that are bfloat16 in forward and backward."""
    indices = [everywhere(index) for index in indices]
    reference = FAMILY.oracle(build(), indices, "densemixer").bfloat16()
    loss_of(reference, batch()).backward()
    return judge_half(gradients, gradients_of(reference), indices, torch.bfloat16)


def everywhere(mine: Tensor) -> Tensor:
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts)


def load(family: str, **distributed: Any) -> Any:
    """With a plan of transformers' own."""
    from transformers.distributed import DistributedConfig

    own = {"distributed_config": DistributedConfig(**distributed)} if distributed else {"tp_plan": "auto"}
    return transformers.AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32, **own).train()


def own_fsdp() -> Result:
    model = load("qwen3_moe", fsdp_size=2)
    apply_densemixer(model)
    backward(model)
    return compare(full(gradients_of(model)))


def cells() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "DDP: plain", ddp
    yield "DDP: gradient accumulation", lambda: ddp(micro_batches=2)
    yield "DDP: static graph", lambda: ddp(static_graph=True)
    yield "DDP: find unused parameters", lambda: ddp(find_unused_parameters=True)
    for original in (True, False):
        way = f"FSDP1, use_orig_params={original}"
        one = functools.partial(fsdp1, use_orig_params=original)
        yield f"{way}: plain", one
        yield f"{way}: gradient accumulation", functools.partial(one, micro_batches=2)
        yield f"{way}: SHARD_GRAD_OP", functools.partial(one, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
        yield f"{way}: routers and experts wrapped", functools.partial(one, wrap=("DecoderLayer", "Router", "Experts"))
        yield f"{way}: gpt-oss", functools.partial(one, family="gpt_oss")
        for kind in KINDS:
            yield f"{way}: checkpointing {kind}", functools.partial(one, kind)
    for reshard in (True, False):
        way = f"FSDP2, reshard_after_forward={reshard}"
        two = functools.partial(fsdp2, reshard_after_forward=reshard)
        yield f"{way}: plain", two
        yield f"{way}: gradient accumulation", functools.partial(two, micro_batches=2)
        yield f"{way}: routers and experts wrapped", functools.partial(two, wrap=("DecoderLayer", "Router", "Experts"))
        yield f"{way}: attached after it", functools.partial(two, attach_first=False)
        yield f"{way}: CPU offload", functools.partial(two, offload_policy=CPUOffloadPolicy(pin_memory=False))
        yield f"{way}: gpt-oss", functools.partial(two, family="gpt_oss")
        for kind in KINDS:
            yield f"{way}: checkpointing {kind}", functools.partial(two, kind)
    for kind in KINDS:
        yield f"DDP: checkpointing {kind}", functools.partial(ddp, kind)
    yield "FSDP1, bfloat16: plain", half_fsdp1
    yield "FSDP2, bfloat16: plain", half_fsdp2
    yield "FSDP2, bfloat16: checkpointing non-reentrant", lambda: half_fsdp2("non-reentrant")
    if Version(transformers.__version__) >= Version("5.23"):
        yield "FSDP2 of transformers (fsdp_size): plain", own_fsdp
    else:  # the newer ones are cells of parallel.py
        yield (
            "refused: expert parallelism",
            lambda: refusal(lambda: apply_densemixer(load("gpt_oss", enable_expert_parallel=True))),
        )
        yield "refused: tensor parallelism", lambda: refusal(lambda: apply_densemixer(load("qwen3_moe")))
    for stage in (1, 2, 3):
        way, ds = f"ZeRO-{stage}", functools.partial(zero, stage)
        yield f"{way}: plain", functools.partial(ds, count_steps=stage == 3)
        yield f"{way}: gradient accumulation", functools.partial(ds, micro_batches=2)
        for kind in KINDS:
            yield f"{way}: checkpointing {kind}", functools.partial(ds, kind)
        if stage > 1:
            yield f"{way}: optimizer on the CPU", functools.partial(ds, offload_optimizer={"device": "cpu"})
    yield "ZeRO-3: parameters on the CPU", lambda: zero(3, offload_param={"device": "cpu"})
    yield "ZeRO-3: without leaf modules", lambda: zero(3, leaf=False, count_steps=True)
    yield "ZeRO-3: gpt-oss", lambda: zero(3, family="gpt_oss")
    yield "ZeRO-3: through accelerate", zero_with_accelerate
    yield "ZeRO-3: through the Trainer", zero_with_trainer


def main(report: Path, *names: str) -> None:
    deepspeed.init_distributed("gloo")
    run(chosen(cells(), names), report, write=dist.get_rank() == 0)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may outlive what they belong to


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
