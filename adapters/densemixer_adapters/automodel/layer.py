"""One Mixture-of-Experts layer of Automodel's own, and how its router is trained through all of its experts.

Routing, dispatch, experts and combination stay Automodel's. In a training forward a hook on the gate makes the scores
of all experts from the gate's input, and a hook on the experts puts the straight-through node on their output. What
both see are this rank's tokens, as plain tensors, under FSDP2, expert parallelism and activation checkpointing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from densemixer_adapters.automodel.experts import read_experts
from densemixer_adapters.transformers.checks import TOKENS, OutputMismatchError, Recurring, check_output
from densemixer_adapters.transformers.frozen_routers import FrozenRouters
from densemixer_core import (
    Activation,
    DenseMixerConfig,
    Known,
    RoutingMismatchError,
    check_routing,
    compute_dtype,
    routed_output,
    router_scores,
    stacked_dots,
    straight_through,
)

EPSILON = 1e-20
"""What Automodel adds to the sum of the selected scores where it renormalises them."""

SCORES = {
    "softmax": "softmax",
    "softmax_with_bias": "softmax",
    "sigmoid": "sigmoid",
    "sigmoid_with_bias": "sigmoid",
    "sqrtsoftplus": "sqrtsoftplus",
}
"""What Automodel's gate calls its score function, and what `densemixer_core.routing` does. A bias counts for the
selection alone, which is the host's."""


