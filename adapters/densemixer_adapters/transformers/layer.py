"""How the router of a Mixture-of-Experts layer of transformers 5 is trained through all of its experts.

In a training forward the block's first hook begins a `calls.Call`, the router's hook puts its output there, the
experts' hook puts the straight-through node on their output, and the block's last hook ends the call.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from densemixer_adapters.observer import Forward, Observer, PairsLeftOut
from densemixer_adapters.transformers import calls, veomni
from densemixer_adapters.transformers.calls import Call
from densemixer_adapters.transformers.experts import ExpertsInput, KnownFormula, layout_of, rows, unwrap, weight_names
from densemixer_adapters.transformers.host_layer import HostLayer
from densemixer_adapters.transformers.layer_checks import LayerChecks
from densemixer_adapters.transformers.parallel import local_weights, spread_of
from densemixer_adapters.transformers.refuse import (
    refuse_adapter_apart,
    refuse_forward,
    refuse_moved_hooks,
    refuse_scores,
    refuse_unfollowed,
    refuse_unseen_router,
    refuse_weights,
)
from densemixer_adapters.transformers.routers import Router
from densemixer_adapters.transformers.weights import read_weights
from densemixer_core import Activation, DenseMixerConfig, ExpertDots, StackedExperts, compute_dtype, straight_through


class Attachment(Protocol):
    """Who has attached a layer, and is told what the user should know."""

    def warn_of_frozen_router(self, layer: DenseMixerLayer) -> None: ...

    def warn_of_lost_gradient(self, router_name: str) -> None: ...

    def warn_of_unread_metrics(self) -> None: ...

    def warn_of_overflow(self, name: str, count: Tensor) -> None: ...

    def warn_of_changed_experts(self, name: str) -> None: ...

    def warn_of_latecomers(self) -> None: ...


class DenseMixerLayer(HostLayer):
    """One Mixture-of-Experts layer. Its block owns it, by its hooks: a copied block has a layer of its own.

    Args:
        name: As in `HostLayer`, and so are ``block``, ``router_attribute`` and ``spec``.
        config: The options.
        sharing: How many ranks have the same tokens, see `parallel.sharing_ranks`.

    Attributes:
        config, sharing: As given.
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
        super().__init__(name, block, router_attribute, spec)
        self.config = config
        self.sharing = sharing
        self.handle: Attachment | None = None
        self._formula = KnownFormula(self.experts)
        self._arguments = list(inspect.signature(type(self.experts).forward).parameters)[1:4]
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.observer: Observer | None = None
        self._checks = LayerChecks(self.name, self.router_name, self.spec)
        self._left_out = PairsLeftOut()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: neither who observes this one is theirs, nor what was found out and counted."""
        return {**super().__getstate__(), "observer": None, "_checks": None, "_left_out": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_afresh()

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
        block = self.block_or_none
        if block is None:
            return
        calls.remove_hooks_of(self, block)
        calls.detach(block)

    @property
    def formula(self) -> Activation | None:
        """What the experts' activation computes, for the fused kernel; None if that is unknown."""
        return self._formula.found

    # What happens in a forward, in this order.

    def _before_block(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        outer = None if torch.compiler.is_compiling() else calls.drop_interrupted(block)
        if self.handle is None or not (torch.is_grad_enabled() or calls.recorder() is not None):
            return
        if not (self.knows_block or torch.compiler.is_compiling()):
            self.belong_to(block)
        call = Call(self, block, torch.is_grad_enabled() and self._trains(block), outer)
        if torch.compiler.is_compiling():
            if call.trains:
                refuse_moved_hooks(self.name, call)
            call.checks = self._checks.probabilities is None
        elif call.trains:
            refuse_forward(self.name, call)
            calls.attach(call.router, call.hooked)
            self._checks.plan(call)
            if call.checks:
                self.handle.warn_of_latecomers()
        calls.begin(call)

    def _trains(self, block: nn.Module) -> bool:
        """Whether there is anything to do in a training forward."""
        assert self.handle is not None
        if self.config.metrics and self.observer is None:
            self.handle.warn_of_unread_metrics()
        if self.config.estimator == "conventional" and self.observer is None:
            return False
        if self.is_frozen_in(block):
            self.handle.warn_of_frozen_router(self)
            return False
        return True

    def after_experts(
        self, call: Call, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Called by `calls.after_experts` after the module with the weights, and after the checkpoint around it."""
        given = ExpertsInput(*(args + tuple(kwargs[name] for name in self._arguments[len(args) :]))[:3])
        if not call.trains:
            recorder = None if torch.is_grad_enabled() else calls.recorder()
            if recorder is not None and call.router_output is not None:
                recorder(self, rows(call.router_output), given.selected)
            return None
        refuse_unseen_router(self.name, self.router_name, call)
        if experts is not call.site:
            call.stacked = None if self.config.estimator == "conventional" else self._read(call, experts, given.x)
            if call.site is not None:
                return None
        if not torch.is_grad_enabled():  # somebody looks at the experts, or a checkpoint of the block's own
            return None
        self._checks.run(call, given, output)
        call.done = True
        return self._through(call, given, output)

    def _read(self, call: Call, experts: Any, x: Tensor) -> StackedExperts:
        """The experts with their weights, as their forward saw them; and how they are spread, into the call."""
        assert call.router_output is not None
        spec = self.spec
        scale = getattr(unwrap(call.router), spec.expert_scale) if spec.expert_scale else None
        refuse_adapter_apart(self.name, call.experts, experts)
        weights, derivation = read_weights(experts, weight_names(experts), scale)
        call.spread = spread_of(weights.down, self.sharing)
        # By all ranks together, where transformers has spread them.
        scored, held = call.router_output.shape[-1], weights.down.shape[0]
        if call.spread is None and held < scored and spec.further is None:
            call.spread = veomni.spread_of(experts, held, scored)
        if call.spread is not None:
            held = call.spread.count
        refuse_weights(self.name, weights, derivation, spread=call.spread is not None, meta=x.is_meta)
        refuse_scores(self.name, scored, held, spec)
        layout = dataclasses.replace(
            layout_of(experts),
            formula=self._formula.of(experts, afresh=call.checks),
            identities=scored - held if spec.further == "identity" else 0,
            zeros=scored - held if spec.further == "zero" else 0,
        )
        return StackedExperts(weights if call.spread is None else local_weights(weights), layout, derivation)

    def _through(self, call: Call, given: ExpertsInput, output: Tensor) -> Tensor | None:
        """The experts' output with the straight-through node on it, or what an observer makes of it."""
        raw, stacked, spec = call.router_output, call.stacked, self.spec
        assert raw is not None
        assert self.handle is not None
        if not output.requires_grad:
            return None
        if not raw.requires_grad:
            if any(parameter.requires_grad for parameter in call.router.parameters()):
                self.handle.warn_of_lost_gradient(self.router_name)
            else:
                self.handle.warn_of_frozen_router(self)
            return None
        probabilities = bool(self._checks.probabilities)
        scores = None if stacked is None else spec.scores_of(rows(raw), probabilities)
        observed = scores
        if self.observer is not None:
            forward = Forward(call.router_input, raw, probabilities, given.x, given.selected, given.weights)
            output, observed = self.observer(forward, output, scores)
        if stacked is None or scores is None or observed is None:
            return output
        x, index, weights = given.with_experts_of_none(stacked.layout.zeros, scores)
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
            score=spec.score,
            renormalised=spec.is_renormalised([unwrap(call.router), call.block]),
            config=self.config,
            epsilon=spec.epsilon_of(unwrap(call.router)),
            weight_scale=stacked.weights.scale,
            listener=self,
        )

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = calls.end(block)
        if call is not None and call.trains and not call.done and output is not None:  # None: it has raised an error
            refuse_unfollowed(self.name, args)

    # What happens in the backward: called by the core.

    def pairs_left_out(self, count: Tensor) -> None:
        """In float16."""
        self._left_out.add(count)
        if self.handle is not None:
            self.handle.warn_of_overflow(self.name, count)

    def experts_written_to(self) -> None:
        if self.handle is not None:
            self.handle.warn_of_changed_experts(self.name)

    def take_pairs_left_out(self) -> Tensor | None:
        """How many pairs overflowed in float16 since this was last called, a scalar; None if nothing was counted."""
        return self._left_out.take()
