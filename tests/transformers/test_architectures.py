"""Every Mixture-of-Experts model of the installed transformers: trained right, or refused with the reason."""

from __future__ import annotations

import architectures
import oracle
import pytest
import torch
import transformers
from formulas import FORMULAS, dense
from sweep import refusal, step

from densemixer_adapters.transformers import apply_densemixer
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
EXPECTED = {**REFUSED, **REFUSED_IN.get(transformers.__version__, {})}

# The error to allow, relative to the largest gradient, where it isn't rounding.
TOLERANCE = {
    # It adds 1e-6 to the sum of the selected scores, so its weights sum to a little less than the scaling factor, and
    # DenseMixer takes the one for the other.
    ("lfm2_moe", "centered"): 1e-6,
}

SUPPORTED = [(folder, i) for folder in architectures.found() if folder not in EXPECTED for i in (0, 1)]
SUPPORTED = [(folder, i) for folder, i in SUPPORTED if i < len(architectures.model_classes(folder))]


def test_every_architecture_is_accounted_for() -> None:
    """A new one must be added to a table: with its formula, or with the reason why not."""
    unknown = {*architectures.found()} - {*FORMULAS} - {*REFUSED}
    assert not unknown, f"no formula and no reason for {sorted(unknown)}"
    assert {*EXPECTED} <= {*architectures.found()}
    assert len(architectures.found()) >= 40


@pytest.mark.parametrize(("folder", "which"), SUPPORTED)
def test_gradients(folder: str, which: int) -> None:
    with oracle.Float64():
        model = architectures.build(folder, architectures.model_classes(folder)[which]).double()
        before, conventional = step(model)
        for estimator in ("densemixer", "centered"):
            with apply_densemixer(model, DenseMixerConfig(estimator)) as handle:
                after, ours = step(model)
            assert torch.equal(before, after)
            layers = [(layer.block, layer.router) for layer in handle.layers]
            output, truth = step(dense(model, layers, folder, estimator))
            assert oracle.worst_error(after, output) <= 1e-10
            assert ours.keys() == truth.keys()
            tolerance = TOLERANCE.get((folder, estimator), 1e-10)
            rounding = 1e-14 * max(gradient.abs().max().item() for gradient in truth.values())
            for name, expected in truth.items():
                error = (ours[name] - expected).abs().max().item()
                assert error <= max(tolerance * expected.abs().max().item(), rounding), (estimator, name)
    for layer in handle.layers:  # all of them ran
        names = [name for name in ours if name.startswith(f"{layer.router_name}.")]
        assert any(oracle.worst_error(ours[name], conventional[name]) > 1e-3 for name in names), layer.name


@pytest.mark.parametrize("folder", [folder for folder in architectures.found() if folder in EXPECTED])
def test_refused_with_the_reason(folder: str) -> None:
    for cls in architectures.model_classes(folder):
        reason = refusal(architectures.build(folder, cls))
        assert reason is not None
        assert EXPECTED[folder] in reason


@pytest.mark.parametrize("folder", [folder for folder in architectures.found() if architectures.decorated(folder)])
def test_all_kinds_of_experts_are_reached(folder: str) -> None:
    """The models that the sweep builds have every class of experts that the architecture defines."""
    built = [architectures.build(folder, cls) for cls in architectures.model_classes(folder)]
    classes = {type(module).__name__ for model in built for module in model.modules()}
    assert architectures.decorated(folder) <= classes
