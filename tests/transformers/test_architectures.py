"""Every Mixture-of-Experts model of the installed transformers: trained right, or refused with the reason."""

from __future__ import annotations

from typing import Any

import architectures
import oracle
import pytest
import torch
import transformers
from formulas import FORMULAS, Formula, dense
from sweep import line_to_add, refusal, step
from torch import nn

from densemixer_adapters.transformers import apply_densemixer, routers
from densemixer_adapters.transformers.experts import WITHOUT_DECORATOR
from densemixer_core import DenseMixerConfig

# What DenseMixer must say of an architecture that it refuses, in every version of transformers that has it.
REFUSED = {
    "dbrx": "gate and up projection in separate weights",
    "doge": "product keys",
    "inkling": "normalised together with those of its shared experts",
    "jetmoe": "inline",
    "llama4": "scales the experts' input",
    "nllb_moe": "capacity",
    "phimoe": "SparseMixer",
    "switch_transformers": "capacity",
}
# The same, of what it refuses in one version only.
REFUSED_IN: dict[str, dict[str, str]] = {
    "5.5.4": {
        "aria": "select by themselves",
        "deepseek_v2": "multiplies by its router's weight",
        "granitemoe": "inline",
        "granitemoehybrid": "inline",
        "granitemoeshared": "inline",
        "longcat_flash": "numbers a token first",
    },
}
EXPECTED_REFUSALS = {**REFUSED, **REFUSED_IN.get(transformers.__version__, {})}

# Blocks that only the oldest version knows as their routers, which are plain linear layers there.
ONLY_IN_OLDEST = {"JambaSparseMoeBlock", "Lfm2MoeSparseMoeBlock"}

# The error to allow, relative to the largest gradient of a parameter, where it isn't rounding.
TOLERANCE = {
    # It adds 1e-6 to the sum of the selected scores, so its weights sum to a little less than the scaling factor, and
    # DenseMixer takes the one for the other.
    ("lfm2_moe", "centered"): 1e-6,
}

# Activations that the fused kernel can't compute; experts with such ones are computed one by one.
WITHOUT_FORMULA = {"inkling2", "inkling2_loop"}

FOUND = architectures.found()


def test_every_architecture_is_accounted_for() -> None:
    """A new one must be added to a table: with its formula, or with the reason why not."""
    unknown = sorted({*FOUND} - {*FORMULAS} - {*REFUSED})
    assert not unknown, "no formula and no reason for these; " + "\n".join(map(line_to_add, unknown))
    assert len(FOUND) >= 40


def test_a_new_architecture_is_told_with_the_line_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MixtralTopKRouter", "Qwen3MoeTopKRouter", "DeepseekV3TopkRouter"):
        monkeypatch.delitem(routers.ROUTERS, name)
    assert 'mixtral: "MixtralTopKRouter": Router("softmax", True)' in line_to_add("mixtral")
    assert 'qwen3_moe: "Qwen3MoeTopKRouter": Router("softmax", "norm_topk_prob")' in line_to_add("qwen3_moe")
    assert 'deepseek_v3: "DeepseekV3TopkRouter": Router("sigmoid", "norm_topk_prob")' in line_to_add("deepseek_v3")
    assert "jetmoe: a line in REFUSED, or a declaration" in line_to_add("jetmoe")
    monkeypatch.setitem(architectures.OPTIONS, "mixtral", {"hidden_size": "wide"})
    assert "mixtral: options that make a tiny model of it, in architectures.OPTIONS" in line_to_add("mixtral")


@pytest.mark.parametrize("folder", [folder for folder in FOUND if folder not in EXPECTED_REFUSALS])
def test_gradients(folder: str) -> None:
    configured = FORMULAS[folder].renormalised
    variants: list[dict[str, Any]] = [{}]
    if isinstance(configured, str):
        variants = [{configured: True}, {configured: False}]
    for cls in architectures.model_classes(folder):
        for options in variants:
            with oracle.Float64():
                compare(architectures.build(folder, cls, **options).double(), folder, FORMULAS[folder])


def compare(model: nn.Module, folder: str, formula: Formula) -> None:
    """Output and all gradients of both estimators with the oracle's."""
    before, conventional = step(model)
    for estimator in ("densemixer", "centered"):
        with apply_densemixer(model, DenseMixerConfig(estimator)) as handle:
            after, ours = step(model)
        assert torch.equal(before, after)
        assert any(layer.formula is None for layer in handle.layers) == (folder in WITHOUT_FORMULA)
        layers = [(layer.block, layer.router) for layer in handle.layers]
        output, truth = step(dense(model, layers, formula, estimator))
        assert oracle.worst_error(after, output) <= 1e-10
        assert ours.keys() == truth.keys()
        tolerance = TOLERANCE.get((folder, estimator), 1e-10)
        rounding = 1e-14 * max(gradient.abs().max().item() for gradient in truth.values())
        for name, expected in truth.items():
            error = (ours[name] - expected).abs().max().item()
            assert error <= max(tolerance * expected.abs().max().item(), rounding), (estimator, name)
    names = {parameter: name for name, parameter in model.named_parameters()}  # layers may share them
    for layer in handle.layers:  # all of them ran
        own = [names[parameter] for parameter in layer.router.parameters() if names[parameter] in ours]
        assert any(oracle.worst_error(ours[name], conventional[name]) > 1e-3 for name in own), layer.name


@pytest.mark.parametrize(
    ("folder", "options", "formula"),
    [
        ("cohere2_moe", dict(expert_selection_fn="sigmoid", norm_topk_prob=True), Formula(torch.sigmoid, True)),
        ("cohere2_moe", dict(expert_selection_fn="sigmoid", norm_topk_prob=False), Formula(torch.sigmoid, False)),
        ("deepseek_v4", dict(scoring_func="sigmoid"), Formula(torch.sigmoid, True, "routed_scaling_factor")),
    ],
)
def test_score_functions_that_the_configuration_chooses(folder: str, options: dict[str, Any], formula: Formula) -> None:
    if folder not in FOUND:
        pytest.skip(f"transformers {transformers.__version__} has no {folder}")
    with oracle.Float64():
        compare(architectures.build(folder, **options).double(), folder, formula)


@pytest.mark.parametrize("folder", [folder for folder in FOUND if folder in EXPECTED_REFUSALS])
def test_refused_with_the_reason(folder: str) -> None:
    for cls in architectures.model_classes(folder):
        reason = refusal(architectures.build(folder, cls))
        assert reason is not None
        assert EXPECTED_REFUSALS[folder] in reason


def test_the_models_reach_all_experts_and_all_declarations() -> None:
    reached = set()
    for folder in FOUND:
        built = [architectures.build(folder, cls) for cls in architectures.model_classes(folder)]
        classes = {parent.__name__ for model in built for module in model.modules() for parent in type(module).__mro__}
        assert architectures.experts_classes(folder) <= classes, folder
        reached |= classes
    declared = {*routers.ROUTERS, *routers.CONVENTIONAL, *routers.REFUSED, *WITHOUT_DECORATOR}
    if transformers.__version__ == "5.5.4":
        assert reached >= ONLY_IN_OLDEST
    else:
        # Not of this transformers; `tests/running` and `tests/veomni` reach them.
        assert declared - reached == {"LigerExperts", "DeepseekV3NaiveMoe"}
