"""What DenseMixer doesn't work with in Automodel's own Mixture-of-Experts layers: why, and what to do instead."""

from __future__ import annotations

from typing import Any

from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from densemixer_adapters.automodel.experts import activation
from densemixer_adapters.automodel.layer import SCORES
from densemixer_adapters.errors import UnsupportedModelError

MENDED = "0.6.0"
"""Of Automodel: from here on, the gathered weights of its own expert parallelism carry a gradient."""


def refuse_model(model: nn.Module) -> None:
    """Raise if DenseMixer can't train a model because of the way it is spread over ranks.

    Raises:
        UnsupportedModelError: The message names the reason and the fix.
    """
    reason = fix = ""
    for module in model.modules():
        if type(module).__name__ == "MegatronFSDP":
            reason = "Megatron-FSDP takes the experts' weights away between the forward and the backward"
            fix = "set distributed.strategy to fsdp2"
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) and mesh["tp"].size() > 1:
            reason = "tensor parallelism beside Automodel's own layers has not been run: ranks share their tokens there"
            fix = "set tp_size to 1"
    if reason:
        raise UnsupportedModelError(
            f"DenseMixer can't train this {type(model).__name__}: {reason}. Either {fix}, or switch DenseMixer off."
        )


def refuse_block(name: str, block: Any) -> None:
    """Raise if DenseMixer doesn't know how a layer routes, or how its experts compute.

    Args:
        name: The layer's, in the model.
        block: A ``MoE`` of Automodel.

    Raises:
        UnsupportedModelError: The message names the layer, the reason and the fix.
    """
    refusal = _why_not_gate(block.gate) or _why_not_experts(block.experts)
    if refusal:
        reason, fix = refusal
        raise UnsupportedModelError(
            f"{name or 'the model'} ({_kind(block).__name__}): DenseMixer can't train it: {reason}. Either {fix}, or "
            "switch DenseMixer off."
        )


def _why_not_gate(gate: Any) -> tuple[str, str] | None:
    from nemo_automodel.components.moe.layers import Gate

    leave_out = "leave the layer out with the option `layers`"
    kind = _kind(gate)
    if not isinstance(gate, Gate):
        if kind.__name__ == "FakeBalancedGate":
            return "its FakeBalancedGate learns nothing", "set model.backend.fake_balanced_gate to false"
        return f"its gate is a {kind.__name__}, which routes in a way of its own", leave_out
    if any(getattr(kind, own, None) is not getattr(Gate, own, None) for own in ("forward", "_route_scores")):
        return f"its {kind.__name__} overrides how Automodel's Gate routes", leave_out
    if getattr(gate, "router_weight_uses_score_correction_bias", False):
        return (
            "router_weight_uses_score_correction_bias adds a bias to the weights, which then aren't in proportion to "
            "the scores",
            "set it to false",
        )
    if gate.score_func not in SCORES:
        return f"its score_func {gate.score_func} is unknown", f"use one of {', '.join(SCORES)}"
    return None


def _why_not_experts(experts: Any) -> tuple[str, str] | None:
    from nemo_automodel.components.moe.experts import GroupedExperts, GroupedExpertsDeepEP

    kind = _kind(experts)
    if kind.__name__ == "GroupedExpertsMoK":
        return (
            "the dispatcher mok computes routed and shared experts in one kernel, so that y of the routed ones alone "
            "is nowhere",
            "choose another model.backend.dispatcher",
        )
    if kind.__name__.endswith("LoRA"):
        return (
            "LoRA on its experts: the weights that they compute with are never put together",
            "leave the experts out of peft.target_modules",
        )
    if kind not in (GroupedExperts, GroupedExpertsDeepEP):
        return (
            f"its experts are {kind.__name__}, whose weights are elsewhere than those of GroupedExperts",
            "set model.backend.experts to torch_mm",
        )
    if getattr(experts, "use_mxfp8", False):
        return (
            "torch_mm_mxfp8 has the experts compute with quantised weights, which DenseMixer doesn't read",
            "set model.backend.experts to torch_mm",
        )
    if activation(experts.config) is None:
        return f"its expert_activation {experts.config.expert_activation} is unknown", "use another one"
    if kind is GroupedExperts and isinstance(experts.gate_and_up_projs, DTensor) and _is_without_gradient():
        return (
            "expert parallelism with the dispatcher torch gives the router no gradient at all in this version of "
            f"Automodel, with DenseMixer or without, since it gathers the weights outside of autograd; {MENDED} mends "
            "that",
            "upgrade Automodel, or use no expert parallelism (ep_size 1)",
        )
    return None


def _kind(module: nn.Module) -> type:
    """A module's class. FSDP2 puts one of its own before it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def _is_without_gradient() -> bool:
    import nemo_automodel

    return Version(nemo_automodel.__version__) < Version(MENDED)
