"""A budget below 1: exact in the mean, exact for each pair that is drawn, and at the cost that it promises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import oracle
import pytest
import torch
from draws import bias, standard_errors
from hypothesis import given, settings
from layers import Case, Layer
from test_straight_through import LiveBytes, assert_equal_gradients, cases
from torch.utils.checkpoint import checkpoint

from densemixer_core import DenseMixerConfig, Known, StackedExperts, expert_dots, sampled_dots
from densemixer_core.control import fit
from densemixer_core.routing import SCORE_FUNCTIONS, router_scores, score_gradient_to_logits, score_sensitivity
from densemixer_core.sampling import Pairs, draw_pairs, inclusion_probabilities, offsets


@pytest.mark.parametrize(
    "case",
    [
        Case(40),
        Case(40, activation="interleaved", bias=True, transposed=True, renormalised=False, scaling=2.5),
        Case(40, activation="ungated", post_norm=True, scale=True, score="sigmoid"),
        Case(40, identities=1, zeros=1, score="sqrtsoftplus"),
    ],
    ids=["gated", "biased", "normed", "with identities"],
)
@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_the_mean_over_seeds_is_the_exact_gradient(case: Case, estimator: str) -> None:
    layer = Layer(case)
    truth = layer.truth(estimator)["router"]
    draws = torch.stack([layer.ours(DenseMixerConfig(estimator, budget=0.3, seed=s))["router"] for s in range(200)])
    spread = (draws - truth).square().mean(0).sum().sqrt()
    assert spread > 0.03 * truth.norm()  # one draw is no more than an estimate
    assert (draws.mean(0) - truth).norm() < 0.12 * spread  # 0.07 is to be expected of 200 draws
    assert bias(draws, truth) < 4


def known_of(layer: Layer, sensitivity: torch.Tensor | None = None) -> Known:
    """What is known of a layer's pairs, all of which matter alike unless they are said not to."""
    output, _, weights = layer.host()
    along = (layer.g * output).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    everything = torch.ones(layer.case.tokens, layer.case.scored)
    return Known(everything if sensitivity is None else sensitivity, along.detach())


def repeated_and_quiet(layer: Layer) -> None:
    """Half of the tokens once more, and a third without a gradient."""
    half = layer.case.tokens // 2
    with torch.no_grad():
        layer.x[half:], layer.g[half:] = layer.x[:half], layer.g[:half]
        layer.g[::3] = 0


def alike(layer: Layer) -> None:
    """All experts nearly one network: the control is nearly everything."""
    with torch.no_grad():
        for weight in layer.weights[:2]:
            weight[1:] = weight[:1] + 0.1 * weight[1:]


def unchanged(layer: Layer) -> None:
    pass


@pytest.mark.parametrize(
    ("case", "count", "change"),
    [
        (Case(), 32, alike),
        (Case(40, scale=True, bias=True, identities=1), 60, repeated_and_quiet),
        (Case(40, experts=30), 50, unchanged),  # three pairs in the pilot, so most experts aren't there
        (Case(1, experts=40), 17, unchanged),
        (Case(5), 1, unchanged),
    ],
    ids=["experts alike", "repeated tokens and g of zeros", "experts that no pilot has", "one token", "one pair"],
)
def test_a_bias_of_a_tenth_of_a_draws_error_would_show(case: Case, count: int, change: Callable[[Layer], None]) -> None:
    layer = Layer(case)
    change(layer)
    experts = StackedExperts(layer.weights, layer.layout)
    with torch.no_grad():
        sensitivity = score_sensitivity(layer.host()[1], case.score).scatter(1, layer.index, 0)
        known = known_of(layer, sensitivity)
        exact = expert_dots(layer.x, layer.g, experts)
        # The errors of a single pair all have nearly the same direction, so fewer of them tell less.
        seeds = range(1200 if count > 1 else 4000)
        draws = torch.stack([sampled_dots(layer.x, layer.g, known, count, seed, experts) for seed in seeds])
    directions = torch.randn(10, *exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions[:2] = torch.stack([exact, known.along.expand_as(exact)])  # what is estimated, and by what
    errors = torch.einsum("ste,dte->sd", (draws - exact) * sensitivity, directions)
    assert standard_errors(errors) < 3.5 < standard_errors(errors + 0.1 * errors.std(0))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases)
