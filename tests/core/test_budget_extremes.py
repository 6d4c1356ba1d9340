"""A budget below 1 where something is extreme: scores, scales, numbers beyond float16, equal experts, few pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import oracle
import pytest
import torch
from layers import Case, Layer

from densemixer_core import DenseMixerConfig, Known, StackedExperts, expert_dots, sampled_dots, straight_through
from densemixer_core.routing import score_sensitivity
from densemixer_core.sampling import share_of_pairs


@pytest.mark.parametrize("gap", [0.0, 4.0, 9.0, 12.0, 25.0])
def test_the_sensitivity_of_a_score_near_one(gap: float) -> None:
    """1 − p, which an expert that is shut out in spite of its score lives on, isn't lost in rounding."""
    logits = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, 3] += gap
    p = logits.softmax(1)
    others = p.unsqueeze(1) * (1 - torch.eye(8))  # of each expert, those of all others
    exact = p * (others.sum(2).square() + others.square().sum(2)).sqrt()
    found = score_sensitivity(logits.float().softmax(1), "softmax")
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("budget", [0.125, 0.5, 0.9])
@pytest.mark.parametrize("free", [4, 12])
def test_experts_without_weights_take_nothing_of_the_budget(free: int, budget: float) -> None:
    layer = Layer(Case(40, experts=4, k=2, identities=free))
    rows = []

    def activation(up: torch.Tensor) -> torch.Tensor:
        rows.append(len(up))
        return layout.activation(up)

    layout = layer.layout
    layer.layout = dataclasses.replace(layout, activation=activation)
    layer.ours(DenseMixerConfig(budget=budget))
    unselected = 40 * 4 * (4 + free - 2) // (4 + free)
    assert sum(rows) == round(budget * unselected)


def test_a_rank_with_one_expert_evaluates_its_only_pair() -> None:
    """Its part of the pairs is less than one; without any, the estimate would be that of no expert at all."""
    assert share_of_pairs(tokens=1, experts=1, scored=8, selected=2, budget=0.125) == 1
    assert share_of_pairs(tokens=0, experts=1, scored=8, selected=2, budget=0.125) == 0
    assert share_of_pairs(tokens=5, experts=2, scored=8, selected=8, budget=0.125) == 0


@pytest.mark.parametrize("tokens", [4, 64])
def test_centered_is_exact_where_all_experts_are_one(tokens: int) -> None:
    """d is ⟨g, y⟩/Σw for all of them: nothing is left to chance, with a pilot and without."""
    layer = Layer(Case(tokens, experts=8, k=2))
    with torch.no_grad():
        for weight in layer.weights[:2]:
            weight[:] = weight[:1].clone()
    extra = layer.ours(DenseMixerConfig("centered", budget=0.125))["router"] - layer.truth("conventional")["router"]
    whole = layer.truth("densemixer")["router"] - layer.truth("conventional")["router"]
    assert extra.norm() < 1e-9 * whole.norm()


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_nearly_all_pairs_are_nearly_exact(estimator: str) -> None:
    layer = Layer(Case(128, experts=8, k=2))
    truth = layer.truth(estimator)["router"]
    errors = [
        oracle.relative_error(layer.ours(DenseMixerConfig(estimator, budget=0.99, seed=seed))["router"], truth)
        for seed in range(5)
    ]
    assert max(errors) < 0.05


@pytest.mark.parametrize("count", [8, 120])
def test_a_large_scale_counts_in_the_draw(count: int) -> None:
    """As if it were in the weights, where it is drawn for."""
    case = Case(60, experts=16, k=2, scale=True)
    layer = Layer(case)
    with torch.no_grad():
        layer.weights.scale.copy_(torch.ones(16))
        layer.weights.scale[5] = 10
        folded = layer.weights._replace(down=layer.weights.down * layer.weights.scale[:, None, None], scale=None)
        known = Known(torch.ones(60, 16), torch.zeros(60, 1))
        exact = expert_dots(layer.x, layer.g, StackedExperts(layer.weights, layer.layout))
        errors = [
            torch.stack(
                [
                    sampled_dots(layer.x, layer.g, known, count, seed, StackedExperts(weights, layer.layout)) - exact
                    for seed in range(60)
                ]
            )
            .square()
            .mean()
            .sqrt()
            for weights in (layer.weights, folded)
        ]
    # Without a pilot nothing says how large an expert is but its scale.
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("estimator", ["densemixer", "centered"])
def test_a_token_beyond_float16_leaves_the_draw_to_the_others(estimator: str) -> None:
    layer = Layer(Case(48, experts=8, k=2), torch.float32)
    layer.g[7, 0] = 1e5
    output, scores, weights = layer.host()
    half = type(layer.weights)(*(None if w is None else w.detach().half() for w in layer.weights))

    def extra(budget: float) -> torch.Tensor:
        leaf = scores.detach().requires_grad_()
        through = straight_through(
            output.detach(),
            leaf,
            x=layer.x.detach().half(),
            index=layer.index,
            weights=weights.detach(),
            experts=StackedExperts(half, layer.layout),
            score="softmax",
            renormalised=True,
            config=DenseMixerConfig(estimator, budget=budget),
        )
        (gradient,) = torch.autograd.grad(through, leaf, layer.g)
        return torch.cat([gradient[:7], gradient[8:]])

    assert (extra(0.99) - extra(1.0)).norm() < 0.1 * extra(1.0).norm()


