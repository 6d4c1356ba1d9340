"""Gradients against the dense float64 oracle, over shapes, layouts, dtypes and memory bounds."""

from __future__ import annotations

import weakref

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import given, settings
from layers import Case, Layer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densemixer_core import DenseMixerConfig, Known, StackedExperts, expert_dots, straight_through
from densemixer_core.estimators import ESTIMATORS, extra_score_gradient

cases = st.builds(
    lambda k, more, **rest: Case(k=k, experts=k + more, **rest),
    k=st.integers(1, 4),
    more=st.integers(0, 5),
    tokens=st.integers(1, 17),
    hidden=st.integers(1, 12),
    ffn=st.integers(1, 9),
    activation=st.sampled_from(["concatenated", "interleaved", "ungated"]),
    bias=st.booleans(),
    transposed=st.booleans(),
    apart=st.booleans(),
    post_norm=st.booleans(),
    scale=st.booleans(),
    identities=st.integers(0, 2),
    zeros=st.integers(0, 2),
    score=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    renormalised=st.booleans(),
    scaling=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 2**31),
)


def assert_equal_gradients(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, expected in truth.items():
        error = (ours[name] - expected).abs().max().item()
        # The scale below which rounding of the terms that cancel decides.
        assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{name}: {error}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases, estimator=st.sampled_from(ESTIMATORS))
def test_gradients_in_float64(case: Case, estimator: str) -> None:
    layer = Layer(case)
    assert_equal_gradients(layer.ours(DenseMixerConfig(estimator)), layer.truth(estimator), 1e-10)


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_the_extra_gradient_is_there(estimator: str) -> None:
    layer = Layer(Case())
    conventional = layer.ours(DenseMixerConfig("conventional"))
    with_extra = layer.ours(DenseMixerConfig(estimator))
    assert oracle.relative_error(with_extra["router"], conventional["router"]) > 0.01
    for name in layer.weights._fields[:2]:
        assert torch.equal(with_extra[name], conventional[name])


def test_estimators_differ_only_where_weights_are_renormalised() -> None:
    for renormalised in (True, False):
        layer = Layer(Case(renormalised=renormalised))
        plain, centered = (layer.ours(DenseMixerConfig(e))["router"] for e in ("densemixer", "centered"))
        assert torch.equal(plain, centered) == (not renormalised)


def test_centered_is_the_derivative_of_joining_the_selection() -> None:
    """Give an unselected expert a little score and a place in the selection: the loss changes as the estimator says."""
    layer = Layer(Case(tokens=1, scaling=2.5))
    scores, index = layer.host()[1], layer.index
    outputs = torch.stack([layer.expert(j, layer.x)[0] for j in range(layer.case.experts)])
    newcomer = next(j for j in range(layer.case.experts) if j not in index)

    def loss(score: float) -> torch.Tensor:
        p = torch.zeros_like(scores[0]).scatter(0, index[0], scores[0, index[0]])
        p[newcomer] = score
        return layer.g[0] @ (2.5 * p / p.sum() @ outputs)

    derivative = (loss(1e-6) - loss(-1e-6)) / 2e-6
    p = scores.gather(1, index)
    y = 2.5 * p / p.sum() @ outputs[index[0]]
    extra = extra_score_gradient(
        (outputs @ layer.g[0])[None], index, scale=2.5 / p.sum(1, keepdim=True), mean=y @ layer.g.T / 2.5
    )
    torch.testing.assert_close(extra[0, newcomer], derivative, rtol=1e-7, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), bound=st.integers(1, 4000))
def test_inner_products_in_every_dtype_and_memory_bound(case: Case, dtype: torch.dtype, bound: int) -> None:
    layer = Layer(case, dtype)
    with torch.no_grad():
        experts = StackedExperts(layer.weights, layer.layout)
        ours = expert_dots(layer.x, layer.g, experts, workspace_bytes=bound)
        naive = torch.stack([(layer.expert(j, layer.x) * layer.g).sum(-1) for j in range(case.scored)], 1)
        exact = Layer(case, dtype)
        exact.weights = type(layer.weights)(*(None if w is None else w.double() for w in layer.weights))
        x, g = layer.x.double(), layer.g.double()
        truth = torch.stack([(exact.expert(j, x) * g).sum(-1) for j in range(case.scored)], 1)
    assert ours.dtype == torch.float32
    assert ours.shape == (case.tokens, case.scored)
    # No worse than the obvious evaluation in the same dtype by more than a few roundings of the largest value.
    allowed = (naive.double() - truth).norm() + 4 * torch.finfo(dtype).eps * truth.abs().max() * truth.numel() ** 0.5
    assert (ours.double() - truth).norm() <= allowed


