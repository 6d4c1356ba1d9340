"""A second derivative through the estimator doesn't exist: asked for, it is refused; a first one is right as ever."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close
from single import Single, run, tokens
from torch import Tensor

from densemixer_adapters.transformers import apply_densemixer
from densemixer_core import DenseMixerConfig

ESTIMATORS = ["densemixer", "centered"]
FOLDERS = ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "lfm2_moe"]
REFUSED = r"(?s)(?=.*DenseMixer)(?=.*second derivative)"


def first(layer: Single, x: Tensor, g: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(layer.block, x), wanted, g, create_graph=True)


@pytest.mark.parametrize("needs", ["a constant", "itself a gradient"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_first_derivative_with_a_graph_is_right(folder: str, estimator: str, needs: str) -> None:
    layer = Single(folder)
    x, g = tokens(24)
    wanted = {"input": x.clone().requires_grad_(), **dict(layer.block.named_parameters())}
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        constant = g if needs == "a constant" else g.clone().requires_grad_()
        found = first(layer, wanted["input"], constant, list(wanted.values()))
    assert_close(dict(zip(wanted, found, strict=True)), layer.truth(x, g, estimator))


@pytest.mark.parametrize("needs", ["a constant", "itself a gradient"])
@pytest.mark.parametrize("by", ["router", "input", "experts"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_second_derivative_of_the_routers_gradient_is_refused(
    folder: str, estimator: str, by: str, needs: str
) -> None:
    layer = Single(folder)
    x, g = tokens(24)
    x.requires_grad_()
    by_tensor = {"router": layer.router.weight, "input": x, "experts": layer.block.experts.down_proj}[by]
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        if needs == "itself a gradient":
            g.requires_grad_()
        (gradient,) = first(layer, x, g, [layer.router.weight])
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(gradient.square().sum(), by_tensor)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_penalty_on_the_gradient_of_the_input_is_refused(folder: str, estimator: str) -> None:
    """As a loss that isn't linear has it, through ``backward``."""
    layer = Single(folder)
    x, _ = tokens(24)
    x.requires_grad_()
    with apply_densemixer(layer.model, DenseMixerConfig(estimator)):
        loss = run(layer.block, x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=REFUSED):
            (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_host_itself_is_differentiated_twice(folder: str) -> None:
    """Where DenseMixer adds nothing it refuses nothing: with `conventional`, and after it is removed."""
    layer = Single(folder)
    x, g = tokens(24)

    def second() -> Tensor:
        (gradient,) = first(layer, x, g, [layer.router.weight])
        return torch.autograd.grad(gradient.square().sum(), layer.router.weight)[0]

    expected = second()
    assert expected.any()
    with apply_densemixer(layer.model, DenseMixerConfig("conventional")):
        torch.testing.assert_close(second(), expected)
    apply_densemixer(layer.model).remove()
    torch.testing.assert_close(second(), expected)
