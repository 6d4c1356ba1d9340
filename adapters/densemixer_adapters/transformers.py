"""DenseMixer on a live model of transformers 5.

All its Mixture-of-Experts layers share one contract: a block owns a router (``gate`` or ``router``) and ``experts``
with stacked weights, and calls ``experts(hidden_states, top_k_index, top_k_weights)``. Forward hooks on these modules
see all that the method needs, whatever kernel computes the experts, so no forward is copied or replaced.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from densemixer_adapters.routers import STACKED_WITHOUT_DECORATOR, Router, is_refused, left_to_the_host, router_of
from densemixer_adapters.weights import read_weights, why_unreadable
from densemixer_core import (
    Activation,
    DenseMixerConfig,
    ExpertLayout,
    RoutingMismatchError,
    StackedExperts,
    check_routing,
    recognise,
    router_scores,
    straight_through,
)
from densemixer_core.routing import are_probabilities

logger = logging.getLogger("densemixer")

ROUTER_NAMES = ("gate", "router")


class UnsupportedModelError(ValueError):
    """DenseMixer can't be attached to this model. The message names the module, the reason and the fix."""


def apply_densemixer(model: nn.Module, config: DenseMixerConfig | None = None) -> DenseMixerHandle:
    """Train the routers of a transformers model through all of their experts.

    The model's outputs stay what they are, bit for bit; nothing is added to its parameters, modules or checkpoints.
    Call it on the model that will be trained, before it is wrapped by DDP, FSDP, DeepSpeed or ``torch.compile``; before
    or after PEFT.

    Args:
        model: A model with Mixture-of-Experts layers, or any module that contains some.
        config: The options.

    Returns:
        A handle that lists the layers and undoes everything, also as a context manager.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts layers, one with an unknown router, or one whose
            experts don't follow the contract of transformers 5, or are split by its tensor or expert parallelism; or
            Unsloth has been imported.
        ValueError: The options select layers that the model doesn't have.
        RuntimeError: DenseMixer is attached already.
    """
    config = config or DenseMixerConfig()
    if "unsloth" in sys.modules:
        # Importing it puts its own forwards into the classes of experts, blocks and PEFT's wrappers. With LoRA on the
        # experts, the weights that DenseMixer would compute with are never made.
        raise UnsupportedModelError(
            f"{type(model).__name__}: Unsloth has been imported in this process, and replaces the forwards of "
            "Mixture-of-Experts layers and of LoRA by its own, which DenseMixer can't follow. Train without `import "
            "unsloth`, or switch DenseMixer off."
        )
    layers = list(_find_layers(model, config))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Mixture-of-Experts layers: no module owns both `experts` and one of "
            f"{', '.join(f'`{name}`' for name in ROUTER_NAMES)}. DenseMixer trains the routers of such layers; "
            "switch it off for this model."
        )
    handle = DenseMixerHandle(layers)
    logger.log(
        logging.DEBUG if int(os.environ.get("RANK") or 0) else logging.INFO,
        "DenseMixer is attached to %d layers of %s (%s): estimator %s, %.3g GFLOP more a token in the backward",
        len(layers),
        type(model).__name__,
        getattr(getattr(model, "config", None), "model_type", "no model type"),
        config.estimator,
        1e-9 * sum(layer.extra_operations for layer in layers),
    )
    handle.warn_of_frozen_routers()
    return handle


def has_experts(model: nn.Module) -> bool:
    """Whether a model has Mixture-of-Experts layers, be they of a kind that DenseMixer can train or not."""
    return next(_find_blocks(model), None) is not None


