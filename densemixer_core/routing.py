"""From a router's output to its scores, and from its scores to the weights that the layer uses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


class RoutingMismatchError(RuntimeError):
    """The weights that a layer uses do not follow from the scores that its router is declared to have."""


def router_scores(logits: Tensor, score: str) -> Tensor:
    """The scores p of all experts, at least in float32.

    Args:
        logits: [tokens, experts].
        score: One of `SCORE_FUNCTIONS`; ``"sqrtsoftplus"`` is √log(1 + eᶻ).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if score == "softmax":
        return logits.softmax(-1, dtype=dtype)
    if score == "sigmoid":
        return logits.to(dtype).sigmoid()
    if score == "sqrtsoftplus":
        return softplus(logits.to(dtype)).sqrt()
    raise ValueError(f"score must be one of {', '.join(SCORE_FUNCTIONS)}; got {score!r}")


def score_gradient_to_logits(gradient: Tensor, scores: Tensor, score: str) -> Tensor:
    """The gradient of the logits from that of the scores; all [tokens, experts]."""
    if score == "softmax":
        return scores * (gradient - (scores * gradient).sum(-1, keepdim=True))
    return gradient * _slope(scores, score)


def score_sensitivity(scores: Tensor, score: str) -> Tensor:
    """‖gradient of the logits‖ for a gradient of 1 at one of the scores; [tokens, experts]."""
    if score == "softmax":
        # Of the logits, z_i receives −p_i·p_j for i ≠ j, and z_j receives p_j·(1 − p_j).
        squares = scores.square().sum(-1, keepdim=True)
        return scores * (1 - 2 * scores + squares).clamp(min=0).sqrt()
    return _slope(scores, score)


def _slope(scores: Tensor, score: str) -> Tensor:
    """dp_j/dz_j of a score function that treats each logit alone, from p_j."""
    if score == "sigmoid":
        return scores * (1 - scores)
    # p = √softplus(z), and softplus'(z) = 1 − e^(−softplus(z)).
    return -torch.expm1(-scores.square()) / (2 * scores).clamp(min=torch.finfo(scores.dtype).tiny)


def are_probabilities(router_output: Tensor) -> bool:
    """Whether a router's output has been through a softmax already: nonnegative rows that sum to one.

    Some routers of transformers return logits and others probabilities in the same place. Logits that pass by accident
    would need rows that sum to one within rounding, for every token. Synchronises with the device.
    """
    rows = router_output.detach()
    error = (rows.sum(-1, dtype=torch.float64) - 1).abs()
    return bool(((rows >= 0).all() & (error <= _tolerance(rows.dtype)).all()).item())


def weight_per_score(scores: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """c, the factor between the weight that the layer uses and the score: w_j = c·p_j for the selected experts.

    1 without renormalisation, 1/Σ_selected p with it, times the layer's routed scaling factor.

    Args:
        scores: p of all experts, [tokens, experts].
        index: The selected experts, [tokens, k].
        weights: Their weights w, [tokens, k].

    Returns:
        [tokens, 1], detached, in the dtype of ``scores``.
    """
    selected = scores.detach().gather(-1, index)
    return weights.detach().to(scores.dtype).sum(-1, keepdim=True) / selected.sum(-1, keepdim=True)


def check_routing(scores: Tensor, index: Tensor, weights: Tensor, renormalised: bool) -> None:
    """Compare a router's declaration with the weights that its layer really used. Synchronises with the device.

    Args:
        scores: p of all experts according to the declared score function, [tokens, experts].
        index: The selected experts, [tokens, k].
        weights: Their weights w, [tokens, k].
        renormalised: Whether the layer is declared to divide the selected scores by their sum.

    Raises:
        RoutingMismatchError: The weights are not proportional to the scores of their token, or (for more than one
            token) renormalised weights do not sum to the same for all tokens, or weights without renormalisation are
            not the same multiple of the score for all tokens.
    """
    if weights.numel() == 0:
        return
    tolerance = _tolerance(weights.dtype)
    scale = weight_per_score(scores, index, weights)
    weights = weights.detach().to(scores.dtype)
    error = (weights - scale * scores.detach().gather(-1, index)).abs()
    if bool((error > tolerance * weights.amax(-1, keepdim=True)).any().item()):
        raise RoutingMismatchError("its weights are not proportional to those scores")
    total = weights.sum(-1)
    constant, what = (total, "their sum") if renormalised else (scale, "their ratio to the scores")
    if bool((constant.amax() - constant.amin() > tolerance * constant.amax()).item()):
        declared = "renormalised" if renormalised else "not renormalised"
        raise RoutingMismatchError(f"its weights are declared to be {declared}, but {what} differs between tokens")


def _tolerance(dtype: torch.dtype) -> float:
    """Relative rounding error to allow for values that were at some point of this dtype."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)
