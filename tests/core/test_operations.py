"""What DenseMixer costs, counted rather than timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import Case, Layer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from densemixer_core import DenseMixerConfig, ExpertWeights, StackedExperts, router_scores, straight_through

CASE = Case(tokens=64, hidden=16, ffn=8, experts=12, k=2)


def operations(config: DenseMixerConfig) -> int:
    """Floating-point operations of the matrix products in forward and backward."""
    layer = Layer(CASE)
    layer.index  # noqa: B018  # made once, before counting
    with FlopCounterMode(display=False) as counter:
        layer.ours(config)
    return counter.get_total_flops()


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("budget", [1, 0.25, 0.1])
def test_matrix_products(budget: float, estimator: str) -> None:
    pairs, means = CASE.tokens * CASE.experts, 0
    if budget < 1:
        pairs, means = round(budget * CASE.tokens * (CASE.experts - CASE.k)), pairs
    extra = operations(DenseMixerConfig(estimator, budget=budget)) - operations(DenseMixerConfig("conventional"))
    assert extra == pairs * 6 * CASE.hidden * CASE.ffn + means * 2 * CASE.hidden


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("budget", [1, 0.25])
def test_nothing_waits_for_the_device(budget: float) -> None:
    """No operation on the way hands a number to Python, or has a result whose size depends on numbers."""
    layer = Layer(Case(tokens=64, hidden=16, ffn=8, bias=True, post_norm=True, identities=1), torch.float32)
    through = layer.attached(DenseMixerConfig(budget=budget))
    with Calls() as calls:
        torch.autograd.grad(through, layer.router, layer.g)
    assert calls.names.count("_grouped_mm") == (0 if budget == 1 else 4)  # pilot and draw
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal"}
    assert not waiting & set(calls.names)


def test_the_number_of_calls_grows_with_experts_and_not_with_tokens() -> None:
    def count(tokens: int, experts: int, budget: float) -> int:
        layer = Layer(Case(tokens=tokens, experts=experts, hidden=16, ffn=8), torch.float32)
        through = layer.attached(DenseMixerConfig(budget=budget))
        with Calls() as calls:
            torch.autograd.grad(through, layer.router, layer.g)
        return len(calls.names)

    assert count(64, 8, 1) == count(256, 8, 1) < count(64, 16, 1)
    assert count(64, 8, 0.25) == count(256, 8, 0.25)


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
@pytest.mark.parametrize("budget", [1, 0.25])
@pytest.mark.parametrize(
    "change",
    [dict(), dict(bias=True, scale=True, identities=1, zeros=1), dict(apart=True), dict(post_norm=True)],
    ids=str,
)
def test_nothing_is_made_on_another_device(change: dict[str, Any], budget: float, estimator: str) -> None:
    """On one that isn't the CPU and has shapes without numbers; there, tensors of two devices don't mix."""
    layer = Layer(
        Case(tokens=64, hidden=16, ffn=8, **change), torch.bfloat16
    )  # all that torch groups products of there

    def there(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").requires_grad_(tensor.requires_grad)

    with FakeTensorMode(allow_non_fake_inputs=False):
        x, router, g = map(there, (layer.x, layer.router, layer.g))
        index = torch.zeros(64, layer.case.k, dtype=torch.int64, device="meta")
        scores = router_scores(x @ router.t(), "softmax")
        through = straight_through(
            torch.zeros_like(x),
            scores,
            x=x,
            index=index,
            weights=scores.detach().gather(1, index),
            experts=StackedExperts(ExpertWeights(*(w if w is None else there(w) for w in layer.weights)), layer.layout),
            score="softmax",
            renormalised=True,
            config=DenseMixerConfig(estimator, budget=budget),
        )
        (gradient,) = torch.autograd.grad(through, router, g)
        assert (gradient.shape, gradient.device.type) == (router.shape, "meta")
        with pytest.raises(RuntimeError, match="device"):
            gradient + torch.zeros(router.shape)
