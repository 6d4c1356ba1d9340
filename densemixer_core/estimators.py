"""What gradient the score of an unselected expert receives.

Notation, per token: g = dL/dy is the gradient of the layer's output, E_j(x) the output of expert j, p_j the router's
score of it, w_j = c·p_j the weight that the layer uses, y = Σ_selected w_j E_j(x).

=================  ==============================================================================
``conventional``   0: only selected experts teach the router
``densemixer``     c·⟨g, E_j(x)⟩: DenseMixer as published (Yao et al., "DenseMixer: Improving MoE
                   Post-Training with Precise Router Gradient", 2025, and its released code)
``centered``       c·⟨g, E_j(x) − y/Σ_selected w⟩ if the layer renormalises its weights, else the same
                   as ``densemixer``: the derivative of y with respect to p_j if j joined the selection
=================  ==============================================================================

The derivative behind ``centered``: with w_j = a·p_j/S and S = Σ_selected p, adding j to the selection gives
dy/dp_j = (a/S)·(E_j(x) − y/a), where a = Σ_selected w is 1 or the layer's routed scaling factor and c = a/S.

The scores of selected experts keep the host's own gradient in every estimator.
"""

from __future__ import annotations

from torch import Tensor

ESTIMATORS = ("conventional", "densemixer", "centered")


def extra_score_gradient(dots: Tensor, index: Tensor, scale: Tensor, mean: Tensor | None) -> Tensor:
    """The gradient that DenseMixer adds to the scores; zero for selected experts.

    Args:
        dots: ⟨g, E_j(x)⟩, shape [tokens, experts].
        index: The selected experts, [tokens, k].
        scale: c, [tokens, 1].
        mean: For ``centered``, where the layer renormalises: ⟨g, y⟩/Σ_selected w, [tokens, 1]. Otherwise None.

    Returns:
        [tokens, experts], in the dtype of ``dots``.
    """
    return ((dots if mean is None else dots - mean) * scale).scatter(-1, index, 0.0)