def attached_layers(model: nn.Module) -> list[DenseMixerLayer]:
    """The layers of a model that DenseMixer is attached to, in the model's order."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, DenseMixerLayer)))


class DenseMixerHandle:
    """What `apply_densemixer` attached. Leaving it as a context manager, or `remove`, detaches it.

    Attributes:
        layers: The layers, in the model's order.
        gives_way: Whether attaching DenseMixer again takes this one's place rather than being an error.
    """

    def __init__(self, layers: list[DenseMixerLayer]) -> None:
        self.layers = layers
        self.gives_way = False
        self._known_as_frozen: set[str] = set()
        for layer in layers:
            layer.attach(self)

    def warn_of_frozen_routers(self) -> None:
        """Log one warning for all layers whose router is frozen now and wasn't when this was last called."""
        frozen = [layer.router_name for layer in self.layers if layer.router_is_frozen]
        new = [name for name in frozen if name not in self._known_as_frozen]
        self._known_as_frozen = set(frozen)
        if not new:
            return
        logger.warning(
            "DenseMixer has nothing to train where the router is frozen: %s%s. Such a layer trains as without "
            'DenseMixer. With PEFT, add the router to modules_to_save, e.g. LoraConfig(..., modules_to_save=["%s"]); '
            "otherwise call requires_grad_(True) on it.",
            new[0],
            f" and {len(new) - 1} more" if len(new) > 1 else "",
            ".".join(new[0].split(".")[-2:]),
        )

    def remove(self) -> None:
        """Leave the model as it was. Does nothing the second time."""
        for layer in self.layers:
            layer.remove()

    def __enter__(self) -> DenseMixerHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


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
        self.renormalised = spec.is_renormalised([_unwrap(self.router), block])
        self.formula = _formula(experts)
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
        weights = [getattr(self.experts, name) for name in _weight_names(self.experts)[:2] if name]
        return [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights]

    @property
    def extra_operations(self) -> float:
        """Floating-point operations a token, in the backward: the up projection of x and the down projection of g."""
        return self.config.budget * sum(2 * math.prod(shape) for shape in self.matrices)

    @property
    def router_is_linear(self) -> bool:
        """Whether the router's logits are its weight times its input, plus a bias at most."""
        return self._router.linear and isinstance(getattr(_unwrap(self.router), "weight", None), Tensor)

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
        for router in _unwrapped(self.router):
            self._hooks.append(router.register_forward_hook(self._after_router))
        for experts in _unwrapped(self.block.get_submodule("experts")):
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
        weights, derivation = read_weights(experts, _weight_names(experts))
        if self._router.expert_scale:
            scale = getattr(_unwrap(self.router), self._router.expert_scale)
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
            _layout(experts),
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
                f"{self.router_name} ({type(_unwrap(self.router)).__name__}): DenseMixer takes its scores to be "
                f"the {self._router.score} of its logits, but {error}. This version of the model routes "
                "differently from what densemixer_adapters.routers declares; its gradient would be wrong."
            ) from None


