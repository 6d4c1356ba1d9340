"""The identity function whose backward teaches the scores of unselected experts.

It sits on the output of the host's own sparse forward, which it returns unchanged. Nothing is computed for an
unselected expert until the backward, where g is known and [tokens, experts] scalars are all that is needed, see
`experts`.

There are two nodes in the graph: one on the output, which hands g on to both the experts and the other one; and that
other one, which turns g into the gradient of the scores. So a backward that asks for the experts' gradients alone
doesn't evaluate an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from densemixer_core.config import DenseMixerConfig
from densemixer_core.control import Known
from densemixer_core.estimators import extra_score_gradient
from densemixer_core.routing import score_sensitivity, selection
from densemixer_core.sampled import stacked_dots
from densemixer_core.weights import ExpertLayout, ExpertWeights, StackedExperts, compute_dtype

ExpertDots = Callable[[Tensor, Tensor, Known | None], Tensor]
"""From x and g, [tokens, hidden] each, and None, to ⟨g, E_j(x)⟩ as `expert_dots` returns it, [tokens, experts]. For a
budget below 1 there is what is known of the pairs in place of the None, and it returns what `sampled_dots` returns."""


class Listener(Protocol):
    """Who wants to know what happens in the backward. It is called there, in whatever thread runs it."""

    def pairs_left_out(self, count: Tensor) -> None:
        """So many pairs of a token and an unselected expert count as nothing, a scalar tensor: see `straight_through`.

        Called for each backward in float16, also where there are none.
        """

    def experts_written_to(self) -> None:
        """The experts' weights have been written to in place between the layer's forward and its backward."""


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
    epsilon: float = 0.0,
    weight_scale: Tensor | None = None,
    listener: Listener | None = None,
) -> Tensor:
    """Return ``output`` unchanged, with a gradient from all experts for ``scores``.

    Under ``torch.no_grad()``, in inference mode, or with scores that need no gradient, ``output`` itself is returned
    and no torch operation runs; likewise for no tokens, unless the experts are a function, which other ranks may await.

    In float16 an expert that the host didn't select may overflow where the selected ones don't. A pair whose inner
    product isn't finite, while x and g of its token are, adds nothing: its score trains conventionally.

    Args:
        output: The routed experts' output y = Σ_selected w_j E_j(x), without shared experts, [..., hidden].
        scores: p of all experts, [tokens, experts]. Selected experts' scores receive zero from here: they have the
            host's own gradient.
        x: The experts' input, [..., hidden]. It receives no gradient from here but through the scores.
        index: The experts that the host selected, [tokens, k].
        weights: The weights w that the host gave them, [tokens, k].
        experts: The experts; their weights receive no gradient from here. Parameters that a framework frees or
            partitions after the forward must be live again, as the same tensors, when the backward comes: they are kept
            by reference and used as they are then. Weights with a derivation are not kept: the backward computes them
            again. Where they aren't stacked, or not all in this process, a function that evaluates them: it is called
            in the backward, without gradient tracking.
        score: The function that made the scores of logits, one of `routing.SCORE_FUNCTIONS`.
        renormalised: Whether the host divides the selected scores by their sum.
        config: The options.
        epsilon: What the host adds to that sum.
        weight_scale: The host's own factor on each expert's weight, [experts], if it has one. It must be the `scale` of
            the experts, whose outputs are then meant without it.
        listener: Who is told of what happens in the backward.

    Raises:
        RuntimeError: A second derivative is taken, gradients are batched (``is_grads_batched``), or in forward mode.
    """
    if config.estimator == "conventional" or not (torch.is_grad_enabled() and scores.requires_grad):
        return output
    if isinstance(experts, StackedExperts) and not len(index):
        return output
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(output).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "DenseMixer has no forward-mode derivative: a straight-through estimate exists in the backward alone. Use "
            "torch.autograd in reverse mode, or call handle.remove() first."
        )
    selected, factor, total = selection(scores, index, weights, renormalised, epsilon, weight_scale)
    sampled, centered = config.budget < 1, config.estimator == "centered" and renormalised
    how = _Stacked.of(experts) if isinstance(experts, StackedExperts) else experts
    saved = [x, index, factor, scores, total if centered or sampled else None]
    # ⟨g, y⟩ follows from the inner products of the selected experts, where all are evaluated. Otherwise y is copied:
    # whoever comes next may write to the host's own in place.
    saved.append(output.detach().clone() if sampled else selected if centered else None)
    if isinstance(how, _Stacked) and torch.compiler.is_compiling():
        saved += how.kept  # torch.compile follows no other way
        how = dataclasses.replace(how, kept=())
    half = (how.dtype if isinstance(how, _Stacked) else compute_dtype(x)) == torch.float16
    carrier = _ScoreGradient.apply(scores, output, tuple(saved), _Call(how, score, config, centered, half, listener))  # type: ignore[no-untyped-call]
    return _HandOn.apply(output, carrier)  # type: ignore[no-any-return,no-untyped-call]


@dataclasses.dataclass(frozen=True)
class _Stacked:
    """Stacked experts, from the forward to the backward.

    Attributes:
        kept: The weights, or what they are derived from. By reference: FSDP and ZeRO-3 free a parameter's data after
            the forward and bring it back for the backward. `save_for_backward` would do that too, but it refuses
            tensors that anybody has written to since, as PEFT and other forwards do, where the host never looks again.
        versions: How often each had been written to in the forward; None where that doesn't matter.
    """

    layout: ExpertLayout
    compute: Callable[[ExpertWeights], ExpertWeights] | None
    dtype: torch.dtype
    kept: tuple[Tensor | None, ...]
    versions: tuple[int, ...] | None

    @classmethod
    def of(cls, experts: StackedExperts) -> _Stacked:
        derivation, dtype = experts.derivation, compute_dtype(experts.weights.up)
        if derivation is not None:
            return cls(experts.layout, derivation.compute, dtype, tuple(derivation.sources), None)
        kept = tuple(experts.weights)
        return cls(experts.layout, None, dtype, kept, None if torch.compiler.is_compiling() else _versions(kept))

    def dots(self, x: Tensor, g: Tensor, known: Known | None, selected: int, config: DenseMixerConfig) -> Tensor:
        """What an `ExpertDots` returns."""
        weights = ExpertWeights(*self.kept)  # type: ignore[arg-type]
        experts = StackedExperts(weights if self.compute is None else self.compute(weights), self.layout)
        return stacked_dots(x, g, known, experts=experts, selected=selected, dtype=self.dtype, config=config)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the backward needs besides tensors.

    Attributes:
        half: Whether the experts compute in float16, be it that autocast has them do so.
    """

    how: _Stacked | ExpertDots
    score: str
    config: DenseMixerConfig
    centered: bool
    half: bool
    listener: Listener | None


