"""One Mixture-of-Experts layer of transformers 5, and the forward hooks that train its router through all experts."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from densemixer_adapters.host_experts import formula_of, layout_of, unwrap, unwrapped, weight_names
from densemixer_adapters.routers import Router
from densemixer_adapters.weights import read_weights
from densemixer_core import (
    DenseMixerConfig,
    RoutingMismatchError,
    StackedExperts,
    check_routing,
    router_scores,
    straight_through,
)
from densemixer_core.routing import are_probabilities

if TYPE_CHECKING:
    from densemixer_adapters.transformers import DenseMixerHandle


class UnsupportedModelError(ValueError):
    """DenseMixer can't be attached to this model. The message names the module, the reason and the fix."""


class DenseMixerLayer:
    """One Mixture-of-Experts layer and the hooks on it.

    Attributes:
        name: The block's name in the model, e.g. ``model.layers.0.mlp``.
        block: The module that owns router and experts.
        router_name: The router's name in the model, e.g. ``model.layers.0.mlp.gate``.
        experts: The module with the stacked weights.
        renormalised: Whether the selected experts' scores are divided by their sum.
        formula: What the experts' activation computes, for the fused kernel; None if that is unknown.
        config: The options.
        observe: None, or a function of the scores, [tokens, experts], and the experts' input, [..., hidden]. What it
            returns takes the place of the scores for DenseMixer alone, so the gradient that comes back there is the one
            that DenseMixer adds.
        watch: None, or a function that is called in each training forward, whatever the estimator, with the router's
            input and output, the selected experts and the experts' output. What it returns takes that output's place.
        probe: None, or a function of the router's output and the selected experts, called in forwards without
            gradients.
    """

    def __init__(
        self, name: str, block: nn.Module, router_name: str, experts: nn.Module, spec: Router, config: DenseMixerConfig
    ) -> None:
        self.name = name
        self.block = block
        self.router_name = f"{name}.{router_name}" if name else router_name
        self.experts = experts
        self.observe: Callable[[Tensor, Tensor], Tensor] | None = None
        self.watch: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
        self.probe: Callable[[Tensor, Tensor], None] | None = None
        self._router = spec
        self.renormalised = spec.is_renormalised([unwrap(self.router), block])
        self.formula = formula_of(experts)
        self.config = config
        self._arguments = list(inspect.signature(type(experts).forward).parameters)[1:4]
        self._hooks: list[RemovableHandle] = []
        self._handle: DenseMixerHandle | None = None  # while attached
        self._router_output: Tensor | None = None
        self._router_input: Tensor | None = None  # where somebody watches
        self._experts_ran = False
        self._gives_probabilities: bool | None = None  # unknown until the first training forward

    @property
    def router(self) -> nn.Module:
        """The router, as the block calls it now: PEFT may have wrapped it since."""
        router: nn.Module = getattr(self.block, self.router_name.rpartition(".")[2])
        return router

    def give_way(self) -> bool:
        """Remove the whole handle that this layer belongs to, if it may be."""
        if self._handle is not None and self._handle.gives_way:
            self._handle.remove()
            return True
        return False

    @property
    def matrices(self) -> list[tuple[int, ...]]:
        """The shapes of the experts' two stacked weights, also while ZeRO-3 has partitioned them."""
        weights = [getattr(self.experts, name) for name in weight_names(self.experts)[:2] if name]
        return [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights]

    @property
    def extra_operations(self) -> float:
        """Floating-point operations a token, in the backward: the up projection of x and the down projection of g."""
        return self.config.budget * sum(2 * math.prod(shape) for shape in self.matrices)

    @property
    def router_is_linear(self) -> bool:
        """Whether the router's logits are its weight times its input, plus a bias at most."""
        return self._router.linear and isinstance(getattr(unwrap(self.router), "weight", None), Tensor)

    @property
    def gives_probabilities(self) -> bool:
        """Whether the router's output has been through a softmax already, from the first training forward on."""
        return bool(self._gives_probabilities)

    @property
    def score(self) -> str:
        """The function that makes scores of the router's logits, see `densemixer_core.routing`."""
        return self._router.score

    @property
    def router_is_frozen(self) -> bool:
        # FSDP1 may have taken the parameters away; then only the graph knows.
        parameters = list(self.router.parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    def attach(self, handle: DenseMixerHandle) -> None:
        self._handle = handle
        # On the host's own modules, inside of PEFT's wrappers: these come and go (merge_and_unload).
        for router in unwrapped(self.router):
            self._hooks.append(router.register_forward_hook(self._after_router))
        for experts in unwrapped(self.block.get_submodule("experts")):
            # First of the hooks: those of ZeRO-3, which may be there already, bring the weights back for what lies
            # below them in the graph, and those of bitsandbytes drop the dequantised weights.
            self._hooks.append(experts.register_forward_hook(self._after_experts, prepend=True, with_kwargs=True))
        self._hooks.append(self.block.register_forward_hook(self._after_block))

    def remove(self) -> None:
        # Copies that others made of the hooked modules (of the whole model, say) share this object; this stops them.
        self._handle = None
        self._router_output = self._router_input = None
        self.observe = self.watch = self.probe = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        # PEFT's `modules_to_save` has copied a module with its hooks.
        for module in self.block.modules():
            for key, function in list(module._forward_hooks.items()):
                if getattr(function, "__self__", None) is self:
                    del module._forward_hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseMixerLayer:
        # The hooks of a copied router must report to the layer whose experts run; a copied layer would bring along a
        # copy of all experts.
        return self

    def _after_router(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._handle and (torch.is_grad_enabled() or self.probe is not None):
            self._router_output = output[0] if isinstance(output, tuple) else output
            self._router_input = args[0] if args and self.watch is not None else None

    def _after_experts(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if self._handle is None or not (torch.is_grad_enabled() or self.probe is not None):
            return None
        router_output, self._router_output = self._router_output, None
        router_input, self._router_input = self._router_input, None
        x, index, weights = (args + tuple(kwargs[name] for name in self._arguments[len(args) :]))[:3]
        if not torch.is_grad_enabled():
            if self.probe is not None and router_output is not None:
                self.probe(router_output.reshape(-1, router_output.shape[-1]), index)
            return None
        self._experts_ran = True
        if self.config.metrics and self.watch is None:
            self._handle.warn_of_unread_metrics()
        conventional = self.config.estimator == "conventional"
        if conventional and self.watch is None:
            return None
        if router_output is None:
            raise UnsupportedModelError(
                f"{self.name}: the experts ran without their router `{self.router_name}` having been called as a module"
                ", so DenseMixer can't see the scores. Something replaced the block's forward; remove that, or switch "
                "DenseMixer off."
            )
        if not output.requires_grad:
            return None
        if not router_output.requires_grad or self.router_is_frozen:
            self._handle.warn_of_frozen_routers()
            return None
        raw, router_output = router_output, router_output.reshape(-1, router_output.shape[-1])
        stacked = None if conventional else self._stacked(experts, router_output.shape[-1])
        first = self._gives_probabilities is None
        if first:
            self._gives_probabilities = self._router.score == "softmax" and are_probabilities(router_output)
        if self.watch is not None and router_input is not None:
            output = self.watch(router_input, raw, index, output)
        if stacked is None:
            return output
        scores = router_output if self._gives_probabilities else router_scores(router_output, self._router.score)
        if stacked.layout.zeros:
            # Where a token chose the expert that returns zero, the host has put another one there, with weight 0.
            none = weights == 0
            index = index.masked_fill(none, stacked.weights.down.shape[0])
            weights = torch.where(none, scores.detach().gather(-1, index).to(weights.dtype), weights)
        if stacked.weights.scale is not None:
            weights = weights / stacked.weights.scale[index]
        if first:
            self._check(scores, index, weights)
        return straight_through(
            output,
            scores if self.observe is None else self.observe(scores, x),
            x=x,
            index=index,
            weights=weights,
            experts=stacked,
            score=self._router.score,
            renormalised=self.renormalised,
            config=self.config,
        )

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._handle is None or not torch.is_grad_enabled():
            return
        if not self._experts_ran:
            raise UnsupportedModelError(
                f"{self.name}: its forward ran without calling `experts` as a module, so DenseMixer had no effect. A "
                "kernel that replaces the whole block does this: load the model with use_kernels=False, or switch "
                "DenseMixer off."
            )
        self._experts_ran = False

    def _stacked(self, experts: nn.Module, scored: int) -> StackedExperts:
        """The experts, of which the router scores ``scored``."""
        weights, derivation = read_weights(experts, weight_names(experts))
        if self._router.expert_scale:
            scale = getattr(unwrap(self.router), self._router.expert_scale)
            weights = weights._replace(scale=scale)
            if derivation:
                derivation = dataclasses.replace(derivation, sources=derivation.sources._replace(scale=scale))
        if weights.down.is_meta:
            raise UnsupportedModelError(
                f"{self.name}: the weights of its experts are not there after their forward: accelerate offloads them "
                "(a device_map with `cpu` or `disk`, or cpu_offload). Load the model without, or offload with FSDP2 or "
                "ZeRO-3; or switch DenseMixer off."
            )
        held = weights.down.shape[0]
        further = self._router.further
        if scored < held:
            raise UnsupportedModelError(
                f"{self.name}: its router returns {scored} numbers a token first, not the scores of {held} experts. "
                "Newer versions of transformers return them; upgrade, or switch DenseMixer off."
            )
        if scored > held and further is None:
            raise UnsupportedModelError(
                f"{self.name}: this process holds {held} of {scored} experts. DenseMixer doesn't work with the expert "
                "parallelism of transformers yet; load the model without an expert-parallel plan, or switch DenseMixer "
                "off."
            )
        layout = dataclasses.replace(
            layout_of(experts),
            formula=self.formula,
            identities=scored - held if further == "identity" else 0,
            zeros=scored - held if further == "zero" else 0,
        )
        return StackedExperts(weights, layout, derivation)

    def _check(self, scores: Tensor, index: Tensor, weights: Tensor) -> None:
        try:
            check_routing(scores, index, weights, self.renormalised)
        except RoutingMismatchError as error:
            self._gives_probabilities = None
            raise RoutingMismatchError(
                f"{self.router_name} ({type(unwrap(self.router)).__name__}): DenseMixer takes its scores to be "
                f"the {self._router.score} of its logits, but {error}. This version of the model routes "
                "differently from what densemixer_adapters.routers declares; its gradient would be wrong."
            ) from None
