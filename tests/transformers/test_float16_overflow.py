"""An unselected expert that overflows float16 for some tokens: its pairs count as without DenseMixer, and it is said.

A pair is a token and an expert that it didn't select. What isn't finite for other reasons stays so, for the gradient
scaler to see.
"""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from formulas import FORMULAS
from single import Single, run, tokens
from torch import Tensor

from densemixer_adapters.metrics.router_metrics import RouterMetrics
from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
FOLDERS = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"]
LEFT_OUT = "densemixer/pairs_left_out"

# Its output overflows for tokens with the mark, and is zero for all others.
OVERFLOWING = 5
MARKED = (2, 7, 11)
COUNT = 24


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.float16)


class Overflowing(Single):
    """The last of the input's numbers is the mark: the overflowing expert multiplies it, and is never selected."""

    def __init__(self, folder: str, implementation: str = "eager") -> None:
        super().__init__(folder, implementation, n_group=1, topk_group=1)
        experts, router = self.block.experts, self.router
        with torch.no_grad():
            # Weights and inputs that are exact in float16.
            for parameter in self.block.parameters():
                parameter.copy_(parameter.half())
            experts.gate_up_proj[OVERFLOWING] = 0
            experts.gate_up_proj[OVERFLOWING, :, -1] = 300.0
            router.weight[:, -1] = 1.0
            router.weight[OVERFLOWING] = 0
            router.weight[OVERFLOWING, 0] = -4.0
            if hasattr(router, "e_score_correction_bias"):
                router.e_score_correction_bias.zero_()

    def batch(self, seed: int = 0, marked: tuple[int, ...] = MARKED) -> tuple[Tensor, Tensor]:
        x, g = (tensor.half().float() for tensor in tokens(COUNT, seed))
        x[..., 0] = x[..., 0].abs() + 2
        x[..., -1] = 0
        x[:, list(marked), -1] = 4.0
        return x, g

    def left_out(self, marked: tuple[int, ...] = MARKED) -> Tensor:
        pairs = torch.zeros(COUNT, 8, dtype=torch.bool)
        pairs[list(marked), OVERFLOWING] = True
        return pairs

    def train_as_in_a_step(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        with autocast():
            output = run(self.block, x)
        wanted = {name: p for name, p in self.block.named_parameters() if p.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), g.to(output.dtype)), strict=True))

    def expected(self, x: Tensor, g: Tensor, estimator: str, marked: tuple[int, ...] = MARKED) -> dict[str, Tensor]:
        """The oracle's, where the scores of the pairs that are left out are constants."""
        pairs, own = self.left_out(marked), FORMULAS[self.folder]

        def score(logits: Tensor) -> Tensor:
            p = own.score(logits)
            return torch.where(pairs, p.detach(), p)

        formula = dataclasses.replace(own, score=score)
        return self.truth(x, g, estimator, formula, index=self.indices[-1])


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_such_a_pair_counts_as_without_densemixer(folder: str, estimator: str, implementation: str) -> None:
    layer = Overflowing(folder, implementation)
    x, g = layer.batch()
    conventional = layer.train_as_in_a_step(x, g)
    assert all(bool(gradient.isfinite().all()) for gradient in conventional.values())
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        ours = layer.train_as_in_a_step(x, g)
        without = layer.train_as_in_a_step(*layer.batch(marked=()))
    assert not (layer.indices[-1] == OVERFLOWING).any()
    truth = layer.expected(x, g, estimator)
    name = next(name for name in ours if name.endswith(("gate.weight", "router.weight")))
    assert bool(ours[name].isfinite().all())
    assert error(ours[name], truth[name]) < 0.01
    assert error(conventional[name], truth[name]) > 0.05
    assert error(without[name], layer.expected(*layer.batch(marked=()), estimator, ())[name]) < 0.01
    for other in ours:
        if "experts." in other:
            assert error(ours[other], truth[other]) < 0.02, other


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_gradient_scaler_does_not_skip_the_step(folder: str, estimator: str) -> None:
    layer = Overflowing(folder)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD([layer.router.weight], lr=1e-5)
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        for seed in range(3):
            before = layer.router.weight.detach().clone()
            x, g = layer.batch(seed)
            with autocast():
                loss = (run(layer.block, x) * g).sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert not torch.equal(layer.router.weight, before)
    assert scaler.get_scale() == 64.0


@pytest.mark.parametrize("what", ["the gradient", "the input"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_finite_by_itself_stays_so(estimator: str, what: str) -> None:
    """Else a scaler would take a step with a gradient that overflowed."""
    layer = Overflowing("qwen3_moe")
    x, g = layer.batch(marked=())
    (g if what == "the gradient" else x)[0, 3, 1] = torch.inf
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        ours = layer.train_as_in_a_step(x, g)
    assert not ours["gate.weight"].isfinite().all()


def test_one_warning_for_the_whole_model(caplog: pytest.LogCaptureFixture) -> None:
    layer = Overflowing("qwen3_moe")
    second = layer.model.model.layers[1].mlp
    second.load_state_dict(layer.block.state_dict())
    with caplog.at_level(logging.WARNING, "densemixer"), apply_densemixer(layer.model):
        layer.train_as_in_a_step(*layer.batch(marked=()))
        assert not caplog.records
        for block in (layer.block, second, layer.block):
            x, g = layer.batch()
            with autocast():
                output = run(block, x)
            torch.autograd.grad(output, list(block.parameters()), g.to(output.dtype))
    (warning,) = caplog.records
    assert warning.name == "densemixer"
    assert "float16" in warning.getMessage()


def test_router_metrics_count_them() -> None:
    layer = Overflowing("qwen3_moe")
    with apply_densemixer(layer.model) as handle:
        metrics = RouterMetrics(handle.layers, layer.model)

        def measure(*batches: tuple[int, ...]) -> dict[str, float]:
            metrics.start_step()
            for marked in batches:
                layer.train_as_in_a_step(*layer.batch(marked=marked))
            return metrics.measure()

        assert LEFT_OUT not in measure(())
        found = measure(MARKED)
        assert found[LEFT_OUT] == len(MARKED)
        assert found["densemixer/router_grad_norm"] > 0
        assert LEFT_OUT not in measure(())  # since the last measurement
        assert measure(MARKED, (1, 5), ())[LEFT_OUT] == len(MARKED) + 2


@pytest.mark.parametrize("budget", [0.5, 0.125])
def test_sampled_pairs_that_overflow(budget: float) -> None:
    layer = Overflowing("qwen3_moe")
    with apply_densemixer(layer.model, DenseMixerConfig(budget=budget)):
        for seed in range(4):
            ours = layer.train_as_in_a_step(*layer.batch(seed))
            assert bool(ours["gate.weight"].isfinite().all())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_in_float16_without_autocast(estimator: str) -> None:
    layer = Overflowing("qwen3_moe")
    x, g = layer.batch()
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        layer.model.half()
        found = torch.autograd.grad(run(layer.block, x.half()), layer.router.weight, g.half())[0]
    expected = layer.expected(x, g, estimator)["gate.weight"]
    assert error(found, expected) < 0.01