class _HandOn(torch.autograd.Function):
    """The identity on the output; its gradient is that of the carrier too."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, carrier: Tensor) -> Tensor:
        # No view: to write to a view that such a function returns in place, as others' hooks do, is an error.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g


class _ScoreGradient(torch.autograd.Function):
    """From scores to a carrier: zeros without memory, in the shape of the output, whose gradient is g.

    The output is an input too, though it gets no gradient: so this comes before the experts in the backward, and an
    error here (out of memory, in a recomputation) leaves nothing of them waiting in the engine.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, output: Tensor, saved: tuple[Tensor | None, ...], call: _Call) -> Tensor:
        # `saved` comes as a tuple, so that its tensors are no inputs of this node: x and the weights get no edge to it.
        ctx.save_for_backward(*saved)
        ctx.call = call
        return output.new_zeros(()).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and not _is_wanted(ctx.next_functions[0][0]):
            return None, None, None, None
        if not torch.compiler.is_compiling() and _is_batched(g):
            raise RuntimeError(
                "DenseMixer doesn't work with batched gradients (is_grads_batched, vmap, a vectorised Jacobian). Take "
                "them one by one with torch.autograd, or call handle.remove() first."
            )
        with torch.no_grad():
            extra = _extra_gradient(g, ctx.saved_tensors, ctx.call)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # under create_graph
            x, _, _, scores, *_ = ctx.saved_tensors
            weights = ctx.call.how.kept if isinstance(ctx.call.how, _Stacked) else ()
            extra = _Undifferentiable.apply(extra, g, x, scores, *weights)  # type: ignore[no-untyped-call]
        return extra, None, None, None


class _Undifferentiable(torch.autograd.Function):
    """The extra gradient as a function of all that it follows from, whose derivative isn't known."""

    @staticmethod
    def forward(ctx: Any, extra: Tensor, *sources: Tensor | None) -> Tensor:
        return extra.view_as(extra)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "DenseMixer's gradient has no second derivative: it is a straight-through estimate. Take second "
            "derivatives without DenseMixer: call handle.remove() first, or use the estimator 'conventional'."
        )


def _extra_gradient(g: Tensor, saved: tuple[Any, ...], call: _Call) -> Tensor:
    """The gradient that DenseMixer adds to the scores, [tokens, experts]."""
    x, index, factor, scores, total, y_or_selected, *kept = saved
    x, rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    how, known, mean = call.how, None, None
    if call.config.budget < 1:
        sensitivity = (score_sensitivity(scores, call.score) * factor).scatter(-1, index, 0.0)
        mean = _mean_of_output(rows, y_or_selected, factor * total)
        known = Known(sensitivity, mean.nan_to_num(0.0, 0.0, 0.0), float(call.centered))
    if isinstance(how, _Stacked):
        if how.versions is not None and how.versions != _versions(how.kept) and call.listener is not None:
            call.listener.experts_written_to()
        how = dataclasses.replace(how, kept=tuple(kept)) if kept else how
        dots = how.dots(x, rows, known, index.shape[-1], call.config)
    else:
        dots = how(x, rows, known)
    dots = dots.to(factor.dtype)
    if call.centered and known is None:
        # y = c·Σ_selected p_j·E_j(x), and c·(S + ε) is the routed scaling factor.
        mean = (dots.gather(-1, index) * y_or_selected).sum(-1, keepdim=True) / total
    extra = extra_score_gradient(dots, index, factor, mean if call.centered else None)
    return _without_overflow(extra, x, rows, call.listener) if call.half else extra


def _mean_of_output(g: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """⟨g, y⟩/Σ_selected w, [tokens, 1], from that sum; zero where all weights are zero."""
    y = y.reshape(g.shape)
    if g.dtype == torch.float16:  # whose products may be below its range
        g, y = g.to(weights.dtype), y.to(weights.dtype)
    along = torch.sum(g * y, -1, True, dtype=weights.dtype)
    return torch.where(weights == 0, 0.0, along / weights)


def _without_overflow(extra: Tensor, x: Tensor, g: Tensor, listener: Listener | None) -> Tensor:
    """Zero where it isn't finite, except for tokens whose x or g isn't: these are the host's affair."""
    finite = torch.isfinite(x).all(-1, keepdim=True) & torch.isfinite(g).all(-1, keepdim=True)
    overflowed = ~torch.isfinite(extra) & finite
    if listener is not None:
        listener.pairs_left_out(overflowed.sum())
    return extra.masked_fill(overflowed, 0.0)


def _is_wanted(node: Any) -> bool:
    """Whether the backward that is running needs the gradient that goes to this node of the graph."""
    if node is None or hasattr(node, "variable"):  # of a leaf, the engine can't say
        return True
    return torch._C._will_engine_execute_node(node)


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for several, under ``is_grads_batched`` or ``torch.vmap``: only these have no storage."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(-1 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)
