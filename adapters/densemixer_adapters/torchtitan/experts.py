"""Where the weights of a layer's experts are, and how the layer computes with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from densemixer_core import Activation, ExpertLayout, ExpertWeights, StackedExperts

COMPUTES_IN = torch.bfloat16
"""The dtype of torchtitan's matrix products of experts, whatever that of their weights is."""

_SWIGLU = Activation("silu", "concatenated")


def read_experts(experts: Any) -> StackedExperts:
    """This rank's experts, or its part of all of them, as they are now. Nothing is copied, and no graph is made.

    Args:
        experts: A ``GroupedExperts`` of torchtitan, or a ``GptOssGroupedExperts``.
    """
    if hasattr(experts, "w1_EFD"):
        weights = ExpertWeights(_local(experts.w3_EFD), _local(experts.w2_EDF), gate=_local(experts.w1_EFD))
        return StackedExperts(weights, ExpertLayout(_SWIGLU, formula=_SWIGLU))
    up_bias, down_bias = _local(experts.mlp1_bias_EG), _local(experts.mlp2_bias_ED)
    # Each rank of tensor parallelism adds its share of the down projection's bias.
    down_bias = down_bias / _tensor_parallel(experts.mlp1_weight_EGD)
    weights = ExpertWeights(_local(experts.mlp1_weight_EGD), _local(experts.mlp2_weight_EDF), up_bias, down_bias)
    gpt_oss = Activation("silu", "interleaved", alpha=1.702, limit=experts.swiglu_limit, offset=1.0)
    return StackedExperts(weights, ExpertLayout(gpt_oss, formula=gpt_oss))


def _local(parameter: Tensor) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def _tensor_parallel(parameter: Tensor) -> int:
    """How many ranks have a part of each expert's width."""
    mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
    names = (mesh and mesh.mesh_dim_names) or ()
    return mesh.size(names.index("tp")) if mesh is not None and "tp" in names else 1
