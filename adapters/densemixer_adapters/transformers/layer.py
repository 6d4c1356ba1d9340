"""One Mixture-of-Experts layer of transformers 5, and how its router is trained through all of its experts.

In a training forward the block's first hook begins a `calls.Call`, the router's hook puts its output there, the
experts' hook puts the straight-through node on their output, and the block's last hook ends the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from densemixer_adapters.errors import UnsupportedModelError
from densemixer_adapters.transformers import calls
from densemixer_adapters.transformers.calls import Call
from densemixer_adapters.transformers.checks import (
    EVERY,
    TOKENS,
    OutputMismatchError,
    check_output,
    comparable,
    signature,
)
from densemixer_adapters.transformers.experts import formula_of, layout_of, unwrap, weight_names
from densemixer_adapters.transformers.parallel import local_weights, spread_of
from densemixer_adapters.transformers.routers import Router
from densemixer_adapters.transformers.weights import adapter_apart, read_weights
from densemixer_core import (
    DenseMixerConfig,
    ExpertDots,
    RoutingMismatchError,
    StackedExperts,
    check_routing,
    compute_dtype,
    routed_output,
    router_scores,
    straight_through,
)
from densemixer_core.routing import are_probabilities


@dataclasses.dataclass(frozen=True)
class Forward:
    """What a training forward of a layer did, for an observer.

    Attributes:
        router_input: The router's input, [..., hidden]; None if it was called without positional arguments.
        router_output: The tensor that the router returned, [..., experts].
        probabilities: Whether that has been through a softmax already.
        x: The experts' input, [..., hidden].
        index: The selected experts, [tokens, k].
    """

    router_input: Tensor | None
    router_output: Tensor
    probabilities: bool
    x: Tensor
    index: Tensor


Observer = Callable[[Forward, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Called in each training forward, whatever the estimator, with the experts' output, [..., hidden], and the scores,
[tokens, experts]; None for those if DenseMixer adds nothing. What it returns takes their places, that of the scores for
DenseMixer alone: the gradient that comes back there is the one that DenseMixer adds."""

_lock = threading.Lock()


class Attachment(Protocol):
    """Who has attached a layer, and is told what the user should know."""

    def warn_of_frozen_routers(self) -> None: ...

    def warn_of_unread_metrics(self) -> None: ...

    def warn_of_overflow(self, name: str, count: Tensor) -> None: ...

    def warn_of_changed_experts(self, name: str) -> None: ...