def _find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, block and the name of its router ("" if it has none), of every Mixture-of-Experts layer."""
    for name, block in model.named_modules():
        # Its own modules: wrappers (torch.compile, FSDP1, activation checkpointing) lend out those of what they wrap.
        own = dict(block.named_children())
        router_name = next((name for name in ROUTER_NAMES if name in own), "")
        if is_refused(block) or (router_name and "experts" in own):
            yield name, block, router_name


def _find_layers(model: nn.Module, config: DenseMixerConfig) -> Iterator[DenseMixerLayer]:
    blocks, left_out = [], {}
    for name, block, router_name in _find_blocks(model):
        why = left_to_the_host(_unwrap(block.get_submodule(router_name)))
        if why is None:
            blocks.append((name, block, router_name))
        else:
            left_out[name] = why
    if left_out:
        logger.warning(
            "DenseMixer leaves %s to conventional training: %s.", ", ".join(left_out), "; ".join({*left_out.values()})
        )
    if not blocks:
        return
    for name, block, router_name in (blocks[position] for position in config.positions(len(blocks))):
        where = f"{name or type(model).__name__} ({type(block).__name__})"
        router = _unwrap(block.get_submodule(router_name))
        try:
            spec = router_of(router, block)
        except LookupError as refused:
            raise UnsupportedModelError(
                f"{where}: DenseMixer can't train it: {refused.args[0]}. Switch DenseMixer off for this model, or "
                "leave the layer out with the option `layers`."
            ) from None
        if spec is None:
            raise UnsupportedModelError(
                f"{where}: its router {type(router).__name__} is unknown to DenseMixer, which must know how scores "
                "become weights. Those that it knows are in densemixer_adapters/routers.py, and in the README by "
                "architecture. A newer densemixer-adapters may know it; otherwise switch DenseMixer off for this model."
            )
        experts = _unwrap(block.get_submodule("experts"))
        stacked = hasattr(experts, "has_gate") or type(experts).__name__ in STACKED_WITHOUT_DECORATOR
        if not stacked or not isinstance(getattr(experts, "down_proj", None), Tensor):
            raise UnsupportedModelError(
                f"{where}: its experts ({type(experts).__name__}) don't hold stacked weights as the models of "
                "transformers 5 do. Load the model with transformers >= 5.5.4 and without quantisation, or switch "
                "DenseMixer off."
            )
        if reason := why_unreadable(experts, _weight_names(experts)):
            raise UnsupportedModelError(
                f"{where}: of its experts ({type(experts).__name__}), {reason}, so DenseMixer can't compute with them. "
                "Load the model with dequantize=True in its quantisation config or without quantising the experts, or "
                "switch DenseMixer off."
            )
        if _is_split(experts):
            raise UnsupportedModelError(
                f"{where}: transformers has split its experts between processes. DenseMixer doesn't work with the "
                "tensor and expert parallelism of transformers yet; load the model without tp_plan, tp_size, ep_size "
                "and enable_expert_parallel (DDP, FSDP and ZeRO work), or switch DenseMixer off."
            )
        for hook in list(experts._forward_hooks.values()):
            attached = getattr(hook, "__self__", None)
            if isinstance(attached, DenseMixerLayer) and not attached.give_way():
                raise RuntimeError(f"{where}: DenseMixer is attached already; call .remove() on its handle first.")
        yield DenseMixerLayer(name, block, router_name, experts, spec, config)


def _unwrap(module: nn.Module) -> nn.Module:
    """The host's own module inside PEFT's wrappers."""
    return next(_unwrapped(module))


def _unwrapped(module: nn.Module) -> Iterator[nn.Module]:
    """The host's own module inside PEFT's wrappers, then the copies of it that `modules_to_save` has made."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    if not isinstance(inner, nn.Module):
        yield module
        return
    yield from _unwrapped(inner)
    yield from getattr(module, "modules_to_save", {}).values()


def _is_split(experts: nn.Module) -> bool:
    """Whether transformers' own tensor or expert parallelism has been applied. FSDP brings the whole weights back."""
    if hasattr(experts, "_hf_tp_plan"):  # transformers 5.5, whose weights stay plain tensors
        return True
    meshes = (getattr(parameter, "device_mesh", None) for parameter in experts.parameters())
    return any({"tp", "ep"} & set(getattr(mesh, "mesh_dim_names", None) or ()) for mesh in meshes)


def _weight_names(experts: Any) -> tuple[str | None, ...]:
    """The attributes that hold the stacked weights, in the order of `ExpertWeights`."""
    up = "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"
    biases = (f"{up}_bias", "down_proj_bias") if getattr(experts, "has_bias", False) else (None, None)
    return up, "down_proj", *biases


def _layout(experts: Any) -> ExpertLayout:
    """How to compute with the weights. Experts without transformers' decorator are laid out as its defaults say."""
    activation = getattr(experts, "_apply_gate", None) if getattr(experts, "has_gate", True) else experts.act_fn
    return ExpertLayout(
        activation=activation or _gate_by(getattr(experts, "act_fn", F.silu)),  # Liger's experts know no other
        transposed=getattr(experts, "is_transposed", False),
        post_norm=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
    )


def _formula(experts: Any) -> Activation | None:
    """What the activation of the layout computes. Its parameters have two names in transformers."""
    alpha, limit = (getattr(experts, f"swiglu_{name}", getattr(experts, name, None)) for name in ("alpha", "limit"))
    return recognise(_layout(experts).activation, getattr(experts, "has_gate", True), alpha, limit)


def _gate_by(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gate_up(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return activation(gate) * up

    return gate_up
