"""The comparison of router gradients with forced routing, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from common.sizes import SIZES
from quality.agreement import agreement, cosine_of_sums
from quality.forcing import Estimates, effects, estimate, in_float64, predictions, sequence_losses, unselected
from scipy import stats
from start.model import small_model
from torch import Tensor

SIZE = SIZES["tiny"]


class Vocabulary:
    """As much of a tokenizer as the model's configuration asks for."""

    eos_token_id, pad_token_id = 1, 0

    def __len__(self) -> int:
        return 50


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Tensor, list[Estimates]]:
    """A model with weights large enough for its experts to matter, two sequences, and what is estimated of them."""
    model = small_model(SIZE, Vocabulary())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model = in_float64(model)
    ids = torch.randint(2, 50, (2, 12), generator=generator)
    return model, ids, estimate(model, ids)


@pytest.mark.parametrize("layer", range(SIZE.layers))
@pytest.mark.parametrize(("sequence", "token"), [(0, 3), (1, 7)])
def test_centered_is_the_derivative_of_joining(setting: Any, layer: int, sequence: int, token: int) -> None:
    model, ids, estimates = setting
    here, share = estimates[layer], 1e-4
    scores, index = here.scores[sequence, token], here.index[sequence, token]
    experts = model.model.layers[layer].mlp.experts
    measured = effects(model, experts, ids[sequence], scores, index, token, (share, -share)).added
    derivative = (measured[share] - measured[-share]) / (2 * share)
    predicted = predictions(here, sequence, token, "centered").added[1.0]
    torch.testing.assert_close(predicted, derivative, rtol=1e-6, atol=1e-10)
    other = predictions(here, sequence, token, "densemixer").added[1.0]
    assert not torch.allclose(other, derivative, rtol=0.01)


def test_selected_experts_have_the_derivative_of_the_host(setting: Any) -> None:
    model, ids, estimates = setting
    logits: list[Tensor] = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda *call: logits.append(call[2][0]))
    loss = sequence_losses(model(input_ids=ids, use_cache=False).logits, ids).sum()
    (expected,) = torch.autograd.grad(loss, logits)
    hook.remove()
    scores = estimates[0].scores.flatten(0, 1)
    gradient = estimates[0].gradients["conventional"].flatten(0, 1)
    found = scores * (gradient - (scores * gradient).sum(1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_forced_routing_is_what_the_layer_would_do(setting: Any) -> None:
    """A layer whose top-k is raised by one selects the next best expert by itself."""
    model, ids, _ = setting
    ids = ids[:1, :2]  # of two tokens, the last one's output predicts nothing, so its routing doesn't matter
    here = estimate(model, ids)[0]
    layer, scores, index = model.model.layers[0].mlp, here.scores[0, 0], here.index[0, 0]
    measured = effects(model, layer.experts, ids[0], scores, index, 0, (1.0,)).added[1.0]
    with torch.no_grad():
        before = sequence_losses(model(input_ids=ids, use_cache=False).logits, ids)
        layer.gate.top_k += 1
        after = sequence_losses(model(input_ids=ids, use_cache=False).logits, ids)
        layer.gate.top_k -= 1
    next_best = scores[unselected(scores, index)].argmax()
    torch.testing.assert_close(measured[next_best], (after - before)[0], rtol=1e-9, atol=1e-12)


def test_layers_above_add_to_what_a_layer_below_receives(setting: Any) -> None:
    _, _, (first, last) = setting
    for estimator in ("densemixer", "centered"):
        torch.testing.assert_close(last.gradients[estimator], last.gradients[f"{estimator}, all layers"])
        assert not torch.allclose(first.gradients[estimator], first.gradients[f"{estimator}, all layers"], rtol=0.01)


def test_agreement_measures_what_it_says() -> None:
    random = np.random.default_rng(0)
    predicted = random.normal(size=(40, 6))
    measured = 0.5 * predicted + 0.1 + 0.3 * random.normal(size=(40, 6))
    found = agreement(predicted, measured, np.repeat(np.arange(10), 4))
    line = stats.linregress(predicted.flatten(), measured.flatten())
    assert found.slope.mean == pytest.approx(line.slope)
    assert found.intercept.mean == pytest.approx(line.intercept)
    assert found.r_squared.mean == pytest.approx(line.rvalue**2)
    pairs = list(zip(predicted, measured, strict=True))
    assert found.rank.mean == pytest.approx(np.mean([stats.spearmanr(*pair).statistic for pair in pairs]))
    cosines = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in pairs]
    assert found.cosine.mean == pytest.approx(np.mean(cosines))
    assert found.sign.mean == pytest.approx(np.mean((predicted > 0) == (measured > 0)))
    assert found.favourite.mean == pytest.approx(np.mean([b[a.argmin()] for a, b in pairs]))
    assert all(value.low < value.mean < value.high for value in found)


def test_a_constant_prediction_ranks_nothing() -> None:
    measured = np.random.default_rng(0).normal(size=(6, 4))
    found = agreement(np.full((6, 4), -2.0), measured, np.arange(6))
    assert found.rank.mean == 0
    assert found.slope.mean == found.r_squared.mean == 0
    assert found.favourite.mean == pytest.approx(measured.mean())


def test_cosine_of_sums() -> None:
    one, other = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [0.0, 3.0]])
    assert cosine_of_sums(one, other).mean == pytest.approx(1)
    assert cosine_of_sums(one, other * [[1], [-1]]).mean == pytest.approx(0)