def test_enough_pairs_are_exact(case: Case) -> None:
    layer = Layer(case)
    experts = StackedExperts(layer.weights, layer.layout)
    with torch.no_grad():
        dots = sampled_dots(layer.x, layer.g, known_of(layer), 2 * case.tokens * case.experts, 0, experts)
        torch.testing.assert_close(dots, expert_dots(layer.x, layer.g, experts), rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=cases,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    bound=st.integers(1, 4000),
    share=st.floats(0.05, 1),
    aligned=st.booleans(),
)
def test_each_drawn_pair_in_every_dtype_and_memory_bound(
    case: Case, dtype: torch.dtype, bound: int, share: float, aligned: bool
) -> None:
    if aligned:  # torch's grouped matrix product wants rows of a multiple of 16 bytes
        case.hidden, case.ffn = 16 * case.hidden, 16 * case.ffn
    layer = Layer(case, dtype)
    importance = torch.rand(case.tokens, case.scored, generator=torch.Generator().manual_seed(case.seed))
    count = math.ceil(share * case.tokens * case.experts)
    experts = StackedExperts(layer.weights, layer.layout)
    evaluated, draws = [], []

    def activation(up: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(up))
        return layer.layout.activation(up)

    def draw(*args: Any) -> Pairs:
        draws.append(draw_pairs(*args))
        return draws[-1]

    def without_control(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        control, rest = fit(*args)
        return torch.zeros_like(control), rest

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("densemixer_core.sampled.draw_pairs", draw)
        patch.setattr("densemixer_core.sampled.fit", without_control)
        counted = StackedExperts(layer.weights, dataclasses.replace(layer.layout, activation=activation))
        known = Known(importance, torch.ones(case.tokens, 1))
        ours = sampled_dots(layer.x, layer.g, known, count, 0, counted, workspace_bytes=bound)
        exact = expert_dots(layer.x, layer.g, experts)
        whole = Layer(case, dtype)
        whole.weights = type(layer.weights)(*(None if w is None else w.double() for w in layer.weights))
        truth = expert_dots(layer.x.double(), layer.g.double(), StackedExperts(whole.weights, layer.layout))
    assert sum(evaluated) == count
    assert ours.dtype == exact.dtype
    factors = torch.zeros(case.experts * case.tokens, dtype=torch.float64)
    factors = factors.index_add(0, draws[-1].place, draws[-1].factor)
    if len(draws) > 1:  # a pilot's pairs are exact, and not drawn again
        factors[draws[0].place] = 1
    factors = factors.view(case.experts, case.tokens).t()
    factors = torch.cat([factors, torch.ones(case.tokens, case.scored - case.experts)], 1)
    drawn = factors > 0
    assert torch.equal(ours[~drawn], torch.zeros_like(ours[~drawn]))
    # No worse than the dense evaluation in the same dtype by more than a few roundings of the largest value.
    allowed = 4 * torch.finfo(dtype).eps * truth.abs().max() * truth.numel() ** 0.5
    assert (ours / factors - truth)[drawn].norm() <= (exact.double() - truth)[drawn].norm() + allowed


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 9),
    share=st.floats(0.01, 1),
    tail=st.floats(0, 8),
    seed=st.integers(-(2**63), 2**63),
)
def test_draws_have_the_promised_probabilities(tokens: int, experts: int, share: float, tail: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    importance = torch.rand(tokens, experts, generator=generator, dtype=torch.float64) ** tail
    importance[torch.rand(tokens, experts, generator=generator) < 0.2] = 0
    count = math.ceil(share * tokens * experts)
    probability = inclusion_probabilities(importance, count)
    positive = int((importance > 0).sum())
    assert probability.max() <= 1
    assert count * (1 + 1e-9) >= probability.sum() >= 0.98 * min(count, positive)
    free = (probability > 0) & (probability < 1)
    ratio = (probability / importance)[free]
    assert not len(ratio) or ratio.max() / ratio.min() < 1 + 1e-9

    pairs = draw_pairs(importance, count, offsets(importance, seed)[0])
    drawn = pairs.factor > 0
    expected = probability.t().flatten()[pairs.place[drawn]]
    torch.testing.assert_close(1 / pairs.factor[drawn], expected, rtol=0, atol=2**-34)
    assert len(pairs.place) == count
    assert len(pairs.place[drawn].unique()) == drawn.sum() >= int(probability.sum() + 1e-6)
    assert pairs.ends.tolist() == torch.bincount(pairs.place // tokens, minlength=experts).cumsum(0).tolist()


def test_the_offsets_of_the_combs_are_uniform() -> None:
    """Over seeds, and over data: sixteenths of the line between 0 and 1."""
    ones = torch.ones(4, 4)
    for pairs_of_offsets in (
        [offsets(ones, seed) for seed in range(1600)],
        [offsets(ones + torch.eye(4) * step * 1e-6, 0) for step in range(1600)],
    ):
        first, second = ((torch.stack(some) * 16).long() for some in zip(*pairs_of_offsets, strict=True))
        for places in (first, second, first // 4 * 4 + second // 4):  # each, and whether they depend on each other
            counts = torch.bincount(places, minlength=16)
            assert ((counts - 100).square() / 100).sum() < 37.7  # χ² with 15 degrees of freedom, 99.9 %


def test_a_seed_gives_the_same_draw_and_leaves_the_hosts_generator_alone() -> None:
    layer = Layer(Case(tokens=40))
    state = torch.get_rng_state()
    first, again, other = (layer.ours(DenseMixerConfig(budget=0.3, seed=seed))["router"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same(reentrant: bool) -> None:
    layer, config = Layer(Case(tokens=40)), DenseMixerConfig(budget=0.3)
    plain = layer.ours(config)
    leaves = list(layer.leaves.values())
    output = checkpoint(lambda *_: layer.attached(config), *leaves, use_reentrant=reentrant)
    output.backward(layer.g)
    for name, leaf in layer.leaves.items():
        assert torch.equal(leaf.grad, plain[name])


def test_not_a_number_is_left_to_the_gradient_scaler() -> None:
    layer = Layer(Case())
    layer.g[3] = torch.inf
    gradients = layer.ours(DenseMixerConfig(budget=0.3))
    assert not torch.isfinite(gradients["router"]).all()


def test_tokens_without_a_gradient_take_no_pairs() -> None:
    layer = Layer(Case(tokens=40))
    layer.g[10:] = 0
    assert_equal_gradients(layer.ours(DenseMixerConfig(budget=0.3)), layer.truth("densemixer"), 1e-10)


@pytest.mark.parametrize("budget", [0.3, 0.01])
def test_no_tokens(budget: float) -> None:
    gradients = Layer(Case(tokens=0)).ours(DenseMixerConfig(budget=budget))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_all_experts_selected() -> None:
    layer = Layer(Case(experts=3, k=3))
    assert_equal_gradients(layer.ours(DenseMixerConfig(budget=0.5)), layer.truth("conventional"), 1e-10)


def test_importance_beats_chance() -> None:
    """The error of the router's gradient for as many pairs, and without what is known of the pairs."""
    layer = Layer(Case(tokens=2000, experts=16, hidden=16))
    scores = layer.host()[1].detach()
    generator = torch.Generator().manual_seed(0)
    layer.g *= torch.rand(2000, 1, generator=generator, dtype=torch.float64) ** 4  # few tokens matter
    loud = 4 * torch.rand(16, 1, 1, generator=generator, dtype=torch.float64) ** 4  # and few experts
    experts = StackedExperts(layer.weights._replace(down=layer.weights.down * loud), layer.layout)
    sensitivity, norm = score_sensitivity(scores, "softmax"), layer.g.norm(dim=1, keepdim=True)
    with torch.no_grad():
        exact = score_gradient_to_logits(expert_dots(layer.x, layer.g, experts), scores, "softmax").T @ layer.x

        def error(sensitivity: torch.Tensor) -> float:
            errors = []
            for seed in range(8):
                known = Known(sensitivity, torch.zeros(2000, 1, dtype=torch.float64))
                dots = sampled_dots(layer.x, layer.g, known, 4000, seed, experts)
                logits = score_gradient_to_logits(dots, scores, "softmax")
                errors.append(oracle.relative_error(logits.T @ layer.x, exact))
            return sum(errors) / len(errors)

        best = error(sensitivity)
        assert best < 0.8 * error(torch.ones_like(sensitivity))
        assert best < 0.8 * error(sensitivity / norm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("densemixer_core.sampled.PAIRS_PER_PILOT", 10**9)
            assert best < 0.8 * error(sensitivity)


@pytest.mark.parametrize("score", SCORE_FUNCTIONS)
def test_derivatives_of_the_scores(score: str) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = router_scores(logits, score)
    g = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (truth,) = torch.autograd.grad(scores, logits, g, retain_graph=True)
    torch.testing.assert_close(score_gradient_to_logits(g, scores.detach(), score), truth)
    for expert in range(7):
        one = torch.zeros_like(g)
        one[:, expert] = 1
        (column,) = torch.autograd.grad(scores, logits, one, retain_graph=True)
        torch.testing.assert_close(score_sensitivity(scores.detach(), score)[:, expert], column.norm(dim=1))


@pytest.mark.parametrize(("activation", "apart"), [("concatenated", False), ("concatenated", True), ("ungated", False)])
@pytest.mark.parametrize("bound", [1 << 16, 1 << 20])
def test_temporaries_stay_below_the_bound(activation: str, apart: bool, bound: int) -> None:
    layer = Layer(Case(2048, hidden=32, ffn=48, activation=activation, apart=apart, bias=True), torch.float32)
    experts, importance = StackedExperts(layer.weights, layer.layout), torch.rand(2048, 7)
    with torch.no_grad(), LiveBytes() as alone:
        draw_pairs(importance, 8000, offsets(importance, 0)[0])
    with torch.no_grad(), LiveBytes() as live:
        known = Known(importance, torch.ones(2048, 1))
        sampled_dots(layer.x, layer.g, known, 8000, 0, experts, workspace_bytes=bound)
    results_and_importance = 4 * 4 * layer.case.tokens * layer.case.experts
    assert live.peak <= max(alone.peak, bound + 8000 * 32) + results_and_importance
