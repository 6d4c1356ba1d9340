"""The identity function whose backward teaches the scores of unselected experts.

It sits on the output of the host's own sparse forward, which it returns unchanged. Nothing is computed for an
unselected expert until the backward, where g is known and [tokens, experts] scalars are all that is needed, see
`experts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from densemixer_core.config import DenseMixerConfig
from densemixer_core.estimators import extra_score_gradient
from densemixer_core.experts import ExpertLayout, ExpertWeights, StackedExperts, expert_dots, sampled_dots
from densemixer_core.routing import score_sensitivity, weight_per_score
from densemixer_core.sampling import share_of_pairs

ExpertDots = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""From x and g, [tokens, hidden] each, and None, to ⟨g, E_j(x)⟩ as `expert_dots` returns it, [tokens, experts], and
None. For a budget below 1 there are sensitivities, [tokens, experts], in place of the first None, and it returns what
`sampled_dots` returns."""


def straight_through(
    output: Tensor,
    scores: Tensor,
    *,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: StackedExperts | ExpertDots,
    score: str,
    renormalised: bool,
    config: DenseMixerConfig,
) -> Tensor:
    """Return ``output`` unchanged, with a gradient from all experts for ``scores``.

    Under ``torch.no_grad()``, in inference mode, or with scores that need no gradient, ``output`` itself is returned
    and no torch operation runs.

    Args:
        output: The routed experts' output y = Σ_selected w_j E_j(x), without shared experts, [..., hidden].
        scores: p of all experts, [tokens, experts]. Selected experts' scores receive zero from here: they have the
            host's own gradient.
        x: The experts' input, [..., hidden]. It receives no gradient from here but through the scores.
        index: The experts that the host selected, [tokens, k].
        weights: The weights w that the host gave them, [tokens, k].
        experts: The experts; their weights receive no gradient from here. Parameters that a framework frees or
            partitions after the forward must be live again, as the same tensors, when the backward comes. Weights with
            a derivation are not kept: the backward computes them again. Where they aren't stacked, or not all in this
            process, a function that evaluates them: it is called in the backward, without gradient tracking.
        score: The function that made the scores of logits, one of `routing.SCORE_FUNCTIONS`.
        renormalised: Whether the host divides the selected scores by their sum.
        config: The options.
    """
    if config.estimator == "conventional" or not (torch.is_grad_enabled() and scores.requires_grad):
        return output
    kept: tuple[Tensor | None, ...] = ()
    how: _Stacked | ExpertDots
    if isinstance(experts, StackedExperts):
        derivation = experts.derivation
        kept = experts.weights if derivation is None else derivation.sources
        compute = None if derivation is None else derivation.compute
        how = _Stacked(experts.layout, compute, _compute_dtype(experts.weights.up))
    else:
        how = experts
    weights = weights.detach().to(scores.dtype)
    centered = config.estimator == "centered" and renormalised
    saved = (
        x.detach(),
        index,
        weight_per_score(scores, index, weights),
        scores.detach() if config.budget < 1 else None,
        *((output.detach(), weights.sum(-1, keepdim=True)) if centered else (None, None)),
        *kept,
    )
    return _StraightThrough.apply(output, scores, saved, _Call(how, score, config))  # type: ignore[no-any-return,no-untyped-call]


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """How to compute with stacked experts, besides their tensors."""

    layout: ExpertLayout
    compute: Callable[[ExpertWeights], ExpertWeights] | None
    dtype: torch.dtype

    def dots(
        self,
        x: Tensor,
        g: Tensor,
        sensitivity: Tensor | None,
        kept: Iterable[Tensor],
        selected: int,
        config: DenseMixerConfig,
    ) -> tuple[Tensor, Tensor | None]:
        """What an `ExpertDots` returns, from the tensors that were kept."""
        weights, workspace = ExpertWeights(*kept), config.workspace_mb << 20
        experts = StackedExperts(weights if self.compute is None else self.compute(weights), self.layout)
        if sensitivity is None:
            return expert_dots(x, g, experts, self.dtype, workspace), None
        count = share_of_pairs(len(x) * (sensitivity.shape[-1] - selected), config.budget)
        return sampled_dots(x, g, sensitivity, count, config.seed, experts, self.dtype, workspace)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the backward needs besides tensors."""

    how: _Stacked | ExpertDots
    score: str
    config: DenseMixerConfig


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, output: Tensor, scores: Tensor, saved: tuple[Tensor | None, ...], call: _Call
    ) -> Tensor:
        # `saved` comes as a tuple, so that its tensors are no inputs of this node: x and the weights get no edge to it.
        # `save_for_backward` keeps a leaf by reference. That is what lets FSDP and ZeRO-3 free a parameter's data after
        # the forward and bring it back for the backward; anything else would keep the old data alive or see none.
        ctx.save_for_backward(*saved)  # type: ignore[arg-type]  # None is allowed
        ctx.call = call  # type: ignore[attr-defined]
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        how, score, config = ctx.call.how, ctx.call.score, ctx.call.config
        x, index, scale, scores, y, total, *kept = ctx.saved_tensors
        x, rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        sensitivity = None
        if scores is not None:
            sensitivity = (score_sensitivity(scores, score) * scale).scatter(-1, index, 0.0)
        if isinstance(how, _Stacked):
            dots, factor = how.dots(x, rows, sensitivity, kept, index.shape[-1], config)
        else:
            dots, factor = how(x, rows, sensitivity)
        mean = None if y is None else torch.sum(rows * y.reshape(rows.shape), -1, True, dtype=scale.dtype) / total
        extra = extra_score_gradient(dots.to(scale.dtype), index, scale, mean)
        return g, extra if factor is None else extra * factor.to(scale.dtype), None, None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the host multiplies by ``weight``: autocast's where it is on (it leaves float64 alone)."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
