"""DDP, FSDP1 and FSDP2 on two ranks, also in half precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from running.shares import backward, weights_under_fsdp1, wrap_fsdp1, wrap_fsdp2
from runs import loss_of, selections
from setting import (
    FAMILIES,
    FAMILY,
    STEP,
    Gradients,
    Result,
    batch,
    build,
    checkpoint,
    compare,
    full,
    gradients_of,
    judge_half,
)
from torch import Tensor
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from densemixer_adapters.transformers import apply_densemixer


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
