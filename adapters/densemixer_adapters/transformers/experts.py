"""The experts of transformers 5: the module inside its wrappers, where its weights are and how to compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from densemixer_core import Activation, ExpertLayout, recognise

_CHECKPOINTED = "_checkpoint_wrapped_module"  # of torch's `CheckpointWrapper`


_DEFAULTS = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
"""What transformers' `use_experts_implementation` says of the experts that it decorates, if it isn't told otherwise."""

WITHOUT_DECORATOR: dict[str, dict[str, bool]] = {
    "LongcatFlashExperts": {},
    "Step3p7Experts": {},
    "LigerExperts": {},  # which Liger puts in the place of a model's if it is applied before the model is made
    # VeOmni takes the decorator off, so that its own kernels compute them.
    "DeepseekV3NaiveMoe": {},
    "DeepseekV4Experts": {},
    "GptOssExperts": {"has_bias": True, "is_transposed": True},
    "Qwen3MoeExperts": {},
    "Qwen3OmniMoeThinkerTextExperts": {},
    "Qwen3VLMoeTextExperts": {},
    "Qwen3_5MoeExperts": {},
}
"""Classes of experts that aren't decorated by it, and what it would say of them where that isn't the default.

What a layer returns is compared with what its weights give if they are laid out so, see `checks`.
"""


class ExpertsInput(NamedTuple):
    """What experts were called with.

    Attributes:
        x: Their input, [..., hidden].
        selected: The selected experts, [tokens, k].
        weights: Their weights, [tokens, k].
    """

    x: Tensor
    selected: Tensor
    weights: Tensor

    def with_experts_of_none(self, zeros: int, scores: Tensor) -> ExpertsInput:
        """Where a token chose an expert that returns zero, the host has put another one there, with weight 0.

        Args:
            zeros: How many of the last experts are such.
            scores: Of all experts, [tokens, experts].
        """
        if not zeros:
            return self
        none = self.weights == 0
        selected = self.selected.masked_fill(none, scores.shape[-1] - zeros)
        weights = torch.where(none, scores.detach().gather(-1, selected).to(self.weights.dtype), self.weights)
        return ExpertsInput(self.x, selected, weights)


def unwrap(module: nn.Module) -> nn.Module:
    """The host's own module inside the wrappers of PEFT, of activation checkpointing and of torch.compile."""
    inner = next((found for name in _WRAPPED if isinstance(found := getattr(module, name, None), nn.Module)), None)
    return module if inner is None else unwrap(inner)


_WRAPPED = ("base_layer", "original_module", _CHECKPOINTED, "_orig_mod")


def is_stacked(module: nn.Module) -> bool:
    """Whether a module is of a class of experts that holds stacked weights, as all of transformers 5 are."""
    # Not by `getattr`: wrappers lend out the attributes of what they wrap.
    if hasattr(type(module), "has_gate") or "has_gate" in vars(module):
        return True
    return _declared(module) is not None


def stacked_within(experts: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """The modules with stacked weights inside all wrappers, and the outermost activation checkpoint around them."""
    if is_stacked(experts):
        return [experts], None
    inner = [module for module in experts.modules() if is_stacked(module)]
    checkpoints = (module for module in experts.modules() if _CHECKPOINTED in module._modules)
    return inner, next((found for found in checkpoints if any(map(is_stacked, found.modules()))), None)


def weight_names(experts: Any) -> tuple[str | None, ...]:
    """The attributes that hold the stacked weights, in the order of `ExpertWeights`."""
    up = "gate_up_proj" if _says(experts, "has_gate") else "up_proj"
    biases = (f"{up}_bias", "down_proj_bias") if _says(experts, "has_bias") else (None, None)
    return up, "down_proj", *biases


def layout_of(experts: Any) -> ExpertLayout:
    """How to compute with the weights."""
    activation = getattr(experts, "_apply_gate", None) if _says(experts, "has_gate") else experts.act_fn
    return ExpertLayout(
        activation=activation or _gate_by(getattr(experts, "act_fn", F.silu)),  # Liger's experts know no other
        transposed=_says(experts, "is_transposed"),
        post_norm=experts.post_expert_norm if _says(experts, "has_post_expert_norm") else None,
    )


class KnownFormula:
    """What the activation of some experts computes, for the fused kernel. Experts may get another activation.

    Attributes:
        found: That; None if it is unknown.
    """

    def __init__(self, experts: Any) -> None:
        self._activation, self.found = _activation_of(experts), _formula_of(experts)

    def of(self, experts: Any, afresh: bool) -> Activation | None:
        """Of the activation that they have now. Compiled code can't look for it: it does without.

        Args:
            experts: The experts.
            afresh: Whether a known formula is compared with it again, for what changes within an activation.
        """
        activation = _activation_of(experts)
        changed = activation != self._activation
        if torch.compiler.is_compiling():
            return None if changed else self.found
        if changed or (afresh and self.found is not None):
            with torch.no_grad(), _disable_current_modes():
                self._activation, self.found = activation, _formula_of(experts)
        return self.found


def _activation_of(experts: Any) -> tuple[Any, ...]:
    """What a formula follows from, without what would keep the experts alive: a bound method is made at each access."""
    gate = getattr(experts, "_apply_gate", None)
    return getattr(gate, "__func__", gate), getattr(experts, "act_fn", None), *_parameters(experts)


def activation_modules(experts: Any) -> list[nn.Module]:
    """What their activation is made of, where that is a module."""
    activation = getattr(experts, "act_fn", None)
    return list(activation.modules()) if isinstance(activation, nn.Module) else []


def activation_constants(modules: Iterable[nn.Module]) -> Iterator[float | str]:
    """What parts of an activation may compute with, besides parameters."""
    return (value for module in modules for value in vars(module).values() if type(value) in (float, str))


def _formula_of(experts: Any) -> Activation | None:
    return recognise(layout_of(experts).activation, _says(experts, "has_gate"), *_parameters(experts))


def _parameters(experts: Any) -> tuple[Any, Any]:
    """Slope and limit of an activation, which have two names in transformers."""
    alpha, limit = (getattr(experts, f"swiglu_{name}", getattr(experts, name, None)) for name in ("alpha", "limit"))
    return alpha, limit


def _says(experts: Any, trait: str) -> bool:
    """What transformers' decorator says of these experts, or what is declared of them in its place."""
    found = getattr(experts, trait, None)
    return {**_DEFAULTS, **(_declared(experts) or {})}[trait] if found is None else bool(found)


def _declared(experts: nn.Module) -> dict[str, bool] | None:
    names = (kind.__name__ for kind in type(experts).__mro__)
    return next((WITHOUT_DECORATOR[name] for name in names if name in WITHOUT_DECORATOR), None)


def rows(tensor: Tensor) -> Tensor:
    """[..., n] as [rows, n]."""
    return tensor.reshape(-1, tensor.shape[-1])


def _gate_by(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gate_up(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return activation(gate) * up

    return gate_up
