"""From a router's output to its scores, and from its scores to the weights that the layer uses."""

from __future__ import annotations

from typing import NamedTuple

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
        # The largest score apart: 1 − p is then what the others sum to, which beside 1 would vanish in rounding.
        top = scores.argmax(-1, keepdim=True)
        rest = scores.scatter(-1, top, 0.0)
        away = (1 - scores).scatter(-1, top, rest.sum(-1, keepdim=True))
        squares = rest.square().sum(-1, keepdim=True)
        others = squares - rest.square() + scores.gather(-1, top).square()
        return scores * (away.square() + others.scatter(-1, top, squares)).sqrt()
    return _slope(scores, score)


def _slope(scores: Tensor, score: str) -> Tensor:
    """dp_j/dz_j of a score function that treats each logit alone, from p_j."""
    if score == "sigmoid":
        return scores * (1 - scores)
    # p = √softplus(z), and softplus'(z) = 1 − e^(−softplus(z)).
    return -torch.expm1(-scores.square()) / (2 * scores).clamp(min=torch.finfo(scores.dtype).tiny)


def are_probabilities(router_output: Tensor) -> bool | None:
    """Whether a router's output has been through a softmax already: nonnegative rows that sum to one.

    Some routers of transformers return logits and others probabilities in the same place. Logits that pass by accident
    would need rows that sum to one within rounding, for every token. Synchronises with the device.

    Returns:
        None where that can't be told: there is no row, or none of numbers.
    """
    rows = router_output.detach()
    total = rows.sum(-1, dtype=torch.float64)
    known = ~total.isnan()  # an infinite one is known to be no probability: logits are masked by it
    passes = (rows >= 0).all(-1) & ((total - 1).abs() <= _tolerance(rows.dtype))
    some, all_pass = torch.stack([known.any(), (passes | ~known).all()]).tolist()
    return bool(all_pass) if some else None


class Selection(NamedTuple):
    """What a layer's routing says about its selected experts, detached.

    Attributes:
        scores: p of the selected experts, [tokens, k].
        factor: c, the factor between a score and the weight that the layer uses, w_j = c·p_j, [tokens, 1]: without
            renormalisation the layer's routed scaling factor a; with it a/(S + ε), for the sum S of the selected scores
            and the ε that the layer adds to it.
        total: S + ε with renormalisation, [tokens, 1].
    """

    scores: Tensor
    factor: Tensor
    total: Tensor


def selection(
    scores: Tensor,
    index: Tensor,
    weights: Tensor,
    renormalised: bool,
    epsilon: float = 0.0,
    scale: Tensor | None = None,
) -> Selection:
    """Read c off the weights that the layer really used.

    Where the scores of all selected experts have underflowed to zero, c is its limit: a/ε, with the a of the other
    tokens, or 1 if there are none.

    Args:
        scores: p of all experts, [tokens, experts].
        index: The selected experts, [tokens, k].
        weights: Their weights w, [tokens, k].
        renormalised: Whether the layer divides the selected scores by their sum.
        epsilon: What it adds to that sum.
        scale: A factor of each expert that the weights contain besides, [experts], if there is one.
    """
    selected = scores.detach().gather(-1, index)
    total = selected.sum(-1, keepdim=True) + epsilon
    unit = selected if scale is None else selected * scale.detach().to(selected.dtype)[index]
    size = unit.abs().sum(-1, keepdim=True)
    factor = weights.detach().to(scores.dtype).abs().sum(-1, keepdim=True) / size
    if renormalised and not epsilon:  # the layer itself would be dividing by zero
        return Selection(selected, factor, total)
    scaling = (factor * total if renormalised else factor).nan_to_num(0.0, 0.0)
    most = scaling.amax() if len(scaling) else scaling.new_ones(())
    limit = torch.where(most > 0, most, 1.0) / (epsilon if renormalised else 1.0)
    return Selection(selected, torch.where(size == 0, limit, factor), total)


def check_routing(
    scores: Tensor,
    index: Tensor,
    weights: Tensor,
    renormalised: bool,
    epsilon: float = 0.0,
    scale: Tensor | None = None,
) -> bool:
    """Compare a router's declaration with the weights that its layer really used. Synchronises with the device.

    Tokens whose scores or weights are not finite, all zero, or below the smallest normal number of their dtype, say
    nothing, and neither does a batch without tokens.

    Args:
        scores: As in `selection`, and so are all others.

    Returns:
        Whether any token has said something.

    Raises:
        RoutingMismatchError: The weights are not proportional to the scores of their token, or (for more than one
            token) renormalised weights do not sum to the same for all tokens, or weights without renormalisation are
            not the same multiple of the score for all tokens.
    """
    tolerance, smallest = _tolerance(weights.dtype), torch.finfo(weights.dtype).tiny
    weights = weights.detach().to(scores.dtype)
    selected, factor, total = selection(scores, index, weights, renormalised, epsilon, scale)
    unit = selected if scale is None else selected * scale.detach().to(selected.dtype)[index]
    size = weights.abs().amax(-1)
    some = (size > 0) & (selected.amax(-1) >= smallest) & (unit.abs().amax(-1) > 0)
    telling = (some & size.isfinite() & factor.isfinite().squeeze(-1)).unsqueeze(-1)
    error = torch.where(telling, (weights - factor * unit).abs() - tolerance * size.unsqueeze(-1), 0.0)
    if bool((error > 0).any().item()):
        raise RoutingMismatchError("its weights are not proportional to those scores")
    constant = (factor * total if renormalised else factor)[telling]
    if constant.numel() and bool((constant.amax() - constant.amin() > tolerance * constant.amax()).item()):
        what = "their sum" if renormalised else "their ratio to the scores"
        declared = "renormalised" if renormalised else "not renormalised"
        raise RoutingMismatchError(f"its weights are declared to be {declared}, but {what} differs between tokens")
    return constant.numel() > 0


def _tolerance(dtype: torch.dtype) -> float:
    """Relative rounding error to allow for values that were at some point of this dtype."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)
