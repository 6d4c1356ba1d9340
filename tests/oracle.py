"""The method, dense and obvious: every expert on every token, the formula written out, autograd for the rest.

Nothing here is shared with the product. Run in float64 it is the truth for all gradients; run in a half precision it is
what the original implementation does (all experts in autograd, straight-through output), the yardstick for our error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode


@dataclasses.dataclass
class Formula:
    """What the formula needs to know about a layer.

    ``experts`` are E_j, functions of [tokens, hidden]; ``score`` turns logits into p.
    """

    experts: list[Callable[[Tensor], Tensor]]
    score: Callable[[Tensor], Tensor]
    renormalised: bool
    scaling: float = 1.0
    epsilon: float = 0.0  # what a model adds to the sum of the selected scores


def densemixer(x: Tensor, logits: Tensor, index: Tensor, formula: Formula, estimator: str) -> Tensor:
    """The routed output with the gradients of ``estimator``; x [n, hidden], logits [n, experts], index [n, k]."""
    p = formula.score(logits)
    selected = torch.zeros_like(p).scatter(1, index, 1.0)
    outputs = torch.stack([expert(x) for expert in formula.experts], 1)  # [tokens, experts, hidden]

    total = (p * selected).sum(1, keepdim=True)
    c = formula.scaling / (total + formula.epsilon) if formula.renormalised else torch.full_like(total, formula.scaling)
    y = (outputs * (c * p * selected).unsqueeze(2)).sum(1)
    if estimator == "conventional":
        return y

    constant = outputs.detach()
    if estimator == "centered" and formula.renormalised:
        constant = constant - y.detach().unsqueeze(1) / formula.scaling
    through = (constant * (c.detach() * p * (1 - selected)).unsqueeze(2)).sum(1)
    return y + through - through.detach()


def gated_expert(
    gate: Tensor, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """down · (activation(gate · x) ∘ (up · x)), weights as [out, in]."""
    return lambda x: (activation(x @ gate.T) * (x @ up.T)) @ down.T


class Float64(TorchFunctionMode):
    """Lets a model's own code compute in float64 all the way: where it asks for float32, it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        if func is Tensor.backward:
            return self._backward(args[0], kwargs["gradient"])
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})

    def _backward(self, loss: Tensor, gradient: Tensor | None) -> None:
        """The same in a backward that runs Python code: the engine itself, since torch's functions switch modes off."""
        gradient = torch.ones_like(loss) if gradient is None else gradient
        with self:
            _engine_run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, computed in float64."""
    truth = truth.double()
    return ((value.to(truth) - truth).norm() / truth.norm()).item()


def worst_error(value: Tensor, truth: Tensor) -> float:
    """max |value − truth| / max |truth|, computed in float64."""
    truth = truth.double()
    return ((value.to(truth) - truth).abs().max() / truth.abs().max()).item()


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each within the tolerance of the largest value of its truth."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        error, size = (value.double().abs().max().item() for value in (ours[name] - expected, expected))
        assert error <= tolerance * size, name
