"""torchtitan's own training program where there is no GPU: `torchrun … without_gpu.py`, with its command line.

torchtitan takes a machine without an accelerator for one with CUDA. Importing this before anything else of torchtitan
puts stand-ins in the place of what exists for GPUs alone, a function each, which say what they stand for. All else is
torchtitan's own. The matrix products of experts are made in bfloat16, as on a GPU, unless `float32_experts` is called.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torchtitan.tools.utils as tools
from torch import Tensor


class Device(types.ModuleType):
    """What torchtitan asks ``torch.cuda`` for: to show memory, to set a device, to wait for it."""

    def __init__(self) -> None:
        super().__init__("cpu_device")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        properties = types.SimpleNamespace(total_memory=1 << 34, name="cpu")
        answers = {
            "device_count": 64,
            "current_device": 0,
            "get_device_name": "cpu",
            "get_device_properties": properties,
            "memory_stats": {},
        }
        return lambda *args, **kwargs: answers.get(name)


tools.device_type, tools.device_module = "cpu", Device()

import torchtitan.distributed.fsdp as fsdp  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, create_mask  # noqa: E402
from torchtitan.models.common import attention  # noqa: E402


def _attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool, **_: Any) -> Any:
    """For flex attention, which has no backward on the CPU: the same mask, dense."""
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return out, types.SimpleNamespace(lse=q.new_zeros(q.shape[:3]), max_scores=None)


attention.FlexAttention._compiled_flex_attn = staticmethod(_attend)
attention._compiled_create_block_mask = create_block_mask  # compiling it takes a CPU longer than training the model

_disable_division = fsdp.disable_fsdp_gradient_division


def _sum_on_gloo(model: torch.nn.Module) -> None:
    """For sums with a factor of 1 (PREMUL_SUM), which gloo doesn't have: plain sums."""
    _disable_division(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


fsdp.disable_fsdp_gradient_division = _sum_on_gloo


if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13, GPU or not: torchtitan 0.3 asks for it after a step
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]


def float32_experts() -> None:
    """Have experts multiply in the dtype that they are given, so that runs can be compared closely. For tests."""
    torch.Tensor.bfloat16 = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    from torchtitan.train import main

    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
