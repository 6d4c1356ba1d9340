"""A rank's share of the batch, and how a model is wrapped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from device import DEVICE
from runs import loss_of
from setting import Gradients, batch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


def my_share() -> Tensor:
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def backward(model: nn.Module, micro_batches: int = 1, last: Callable[[bool], Any] = lambda last: None) -> None:
    """Gradients of this rank's share. ``last`` is told, or gives a context, whether a micro-batch is the last."""
    parts = my_share().chunk(micro_batches)
    for position, ids in enumerate(parts):
        with last(position == len(parts) - 1) or contextlib.nullcontext():
            (loss_of(model, ids) / len(parts)).backward()


def wrap_fsdp1(model: nn.Module, wrap: tuple[str, ...], **options: Any) -> FullyShardedDataParallel:
    classes = {type(module) for module in model.modules() if type(module).__name__.endswith(wrap)}
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy(classes), device_id=torch.device(DEVICE), **options
    )


def weights_under_fsdp1(wrapped: FullyShardedDataParallel) -> Gradients:
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        named = wrapped.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named}


def wrap_fsdp2(model: Any, wrap: tuple[str, ...] = ("DecoderLayer",), **options: Any) -> None:
    for module in reversed([m for m in model.modules() if type(m).__name__.endswith(wrap)]):  # inner ones first
        fully_shard(module, **options)
    fully_shard(model, **options)