@pytest.mark.parametrize("count", [8, 120])
def test_an_expert_whose_scale_is_zero_adds_nothing_on_average(count: int) -> None:
    """With a prior of 1 too, and with a pilot and without: where it is never drawn nothing makes up for the control."""
    layer = Layer(Case(60, experts=16, k=2, scale=True))
    known = Known(torch.ones(60, 16), torch.randn(60, 1, generator=torch.Generator().manual_seed(0)), 1.0)
    with torch.no_grad():
        layer.weights.scale[5] = 0
        experts = StackedExperts(layer.weights, layer.layout)
        draws = torch.stack([sampled_dots(layer.x, layer.g, known, count, seed, experts) for seed in range(300)])
    mean, error = draws[:, :, 5].mean(0), draws[:, :, 5].std(0) / 300**0.5
    assert (mean.abs() <= 6 * error).all()


@pytest.mark.parametrize("power", [-34, -30, -24, -20, 0, 15, 19, 25])
@pytest.mark.parametrize("count", [8, 240])
def test_gradients_of_any_size_are_drawn_alike(count: int, power: int) -> None:
    """Their squares leave the range of float32, where they themselves don't. A factor of all g is one of all d."""
    layer = Layer(Case(60, experts=16, k=2), torch.float32)
    along = torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    experts = StackedExperts(layer.weights, layer.layout)
    factor = 2.0 ** round(power / 0.30103)
    with torch.no_grad():
        usual, ours = (
            sampled_dots(layer.x, layer.g * scale, Known(torch.ones(60, 16), along * scale), count, 3, experts)
            for scale in (1.0, factor)
        )
        exact = expert_dots(layer.x, layer.g, experts)
    assert ours.count_nonzero() >= count // 2
    # Other draws, since these follow from the numbers: as large an error, about.
    assert oracle.relative_error(ours / factor, exact.double()) < 3 * oracle.relative_error(usual, exact.double())


@pytest.mark.parametrize("power", [-34, -24, 0, 15, 19, 25, 30])
@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_experts_of_any_size_are_drawn_alike(prior: float, power: int) -> None:
    """The squares of what a pilot measures leave the range of float32, where the inner products don't."""
    layer = Layer(Case(60, experts=16, k=2), torch.float32)
    along = torch.randn(60, 1, generator=torch.Generator().manual_seed(0))

    def drawn(factor: float) -> torch.Tensor:
        experts = StackedExperts(layer.weights._replace(down=layer.weights.down * factor), layer.layout)
        return (
            sampled_dots(layer.x, layer.g, Known(torch.ones(60, 16), along * factor, prior), 480, 3, experts) / factor
        )

    with torch.no_grad():
        torch.testing.assert_close(drawn(2.0 ** round(power / 0.30103)), drawn(1.0))


def of_wider_rows(weight: torch.Tensor, more: int) -> torch.Tensor:
    return torch.cat([weight, weight[..., :more]], -1)[..., : weight.shape[-1]]


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{f"{more} wider": functools.partial(of_wider_rows, more=more) for more in (1, 3, 8)},
    "every eighth": lambda weight: weight.repeat_interleave(8, -1)[..., ::8],
    "experts last": lambda weight: weight.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "one column": lambda weight: weight[..., :1].expand(weight.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_weights_that_are_views_of_something_else(view: str) -> None:
    """torch's grouped product takes whole rows or columns only that begin at multiples of 16 bytes."""
    layer = Layer(Case(40, hidden=16, ffn=8, experts=8, k=2), torch.float32)
    known = Known(torch.ones(40, 8), torch.ones(40, 1))
    up, down = VIEWS[view](layer.weights.up), VIEWS[view](layer.weights.down)
    with torch.no_grad():
        plain, views = (
            sampled_dots(layer.x, layer.g, known, 80, 3, StackedExperts(weights, layer.layout))
            for weights in (
                layer.weights._replace(up=up.contiguous(), down=down.contiguous()),
                layer.weights._replace(up=up, down=down),
            )
        )
    torch.testing.assert_close(views, plain, rtol=1e-4, atol=1e-4)