class DenseMixerLayer:
    """One Mixture-of-Experts layer. Its block owns it, by its hooks: a copied block has a layer of its own.

    Attributes:
        name: The block's name in the model, e.g. ``model.layers.0.mlp``.
        router_attribute: The block's attribute that holds the router.
        router_name: The router's name in the model, e.g. ``model.layers.0.mlp.gate``.
        formula: What the experts' activation computes, for the fused kernel; None if that is unknown.
        config: The options.
        sharing: How many ranks have the same tokens, see `transformers_parallel`.
        handle: The handle that the layer belongs to; None while it isn't attached.
        observer: Who is told of each training forward, if anybody.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        router_attribute: str,
        spec: Router,
        config: DenseMixerConfig,
        sharing: int = 1,
    ) -> None:
        self.name = name
        self.router_attribute = router_attribute
        self.router_name = f"{name}.{router_attribute}" if name else router_attribute
        self.config = config
        self.sharing = sharing
        self.handle: Attachment | None = None
        self.observer: Observer | None = None
        self._spec = spec
        self._block: weakref.ref[nn.Module] | None = weakref.ref(block)
        self.formula = formula_of(self.experts)
        self._arguments = list(inspect.signature(type(self.experts).forward).parameters)[1:4]
        self._pairs_left_out: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        """What was found out in checks."""
        self._probabilities: bool | None = None  # whether the router returns them; unknown until a forward with tokens
        self._signature: tuple[Any, ...] | None = None
        self._until_check = 0
        self._until_comparison = 0

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: neither the block of this one nor who observes it is theirs."""
        return {**vars(self), "_block": None, "observer": None, "_pairs_left_out": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or 'of the block itself'}>"

    def belong_to(self, block: nn.Module) -> None:
        """Say whose layer this is, where the block has been copied."""
        self._block = weakref.ref(block)

    @property
    def block(self) -> nn.Module:
        """The module that owns router and experts."""
        block = None if self._block is None else self._block()
        if block is None:
            raise RuntimeError(f"{self.name}: the model of this layer of DenseMixer is gone")
        return block

    @property
    def router(self) -> nn.Module:
        """The router, as the block calls it now: others may have wrapped it since."""
        router: nn.Module = getattr(self.block, self.router_attribute)
        return router

    @property
    def experts(self) -> Any:
        """The module with the stacked weights."""
        return unwrap(self.block.get_submodule("experts"))

    @property
    def matrices(self) -> list[tuple[int, ...]]:
        """The shapes of the experts' two stacked weights, also while ZeRO-3 has partitioned them."""
        weights = [getattr(self.experts, name) for name in weight_names(self.experts)[:2] if name]
        return [tuple(getattr(weight, "ds_shape", weight.shape)) for weight in weights]

    @property
    def router_is_linear(self) -> bool:
        """Whether the router's logits are its weight times its input, plus a bias at most."""
        return self._spec.linear and isinstance(getattr(unwrap(self.router), "weight", None), Tensor)

    @property
    def renormalised(self) -> bool:
        """Whether the selected experts' scores are divided by their sum."""
        return self._is_renormalised(self.block)

    @property
    def score(self) -> str:
        """The function that makes scores of the router's logits, see `densemixer_core.routing`."""
        return self._spec.score

    @property
    def router_is_frozen(self) -> bool:
        """False too where the block is gone, or isn't known yet, as a copy's."""
        block = None if self._block is None else self._block()
        return block is not None and _is_frozen(getattr(block, self.router_attribute))

    def attach(self, handle: Attachment) -> None:
        self.handle = handle
        block = self.block
        block.register_forward_pre_hook(self._before_block)
        block.register_forward_hook(self._after_block, always_call=True)
        call = Call(self, block, False, None)
        calls.attach(call.router, call.hooked)

    def remove(self) -> None:
        """Leave the block as it was. Does nothing the second time, or where the block is gone."""
        self.handle = self.observer = None
        block = None if self._block is None else self._block()
        if block is None:
            return
        for hooks in (block._forward_pre_hooks, block._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    calls.remove_hook(block, key)
        calls.detach(block)

    # What happens in a forward, in this order.

    def _before_block(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        outer = None if torch.compiler.is_compiling() else calls.drop_interrupted(block)
        if self.handle is None or not (torch.is_grad_enabled() or calls.recorder() is not None):
            return
        call = Call(self, block, torch.is_grad_enabled() and self._trains(block), outer)
        if torch.compiler.is_compiling():
            if call.trains and not (calls.is_last(call.router) and calls.is_first(call.hooked)):
                raise UnsupportedModelError(
                    f"{self.name}: somebody has registered hooks on its router or experts since. Run one step before "
                    "you compile it with fullgraph=True."
                )
            call.checks = self._probabilities is None
        elif call.trains:
            if self._block is None:
                self.belong_to(block)
            self._refuse(call)
            calls.attach(call.router, call.hooked)
            self._plan_checks(call)
        calls.begin(call)

    def _trains(self, block: nn.Module) -> bool:
        """Whether there is anything to do in a training forward."""
        assert self.handle is not None
        if self.config.metrics and self.observer is None:
            self.handle.warn_of_unread_metrics()
        if self.config.estimator == "conventional" and self.observer is None:
            return False
        if _is_frozen(getattr(block, self.router_attribute)):
            self.handle.warn_of_frozen_routers()
            return False
        return True

    def _refuse(self, call: Call) -> None:
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedModelError(
                f"{self.name}: DenseMixer doesn't work within torch.func (grad, vmap, functional_call under them). Use "
                "torch.autograd instead, or call handle.remove() first."
            )
        if not call.inner:
            raise UnsupportedModelError(
                f"{self.name}: its experts are now a {type(call.experts).__name__}, which holds no stacked weights. "
                "Something has replaced them since DenseMixer was attached; undo that, or switch DenseMixer off."
            )

    def _plan_checks(self, call: Call) -> None:
        """Decide whether this forward is looked at. By what it is made of, now that our own hooks are in place."""
        now = (
            self._is_renormalised(call.block),
            *signature(call.block, call.router, unwrap(call.router), call.experts, *call.inner),
        )
        call.signature = now
        call.checks = now != self._signature or self._until_check <= 0
        self._until_check -= 1
        # Where the experts are spread over ranks, all of them compare in the same forwards, whatever each has found.
        call.compares = self._until_comparison <= 0
        self._until_comparison = EVERY - 1 if call.compares else self._until_comparison - 1

    def after_experts(
        self, call: Call, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Called by `calls.after_experts` after the module with the weights, and after the checkpoint around it."""
        x, index, weights = (args + tuple(kwargs[name] for name in self._arguments[len(args) :]))[:3]
        if not call.trains:
            recorder = None if torch.is_grad_enabled() else calls.recorder()
            if recorder is not None and call.router_output is not None:
                recorder(self, _rows(call.router_output), index)
            return None
        if call.router_output is None:
            raise UnsupportedModelError(
                f"{self.name}: the experts ran without their router `{self.router_name}` having been called as a module"
                ", so DenseMixer can't see the scores. Something replaced the block's forward; remove that, or switch "
                "DenseMixer off."
            )
        if not calls.is_last(call.router):
            raise UnsupportedModelError(
                f"{self.name}: a hook was registered on its router `{self.router_name}` while the block ran, so "
                "DenseMixer has seen the router's output before it. Register it before the block is called."
            )
        if experts is not call.site:
            call.stacked = None if self.config.estimator == "conventional" else self._stacked(call, experts, x)
            if call.site is not None:
                return None
        if not torch.is_grad_enabled():  # somebody looks at the experts, or a checkpoint of the block's own
            return None
        if (call.checks and len(index)) or (call.spread is not None and call.compares):
            self._check(call, x, index, weights, output)
        call.done = True
        return self._through(call, x, index, weights, output)

    def _through(self, call: Call, x: Tensor, index: Tensor, weights: Tensor, output: Tensor) -> Tensor | None:
        raw, stacked = call.router_output, call.stacked
        assert raw is not None
        assert self.handle is not None
        if not output.requires_grad:
            return None
        if not raw.requires_grad:
            self.handle.warn_of_frozen_routers()
            return None
        probabilities = bool(self._probabilities)
        scores = None if stacked is None else self._scores(_rows(raw), probabilities)
        observed = scores
        if self.observer is not None:
            forward = Forward(call.router_input, raw, probabilities, x, index)
            output, observed = self.observer(forward, output, scores)
        if stacked is None or scores is None or observed is None:
            return output
        index, weights = _with_experts_of_none(stacked, scores, index, weights)
        experts: StackedExperts | ExpertDots = stacked
        if call.spread is not None:
            experts = functools.partial(
                call.spread.dots,
                experts=stacked,
                selected=index.shape[-1],
                dtype=compute_dtype(stacked.weights.up),
                config=self.config,
            )
        return straight_through(
            output,
            observed,
            x=x,
            index=index,
            weights=weights,
            experts=experts,
            score=self._spec.score,
            renormalised=self._is_renormalised(call.block),
            config=self.config,
            epsilon=self._spec.epsilon_of(unwrap(call.router)),
            weight_scale=stacked.weights.scale,
            listener=self,
        )

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = calls.end(block)
        if call is None or not call.trains or call.done or output is None:  # None: it has raised an error
            return
        if any(isinstance(argument, Tensor) and not argument.numel() for argument in args):
            return
        raise UnsupportedModelError(
            f"{self.name}: its forward ran without calling `experts` as a module, or called them without gradients, so "
            "DenseMixer had no effect. A kernel that replaces the whole block does this: load the model with "
            "use_kernels=False. A reentrant checkpoint within the block's forward does: checkpoint the block, or wrap "
            "the experts by torch's checkpoint_wrapper. Experts that are compiled apart from their block do, and a "
            "compiled block in another thread: compile the block or the model, in the thread that trains. Or switch "
            "DenseMixer off."
        )

    # What happens in the backward.

    def pairs_left_out(self, count: Tensor) -> None:
        """Called by the core in float16."""
        with _lock:
            self._pairs_left_out = count if self._pairs_left_out is None else self._pairs_left_out + count
        if self.handle is not None:
            self.handle.warn_of_overflow(self.name, count)

    def experts_written_to(self) -> None:
        """Called by the core."""
        if self.handle is not None:
            self.handle.warn_of_changed_experts(self.name)

    def take_pairs_left_out(self) -> Tensor | None:
        """How many pairs overflowed in float16 since this was last called, a scalar; None if nothing was counted."""
        with _lock:
            count, self._pairs_left_out = self._pairs_left_out, None
        return count

    # What the layer is.

    def _is_renormalised(self, block: nn.Module) -> bool:
        return self._spec.is_renormalised([unwrap(getattr(block, self.router_attribute)), block])

    def _scores(self, router_output: Tensor, probabilities: bool) -> Tensor:
        return router_output if probabilities else router_scores(router_output, self._spec.score)

    def _stacked(self, call: Call, experts: Any, x: Tensor) -> StackedExperts:
        """The experts with their weights, as their forward saw them."""
        assert call.router_output is not None
        scored = call.router_output.shape[-1]
        weights, derivation = read_weights(experts, weight_names(experts))
        if self._spec.expert_scale:
            scale = getattr(unwrap(call.router), self._spec.expert_scale)
            weights = weights._replace(scale=scale)
            if derivation:
                derivation = dataclasses.replace(derivation, sources=derivation.sources._replace(scale=scale))
        if weights.down.is_meta and not x.is_meta:
            raise UnsupportedModelError(
                f"{self.name}: the weights of its experts are not there after their forward: accelerate offloads them "
                "(a device_map with `cpu` or `disk`, or cpu_offload). Load the model without, or offload with FSDP2 or "
                "ZeRO-3; or switch DenseMixer off."
            )
        call.spread = spread_of(weights.down, self.sharing)
        held = weights.down.shape[0]  # by all ranks together
        further = self._spec.further
        if call.spread is not None:
            if derivation is not None:
                raise UnsupportedModelError(
                    f"{self.name}: its experts are spread over ranks, and their weights are computed from others (LoRA "
                    "on them, or quantisation). DenseMixer doesn't work with both; train the experts in full or not at "
                    "all, or switch DenseMixer off."
                )
            weights = local_weights(weights)
        if scored < held:
            raise UnsupportedModelError(
                f"{self.name}: its router returns {scored} numbers a token first, not the scores of {held} experts. "
                "Newer versions of transformers return them; upgrade, or switch DenseMixer off."
            )
        if scored > held and further is None:
            raise UnsupportedModelError(
                f"{self.name}: this process holds {held} of {scored} experts, and nothing says which. DenseMixer works "
                "with the expert parallelism of transformers by distributed_config; use that, load the model without "
                "expert parallelism, or switch DenseMixer off."
            )
        layout = dataclasses.replace(
            layout_of(experts),
            formula=self.formula,
            identities=scored - held if further == "identity" else 0,
            zeros=scored - held if further == "zero" else 0,
        )
        return StackedExperts(weights, layout, derivation)

    def _check(self, call: Call, x: Tensor, index: Tensor, weights: Tensor, output: Tensor) -> None:
        # Out of sight of who records operations, such as selective checkpointing, whose recomputation comes without.
        with torch.no_grad(), contextlib.nullcontext() if torch.compiler.is_compiling() else _disable_current_modes():
            self._compare(call, x, index, weights, output)

    def _compare(self, call: Call, x: Tensor, index: Tensor, weights: Tensor, output: Tensor) -> None:
        """Compare what is declared with what the layer did, see `checks`."""
        assert call.router_output is not None
        raw, stacked = _rows(call.router_output), call.stacked
        if raw.is_meta or isinstance(raw, FakeTensor):  # no numbers to look at
            return
        told = self._check_routing(call, raw, index, weights)
        if stacked is not None and (call.checks if call.spread is None else call.compares):
            self._check_output(call, stacked, x, index, weights, output)
        if told:
            self._signature, self._until_check = call.signature, EVERY - 1

    def _check_routing(self, call: Call, raw: Tensor, index: Tensor, weights: Tensor) -> bool:
        """Whether any token has said something."""
        stacked, router = call.stacked, unwrap(call.router)
        probabilities = are_probabilities(raw) if self._spec.score == "softmax" else False
        if probabilities is None:  # nothing but what isn't a number
            return False
        self._probabilities = probabilities
        if stacked is None:
            return True
        scores = self._scores(raw, probabilities)
        routed = _with_experts_of_none(stacked, scores, index, weights)
        try:
            return check_routing(
                scores,
                *routed,
                self._is_renormalised(call.block),
                self._spec.epsilon_of(router),
                stacked.weights.scale,
            )
        except RoutingMismatchError as error:
            raise RoutingMismatchError(
                f"{self.router_name} ({type(router).__name__}): DenseMixer takes its scores to be "
                f"the {self._spec.score} of its logits, but {error}. This version of the model routes "
                "differently from what densemixer_adapters.transformers.routers declares; its gradient would be "
                "wrong."
            ) from None

    def _check_output(
        self, call: Call, stacked: StackedExperts, x: Tensor, index: Tensor, weights: Tensor, output: Tensor
    ) -> None:
        if not all(weight.untyped_storage().size() for weight in stacked.weights[:2]):
            raise UnsupportedModelError(
                f"{self.name}: the weights of its experts are gone after the activation checkpoint around them, since "
                "FSDP or ZeRO-3 shards them inside of it. Wrap them the other way round: the checkpoint inside."
            )
        if name := adapter_apart(call.experts, call.inner[0]):
            raise UnsupportedModelError(
                f"{self.name}: PEFT's LoRA on `{name}` of its experts isn't in that weight while they run, since a "
                "kernel computes it apart (ScatterMoE and SonicMoE of Axolotl do), so DenseMixer can't see it. Train "
                "the experts in full or not at all, choose another kernel (in Axolotl, drop use_scattermoe and "
                "use_sonicmoe), or switch DenseMixer off."
            )
        if not comparable(call.block, call.experts):
            return
        derivation = stacked.derivation
        used = stacked.weights if derivation is None else derivation.compute(derivation.sources)
        experts = StackedExperts(used._replace(scale=None), stacked.layout)  # the weights contain the scale
        if call.spread is None:
            evaluate = functools.partial(routed_output, experts=experts)
        else:
            evaluate = functools.partial(call.spread.routed_output, experts=experts, rows=TOKENS)
        try:
            check_output(_rows(output), _rows(x), index, weights, evaluate, compute_dtype(used.up))
        except OutputMismatchError as error:
            raise OutputMismatchError(
                f"{self.name} ({type(call.inner[0]).__name__}): {error}. Something changes what its experts return: a "
                "replaced or wrapped forward, a hook registered with prepend=True, or a kernel. DenseMixer computes "
                "with the experts' weights, so its gradient would be wrong. Undo that (a forward hook without prepend "
                "is fine), or switch DenseMixer off."
            ) from None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _is_frozen(router: nn.Module) -> bool:
    # FSDP1 may have taken the parameters away; then only the graph knows.
    parameters = list(router.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _with_experts_of_none(
    stacked: StackedExperts, scores: Tensor, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Where a token chose the expert that returns zero, the host has put another one there, with weight 0."""
    if not stacked.layout.zeros:
        return index, weights
    none = weights == 0
    index = index.masked_fill(none, scores.shape[-1] - stacked.layout.zeros)
    return index, torch.where(none, scores.detach().gather(-1, index).to(weights.dtype), weights)
