"""The gradient of a router's weight by the formula: every expert for every token, autograd for the rest.

In float64 it is the truth. In the dtype of the layer it is what training through all experts would give there, the
yardstick for our error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def router_gradient(
    x: Tensor, g: Tensor, router: Tensor, up: Tensor, down: Tensor, index: Tensor, estimator: str, dtype: torch.dtype
) -> Tensor:
    """The gradient that DenseMixer gives to the router of a layer with softmax scores and gated SiLU experts.

    The weights of the selected experts are renormalised, as those of Qwen3-MoE.

    Args:
        x: The layer's input, [tokens, hidden].
        g: The gradient of its output, [tokens, hidden].
        router: The router's weight, [experts, hidden].
        up: Gate and up projections, [experts, 2·ffn, hidden].
        down: [experts, hidden, ffn].
        index: The selected experts, [tokens, k].
        estimator: ``densemixer`` or ``centered``.
        dtype: In which all is computed.

    Returns:
        [experts, hidden].
    """
    x, g, up, down = (tensor.detach().to(dtype) for tensor in (x, g, up, down))
    router = router.detach().to(dtype).requires_grad_()
    gate, value = torch.einsum("td,ewd->tew", x, up).chunk(2, -1)
    dots = torch.einsum("tef,edf,td->te", F.silu(gate) * value, down, g)
    p = F.softmax(x @ router.t(), -1)
    selected = torch.zeros_like(p).scatter(1, index, 1.0)
    c = 1 / (p * selected).sum(1, keepdim=True)
    along = (c * p * selected * dots).sum(1, keepdim=True)  # ⟨g, y⟩
    others = dots - along.detach() if estimator == "centered" else dots
    through = (c.detach() * p * (1 - selected) * others).sum()
    return torch.autograd.grad(along.sum() + through, router)[0]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖."""
    truth = truth.double()
    return float((value.double() - truth).norm() / truth.norm())
