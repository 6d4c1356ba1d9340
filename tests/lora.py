"""PEFT models of the families, and the dense oracle for them."""

from __future__ import annotations

import copy
import types
from typing import Any

import peft
import torch
from families import Family
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

VARIANTS: dict[str, dict[str, bool]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
STACKED = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def lora_config(family: Family, on: str, router: str, variant: str = "lora") -> LoraConfig:
    """Adapters that aren't zero, on ``on``: ``attention``, ``experts``, or ``experts in full``: attention, and a copy
    of the experts that trains.

    ``router`` is the option of PEFT that makes it trainable: ``modules_to_save`` or ``target_parameters``.
    """
    modules = [f"mlp.{family.router}"] if router == "modules_to_save" else []
    parameters = [f"mlp.{family.router}.weight"] if router == "target_parameters" else []
    if on == "experts":
        parameters += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if on == "experts in full":
        modules.append("mlp.experts")
    return LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=False,
        target_modules=None if on == "experts" else ["o_proj"],
        target_parameters=parameters or None,
        modules_to_save=modules or None,
        **VARIANTS[variant],
    )


def wrapped(family: Family, model: nn.Module, on: str, router: str, variant: str = "lora") -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(family, on, router, variant))


def truth_of(family: Family, model: nn.Module, indices: list[Tensor], estimator: str) -> nn.Module:
    """A copy of the PEFT model in float64 whose MoE layers are the oracle's, with the effective weights written out."""
    truth = copy.deepcopy(model).double()
    for module in truth.modules():
        module._forward_hooks.clear()  # DenseMixer may be attached
    for block, index in zip(family.blocks(truth), indices, strict=True):
        formula = family.oracle_forward(index, estimator)

        def forward(block: Any, x: Tensor, formula: Any = formula) -> Any:
            return formula(effective_block(family, block), x)

        block.forward = types.MethodType(forward, block)
    return truth


def one_adapter_only() -> bool:
    """PEFT has learned to have several adapters with `target_parameters` since."""
    return Version(peft.__version__) < Version("0.21")


def effective_block(family: Family, block: Any) -> Any:
    """Something with the block's children, where router and experts have the weights that adapters make of them."""
    children = dict(block.named_children())
    children["experts"] = effective(block.experts)
    children[family.router] = effective(getattr(block, family.router))
    return types.SimpleNamespace(**children)


def effective(module: Any) -> Any:
    """The weights of a router or of experts as differentiable functions of what PEFT trains."""
    deltas: dict[str, Any] = {}
    while isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
        active = [] if module.disable_adapters else module.active_adapters
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[active[0]] if active else module.original_module
            continue
        for adapter in active:
            deltas[module.parameter_name] = deltas.get(module.parameter_name, 0) + module.get_delta_weight(adapter)
        module = module.base_layer
    names = [name for name in ("weight", "bias", *STACKED) if isinstance(getattr(module, name, None), Tensor)]
    weights = {name: _float64(getattr(module, name)) + deltas.get(name, 0) for name in names}
    return types.SimpleNamespace(num_experts=getattr(module, "num_experts", None), **weights)


def _float64(weight: Any) -> Tensor:
    return (weight.dequantize() if type(weight).__name__ == "Int8Tensor" else weight).double()


def router_gradients(family: Family, found: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = {name: value for name, value in found.items() if f".mlp.{family.router}." in name}
    assert gradients
    return gradients
