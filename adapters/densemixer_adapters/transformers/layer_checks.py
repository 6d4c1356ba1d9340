"""When a layer is looked at, and what comes of it: what `checks` compares, in the words of the layer."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from densemixer_adapters.transformers.calls import Call
from densemixer_adapters.transformers.checks import (
    TOKENS,
    OutputMismatchError,
    Recurring,
    check_output,
    comparable,
    signature,
)
from densemixer_adapters.transformers.experts import (
    ExpertsInput,
    activation_constants,
    activation_modules,
    rows,
    unwrap,
)
from densemixer_adapters.transformers.refuse import refuse_freed_weights, refuse_other_router
from densemixer_adapters.transformers.routers import Router, is_registered
from densemixer_core import RoutingMismatchError, StackedExperts, check_routing, compute_dtype, routed_output
from densemixer_core.routing import are_probabilities


class LayerChecks:
    """What has been found out about a layer, and when it is looked at next.

    Args:
        name: The layer's name in the model.
        router_name: Its router's.
        spec: What is declared of that.

    Attributes:
        probabilities: Whether the router returns these; None until a forward with tokens has told.
    """

    def __init__(self, name: str, router_name: str, spec: Router) -> None:
        self._name = name
        self._router_name = router_name
        self._spec = spec
        self.probabilities: bool | None = None
        self._signature: tuple[Any, ...] | None = None
        self._check, self._comparison = Recurring(), Recurring()

    def plan(self, call: Call) -> None:
        """Decide whether this forward is looked at. By what it is made of, now that our own hooks are in place."""
        router = unwrap(call.router)
        try:
            renormalised = self._spec.is_renormalised([router, call.block])
        except AttributeError as error:
            refuse_other_router(self._router_name, router, error)
        activations = [module for experts in call.inner for module in activation_modules(experts)]
        modules = (call.block, call.router, router, call.experts, *call.inner, *activations)
        call.signature = (renormalised, *activation_constants(activations), *signature(*modules))
        due = self._check.due()
        call.checks = due or call.signature != self._signature
        # Where the experts are spread over ranks, all of them compare in the same forwards, whatever each has found.
        call.compares = self._comparison.due()
        if call.compares:
            self._comparison.made()

    def run(self, call: Call, given: ExpertsInput, output: Tensor) -> None:
        """Compare what is declared with what the layer did, if this forward is to be looked at.

        Args:
            call: The forward, after the experts.
            given: What they were called with.
            output: What they returned.

        Raises:
            RoutingMismatchError, OutputMismatchError: They differ.
            UnsupportedModelError: The weights are gone.
        """
        if not (call.checks and len(given.selected)) and not (call.spread is not None and call.compares):
            return
        # Out of sight of who records operations, such as selective checkpointing, whose recomputation comes without.
        with torch.no_grad(), contextlib.nullcontext() if torch.compiler.is_compiling() else _disable_current_modes():
            self._run(call, given, output)

    def _run(self, call: Call, given: ExpertsInput, output: Tensor) -> None:
        assert call.router_output is not None
        raw, stacked = rows(call.router_output), call.stacked
        if raw.is_meta or isinstance(raw, FakeTensor):  # no numbers to look at
            return
        told = self._check_routing(call, raw, given)
        if stacked is not None and (call.checks if call.spread is None else call.compares):
            self._check_output(call, stacked, given, output)
        if told:
            self._signature = call.signature
            self._check.made()

    def _check_routing(self, call: Call, raw: Tensor, given: ExpertsInput) -> bool:
        """Whether any token has said something."""
        stacked, router = call.stacked, unwrap(call.router)
        probabilities = are_probabilities(raw) if self._spec.score == "softmax" else False
        if probabilities is None:  # nothing but what isn't a number
            return False
        self.probabilities = probabilities
        if stacked is None:
            return True
        scores = self._spec.scores_of(raw, probabilities)
        _, index, weights = given.with_experts_of_none(stacked.layout.zeros, scores)
        try:
            return check_routing(
                scores,
                index,
                weights,
                self._spec.is_renormalised([router, call.block]),
                self._spec.epsilon_of(router),
                stacked.weights.scale,
            )
        except RoutingMismatchError as error:
            declared = "register_router says" if is_registered(self._spec) else "this version of DenseMixer declares"
            raise RoutingMismatchError(
                f"{self._router_name} ({type(router).__name__}): taking its scores to be the {self._spec.score} of its "
                f"logits, {error}. The model routes differently from what {declared}; the router's gradient would be "
                "wrong."
            ) from None

    def _check_output(self, call: Call, stacked: StackedExperts, given: ExpertsInput, output: Tensor) -> None:
        refuse_freed_weights(self._name, stacked.weights)
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
            check_output(rows(output), rows(given.x), given.selected, given.weights, evaluate, compute_dtype(used.up))
        except OutputMismatchError as error:
            raise OutputMismatchError(
                f"{self._name} ({type(call.inner[0]).__name__}): {error}. Something changes what its experts return: a "
                "replaced or wrapped forward, a hook registered with prepend=True, or a kernel. DenseMixer computes "
                "with the experts' weights, so its gradient would be wrong. Undo that (a forward hook without prepend "
                "is fine), or switch DenseMixer off."
            ) from None
