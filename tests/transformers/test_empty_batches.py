"""Forwards without tokens: nothing can be decided from them, and nothing may be lost by them."""

from __future__ import annotations

from typing import Any

import architectures
import oracle
import pytest
import torch
from families import IMPLEMENTATIONS
from formulas import FORMULAS, dense
from oracle import assert_close
from single import Single, run, tokens
from torch import Tensor, nn

from densemixer_adapters.metrics.gradients import RouterMeter
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
FOLDERS = ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "glm4_moe", "lfm2_moe"]


def train_on_nothing(layer: Single) -> None:
    x = tokens(0)[0].requires_grad_()
    output = run(layer.block, x)
    if output.requires_grad:  # not of eager experts, which add nothing to zeros
        output.sum().backward()
        gradients = [p.grad for p in layer.block.parameters() if p.grad is not None]
        assert not any(gradient.any() for gradient in gradients)
    layer.block.zero_grad()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_first_batch_has_no_tokens(folder: str, implementation: str, estimator: str) -> None:
    layer = Single(folder, implementation)
    x, g = tokens(24)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        train_on_nothing(layer)
        ours = layer.train(x, g)
        train_on_nothing(layer)
        again = layer.train(x, g)
    truth = layer.truth(x, g, estimator)
    assert_close(ours, truth)
    assert_close(again, truth)


class _Folder:
    """The first step of a model that sends tokens to a part of its experts alone, by a switch."""

    def __init__(self) -> None:
        with oracle.Float64():
            self.model = architectures.build("ernie4_5_vl_moe").double()

    def implement(self, name: str) -> None:
        for module in self.model.modules():
            if hasattr(getattr(module, "experts", None), "down_proj"):
                module.experts.config._experts_implementation = name

    def step_with(self, kind: int, model: nn.Module | None = None) -> dict[str, Tensor]:
        """With images alone (1) or with text alone but for one token (2)."""
        ids = architectures.tokens()
        kinds = torch.ones_like(ids) if kind == 1 else (torch.arange(ids.numel()).reshape(ids.shape) == 0)
        batch: dict[str, Any] = dict(input_ids=ids, moe_mm_token_type_ids=kinds.int(), use_cache=False)
        model = model or self.model
        model.zero_grad()
        output = model(**batch)[0]
        direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        (output * direction).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])  # torch's grouped_mm has no float64
def test_the_first_batch_is_an_image(implementation: str, estimator: str) -> None:
    """Ernie-4.5-VL has experts for text and others for images; those for text get no tokens then."""
    with oracle.Float64():
        of = _Folder()
        of.implement(implementation)
        with apply_densemixer(of.model, DenseMixerConfig(estimator)) as handle:
            of.step_with(1)
            ours = of.step_with(2)
        layers = [(layer.block, layer.router) for layer in handle.layers]
        truth = of.step_with(2, dense(of.model, layers, FORMULAS["ernie4_5_vl_moe"], estimator))
    for name, expected in truth.items():
        error, size = ((ours[name] - expected).abs().max().item(), expected.abs().max().item())
        assert error <= 1e-10 * max(size, 1e-4), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_router_metrics_are_those_of_the_other_batches(folder: str) -> None:
    x, g = tokens(24)
    found = []
    for with_empty in (False, True):
        layer = Single(folder, "grouped_mm")
        with apply_densemixer(layer.model) as handle:
            meter = RouterMeter(handle.layers[:1], load=True)
            if with_empty:
                train_on_nothing(layer)
            layer.train(x, g)
            found.append({**meter.gradients(), **meter.load()})
    assert found[0]
    for name, values in found[0].items():
        assert found[1][name].layers == pytest.approx(values.layers, rel=1e-5), name
        assert found[1][name].whole == pytest.approx(values.whole, rel=1e-5), name
