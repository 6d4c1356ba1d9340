"""The fused kernel and all experts at once in Triton's interpreter, on the CPU.

`test_kernel.py` runs it, in a process of its own: Triton reads TRITON_INTERPRET=1 when it is imported, and it holds for
all of a process.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import oracle
import pytest
import torch
from interpreting import ELSEWHERE, FORMULAS, RAGGED, TRIAL, both, make
from layers import Case, Layer
from test_straight_through import LiveBytes
from torch import Tensor
from torch._dynamo.utils import counters

from densemixer_core import DenseMixerConfig, StackedExperts
from densemixer_core.kernel import at_once

pytest_plugins = ["interpreting"]


@torch.no_grad()
def truth_of(layer: Layer) -> Tensor:
    exact = Layer(layer.case)
    exact.weights = type(layer.weights)(*(None if w is None else w.double() for w in layer.weights))
    x, g = layer.x.double(), layer.g.double()
    return torch.stack([(exact.expert(j, x) * g).sum(-1) for j in range(layer.case.scored)], 1)


def assert_as_good(layer: Layer, kernel: Tensor, products: Tensor, dtype: torch.dtype) -> None:
    """No worse than the products in the same dtype by more than a few roundings of the largest value."""
    truth = truth_of(layer)
    assert kernel.dtype == torch.float32
    assert kernel.shape == products.shape == truth.shape
    allowed = (products.double() - truth).norm()
    allowed += 4 * torch.finfo(dtype).eps * truth.abs().max() * truth.numel() ** 0.5
    assert (kernel.double() - truth).norm() <= allowed
    assert not torch.equal(kernel, products)


@pytest.mark.parametrize("way", ELSEWHERE)
@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (dict(), torch.float32),
        (dict(transposed=True, bias=True), torch.bfloat16),
        (dict(bias=True, scale=True, identities=2, zeros=1), torch.float16),
        (dict(activation="interleaved", bias=True), torch.float32),
        (dict(activation="interleaved", transposed=True), torch.float16),
        (dict(activation="clamped", transposed=True, bias=True), torch.bfloat16),
        (dict(activation="clamped"), torch.float32),
        (dict(activation="ungated", bias=True, scale=True), torch.bfloat16),
        (dict(activation="ungated, squared", transposed=True, zeros=1), torch.float32),
        (dict(activation="ungated, tanh", bias=True), torch.float32),
        (dict(tokens=1, experts=1), torch.bfloat16),
        (dict(tokens=16, hidden=16, ffn=32, experts=3, bias=True), torch.float32),
        (dict(tokens=17, hidden=5, ffn=3, experts=5), torch.float32),
    ],
    ids=str,
)
def test_inner_products(
    change: dict[str, object],
    dtype: torch.dtype,
    way: str,
    launches: dict[str, list[int]],
    be_fastest: Callable[[str], None],
) -> None:
    be_fastest(way)
    layer = make(dataclasses.replace(RAGGED, **change), dtype)
    ours, products = both(layer)
    assert launches == {name: [TRIAL, layer.case.tokens] if name == way else [TRIAL] for name in ELSEWHERE}
    assert_as_good(layer, ours, products, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [1, 1000, 4000, 1 << 28])
def test_all_at_once_in_every_memory_bound(bound: int, dtype: torch.dtype, be_fastest: Callable[[str], None]) -> None:
    """In parts of one token, of one expert, of several experts that aren't all, and whole."""
    be_fastest("all at once")
    layer = make(dataclasses.replace(RAGGED, tokens=5, experts=3, bias=True))
    ours, products = both(layer, dtype, bound)
    torch.testing.assert_close(ours, products, rtol=0, atol=10 * torch.finfo(dtype).eps * products.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("bound", [1 << 13, 1 << 16])
@pytest.mark.parametrize("rounded", [False, True])
def test_temporaries_of_all_at_once_stay_below_the_bound(
    bound: int, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the copies of weights that another dtype takes, of all experts but one.

    Without the kernel, which makes no tensor: the interpreter holds on to those of its last call.
    """
    monkeypatch.setattr(at_once, "_epilogue", collections.defaultdict(lambda: lambda *args, **kwargs: None))
    layer = make(Case(64, hidden=32, ffn=16, experts=6, bias=True))
    x, g = (tensor.to(torch.float16 if rounded else torch.float32) for tensor in (layer.x, layer.g))
    up, down, up_bias, *_ = layer.weights
    with LiveBytes() as live:
        at_once.launch(x, g, up, down, up_bias, FORMULAS["concatenated"], False, bound)
    copy_of_one = (2 * 16 + 16) * 32 * 2 if rounded else 0
    assert bound / 8 < live.peak - 4 * 64 * 6 - copy_of_one <= bound


@pytest.mark.parametrize("way", ELSEWHERE)
def test_up_projections_without_a_down_projection_are_unused(way: str, be_fastest: Callable[[str], None]) -> None:
    be_fastest(way)
    layer, wider = make(RAGGED), make(RAGGED)
    up = layer.weights.up
    wider.weights = layer.weights._replace(up=torch.cat([up, up]))
    assert torch.equal(both(wider)[0], both(layer)[0])


def test_half_precision_is_better_than_the_products() -> None:
    """Nothing is rounded between the inputs and the sum."""
    layer = make(RAGGED, torch.bfloat16)
    truth = truth_of(layer)
    kernel, products = ((dots.double() - truth).norm() for dots in both(layer))
    assert kernel < 0.1 * products


def test_weights_are_rounded_as_under_autocast() -> None:
    """To float16: the interpreter truncates to bfloat16 instead of rounding."""
    layer = make(dataclasses.replace(RAGGED, bias=True))
    kernel, products = both(layer, torch.float16)
    rounded = make(layer.case, torch.float16)
    torch.testing.assert_close(kernel, both(rounded)[0])
    assert_as_good(layer, kernel, products, torch.float16)


@pytest.mark.parametrize("way", ELSEWHERE)
@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_gradients(estimator: str, way: str, launches: dict[str, list[int]], be_fastest: Callable[[str], None]) -> None:
    be_fastest(way)
    layer = make(dataclasses.replace(RAGGED, tokens=20, experts=4, k=2))
    exact = Layer(layer.case)
    exact.x, exact.router, exact.g = layer.x.double(), layer.router.double(), layer.g.double()
    exact.weights = type(layer.weights)(*(None if w is None else w.double() for w in layer.weights))
    ours, truth = layer.ours(DenseMixerConfig(estimator)), exact.truth(estimator)
    assert launches[way][-1] == 20
    for name, expected in truth.items():
        assert oracle.worst_error(ours[name], expected) <= 1e-5, name


def test_the_operator_keeps_the_rules_of_torch() -> None:
    layer = make(dataclasses.replace(RAGGED, tokens=3))
    up, down = layer.weights.up.detach(), layer.weights.down.detach()
    arguments = (layer.x.detach(), layer.g, up, down, None, "silu", "concatenated", 1.0, float("inf"), 0.0, False, 1)
    torch.library.opcheck(torch.ops.densemixer.fused_expert_dots.default, arguments)


def test_compiled_into_one_graph(launches: dict[str, list[int]]) -> None:
    """Forward and backward without a break; with other numbers of tokens, one more graph at most."""
    layer = make(dataclasses.replace(RAGGED, tokens=20, experts=4, k=2))
    index, weights = layer.index, layer.host()[2].detach()
    expected = layer.ours(DenseMixerConfig())["router"]

    def loss(x: Tensor, g: Tensor) -> Tensor:
        from densemixer_core import straight_through

        return (
            straight_through(
                torch.zeros_like(x),
                (x @ layer.router.T).softmax(1),
                x=x,
                index=index[: len(x)],
                weights=weights[: len(x)],
                experts=StackedExperts(layer.weights, layer.layout),
                score="softmax",
                renormalised=True,
                config=DenseMixerConfig(),
            )
            * g
        ).sum()

    counters.clear()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x = layer.x.detach()
    for tokens in (20, 20, 18, 17, 19):
        (ours,) = torch.autograd.grad(compiled(x[:tokens], layer.g[:tokens]), layer.router)
        (eager,) = torch.autograd.grad(loss(x[:tokens], layer.g[:tokens]), layer.router)
        torch.testing.assert_close(ours, eager)
    assert counters["stats"]["unique_graphs"] <= 2
    assert launches["fused kernel"].count(17) == 2
    assert not torch.equal(expected, ours)
