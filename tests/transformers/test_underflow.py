"""Tokens whose selected scores are so small that they vanish, beside what the model adds to their sum or altogether.

The host's weights go to zero there, so its gradients stay finite. DenseMixer's are the limit of its formula.
"""

from __future__ import annotations

import pytest
import torch
from formulas import FORMULAS
from oracle import assert_close
from single import Single, scored_low
from torch import Tensor

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
FOLDERS = ["glm4_moe", "deepseek_v3", "lfm2_moe", "hy_v3", "afmoe"]

# Around the model's epsilon, and below the smallest float32.
LEVELS = {1e-6: [-8.0, -13.0, -16.0, -25.0], 1e-20: [-40.0, -45.0, -48.0, -60.0]}
VANISHING = [-120.0, -300.0]


def finite(gradients: dict[str, Tensor]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def train(layer: Single, levels: list[float], estimator: str, seed: int = 0) -> tuple[dict[str, Tensor], ...]:
    """What an attached layer computes and what the oracle does, where the host is finite."""
    x, g = scored_low(layer, levels, seed)
    ours = layer.train(x, g)
    assert finite(ours)
    return ours, layer.truth(x, g, estimator, index=layer.indices[-1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_scores_as_small_as_the_models_epsilon(folder: str, estimator: str) -> None:
    """Alone, so that nothing larger hides them; the first batch and later ones."""
    layer = Single(folder)
    levels = LEVELS[FORMULAS[folder].epsilon]
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        for level in [*levels, *levels[::-1]]:
            assert_close(*train(layer, [level + shift for shift in (0.0, 0.3, -0.4, 1.0)], estimator), 1e-4)


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_batch_whose_scores_all_vanish(folder: str, estimator: str, when: str) -> None:
    layer = Single(folder)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if when == "later":
            assert_close(*train(layer, [0.0] * 8, estimator))
        for level in VANISHING:
            ours, truth = train(layer, [level] * 6, estimator)
            for name, expected in truth.items():
                if "shared" not in name and name != "input":  # nothing else is left
                    assert expected.abs().max() < 1e-12
                    assert ours[name].abs().max() < 1e-12, name
        assert_close(*train(layer, [0.0] * 8, estimator, seed=1))


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_some_tokens_among_others(folder: str, estimator: str, when: str) -> None:
    layer = Single(folder)
    low = [*LEVELS[FORMULAS[folder].epsilon], *VANISHING]
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if when == "later":
            assert_close(*train(layer, [0.0] * 8, estimator))
        assert_close(*train(layer, [0.0] * 8 + low, estimator, seed=1), 1e-4)
        assert_close(*train(layer, [0.0] * 8, estimator, seed=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_half_precision_stays_finite(folder: str, estimator: str, dtype: torch.dtype) -> None:
    if folder == "lfm2_moe" and dtype == torch.float16:
        pytest.skip("the host's own gradient of the scores, 1 / 1e-6, is not finite there")
    layer = Single(folder)
    low = [*LEVELS[FORMULAS[folder].epsilon], *VANISHING]
    layer.model.to(dtype)
    x, g = (tensor.to(dtype) for tensor in scored_low(layer, [0.0] * 8 + low))
    conventional = layer.train(x, g)
    assert finite(conventional)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        for part in (slice(8, None), slice(None)):
            assert finite(layer.train(x[:, part], g[:, part]))


@pytest.mark.parametrize("budget", [0.5, 0.125])
@pytest.mark.parametrize("folder", FOLDERS)
def test_sampled_pairs_stay_finite(folder: str, budget: float) -> None:
    layer = Single(folder)
    low = [*LEVELS[FORMULAS[folder].epsilon], *VANISHING]
    with apply_densemixer(layer.model, DenseMixerConfig("centered", budget=budget)):
        for levels in (low, [0.0] * 8 + low, VANISHING):
            x, g = scored_low(layer, levels)
            assert finite(layer.train(x, g))
