"""The experts of Automodel's own Mixture-of-Experts layer: their weights, how they lie on ranks, what they compute."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.expert_parallel import Spread
from densemixer_adapters.transformers.parallel import local_weights, spread_of
from densemixer_core import Activation, ExpertLayout, ExpertWeights, StackedExperts

WEIGHTS = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")
"""The parameters, [experts, in, out] and [experts, out]; those of an expert-parallel rank are DTensors over a mesh of
one dimension. The biases are None in most models."""


def activation(config: Any) -> Activation | None:
    """What an expert's up projection goes through, from Automodel's ``MoEConfig``; None if that is unknown.

    Automodel multiplies its result by the routing weight, or the output: the same, since the rest is linear.
    """
    kind = config.expert_activation
    alpha, limit = getattr(config, "activation_alpha", 1.702), getattr(config, "activation_limit", 7.0)
    if kind == "swiglu":
        return Activation("silu", "concatenated", limit=getattr(config, "swiglu_limit", 0.0) or float("inf"))
    if kind == "geglu":
        return Activation("gelu_tanh", "concatenated")
    if kind == "relu2":
        return Activation("relu2")
    if kind == "swigluoai":  # where a limit of 0 is none
        return Activation("silu", "concatenated", alpha=alpha, limit=limit or float("inf"), offset=1.0)
    if kind == "quick_geglu":
        return Activation("silu", "interleaved", alpha=alpha, limit=limit, offset=1.0)
    return None


def read_experts(name: str, experts: Any, formula: Activation) -> tuple[StackedExperts, Spread | None]:
    """The experts of this rank, sharing the memory of their weights, and how all of them lie on ranks.

    To be called while FSDP has the weights together: in the layer's forward, and in its backward.

    Args:
        name: The layer's, for errors.
        experts: The module with the weights.
        formula: What `activation` says.

    Raises:
        UnsupportedModelError: The weights are in parts that are no whole experts.
    """
    weights = ExpertWeights(*(getattr(experts, weight) for weight in WEIGHTS))
    up = weights.up
    spread = None
    if isinstance(up, DTensor):
        spread = spread_of(up, 1)
        if spread is None or up.device_mesh.ndim > 1 or not up.placements[0].is_shard(0):
            raise UnsupportedModelError(
                f"{name}: the weights of its experts are spread over ranks as {up.placements} on {up.device_mesh}, "
                "which is not how Automodel's FSDP2 and expert parallelism have them while a layer runs. Use these, or "
                "switch DenseMixer off."
            )
    layout = ExpertLayout(formula, transposed=True, formula=formula)
    return StackedExperts(local_weights(weights), layout), spread