def test_no_tokens() -> None:
    layer = Layer(Case(tokens=0))
    gradients = layer.ours(DenseMixerConfig())
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_leading_dimensions_are_kept() -> None:
    layer = Layer(Case(tokens=12))
    through = layer.attached(DenseMixerConfig(), leading=(3, 4))
    assert through.shape == (3, 4, layer.case.hidden)
    assert_equal_gradients(layer.gradients(through), layer.truth("densemixer"), 1e-10)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_a_function_may_evaluate_the_experts(budget: float) -> None:
    """For experts in other processes. It is called once, in the backward, with rows and without gradient tracking."""
    layer = Layer(Case(tokens=12))
    calls = []

    output, scores, weights = layer.host()

    def evaluate(x: torch.Tensor, g: torch.Tensor, known: Known | None) -> torch.Tensor:
        calls.append((x.shape, torch.is_grad_enabled()))
        dots = expert_dots(x, g, StackedExperts(layer.weights, layer.layout))
        if known is not None:
            assert torch.equal(known.sensitivity == 0, torch.zeros_like(dots).scatter(1, layer.index, 1) == 1)
            torch.testing.assert_close(known.along, (g * output).sum(1, keepdim=True))
        return dots

    through = straight_through(
        output.view(3, 4, -1),
        scores,
        x=layer.x.view(3, 4, -1),
        index=layer.index,
        weights=weights,
        experts=evaluate,
        score="softmax",
        renormalised=True,
        config=DenseMixerConfig(budget=budget),
    )
    assert calls == []
    assert_equal_gradients(layer.gradients(through), layer.truth("densemixer"), 1e-10)
    assert calls == [(layer.x.shape, False)]


def test_a_function_is_called_without_tokens_too() -> None:
    """Other processes may wait for it, which have some."""
    layer = Layer(Case(tokens=0))
    calls = []

    def evaluate(x: torch.Tensor, g: torch.Tensor, known: Known | None) -> torch.Tensor:
        calls.append(x.shape)
        return g.new_zeros(0, layer.case.scored)

    output, scores, weights = layer.host()
    through = straight_through(
        output,
        scores,
        x=layer.x,
        index=layer.index,
        weights=weights,
        experts=evaluate,
        score="softmax",
        renormalised=True,
        config=DenseMixerConfig("centered"),
    )
    gradients = layer.gradients(through)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())
    assert calls == [layer.x.shape]


def test_an_expanded_gradient_is_accepted() -> None:
    """``y.sum().backward()`` hands over a gradient without storage of its own."""
    layer = Layer(Case())
    layer.g = torch.ones(()).double().expand(layer.case.tokens, layer.case.hidden)
    assert_equal_gradients(layer.ours(DenseMixerConfig()), layer.truth("densemixer"), 1e-10)


def test_autocast_is_honoured() -> None:
    """The products run in autocast's dtype, in the backward too, where autocast itself is off."""
    case = Case(tokens=64, hidden=32, ffn=32)
    truth = Layer(case).truth("densemixer")["router"]
    layer = Layer(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        through = layer.attached(DenseMixerConfig())
        reference = layer.truth("densemixer")["router"]
    with MatmulDtypes() as seen:
        ours = layer.gradients(through)["router"]
    assert seen.dtypes == {torch.bfloat16}
    assert ours.dtype == torch.float32
    assert oracle.relative_error(ours, truth) <= 1.1 * oracle.relative_error(reference, truth)


def test_a_function_of_experts_may_overflow_where_autocast_is_float16() -> None:
    """x may still be in float32 there. The pair adds nothing, as where the experts are stacked."""
    layer = Layer(Case(tokens=12), torch.float32)
    output, scores, weights = layer.host()
    token, expert = (tensor[5] for tensor in torch.where(scores.scatter(1, layer.index, 0.0) > 0))

    def extra(overflow: bool) -> torch.Tensor:
        def dots(x: torch.Tensor, g: torch.Tensor, known: Known | None) -> torch.Tensor:
            found = expert_dots(x, g, StackedExperts(layer.weights, layer.layout))
            return found.index_put((token, expert), torch.tensor(torch.inf)) if overflow else found

        leaf = scores.detach().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            through = straight_through(
                output.detach(),
                leaf,
                x=layer.x.detach(),
                index=layer.index,
                weights=weights.detach(),
                experts=dots,
                score="softmax",
                renormalised=True,
                config=DenseMixerConfig(),
            )
        (gradient,) = torch.autograd.grad(through, leaf, layer.g)
        return gradient

    whole = extra(overflow=False)
    assert whole[token, expert] != 0
    assert extra(overflow=True).equal(whole.index_put((token, expert), torch.zeros(())))


class MatmulDtypes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.dtypes |= {tensor.dtype for tensor in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("activation", ["concatenated", "interleaved", "ungated"])
@pytest.mark.parametrize("bound", [1 << 15, 1 << 18])
def test_temporaries_stay_below_the_bound(activation: str, post_norm: bool, bound: int) -> None:
    layer = Layer(Case(2048, hidden=32, ffn=48, activation=activation, post_norm=post_norm, bias=True), torch.float32)
    with torch.no_grad(), LiveBytes() as live:
        expert_dots(layer.x, layer.g, StackedExperts(layer.weights, layer.layout), workspace_bytes=bound)
    result = 4 * layer.case.tokens * layer.case.experts
    assert bound / 8 < live.peak - result <= bound


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs | self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes
