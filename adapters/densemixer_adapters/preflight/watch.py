"""What passes by in a layer in a forward and its backward: the edge of the selection, and what a swap there would gain.

An estimator gives the score p_j of each expert a gradient G_j. To first order, the loss changes by p_j·G_j − p_m·G_m if
an unselected expert j takes the place of the selected expert m. That is the derivative of mixing the two, of giving m's
place to j by degrees. For selected experts G is the model's own gradient; for the others it is that of ``centered``,
which is the derivative of joining the selection.

It is hindsight: it knows what each token's loss is. And it is the first order: a whole swap costs something in the
second, which no gradient knows (EVIDENCE.md has measured both).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densemixer_adapters.metrics.drift import logits_of, rows_of
from densemixer_adapters.observer import Forward
from densemixer_adapters.preflight.edge import Edge, gaps_of
from densemixer_adapters.transformers.experts import ExpertsInput, unwrap
from densemixer_adapters.transformers.layer import DenseMixerLayer


class Watch:
    """Of one layer, which has the estimator ``centered``, for one forward.

    It cuts off what DenseMixer adds: the gradient of the scores ends here, so all others are those of training without
    it.

    Args:
        layer: The layer. It is watched from now on.
    """

    def __init__(self, layer: DenseMixerLayer) -> None:
        self.layer = layer
        self._forward: Forward | None = None
        self._scores: Tensor | None = None
        layer.observer = self._observe

    def _observe(self, forward: Forward, output: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert scores is not None
        self._forward, self._scores = forward, scores.detach().requires_grad_()
        return output, self._scores

    @property
    def wanted(self) -> list[Tensor]:
        """The tensors whose gradients `edge` takes; none if the layer wasn't called."""
        return [] if self._forward is None or self._scores is None else [self._scores, self._forward.weights]

    def edge(self, extra: Tensor | None, weights_gradient: Tensor | None, mask: Tensor | None) -> Edge:
        """The edge as that forward had it.

        Args:
            extra: The gradient that DenseMixer gives the scores, [tokens, experts].
            weights_gradient: That of the selected experts' weights, [tokens, k].
            mask: Which tokens are no padding, on the CPU.
        """
        forward, scores, layer = self._forward, self._scores, self.layer
        assert forward is not None
        assert scores is not None
        scores = scores.detach()
        extra = torch.zeros_like(scores) if extra is None else extra
        weights = forward.weights.detach().to(scores.dtype)
        parts = torch.zeros_like(weights) if weights_gradient is None else weights * weights_gradient.to(scores.dtype)
        zeros = layer.scored_experts - layer.stacked_experts if layer.spec.further == "zero" else 0
        index = ExpertsInput(forward.x, forward.index, forward.weights).with_experts_of_none(zeros, scores).selected
        epsilon = layer.spec.epsilon_of(unwrap(layer.router)) if layer.renormalised else None
        changes = score_changes(scores, index, parts, extra, epsilon)
        best, following = swaps(changes, scores, index)
        logits = logits_of(forward.router_output.detach().reshape(scores.shape), layer.score)
        rows = rows_of(mask, len(index))
        return Edge(
            gaps_of(logits, index).cpu()[rows],
            index.shape[-1],
            self._sizes(forward.router_input, len(index)).cpu()[:, rows],
            best.cpu()[rows],
            following.cpu()[rows],
        )

    def _sizes(self, x: Tensor | None, tokens: int) -> Tensor:
        """‖x‖₁ and ‖x‖₂, [2, tokens]; NaN where more than one weight, or another one, moves the logits."""
        router = self.layer.router
        trained = [parameter.shape for parameter in router.parameters() if parameter.requires_grad]
        shape = unwrap(router).weight.shape if self.layer.router_is_linear else None
        if x is None or shape not in trained or not {*trained} <= {shape, shape[:1]}:  # an adapter has other shapes
            return torch.full((2, tokens), math.nan)
        x = x.detach().reshape(tokens, -1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        bias = float(shape[:1] in trained)  # the weight of one more input, which is 1
        return torch.stack([x.abs().sum(-1) + bias, (x.square().sum(-1) + bias).sqrt()])


def score_changes(scores: Tensor, index: Tensor, parts: Tensor, extra: Tensor, epsilon: float | None) -> Tensor:
    """p_j·G_j for all experts, [tokens, experts].

    Args:
        scores: p.
        index: The selected experts, [tokens, k].
        parts: w_i·dL/dw_i of their weights, [tokens, k].
        extra: G of unselected experts, [tokens, experts].
        epsilon: What the layer adds to the sum of the selected scores that it divides by; None if it doesn't divide.
    """
    if epsilon is not None:  # p_i is in the sum too: all weights fall where one score rises
        selected = scores.gather(-1, index)
        share = selected / (selected.sum(-1, keepdim=True) + epsilon)
        parts = parts - share * parts.sum(-1, keepdim=True)
    return (scores * extra).scatter(-1, index, parts)


def swaps(changes: Tensor, scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the loss falls for the best swap, and for that with the strongest unselected expert, [tokens] each.

    Args:
        changes: p_j·G_j, [tokens, experts].
        scores: p.
        index: The selected experts, [tokens, k].
    """
    weakest = index.gather(-1, scores.gather(-1, index).argmin(-1, keepdim=True))
    falls = changes.gather(-1, weakest) - changes
    others = scores.scatter(-1, index, 0.0)  # what can't be selected has the score 0 already
    falls = falls.masked_fill(others == 0, 0.0)
    following = falls.gather(-1, others.argmax(-1, keepdim=True)).squeeze(-1)
    return falls.amax(-1).clamp(min=0), following.clamp(min=0)
