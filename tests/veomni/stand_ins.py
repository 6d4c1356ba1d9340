"""Test support: what VeOmni 0.1.12 needs on a machine without a GPU.

Stand-ins in plain torch for what runs on GPUs alone: the two Triton modules below its fused experts, and the Quack
kernel of gpt-oss's. All above them is VeOmni's own: how experts are dispatched, its autograd functions, its
all-to-alls, and how it spreads and shards a model.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

KERNELS = "veomni.ops.kernels.moe._kernels.kernel"
FUSED = "fused_plain"
"""The name of the fused experts' implementation that the stand-ins make."""


def group_gemm_same_nk(a: Tensor, b: Tensor, cumsum_M: Tensor, transpose_b: bool, **rest: Any) -> Tensor:  # noqa: N803
    """The rows of group i times b[i], or its transpose."""
    return torch.cat([a[rows] @ (b[i].t() if transpose_b else b[i]) for i, rows in enumerate(groups(cumsum_M))])


def group_gemm_same_mn(a: Tensor, b: Tensor, c: Tensor, cumsum_K: Tensor, **rest: Any) -> Tensor:  # noqa: N803
    """c[i] = a_iᵀ b_i over the rows of group i."""
    for i, rows in enumerate(groups(cumsum_K)):
        c[i] = a[rows].t() @ b[rows]
    return c


def groups(ends: Tensor) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise([0, *ends.tolist()])]


def gpt_oss_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What Quack's kernel computes: gpt-oss's experts, of all ranks, by VeOmni's own exchange of tokens."""
    from veomni.distributed.moe import dispatch_to_ep_class

    return dispatch_to_ep_class(
        GptOssGroups,
        experts.num_experts,
        weights,
        index,
        hidden,
        experts.gate_up_proj,
        experts.gate_up_proj_bias,
        experts.down_proj,
        experts.down_proj_bias,
        experts._apply_gate,
    )


class GptOssGroups:
    """Instead of an autograd function: autograd."""

    @staticmethod
    def apply(x: Tensor, ends: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, gate: Any) -> Any:
        parts = [gate(x[rows] @ up[i] + up_bias[i]) @ down[i] + down_bias[i] for i, rows in enumerate(groups(ends))]
        return torch.cat(parts)


def install() -> None:
    """Call it before VeOmni is imported."""
    gemm, moe = (types.ModuleType(f"{KERNELS}.{name}") for name in ("group_gemm", "moe"))
    gemm.group_gemm_same_nk, gemm.group_gemm_same_mn = group_gemm_same_nk, group_gemm_same_mn  # type: ignore[attr-defined]
    moe.expert_histogram = moe.moe_gather = moe.moe_scatter = None  # type: ignore[attr-defined]  # without ranks alone
    sys.modules |= {gemm.__name__: gemm, moe.__name__: moe}

    import veomni.ops
    import veomni.ops.kernels.moe as fused
    from veomni.ops.kernel_registry import KERNEL_REGISTRY, HardwareRequirement, KernelSpec

    name, anywhere = FUSED.removeprefix("fused_"), HardwareRequirement("any")
    KERNEL_REGISTRY.register(KernelSpec(name, "moe_experts", "standard", fused._triton_kernel_factory, anywhere))
    KERNEL_REGISTRY.register(KernelSpec(name, "moe_experts", "gpt_oss", lambda: gpt_oss_experts, anywhere))
    fused.apply_veomni_fused_moe_patch = lambda fused_moe_kernel: None
    veomni.ops.fused_moe_forward = fused.fused_moe_forward = fused_moe_forward
    gather_flat_on_gloo()
    divide_apart_on_gloo()


def fused_moe_forward(*args: Any, **kwargs: Any) -> Tensor:
    """What some models call instead of the registry's kernel, without VeOmni's demand of a half precision."""
    from veomni.ops.kernels.moe.group_gemm import group_gemm_fused_moe_forward

    result: Tensor = group_gemm_fused_moe_forward(*args, **kwargs)
    return result


def gather_flat_on_gloo() -> None:
    """gloo wants the output of this collective flat, NCCL doesn't care."""
    gather = dist.all_gather_into_tensor

    def all_gather_into_tensor(output: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output.view(-1, *own.shape[1:]), own, *args, **kwargs)

    dist.all_gather_into_tensor = all_gather_into_tensor


def divide_apart_on_gloo() -> None:
    """gloo can't divide while it sums, as FSDP2 asks it to where VeOmni sets a factor: divide before and sum."""
    divide = FSDPModule.set_gradient_divide_factor

    def set_gradient_divide_factor(self: Any, factor: float) -> None:
        from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state

        divide(self, factor)
        (group,) = _get_module_fsdp_state(self)._fsdp_param_groups  # type: ignore[union-attr]
        if group.mesh_info.mesh.size() > 1:  # on one rank it would be divided twice
            self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = set_gradient_divide_factor  # type: ignore[method-assign]


def operations(experts: str = "eager") -> Any:
    """VeOmni's choice of kernels: those in plain torch, and these experts."""
    from veomni.arguments import OpsImplementationConfig

    names = [field.name for field in dataclasses.fields(OpsImplementationConfig)]
    eager = {name: "eager" for name in names if name.endswith("_implementation")}
    chosen = {"attn_implementation": "eager", "qat_implementation": "none", "moe_implementation": experts}
    return OpsImplementationConfig(**{**eager, **chosen})
