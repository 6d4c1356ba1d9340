"""The fused kernel in Triton's interpreter, on the CPU. `test_kernel.py` runs it, in a process of its own.

Triton reads TRITON_INTERPRET=1 when it is imported, and it holds for all of a process.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import oracle
import pytest
import torch
from layers import Case, Layer
from torch import Tensor
from torch._dynamo.utils import counters

from densemixer_core import Activation, DenseMixerConfig, StackedExperts, expert_dots
from densemixer_core.kernel import fused, triton_kernel

FORMULAS = {
    "concatenated": Activation("silu", "concatenated"),
    "interleaved": Activation("gelu", "interleaved", offset=1.0),
    "clamped": Activation("silu", "interleaved", alpha=1.702, limit=2.0, offset=1.0),
    "ungated": Activation("relu"),
    "ungated, squared": Activation("relu2"),
    "ungated, tanh": Activation("gelu_tanh"),
}
# Three tiles of tokens, in two groups, and two of columns and of the hidden dimension; none of them full.
RAGGED = Case(tokens=37, hidden=20, ffn=18, experts=2, k=1)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of each launch of the kernel."""
    seen: list[int] = []
    launch = triton_kernel.launch

    def counted(x: Tensor, *rest: object) -> Tensor:
        seen.append(len(x))
        return launch(x, *rest)

    monkeypatch.setattr(triton_kernel, "launch", counted)
    monkeypatch.setattr(fused, "_used", {})
    return seen


def make(case: Case, dtype: torch.dtype = torch.float32) -> Layer:
    layer = Layer(case, dtype)
    layer.layout = dataclasses.replace(layer.layout, formula=FORMULAS[case.activation])
    return layer


@torch.no_grad()
def truth_of(layer: Layer) -> Tensor:
    exact = Layer(layer.case)
    exact.weights = type(layer.weights)(*(None if w is None else w.double() for w in layer.weights))
    x, g = layer.x.double(), layer.g.double()
    return torch.stack([(exact.expert(j, x) * g).sum(-1) for j in range(layer.case.scored)], 1)


@torch.no_grad()
def both(layer: Layer, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """By the kernel and by the matrix products."""
    known, unknown = layer.layout, dataclasses.replace(layer.layout, formula=None)
    fused_, products = (
        expert_dots(layer.x, layer.g, StackedExperts(layer.weights, layout), dtype) for layout in (known, unknown)
    )
    return fused_, products


def assert_as_good(layer: Layer, kernel: Tensor, products: Tensor, dtype: torch.dtype) -> None:
    """No worse than the products in the same dtype by more than a few roundings of the largest value."""
    truth = truth_of(layer)
    assert kernel.dtype == torch.float32
    assert kernel.shape == products.shape == truth.shape
    allowed = (products.double() - truth).norm()
    allowed += 4 * torch.finfo(dtype).eps * truth.abs().max() * truth.numel() ** 0.5
    assert (kernel.double() - truth).norm() <= allowed
    assert not torch.equal(kernel, products)


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
def test_inner_products(change: dict[str, object], dtype: torch.dtype, launches: list[int]) -> None:
    layer = make(dataclasses.replace(RAGGED, **change), dtype)
    kernel, products = both(layer)
    assert launches == [fused._TRIAL_TOKENS, layer.case.tokens]
    assert_as_good(layer, kernel, products, dtype)


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


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(dict(), torch.float64), (dict(post_norm=True), torch.float32), (dict(tokens=0), torch.float32)],
    ids=str,
)
def test_products_where_the_kernel_does_not_reach(
    change: dict[str, object], dtype: torch.dtype, launches: list[int]
) -> None:
    kernel, products = both(make(dataclasses.replace(RAGGED, **change), dtype))
    assert torch.equal(kernel, products)
    assert not launches


def test_products_where_algorithms_must_be_deterministic(launches: list[int]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        kernel, products = both(make(RAGGED))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(kernel, products)
    assert not launches


def test_it_is_proved_once_for_each_shape(launches: list[int]) -> None:
    layer, wider = make(RAGGED), make(dataclasses.replace(RAGGED, ffn=19))
    for each in (layer, layer, wider, layer):
        both(each)
    trial = fused._TRIAL_TOKENS
    assert launches == [trial, 37, 37, trial, 37, 37]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda right: right * 1.1, "is off by 0.1"),
        (lambda right: right * float("nan"), "is off by nan"),
        (lambda right: right.does_not_exist, "doesn't run, so they are computed one by one: AttributeError"),
    ],
)
def test_a_kernel_that_fails_its_proof_is_not_used(
    wrong, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch = triton_kernel.launch
    monkeypatch.setattr(triton_kernel, "launch", lambda *arguments: wrong(launch(*arguments)))
    layer = make(dataclasses.replace(RAGGED, tokens=3))
    with caplog.at_level(logging.WARNING, "densemixer"):
        for _ in range(2):
            kernel, products = both(layer)
            torch.testing.assert_close(kernel, products)
    assert [message in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_gradients(estimator: str, launches: list[int]) -> None:
    layer = make(dataclasses.replace(RAGGED, tokens=20, experts=4, k=2))
    exact = Layer(layer.case)
    exact.x, exact.router, exact.g = layer.x.double(), layer.router.double(), layer.g.double()
    exact.weights = type(layer.weights)(*(None if w is None else w.double() for w in layer.weights))
    ours, truth = layer.ours(DenseMixerConfig(estimator)), exact.truth(estimator)
    assert launches[-1] == 20
    for name, expected in truth.items():
        assert oracle.worst_error(ours[name], expected) <= 1e-5, name


def test_the_operator_keeps_the_rules_of_torch() -> None:
    layer = make(dataclasses.replace(RAGGED, tokens=3))
    up, down = layer.weights.up.detach(), layer.weights.down.detach()
    arguments = (layer.x.detach(), layer.g, up, down, None, "silu", "concatenated", 1.0, float("inf"), 0.0, False, 1)
    torch.library.opcheck(torch.ops.densemixer.fused_expert_dots.default, arguments)


def test_compiled_into_one_graph(launches: list[int]) -> None:
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
    assert launches.count(17) == 2
    assert not torch.equal(expected, ours)