class AutomodelLayer:
    """One ``MoE`` of Automodel, and the hooks on its gate and its experts.

    Attributes:
        name: The block's name in the model, e.g. ``model.layers.0.mlp``.
        block: The ``MoE``.
        config: The options.
        router_name: The gate's name in the model.

    Args:
        formula: What its experts' activation computes.
    """

    def __init__(self, name: str, block: Any, config: DenseMixerConfig, formula: Activation) -> None:
        self.name = name
        self.router_name = f"{name}.gate" if name else "gate"
        self.block = block
        self.config = config
        self._formula = formula
        self._frozen_routers: FrozenRouters | None = None
        self._hooks: list[RemovableHandle] = []
        self._logits: Tensor | None = None  # between the gate and the experts of a training forward
        self._recurring = Recurring()

    @property
    def router_is_frozen(self) -> bool:
        return not self.block.gate.weight.requires_grad

    @property
    def score(self) -> str:
        """The function that makes scores of the gate's logits, see `densemixer_core.routing`."""
        return SCORES[self.block.gate.score_func]

    @property
    def renormalised(self) -> bool:
        return self._over_selected or self._divides

    @property
    def epsilon(self) -> float:
        """What is added to the sum of the selected scores; a softmax over the selected logits needs nothing."""
        return EPSILON if self._divides and not self._over_selected else 0.0

    @property
    def _over_selected(self) -> bool:
        """Whether the weights are a softmax over the selected logits."""
        gate = self.block.gate
        return bool(gate.score_func == "softmax" and not gate.softmax_before_topk)

    @property
    def _divides(self) -> bool:
        gate = self.block.gate
        return bool(gate.norm_topk_prob and gate.topk > 1)

    def attach(self, frozen_routers: FrozenRouters) -> None:
        """Have the gate trained through all experts. ``frozen_routers`` tells of them, for all layers."""
        self._frozen_routers = frozen_routers
        # First of the hooks, also where FSDP has its own already. Where the experts are an FSDP unit by themselves, its
        # hook must see our output, or the backward would read their weights before FSDP has gathered them; and after
        # its hook on the gate, the gate's weight may be in parts.
        self._hooks = [
            self.block.gate.register_forward_hook(self._after_gate, prepend=True),
            self.block.experts.register_forward_hook(self._after_experts, prepend=True),
            self.block.register_forward_hook(self._after_block, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the layer as it was. Does nothing the second time."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._logits = None

    # The graph that torch.compile makes of a layer breaks here: what is between two hooks is kept on this object.

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # in torch's own words
    def _after_gate(self, gate: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._logits = None
        if not torch.is_grad_enabled():
            return None
        if self.config.estimator == "conventional":
            return None
        if self.router_is_frozen:
            assert self._frozen_routers is not None
            self._frozen_routers.warn_of(self)
            return None
        # As the gate makes them, which returns but the selected ones: one product, small beside an expert's.
        x = args[0]
        dtype = gate.gate_precision or x.dtype
        bias = None if gate.bias is None else gate.bias.to(dtype)
        logits = F.linear(x.to(dtype), gate.weight.to(dtype), bias)
        weights, self._logits = _Together.apply(output[0], logits)  # type: ignore[no-untyped-call]
        return weights, *output[1:]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # in torch's own words
    def _after_experts(self, experts: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        logits, self._logits = self._logits, None
        if logits is None or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        x, mask, weights, index = args
        scores = router_scores(logits, self.score)
        if self._recurring.due():
            # Out of sight of who records operations, as selective checkpointing, whose recomputation comes without.
            with torch.no_grad(), _disable_current_modes():
                self._check(logits, scores, x, mask, weights, index, output)
            self._recurring.made()
        return straight_through(
            output,
            scores,
            x=x,
            index=index,
            weights=weights,
            experts=functools.partial(self._dots, mask, compute_dtype(x), index.shape[-1]),
            score=self.score,
            renormalised=self.renormalised,
            config=self.config,
            epsilon=self.epsilon,
        )

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = None  # left there by an error, or by a recomputation that ended early

    def _dots(
        self, mask: Tensor, dtype: torch.dtype, selected: int, x: Tensor, g: Tensor, known: Known | None
    ) -> Tensor:
        """In the backward, with the weights as they are then: a `densemixer_core.ExpertDots`.

        Args:
            mask: Which tokens are no padding, [tokens]. Padding goes through no expert.
            dtype: In which the host multiplied.
            selected: How many experts a token goes through.
        """
        stacked, spread = read_experts(self.name, self.block.experts, self._formula)
        g = g * mask.unsqueeze(-1)
        dots = stacked_dots if spread is None else spread.dots
        return dots(x, g, known, experts=stacked, selected=selected, dtype=dtype, config=self.config)

    def _check(
        self, logits: Tensor, scores: Tensor, x: Tensor, mask: Tensor, weights: Tensor, index: Tensor, output: Tensor
    ) -> None:
        """Compare what is taken for granted with what the layer did, see `densemixer_adapters.transformers.checks`.

        Collective where the experts are spread over ranks: all of these check in the same forwards.
        """
        coarsest = max(logits.dtype, weights.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        try:
            check_routing(scores, index, weights.to(coarsest), self.renormalised, self.epsilon)
        except RoutingMismatchError as error:
            raise RoutingMismatchError(
                f"{self.name}.gate: DenseMixer takes its scores to be the {self.score} of its logits, but {error}. "
                "This version of Automodel, or a patch of it, routes differently; the gradient would be wrong. Switch "
                "DenseMixer off."
            ) from None
        stacked, spread = read_experts(self.name, self.block.experts, self._formula)
        evaluate = functools.partial(routed_output, experts=stacked)
        if spread is not None:
            evaluate = functools.partial(spread.routed_output, experts=stacked, rows=TOKENS)
        weights = weights * mask.unsqueeze(-1)
        try:
            check_output(output, x, index, weights, evaluate, compute_dtype(x))
        except OutputMismatchError as error:
            raise OutputMismatchError(
                f"{self.name}.experts ({type(self.block.experts).__name__}): {error}. DenseMixer computes with the "
                "experts' weights and the activation of their configuration, so its gradient would be wrong. Something "
                "has replaced one of these, or changes what the experts return; undo that, or switch DenseMixer off."
            ) from None


class _Together(torch.autograd.Function):
    """The identity on weights and logits, whose backward comes once the gradients of both are there.

    Where the gate is an FSDP unit by itself, FSDP brings its weight back when the gradient of what the gate returned
    is there. That is the weights that come from here; so the product above finds it.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return weights.view_as(weights), logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, weights: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return weights, logits
