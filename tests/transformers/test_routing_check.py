"""The comparison of a router's declaration with the weights that its layer uses, and what isn't a mismatch.

What a model adds to the sum of its selected scores, so that it divides by no zero, shows in the weights of a token
whose scores are small. Rows that are not a number say nothing.
"""

from __future__ import annotations

import re
from typing import Any

import architectures
import pytest
import torch
from formulas import FORMULAS
from oracle import assert_close
from single import Single, run, scored_low, tokens

from densemixer_adapters.transformers import apply_densemixer, routers
from densemixer_core import DenseMixerConfig, RoutingMismatchError

ESTIMATORS = ["densemixer", "centered"]
ADDED = re.compile(r"(?:weights|scores|denominator).*sum\(dim=-1, keepdim=True\) \+ ([\w.-]+)")
OPTIONS: dict[str, dict[str, Any]] = {"deepseek_v4": dict(mlp_layer_types=["moe", "moe"])}


def epsilons(folder: str) -> set[float]:
    """What the source of an architecture adds to a sum of scores."""
    text = (architectures.MODELS / folder / f"modeling_{folder}.py").read_text(encoding="utf-8")
    return {1e-20 if "norm_topk_prob_eps" in found else float(found) for found in ADDED.findall(text)}


WITH_EPSILON = [folder for folder in architectures.found() if folder in FORMULAS and epsilons(folder)]


def test_the_formulas_know_what_each_model_adds() -> None:
    assert {"glm4_moe", "deepseek_v3", "lfm2_moe", "afmoe"} <= {*WITH_EPSILON}
    for folder in architectures.found():
        if folder in FORMULAS:
            assert FORMULAS[folder].epsilon == max(epsilons(folder), default=0.0), folder


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", WITH_EPSILON)
def test_one_token_with_small_scores_in_the_first_batch(folder: str, estimator: str) -> None:
    level = {1e-6: -4.0, 1e-20: -60.0}[FORMULAS[folder].epsilon]
    layer = Single(folder, **OPTIONS.get(folder, {}))
    x, g = scored_low(layer, [0.0] * 11 + [level])
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        ours = layer.train(x, g)
    assert_close(ours, layer.truth(x, g, estimator, index=layer.indices[-1]))


@pytest.mark.parametrize("level", [-3.0, -4.0, -6.0, -9.0, -14.0, -30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lfm2_adds_more_than_others(dtype: torch.dtype, level: float) -> None:
    layer = Single("lfm2_moe")
    x, g = scored_low(layer, [0.0] * 11 + [level])
    layer.model.to(dtype)
    with apply_densemixer(layer.model):
        layer.train(x.to(dtype), g.to(dtype))


@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "folder", ["mixtral", "gpt_oss", "qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3", "glm4_moe", "lfm2_moe"]
)
def test_rows_that_are_no_numbers_in_the_first_batch(
    folder: str, estimator: str, implementation: str, rows: str
) -> None:
    layer = Single(folder, implementation)
    x, g = tokens(16)
    broken = x.clone()
    broken[:, 3 if rows == "one" else slice(None)] = torch.nan
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        output = run(layer.block, broken.requires_grad_())
        output.backward(g)
        assert output[0, 3].isnan().all()
        for seed in (1, 2):
            x, g = tokens(16, seed)
            assert_close(layer.train(x, g), layer.truth(x, g, estimator))


@pytest.mark.parametrize("beside", ["small scores", "no numbers"])
@pytest.mark.parametrize(
    ("folder", "declared"),
    [
        ("lfm2_moe", routers.Router("softmax", True)),
        ("lfm2_moe", routers.Router("sigmoid", False)),
        ("glm4_moe", routers.Router("softmax", True)),
        ("glm4_moe", routers.Router("sigmoid", False)),
        ("qwen3_moe", routers.Router("sigmoid", True)),
        ("mixtral", routers.Router("softmax", False)),
    ],
)
def test_a_wrong_declaration_is_found_beside_such_tokens(
    folder: str, declared: routers.Router, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Single(folder)
    router, block = type(layer.router).__name__, type(layer.block).__name__
    monkeypatch.setitem(routers.ROUTERS, router if router in routers.ROUTERS else block, declared)
    x, g = scored_low(layer, [0.0] * 11 + [-60.0])
    if beside == "no numbers":
        x[:, 11] = torch.nan
    with apply_densemixer(layer.model):
        for _ in range(2):
            with pytest.raises(RoutingMismatchError):
                layer.train(x, g)


@pytest.mark.parametrize("folder", ["lfm2_moe", "glm4_moe", "qwen3_moe", "mixtral"])
def test_a_wrong_declaration_is_found_in_the_first_batch_that_says_something(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one that has no tokens, or none that are numbers."""
    layer = Single(folder)
    router, block = type(layer.router).__name__, type(layer.block).__name__
    wrong = routers.Router("sigmoid" if FORMULAS[folder].score is not torch.sigmoid else "softmax", True)
    monkeypatch.setitem(routers.ROUTERS, router if router in routers.ROUTERS else block, wrong)
    x, g = tokens(12)
    with apply_densemixer(layer.model):
        run(layer.block, x[:, :0])
        run(layer.block, torch.full_like(x, torch.nan))
        with pytest.raises(RoutingMismatchError):
            layer.train(x, g)
