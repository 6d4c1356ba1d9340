"""The stacked weights of a layer's experts, as the experts' forward sees them.

Three kinds: plain tensors; attributes under a parametrization of torch, which computes them on access (PEFT's LoRA on
`target_parameters`, for the time of the forward; 4-bit weights of bitsandbytes); and int8 tensors of torchao. The
latter two are computed again in the backward, so that no second copy of a layer's experts lives until then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from densemixer_core import Derivation, ExpertWeights

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_Step = Callable[[Tensor], Tensor]


def why_unreadable(experts: nn.Module, names: Sequence[str | None]) -> str | None:
    """Why the numbers in these weights aren't the weights, or None if they are.

    Args:
        experts: The module that holds the stacked weights.
        names: Its attributes, in the order of `ExpertWeights`; None for one that it doesn't have.
    """
    for name in filter(None, names):
        weight = getattr(experts, name)
        if weight.dtype not in FLOATS:
            return f"`{name}` is quantised to {str(weight.dtype).removeprefix('torch.')}"
        if hasattr(experts, f"{name}_scale_inv"):  # FP8 of transformers 5.5, before the weights are loaded
            return f"`{name}` is quantised, with scales beside it"
        if _is_torchao(weight) and (type(weight).__name__ != "Int8Tensor" or weight.act_quant_kwargs is not None):
            return f"`{name}` is quantised by torchao ({type(weight).__name__}) other than to int8, weights only"
    return None


def read_weights(experts: nn.Module, names: Sequence[str | None]) -> tuple[ExpertWeights, Derivation | None]:
    """The weights, and how to compute them again where they aren't plain tensors. Call it during the forward.

    Args:
        experts: The module that holds the stacked weights.
        names: Its attributes, in the order of `ExpertWeights`; None for one that it doesn't have.
    """
    weights: list[Any] = [None if name is None else getattr(experts, name) for name in names]
    sources, steps = zip(*(_source(experts, name) for name in names), strict=True)
    if not any(steps):
        return ExpertWeights(*weights), None
    return ExpertWeights(*weights), Derivation(ExpertWeights(*sources), functools.partial(_compute, steps))


def adapter_apart(outer: nn.Module, experts: nn.Module) -> str | None:
    """The weight whose LoRA the running forward leaves to a kernel, so that it can't be read; None if there is none.

    PEFT's wrappers put their adapter into the weight for the time of the forward. Some kernels have them leave that.

    Args:
        outer: The module with stacked weights in its wrappers.
        experts: The module with the stacked weights.
    """
    for module in outer.modules():
        wrapper: Any = module
        name = getattr(wrapper, "parameter_name", None)
        if name is None or not hasattr(wrapper, "lora_A") or wrapper.disable_adapters or wrapper.merged:
            continue
        active = any(adapter in wrapper.lora_A for adapter in wrapper.active_adapters)
        if active and not is_parametrized(experts, name):
            return str(name)
    return None


def _source(experts: Any, name: str | None) -> tuple[Any, tuple[_Step, ...]]:
    if name is None:
        return None, ()
    if is_parametrized(experts, name) and hasattr(experts.parametrizations[name], "original"):
        # PEFT removes its parametrization after the forward; the list is copied, its modules live on.
        return experts.parametrizations[name].original, tuple(experts.parametrizations[name])
    weight = getattr(experts, name)
    return weight, (methodcaller("dequantize"),) if _is_torchao(weight) else ()


def _compute(steps: Sequence[Sequence[_Step]], sources: ExpertWeights) -> ExpertWeights:
    weights: list[Any] = list(sources)
    for position, chain in enumerate(steps):
        for step in chain:
            weights[position] = step(weights[position])
    return ExpertWeights(*weights)


def _is_torchao(weight: Tensor) -> bool:
    # The plain kinds first: torch.compile can't trace the name of a class's module.
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return type(weight).__module__.partition(".")[0] == "torchao"
